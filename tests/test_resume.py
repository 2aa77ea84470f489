"""--resume 1 keeps what the same options made, and nothing else; tables speak of the models that are there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_script

import gen_attack_stats
import gen_gmm
import model_paths
import params
import run_training
from utils import attack_batches, checkpoints, files, load_model, save_model, state, tables
from utils.backups import ATTACK
from utils.out_data import load_out


def test_a_killed_attack_keeps_batches_of_the_same_options_and_weights_alone(work, attacks, monkeypatch):
    """Seeds are loaded and radii given, so that these stay the same whatever else changes."""
    files.save({"format": ATTACK, "seeds": torch.rand(6, 1, 28, 28)}, "seeds.pt")
    monkeypatch.setattr(tables, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))     # after all batches

    def attacked(changes=""):
        attacks.clear()
        with pytest.raises(SystemExit) as stop:
            run_script("gen_attack_stats.py --datasets Digits --fit_out 1 --load_seeds seeds.pt --radius 1 --steps 5 "
                       f"--restarts 2 --batch_size 4 --output t --resume 1 {changes}")
        assert stop.value.code == 130 and not Path("t.csv").exists()
        return [call.kind for call in attacks]
    assert attacked("--models Base") == ["Softmax", "Softmax"]
    assert attacked() == ["CCU", "CCU"] and attacked() == []        # a label more costs its own batches alone
    for changes in ("--steps 6", "--restarts 3", "--alpha 2", "--seed 1", "--batch_size 3", "--radius 2",
                    "--certificate tight"):
        assert len(attacked(changes)) == 4, changes
    assert attacked() == []
    base = load_model("checkpoints/Digits/Base.pt")
    base.base_model.fc2.bias.data[0] += 1e-3
    save_model(base, "checkpoints/Digits/Base.pt")
    assert attacked() == ["Softmax", "Softmax"]
    ccu = load_model("checkpoints/Digits/CCU.pt")
    ccu.gmm_out.logvar.data += 1e-3                                 # its balls are everybody's
    save_model(ccu, "checkpoints/Digits/CCU.pt")
    assert len(attacked()) == 4
    files.save({"format": ATTACK, "seeds": torch.rand(6, 1, 28, 28)}, "seeds.pt")
    assert len(attacked()) == 4
    assert len(attacked("--resume 0")) == 4
    monkeypatch.setattr(attack_batches, "FORMAT", "of another version")
    assert len(attacked()) == 4


def test_a_killed_attack_keeps_the_batches_that_it_finished(work, attacks, monkeypatch):
    command = "gen_attack_stats.py --datasets Digits --fit_out 1 --batches 2 --batch_size 4 --output t --resume 1"
    idle = attack_batches.attack

    def dying(*args, **options):
        if len(attacks) == 2:
            raise KeyboardInterrupt
        return idle(*args, **options)
    with monkeypatch.context() as patch:
        patch.setattr(attack_batches, "attack", dying)
        with pytest.raises(SystemExit) as stop:
            run_script(command)
    assert stop.value.code == 130 and len(attacks) == 2 and not Path("t.csv").exists()
    exact = gen_attack_stats.certified_radius       # another machine's last digits differ
    monkeypatch.setattr(gen_attack_stats, "certified_radius", lambda *args: exact(*args) * (1 - 1e-13))
    run_script(command)
    assert len(attacks) == 4 and Path("t.csv").exists()


@pytest.mark.parametrize("part", ["comp_vecs", "singular_values"])
def test_certify_refuses_a_model_of_another_metric(part, work, attacks, capsys):
    other = load_model("checkpoints/Digits/CCU.pt")
    buffer = getattr(other.gmm_in.metric, part)
    buffer.copy_(buffer.flip(0) if part == "comp_vecs" else buffer * 1.01)
    save_model(other, "checkpoints/Digits/other.pt")
    command = ("gen_attack_stats.py --datasets Digits --fit_out 1 --batches 1 --batch_size 2 --models CCU other "
               "--output t")
    with pytest.raises(SystemExit) as stop:
        run_script(command + " --certify 1")
    assert stop.value.code == 2 and "the metrics of other and CCU differ" in capsys.readouterr().err and not attacks
    run_script(command + " --certify 0")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A folder to fit mixtures in, on few out-images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gen_gmm, "load_out", lambda *args, **options: load_out(*args, **options | {"n": 60}))


def test_mixtures_of_other_options_are_fitted_again(empty, monkeypatch):
    fit, calls = gen_gmm.fit_gmm, []
    monkeypatch.setattr(gen_gmm, "fit_gmm", lambda *args: (calls.append(1), fit(*args))[1])

    def fitted(changes=""):
        calls.clear()
        run_script(f"gen_gmm.py --dataset Digits --PCA 0 --n 2 --data_used 50 --resume 1 {changes}")
        return len(calls)
    for changes in ("--seed 1", "--augm_flag 1", "--data_used 40", "--reg_covar 0.5"):
        assert fitted("--resume 0") == 2 and fitted() == 0
        assert fitted(changes) == 2 and fitted(changes) == 0, changes
    gmms = checkpoints.load_mixtures(next(Path("checkpoints/Digits/gmm").glob("*.pt")), "")[:2]
    assert all((gmm.logvar.exp() >= 0.5).all() for gmm in gmms)


def test_mixtures_of_a_run_that_was_killed_when_it_had_written_them(empty, monkeypatch):
    monkeypatch.setattr(state, "SAVE_EVERY", 0.0)
    command = "gen_gmm.py --dataset Digits --PCA 0 --n 2 --data_used 50 --resume 1"

    def folder():
        return {path.name: path.read_bytes() for path in Path("checkpoints/Digits/gmm").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(state.State, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            run_script(command)
    mixtures, = (name for name in folder() if name.endswith(".pt"))
    assert len(folder()) == 3
    before = checkpoints.load_mixtures(Path("checkpoints/Digits/gmm", mixtures), "")
    run_script(command)
    assert list(folder()) == [mixtures]
    after = checkpoints.load_mixtures(Path("checkpoints/Digits/gmm", mixtures), "")
    for one, other in zip(before[:2], after[:2], strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_mixtures_are_fitted_on_as_many_images_as_the_published_code_takes(empty, monkeypatch, capsys):
    few = replace(params.DATASETS["Digits"], fit_images=300)
    monkeypatch.setitem(params.DATASETS, "Digits", few)
    for options, used in (("", 300), ("--data_used 400", 400), ("--data_used 1437", 1437)):
        run_script(f"gen_gmm.py --dataset Digits --PCA 0 --n 2 {options}")
        assert f"per image of {used})" in capsys.readouterr().out
    wanted = {name: of.fit_images for name, of in params.DATASETS.items() if of.fit_images}
    assert wanted == {"Digits": 300, "SVHN": 50_000}       # SVHN has 73,257; the others as many as are fitted on


def test_a_finished_model_is_trained_again_for_other_options_alone(work, monkeypatch, capsys):
    monkeypatch.setattr(run_training, "load_out", lambda *args, **options: load_out(*args, **options | {"n": 64}))
    whole = run_training.load_in_dist
    monkeypatch.setattr(run_training, "load_in_dist", lambda *args: whole(*args).subset(slice(64)))
    command = "run_training.py --dataset Digits --train_type CEDA_GMM --use_gmm 1 --fit_out 1 --n 10 --epochs 1 "
    path = Path("checkpoints/Digits/CCU.pt")

    def trained(changes=""):
        before = path.stat().st_mtime_ns
        run_script(command + changes)
        return path.stat().st_mtime_ns != before
    assert trained() and trained() and not trained("--resume 1") and f"{path} is there" in capsys.readouterr().out
    # what they are without
    assert not trained("--resume 1 --verbose 1 --label CCU --out_dataset Photos")
    assert not trained("--resume 1 --steps 3 --members 2 --image_size 64")
    for changes in ("--lr 1e-4", "--seed 1", "--grad_vars mu", "--loglam 1"):
        assert trained(f"--resume 1 {changes}") and not trained(f"--resume 1 {changes}"), changes
    assert trained("--resume 1")
    with monkeypatch.context() as patch:
        for of, key in ((params.LR, "adam"), (params.LR, "sgd")):      # an edit of params.py, if it matters here
            patch.setitem(of, key, 2e-3)
            assert trained("--resume 1") == (key == "adam") and not trained("--resume 1")
        options = json.loads(model_paths.run_record(path).read_text())["options"]
        used = {"network": "LeNet", "optimizer": "adam", "lr": 2e-3, "decay": 5e-4}
        assert {key: options[key] for key in used} == used
    assert trained("--resume 1")
    gmm_in, gmm_out, meta = checkpoints.load_mixtures(next(Path("checkpoints/Digits/gmm").glob("*.pt")), "")
    checkpoints.save_mixtures(gmm_in, gmm_out, next(Path("checkpoints/Digits/gmm").glob("*.pt")), meta | {"seed": 5})
    assert trained("--resume 1")                                # fitted again meanwhile
    save_model(load_model(path), path, load_model(path).meta | {"test_error": 99.0})
    assert trained("--resume 1")                                # another model in its place
    model_paths.run_record(path).write_text("[]")
    assert trained("--resume 1")
    assert not trained("--resume 1")
    Path("checkpoints/Digits/CCU.wide.state").touch()           # another label's
    assert not trained("--resume 1")
    path.write_bytes(b"damaged")
    assert trained("--resume 1")


def test_the_record_of_a_model_that_was_replaced_is_left_out(work):
    base = load_model("checkpoints/Digits/Base.pt")
    save_model(base, "checkpoints/Digits/Base.pt", base.meta | {"test_error": 99.0})
    run_script("gen_eval.py --dataset Digits --output t")
    runs = json.loads(Path("t_runs.json").read_text())
    assert "--train_type CEDA_GMM" in runs["CCU"]["command"] and runs["CCU"]["seconds"] > 0
    assert not {"command", "options", "seconds"} & set(runs["Base"])
    assert runs["Base"]["train_type"] == "plain" and runs["Base"]["test_error"] < 50       # as measured for the table


def test_an_attack_writes_beside_its_table_alone(work, attacks):
    Path("results").write_text("nothing can be written here")
    run_script("gen_attack_stats.py --datasets Digits --fit_out 1 --batches 1 --batch_size 2 --output out/t")
    assert sorted(path.name for path in Path("out").rglob("*")) == ["backup", "t.csv", "t.txt", "t_Digits.pt"]


def test_a_model_that_another_run_is_still_making_is_not_trained_again(work, capsys):
    """It may be finished by the time the data is loaded."""
    command = "run_training.py --dataset Digits --train_type plain --epochs 1 --resume 1 --label X"
    run_script(command)
    with Path("checkpoints/Digits/.X.pt.lock").open("w") as other:
        files._lock(other.fileno())
        with pytest.raises(SystemExit) as stop:
            run_script(command)
    assert stop.value.code == 2 and "is being made" in capsys.readouterr().err
    run_script(command)         # the lock of a run that was killed
    assert "X.pt is there" in capsys.readouterr().out and not list(Path().rglob("*.lock"))


def test_a_training_killed_at_its_end_lacks_no_record(work, monkeypatch):
    """make runs it again only where there is no model."""
    command = "run_training.py --dataset Digits --train_type plain --epochs 1 --label X"
    save, record = checkpoints.save_model, model_paths.run_record(Path("checkpoints/Digits/X.pt"))

    def kill(*args):
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoints, "save_model", kill)
    with pytest.raises(SystemExit):
        run_script(command)
    error = json.loads(record.read_text())["test_error"]
    assert error == load_model("checkpoints/Digits/X.pt").meta["test_error"]
