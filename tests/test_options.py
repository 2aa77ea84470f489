"""Every option of training reaches what it names: the model, its objective, its optimiser, its batches."""

import math
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import killed, run_script

import run_training
import utils.training as training
from models import CCU, CLASSIFIERS, GMM, PCAMetric, Softmax
from utils import cli, load_model, save_model
from utils.batches import Augmentation, ImageSet
from utils.data import load_in_dist
from utils.errors import UserError
from utils.objectives import CEDA, CEDA_GMM, OE, Objective
from utils.out_data import load_out
from utils.records import how_made
from utils.state import State
from utils.training import Settings


@pytest.fixture
def work(digits_run, tmp_path, monkeypatch):
    """Mixtures and Base of the small Digits run, 40 digits and 40 crops to train on."""
    here, there = tmp_path / "checkpoints" / "Digits", digits_run / "checkpoints" / "Digits"
    here.mkdir(parents=True)
    for name in ("gmm", "Base.pt"):
        (here / name).symlink_to(there / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_training, "load_in_dist", lambda *a, **k: load_in_dist(*a, **k).subset(slice(40)))
    monkeypatch.setattr(run_training, "load_out", lambda *a, **k: load_out(*a, **k | {"n": 40}))
    return tmp_path


@pytest.fixture
def trained(work, monkeypatch):
    """Run run_training.py with these options; what its calls of `train` got, which here trains nothing."""
    calls = []

    def record(model, objective, data, out, augmentation, settings, *more):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        calls.append(SimpleNamespace(model=model, before=before, amp=model.amp, objective=objective,
                                     augmentation=augmentation, settings=settings))
        return [{"seconds": 0.0}]
    monkeypatch.setattr(run_training, "train", record)

    def run(options):
        calls.clear()
        run_script(f"run_training.py --dataset Digits --n 10 --label X --train_type {options}")
        return list(calls)
    return run


def same_classifier(state, other):
    return all(torch.equal(value, other[key]) for key, value in state.items() if key.startswith("base_model."))


@pytest.mark.parametrize("method", ["plain", "CEDA_GMM --fit_out 1"])
def test_a_warm_start_begins_with_the_weights_of_base(method, trained, digits_run):
    base = load_model(digits_run / "checkpoints/Digits/Base.pt").state_dict()
    warm, = trained(f"{method} --warmstart 1")
    cold, = trained(method)
    assert same_classifier(base, warm.before) and not same_classifier(base, cold.before)
    assert not load_model("checkpoints/Digits/X.pt").meta["warmstart"]      # the cold one


def test_a_warm_start_from_another_base_does_not_go_on(work, monkeypatch, capsys):
    command = "run_training.py --dataset Digits --train_type plain --warmstart 1 --epochs 1 --label Warm"
    killed(monkeypatch, run_script, command)
    base = load_model("checkpoints/Digits/Base.pt")
    with torch.no_grad():
        base.base_model.fc2.bias += 1
    save_model(base, "checkpoints/Digits/Base.pt")
    with pytest.raises(SystemExit) as stopped:
        run_script(f"{command} --resume 1")
    assert stopped.value.code == 2 and "Warm.state was made with base" in capsys.readouterr().err


def test_the_tables_name_options_that_are_not_at_their_defaults(work):
    run_script("run_training.py --dataset Digits --train_type CEDA_GMM --fit_out 1 --n 10 --epochs 1 --lr 0.01 "
               "--grad_vars mu --batch_size 256 --arch LeNet --label Other")
    assert "--arch LeNet --batch_size 256 --lr 0.01 --grad_vars mu" in how_made(
        load_model("checkpoints/Digits/Other.pt").meta)


def test_the_tables_name_a_warm_start_and_where_base_came_from(work):
    base = load_model("checkpoints/Digits/Base.pt")
    save_model(base, "checkpoints/Digits/Base.pt", {"source": "LeNet trained elsewhere"})
    run_script("run_training.py --dataset Digits --train_type plain --warmstart 1 --epochs 1 --label Warm")
    run_script("run_training.py --dataset Digits --train_type plain --epochs 1 --label Cold")
    warm, cold = (how_made(load_model(f"checkpoints/Digits/{label}.pt").meta) for label in ("Warm", "Cold"))
    assert warm == f"{cold}, from Base's weights, LeNet trained elsewhere"


def test_training_names_all_that_it_wrote(work, capsys):
    before = set(work.rglob("*"))
    run_script("run_training.py --dataset Digits --train_type DE --members 2 --epochs 1")
    named = [Path(name) for name in re.findall(r"(?:checkpoints|logs)/\S+", capsys.readouterr().out)]
    written = {path.relative_to(work) for path in set(work.rglob("*")) - before if path.is_file()}
    written -= {path for path in written if path.suffix == ".lock"}
    assert len(named) == 4 and all(any(path.is_relative_to(name) for name in named) for path in written)
    assert all(any(path.is_relative_to(name) for path in written) for name in named)


