"""A method that is not here, added as README's "Your own method" says."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import run_script
from torch import nn

import model_paths
import models
import params
import run_training
from models import Detector, Softmax
from utils import checkpoints, evaluation, load_model, objectives, save_model, state
from utils.data import load_in_dist, load_ood
from utils.errors import UserError

TRAIN = "run_training.py --dataset Digits --train_type Energy --epochs 1"
ATTACK = "gen_attack_stats.py --datasets Digits --fit_out 1 --wide_format 1 --batches 1 --batch_size 4 --steps 2 " \
         "--restarts 1 --models Base Energy --output t1"


class Energy(Detector):
    """Energy score (Liu et al. 2020) of a softmax at a temperature: a given one times one that is learnt."""

    score_is_confidence = False

    def __init__(self, base_model, T=2.0):
        super().__init__(base_model, T=T)
        self.T, self.log_t = T, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return (self.logits(x) / (self.T * self.log_t.exp())).log_softmax(1)

    def score(self, x):
        return self.logits(x).logsumexp(1)


class Loss(objectives.Objective):
    needs_out = False

    def loss(self, model, x, y, z):
        loss = nn.functional.nll_loss(model(x), y)
        return loss, {"loss": loss.detach()}


def add(monkeypatch, cls, make):
    """The entries of README, for a class and what makes it of a network."""
    monkeypatch.setitem(objectives.OBJECTIVES, "Energy", Loss)
    monkeypatch.setitem(params.METHODS, "Energy", params.Method())
    monkeypatch.setitem(model_paths.LABELS, "Energy", "--train_type Energy")
    monkeypatch.setitem(models.DETECTORS, cls.__name__, cls)
    make_model = run_training.make_model
    monkeypatch.setattr(run_training, "make_model", lambda *args: make(make_model(*args).base_model))


def auc():
    """Of the model's own score, test images against Uniform (%)."""
    model, test = load_model("checkpoints/Digits/Energy.pt"), load_in_dist("Digits", "test", "data")
    with torch.no_grad():
        scores = [model.score(data.floats()) for data in (test, load_ood("Uniform", test, "data"))]
    return pytest.approx(evaluation.auroc(*scores), abs=1e-3)


def test_an_own_method_is_trained_whole_and_a_column_of_both_tables(work, monkeypatch):
    add(monkeypatch, Energy, lambda network: Energy(network, 3.0))
    run_script(TRAIN)
    model = load_model("checkpoints/Digits/Energy.pt")
    assert model.T == 3.0 and abs(model.log_t.item()) > 1e-3      # was 0
    run_script("gen_eval.py --dataset Digits --drop_mmc 0 --models Base Energy --output t2")
    run_script(ATTACK)
    table2 = pd.read_csv("t2.csv", header=[0, 1], index_col=0)
    table1 = pd.read_csv("t1.csv", index_col=[0, 1])
    assert table2["Energy", "AUC"]["Uniform"] == auc() and table2["Energy", "MMC"].isna().all()
    assert 0 <= table1["Energy"]["Digits", "AUC"] <= 100 and pd.isna(table1["Energy"]["Digits", "MMC"])


class Column(Energy):
    def score(self, x):
        return super().score(x)[:, None]


class Logits(Energy):
    def forward(self, x):
        return self.logits(x)


class Forgetful(Energy):
    def __init__(self, base_model, T=2.0):
        super().__init__(base_model, T)
        del self.spec["T"]


