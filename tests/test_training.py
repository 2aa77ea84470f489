"""The training loop: schedules, the variance constraint, and runs that are interrupted or go wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import killed, run_script

import params
import run_training
from models import CLASSIFIERS, LeNet
from utils.out_data import load_out


def test_another_learning_rate_does_not_continue_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = "run_training.py --dataset Digits --train_type plain --epochs 1"
    killed(monkeypatch, run_script, command)
    with pytest.raises(SystemExit) as stop:
        run_script(command + " --lr 0.1 --resume 1")
    assert stop.value.code == 2 and "made with lr 0.001, not 0.1" in capsys.readouterr().err


def test_out_images_that_came_later_do_not_continue_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_training, "load_out", lambda *args, **options: load_out(*args, **options | {"n": 500}))
    command = "run_training.py --dataset Digits --train_type CEDA --epochs 1"       # --out_dataset auto
    killed(monkeypatch, run_script, command)
    Path("data").mkdir()
    np.save("data/300K_random_images.npy", np.zeros((600, 32, 32, 3), np.uint8))
    with pytest.raises(SystemExit) as stop:
        run_script(command + " --resume 1")
    assert stop.value.code == 2 and "made with out_dataset Photos, not RandomImages300k" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_script("run_training.py --dataset Digits --train_type plain --epochs 4 --lr 1e30")
    assert stop.value.code == 2 and "not finite" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "Digits" / "Base.pt").exists()


def test_a_run_leaves_its_record(digits_run):
    record = json.loads((digits_run / "checkpoints/Digits/CCU.json").read_text())
    assert record["options"]["epochs"] == 3 and record["out_dataset"] == "Photos" and record["seed"] == 0
    assert len(record["history"]) == 3 and record["mixtures"]["n"] == 10
    assert record["history"][0]["smallest_var_out"] >= 4 * record["history"][0]["largest_var_in"]
    assert all(math.isfinite(value) for epoch in record["history"] for value in epoch.values())
    assert "run_training.py" in record["command"] and record["torch"] == torch.__version__


@pytest.mark.parametrize("known, slow", [({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
                                         ({"avx512_bf16": False, "amx_bf16": True}, False), ({"bf16": True}, False),
                                         ({}, False)])
def test_amp_without_bf16_arithmetic_says_that_it_is_slower(known, slow, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):     # there is no MNIST here
        run_script("run_training.py --dataset MNIST --train_type plain --amp 1 --gpu -1")
    assert ("warning: this machine only imitates bf16" in capsys.readouterr().err) == slow


class NarrowLeNet(LeNet):
    """With a quarter and an eighth of the channels."""

    def __init__(self, *args):
        super().__init__(*args)
        self.conv1, self.conv2 = torch.nn.Conv2d(1, 8, 5, padding=2), torch.nn.Conv2d(8, 16, 5, padding=2)
        self.fc1, self.fc2 = torch.nn.Linear(784, 128), torch.nn.Linear(128, 10)


def test_acet_learns_to_be_unsure_of_its_adversarial_noise(tmp_path, monkeypatch):
    """Once a network is certain there, the loss has no gradient that could mend it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(params, "OUT_CROPS", 2_000)
    for name in ("LeNet", "NarrowLeNet"):       # as it is asked for, as it is built again
        monkeypatch.setitem(CLASSIFIERS, name, NarrowLeNet)
    run_script("run_training.py --dataset Digits --train_type ACET --fit_out 1 --steps 5 --batch_size 64 --epochs 12")
    last = json.loads(Path("checkpoints/Digits/ACET.json").read_text())["history"][-1]
    assert last["confidence_out"] < 0.4 and last["confidence_in"] > 0.5 and last["accuracy"] > 0.7