def test_mixtures_fitted_otherwise_are_named(work, capsys):
    """The work's mixtures are fitted on 600 augmented images."""
    notes = {}
    for augmented in (0, 1):
        run_script("run_training.py --dataset Digits --train_type CEDA_GMM --use_gmm 1 --n 10 --epochs 1 --augm_flag "
                   f"{augmented}")
        assert ("fitted with --augm_flag 1, and this training has --augm_flag 0" in capsys.readouterr().err) == (
            not augmented)
        notes[augmented] = how_made(load_model("checkpoints/Digits/CCUs.pt").meta)
    assert "mixtures with --data_used 600" in notes[1] and "mixtures augmented" not in notes[1]
    assert "mixtures augmented, mixtures with --data_used 600" in notes[0]


@pytest.mark.parametrize("method", ["plain", "CEDA", "ACET", "CEDA_GMM", "CEDA_GMM --fit_out 1"])
def test_loglam_reaches_model_and_objective(method, trained):
    run, = trained(f"{method} --loglam 0.7")
    lam = 2.0137527                     # exp 0.7
    assert (run.objective.p_in, run.objective.p_out) == pytest.approx((1 / (1 + lam), lam / (1 + lam)))
    if "GMM" in method:
        assert run.before["loglam"].item() == load_model("checkpoints/Digits/X.pt").loglam.item() == pytest.approx(0.7)


def test_amp_is_on_while_training_and_off_afterwards(trained):
    (on,), (off,) = trained("plain --amp 1"), trained("plain --amp 0")
    assert on.amp and not on.model.amp and not off.amp


def test_steps_and_fit_out_reach_acet(trained):
    (noise,), (crops,) = trained("ACET --steps 7"), trained("ACET --fit_out 1")
    assert (noise.objective.steps, noise.objective.uniform) == (7, True)
    assert (crops.objective.steps, crops.objective.uniform) == (40, False)


ADAM, SGD = torch.optim.Adam, torch.optim.SGD


@pytest.mark.parametrize("options, kind, lr, decay, nesterov", [
    ("plain", ADAM, 1e-3, 5e-4, None),
    ("plain --arch ResNet18", SGD, 0.1, 5e-4, False),
    ("OE", SGD, 0.1, 5e-4, True),
    ("EDL --arch ResNet18", ADAM, 1e-3, 5e-4, None),
    ("MCD", ADAM, 2e-4, 0.0, None),
    ("GAN", ADAM, 2e-4, 5e-4, None),
    ("plain --lr 0.02 --decay 0.03", ADAM, 0.02, 0.03, None),
    ("MCD --lr 0.02 --decay 0.03", ADAM, 0.02, 0.03, None),
    ("plain --decay 0", ADAM, 1e-3, 0.0, None),
])
def test_the_optimizer_is_the_methods_or_the_options(options, kind, lr, decay, nesterov, trained):
    """Without options the numbers that --help and the design name."""
    run, = trained(options)
    optimizer = training.make_optimizer(run.model, run.settings)
    group, = optimizer.param_groups
    assert type(optimizer) is kind and (group["lr"], group["weight_decay"]) == (lr, decay)
    assert (group.get("nesterov"), group.get("momentum")) == (nesterov, None if kind is ADAM else 0.9)


def test_epochs_batch_size_and_seed_reach_the_loop(trained):
    (run,), (default,) = trained("plain --epochs 7 --batch_size 9 --seed 4"), trained("plain")
    assert (run.settings.epochs, run.settings.batch_size, run.settings.seed) == (7, 9, 4)
    assert (default.settings.epochs, default.settings.batch_size, default.settings.seed) == (100, 128, 0)


@pytest.mark.parametrize("options, lr, names", [
    ("", 1e-5, ["mu", "logvar"]), ("--lr_gmm 0.004", 0.004, ["mu", "logvar"]), ("--grad_vars var", 1e-5, ["logvar"]),
    ("--grad_vars mu", 1e-5, ["mu"]), ("--grad_vars", None, []),
])
def test_lr_gmm_and_grad_vars_reach_the_mixtures(options, lr, names, trained):
    run, = trained(f"CEDA_GMM --fit_out 1 {options}")
    groups = training.make_optimizer(run.model, run.settings).param_groups[1:]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(lr, 0)] * (lr is not None)
    wanted = [getattr(gmm, name) for gmm in (run.model.gmm_in, run.model.gmm_out) for name in names]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in wanted}