MISTAKES = {
    "not in DETECTORS": (Softmax, Energy, "unknown kind of model 'Energy'"),
    "a setting that is not in its spec": (Forgetful, lambda network: Forgetful(network, 5.0), "gives other values"),
    "a score of the wrong shape": (Column, Column, "no confidences"),
    "logits": (Logits, Logits, "no confidences"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_could_not_be_loaded_again_is_refused_before_it_is_trained(mistake, work, monkeypatch, capsys):
    cls, make, reason = MISTAKES[mistake]
    add(monkeypatch, cls, make)
    monkeypatch.setattr(run_training, "train", lambda *args: pytest.fail("was trained"))
    with pytest.raises(SystemExit) as stopped:
        run_script(TRAIN)
    assert stopped.value.code == 2 and reason in capsys.readouterr().err
    assert not Path("checkpoints/Digits/Energy.pt").exists() and not list(work.glob("logs/**/*"))


class Running(Loss):
    """Divides the loss by a running mean."""

    def __init__(self, loglam=0.0):
        super().__init__(loglam)
        self.mean = torch.ones(())

    def loss(self, model, x, y, z):
        loss, scalars = super().loss(model, x, y, z)
        self.mean.lerp_(loss.detach(), 0.1)
        return loss / self.mean, scalars


def test_what_an_own_loss_keeps_is_there_when_a_training_is_resumed(work, monkeypatch):
    add(monkeypatch, Energy, Energy)
    monkeypatch.setitem(objectives.OBJECTIVES, "Energy", Running)
    monkeypatch.setattr(state, "SAVE_EVERY", 0.0)
    run_script(f"{TRAIN.removesuffix('1')}2")
    whole, save = load_model("checkpoints/Digits/Energy.pt").state_dict(), state.State.save

    def dying(self, **values):
        save(self, **values)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(state.State, "save", dying)
        with pytest.raises(SystemExit):
            run_script(f"{TRAIN.removesuffix('1')}2")
    run_script(f"{TRAIN.removesuffix('1')}2 --resume 1")
    resumed = load_model("checkpoints/Digits/Energy.pt").state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_score_of_several_networks_that_could_not_be_loaded_is_not_saved(work, monkeypatch):
    monkeypatch.setitem(models.DETECTORS, "Energy", Energy)
    ensemble = models.DE([models.LeNet() for _ in range(2)])
    with pytest.raises(UserError, match="can't write Energy.pt, which would not load again: missing key"):
        save_model(Energy(ensemble.base_model), "Energy.pt", {})
    assert not Path("Energy.pt").exists()


def test_a_check_of_what_is_saved_draws_no_random_numbers():
    model = models.Softmax(models.LeNet())
    before, training = torch.get_rng_state(), model.training
    checkpoints.check_rebuilds(model)
    assert torch.equal(torch.get_rng_state(), before) and model.training is training


class Confident(Energy):
    score_is_confidence = True


class Flat(Energy):
    @torch.no_grad()
    def score(self, x):
        return super().score(x)


def test_a_score_of_a_network_that_is_there_needs_a_class_and_a_file(work, monkeypatch):
    add(monkeypatch, Energy, Energy)
    base = load_model("checkpoints/Digits/Base.pt")
    save_model(Energy(base.base_model), "checkpoints/Digits/Energy.pt", base.meta)
    run_script("gen_eval.py --dataset Digits --drop_mmc 0 --models Base Energy --output t2")
    assert pd.read_csv("t2.csv", header=[0, 1], index_col=0)["Energy", "AUC"]["Uniform"] == auc()


class Dark(Softmax):
    """Not a number for images that are half white on average, as uniform noise is."""

    score_is_confidence = False

    def score(self, x):
        return (0.45 - x.mean((1, 2, 3))).log()


def test_a_score_that_is_no_number_on_noise_is_found_after_a_batch(work, monkeypatch, capsys, attacks):
    add(monkeypatch, Dark, Dark)
    base = load_model("checkpoints/Digits/Base.pt")
    save_model(Dark(base.base_model), "checkpoints/Digits/Energy.pt", base.meta)
    with pytest.raises(SystemExit) as stopped:
        run_script(f"{ATTACK} --batches 2")
    assert stopped.value.code == 2
    assert "Energy, batch 1: the score is NaN or infinite at all points that the attack tried around 4 of 4 seeds" in (
        capsys.readouterr().err)
    assert [call.kind for call in attacks] == ["Softmax", "Softmax", "Dark"] and not Path("t1.csv").exists()


@pytest.mark.parametrize("cls, command, reason", [
    (Confident, "gen_eval.py --dataset Digits --models Base Energy --output t2", "score_is_confidence = False"),
    (Flat, ATTACK, "the score of Energy has no gradient")])
def test_a_score_that_breaks_the_contract_is_refused(cls, command, reason, work, monkeypatch, capsys, attacks):
    add(monkeypatch, cls, cls)
    base = load_model("checkpoints/Digits/Base.pt")
    with torch.no_grad():
        base.base_model.fc2.bias += 10.0        # logits well above 0
    save_model(cls(base.base_model), "checkpoints/Digits/Energy.pt", base.meta)
    with pytest.raises(SystemExit) as stopped:
        run_script(command)
    assert stopped.value.code == 2 and reason in capsys.readouterr().err
    assert not attacks and not list(work.glob("t[12]*"))