@pytest.mark.parametrize("options, unused", [
    ("CEDA --steps 7 --lr_gmm 0.1", "--n, --lr_gmm, --steps"),
    ("plain --PCA 0 --grad_vars mu --metric mahalanobis", "--n, --PCA, --metric, --grad_vars"),
    ("EDL --loglam 1 --members 3", "--n, --loglam, --members"),
    ("ACET --steps 7 --loglam 1 --lr 0.1 --decay 0", "--n"),
    ("ACET --out_dataset Folder --out_dir photos", "--n, --out_dataset, --out_dir"),      # ACET2
    ("ACET --fit_out 1 --out_dataset Photos", "--n"),
    ("CEDA_GMM --fit_out 1 --lr_gmm 0.1 --grad_vars mu --loglam 1", ""),
    ("plain --loglam 1 --lr 0.1 --decay 0 --epochs 7", "--n"),
])
def test_options_that_a_method_has_no_use_for_are_named(options, unused, trained, capsys):
    """`trained` gives --n 10 to all."""
    trained(options)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "no use" in line]
    assert len(warnings) == bool(unused)
    if unused:
        assert set(warnings[0].rpartition(" for ")[2].split(", ")) == set(unused.split(", "))


def test_calibration_has_no_use_for_a_networks_options():
    args = run_training.parser().parse_args(shlex.split("--dataset Digits --train_type ODIN --arch LeNet --decay 0 "
                                                        "--epochs 7 --amp 1 --batch_size 8 --seed 3"))
    assert set(cli.given(args, run_training.parser(), run_training.useless(args))) == {"decay", "arch", "epochs", "amp"}


def test_the_members_of_de_are_base_models_of_seeds_in_a_row(trained):
    members = trained("DE --members 3 --seed 2")
    assert [run.settings.seed for run in members] == [6, 7, 8]
    for run in members:
        alone, = trained(f"plain --seed {run.settings.seed}")
        assert same_classifier(alone.before, run.before)


@pytest.mark.parametrize("text, value", [("0", False), ("False", False), ("no", False), ("1", True), ("TRUE", True)])
def test_flags_mean_what_they_say(text, value):
    assert cli.flag(text) is value


# --- the loop itself ---------------------------------------------------------------------------------------

class Watched(Objective):
    """A loss of no matter; what it is given."""

    def __init__(self, schedule="steps"):
        super().__init__()
        self.schedule, self.x, self.z = schedule, [], []

    def loss(self, model, x, y, z):
        self.x.append(x)
        self.z.append(z)
        return -model(x).mean(), {"rank": torch.tensor(float(len(self.x)))}


def tiny_ccu():
    metric = PCAMetric.euclidean(64)
    gmms = [GMM(torch.rand(2, 64), torch.tensor([logvar, logvar - 1]), torch.full((2,), 0.5).log(), metric)
            for logvar in (0.0, -3.0)]
    return CCU(CLASSIFIERS["LeNet"](1, 8, 3), *gmms, 0.0, 3)


def run_loop(model, objective, tmp_path, n=6, epochs=1, batch_size=3, lr_gmm=1e-3, augmentation=None,
             verbose=False):
    """The history of `train` on n black images with a white pixel at row 3, column 4, and as many with two at row 5."""
    images = torch.zeros(2, n, 1, 8, 8, dtype=torch.uint8)
    images[0, :, :, 3, 4] = images[1, :, :, 5, 3:5] = 255
    return training.train(model, objective, ImageSet("in", images[0], torch.arange(n) % 3, 3),
                          ImageSet("out", images[1], None, 0), augmentation,
                          Settings("sgd", 0.01, lr_gmm, 0.0, ("mu", "var"), epochs, batch_size, 0),
                          State(tmp_path / "state", {}, False), tmp_path / "logs", "test", verbose)


def test_scalars_are_means_over_an_epochs_images(tmp_path):
    objective = Watched()
    history = run_loop(tiny_ccu(), objective, tmp_path, n=10, batch_size=4)      # batches of 4, 4 and 2
    assert history[0]["rank"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 3) / 10)


@pytest.mark.parametrize("verbose", [False, True])
def test_scalars_go_to_tensorboard(verbose, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run_loop(tiny_ccu(), Watched(), tmp_path, epochs=3, verbose=verbose)
    log = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3]
    assert ("step/loss" in log.Tags()["scalars"]) == verbose
    if verbose:
        assert [event.step for event in log.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("schedule, factors", [
    ("steps", [1] * 20 + [0.1] * 10 + [0.01] * 6 + [0.001] * 4),                # 50, 75 and 90 % of 40 steps
    ("cosine", [math.cos(math.pi / 2 * step / 40) ** 2 for step in range(40)]),
])
def test_the_schedule_holds_for_every_group_at_every_step(schedule, factors, tmp_path, monkeypatch):
    make, used = training.make_optimizer, []

    def watched(*args):
        optimizer = make(*args)
        optimizer.register_step_pre_hook(lambda o, *_: used.append([group["lr"] for group in o.param_groups]))
        return optimizer
    monkeypatch.setattr(training, "make_optimizer", watched)
    run_loop(tiny_ccu(), Watched(schedule), tmp_path, epochs=20)
    assert [lr for lr, _ in used] == pytest.approx([0.01 * factor for factor in factors])
    assert [lr_gmm for _, lr_gmm in used] == pytest.approx([1e-3 * factor for factor in factors])


@pytest.mark.parametrize("objective, ratio", [(CEDA, 1), (OE, 2)])
def test_out_batches_follow_in_batches_to_the_last(objective, ratio, tmp_path, monkeypatch):
    sizes, loss = [], objective.loss
    monkeypatch.setattr(objective, "loss", lambda self, model, x, y, z: (
        sizes.append((len(x), len(y), len(z))), loss(self, model, x, y, z))[1])
    run_loop(Softmax(CLASSIFIERS["LeNet"](1, 8, 3)), objective(), tmp_path, n=10, batch_size=4)
    assert sizes == [(n, n, ratio * n) for n in (4, 4, 2)]


def test_in_and_out_images_are_shuffled_apart_and_anew_each_epoch_as_the_seed_says(tmp_path):
    """An image's grey value is its number."""
    orders = {}

    class Orders(CEDA):
        def loss(self, model, x, y, z):
            for which, images in (("x", x), ("z", z)):
                orders[run][which] += (images[:, 0, 0, 0] * 255).round().int().tolist()
            return super().loss(model, x, y, z)
    numbered = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 8, 8).contiguous()
    for run, seed in (("first", 0), ("again", 0), ("other", 1)):
        orders[run] = {"x": [], "z": []}
        training.train(Softmax(CLASSIFIERS["LeNet"](1, 8, 3)), Orders(),
                       ImageSet("in", numbered, torch.arange(40) % 3, 3), ImageSet("out", numbered, None, 0), None,
                       Settings("sgd", 0.01, 0.0, 0.0, (), 2, 10, seed), State(tmp_path / "state", {}, False),
                       tmp_path / "logs", "test")
    assert orders["first"] == orders["again"]
    epochs = [orders[run][which][start:start + 40] for run in ("first", "other") for which in "xz" for start in (0, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs) and len(set(map(tuple, epochs))) == 8


def test_weights_that_the_last_step_spoils_are_not_saved(tmp_path):
    """The losses were all finite: the last of them was taken before it."""
    class Spoils(CEDA):
        calls = 0

        def constrain(self, model):
            self.calls += 1
            if self.calls == 3:         # before the first of two steps, after it, after the last
                model.base_model.fc2.bias.data[0] = math.inf
    with pytest.raises(UserError, match="not finite in epoch 1"):
        run_loop(Softmax(CLASSIFIERS["LeNet"](1, 8, 3)), Spoils(), tmp_path)
    assert not (tmp_path / "state").exists()


def test_variances_are_constrained_before_the_first_step_and_after_each(tmp_path):
    """With a loss that only pulls them together."""
    ratios = []

    def ratio(model):
        return (model.gmm_out.logvar.min() - model.gmm_in.logvar.max()).exp().item()

    class Pull(CEDA_GMM):
        def loss(self, model, x, y, z):
            ratios.append(ratio(model))
            return model.gmm_out.logvar.sum() - model.gmm_in.logvar.sum(), {}
    model = tiny_ccu()
    run_loop(model, Pull(), tmp_path, epochs=2)
    assert [*ratios, ratio(model)] == pytest.approx([4] * 5, rel=1e-5)


def test_in_and_out_images_are_augmented_when_asked(trained, tmp_path):
    (with_it,), (without,) = trained("plain --augm_flag 1"), trained("plain --augm_flag 0")
    assert with_it.augmentation == Augmentation(crop=2, pad_mode="constant", flip=False)
    plain, moved = Watched(), Watched()
    for objective, augmentation in ((plain, without.augmentation), (moved, with_it.augmentation)):
        run_loop(Softmax(CLASSIFIERS["LeNet"](1, 8, 3)), objective, tmp_path, n=60, batch_size=20,
                 augmentation=augmentation)
    for which in ("x", "z"):
        as_it_is, shifted = (torch.cat(getattr(objective, which)).flatten(1) for objective in (plain, moved))
        assert (as_it_is == as_it_is[0]).all()
        still = (shifted == as_it_is[0]).all(1).float().mean()      # half of them, and a 25th of the others
        assert 0.3 < still < 0.75


def test_a_home_folder_that_the_shell_left_alone(monkeypatch, tmp_path):
    """bash does so behind --data_dir=."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.path("~/my data") == str(tmp_path / "my data") and cli.path("a/~") == "a/~"
    assert cli.stem("~/t.csv") == str(tmp_path / "t") and cli.assignment("A=~/b") == ("A", str(tmp_path / "b"))
