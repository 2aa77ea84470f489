"""The benchmarks: their baselines compute what ours does, and they say what they measured."""

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import ablation
import attack_strength
import baselines
import measure
import numpy as np
import pandas as pd
import pytest
import run
import torch
from PIL import Image
from scipy.optimize import minimize

from models import PCAMetric, Softmax, build_classifier
from utils import load_model, save_model
from utils.errors import UserError
from utils.objectives import CEDA_GMM


def test_figures_have_a_name_a_unit_a_target_and_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run.main(run.parser().parse_args(shlex.split("--quick 1 --only certificates loader --output figures.json")))
    printed, written = capsys.readouterr().out, json.loads(Path("figures.json").read_text())
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines] == ["certificate, paper", "certificate, tight", "loader"]
    assert lines == [figure | written["machine"] for figure in written["figures"]]
    paper, _, loader = lines
    assert paper["unit"] == "radii/s" and paper["target"] == ">= 300" and paper["met"] == (paper["ratio"] >= 300)
    assert paper["ratio"] == pytest.approx(paper["value"] / paper["baseline"])
    assert loader["target"] == ">= 30" and loader["met"] == (loader["ratio"] >= 30)
    assert paper["torch"] == torch.__version__ and "wrote figures.json" in printed


def test_an_interrupted_benchmark_leaves_an_earlier_ones_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("figures.json").write_text("earlier")

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setitem(run.SECTIONS, "loader", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.main(run.parser().parse_args(shlex.split("--quick 1 --only certificates loader --output figures.json")))
    assert Path("figures.json").read_text() == "earlier"
    written = json.loads(Path("figures.json.partial").read_text())
    assert [figure["name"] for figure in written["figures"]] == ["certificate, paper", "certificate, tight"]


def test_the_naive_step_is_the_same_step():
    """The baseline of naive_ccu_step / ccu_step: equal gradients."""
    gradients = []
    for objective in (CEDA_GMM(), baselines.NaiveCCU()):
        torch.manual_seed(0)
        ccu = run.make_ccu("LeNet", torch.device("cpu"), (1, 8)).double()
        x, z = torch.rand(2, 6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        loss, _ = objective.loss(ccu, x, torch.arange(6), z)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in ccu.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
    assert gradients[0].norm() > 0


def test_operations_are_counted_without_views():
    a, b = torch.ones(2, 5, 3), torch.ones(3, 4)
    with measure.Operations() as seen:
        (a @ b)[0].T.add_(1).view(4, 5)         # a product and a sum
    assert seen.count == 2


def test_linear_scores_have_the_maximum_that_is_said():
    """By SLSQP, with both ball and cube at work."""
    V, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    metric = PCAMetric(V, torch.tensor([10.0, 5, 2, 1, 0.5, 0.1], dtype=torch.float64))
    seeds = torch.rand(5, 1, 1, 6, generator=torch.Generator().manual_seed(1))
    gradient, rise, radii = attack_strength.known_maximum(metric, seeds, torch.full((5,), 0.8), seed=2)
    A = (V.T / metric.singular_values @ V).numpy()
    corners = 0
    for seed, g, expected, R in zip(seeds.flatten(1).double().numpy(), gradient.numpy(), rise, radii, strict=True):
        ball = {"type": "ineq", "fun": lambda x: R ** 2 - (x - seed) @ A @ (x - seed)}         # noqa: B023
        found = minimize(lambda x: -(x - seed) @ g, seed, jac=lambda x: -g, method="SLSQP",     # noqa: B023
                         bounds=[(0, 1)] * 6, constraints=ball, options={"ftol": 1e-12, "maxiter": 500})
        assert -found.fun == pytest.approx(expected.item(), rel=1e-5)
        corners += np.isclose(found.x, found.x.round(), atol=1e-6).sum()
    assert 0 < corners < 25


def test_attack_strength_tells_shares_and_scores(digits_run, monkeypatch, capsys):
    monkeypatch.chdir(digits_run)
    monkeypatch.setattr(attack_strength, "CHECKPOINTS", (5, 40))
    monkeypatch.setattr(attack_strength, "FRACTIONS", (1.0,))
    attack_strength.main(attack_strength.parser().parse_args(shlex.split("--dataset Digits --n 2 --gpu -1")))
    linear, base, ccu = capsys.readouterr().out.strip().split("\n\n")
    (few, many), (worst_few, worst) = (map(float, line.split()[1:]) for line in linear.splitlines()[1:])
    assert 0 < worst_few <= few < many <= 100.0001 and 80 < worst <= many
    assert base.startswith("Digits Base, 1 R") and ccu.startswith("Digits CCU, 1 R")
    for block in (base, ccu):
        few, many = map(float, block.splitlines()[1].split()[1:])
        assert few <= many <= 0 and "plain, best step size" in block and "attack needs" in block


def test_attack_strength_refuses_what_it_cannot_compare(digits_run, tmp_path, monkeypatch):
    shutil.copytree(digits_run / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    ccu = load_model("checkpoints/Digits/CCU.pt")
    args = attack_strength.parser().parse_args(shlex.split("--dataset Digits --n 2 --gpu -1"))
    with torch.no_grad():
        ccu.gmm_in.logvar.fill_(10.0)           # so wide that nothing is certified
    save_model(ccu, "checkpoints/Digits/CCU.pt")
    with pytest.raises(UserError, match="nothing is certified around 2 of 2 seeds"):
        attack_strength.main(args)
    save_model(Softmax(build_classifier("ResNet18", 3, 32, 10)), "checkpoints/Digits/Base.pt", {})
    with pytest.raises(UserError, match="Base"):
        attack_strength.main(args)


def test_the_ablation_starts_the_scripts_with_its_options(tmp_path, monkeypatch):
    """In its own folder, so that paths lead out of it; a script that fails ends it."""
    commands = []

    def run(command, cwd):
        commands.append([Path(command[1]).name, *command[2:]])
        return SimpleNamespace(returncode=3 * (commands[-1][0] == "gen_eval.py"))
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    monkeypatch.chdir(tmp_path)
    args = ablation.parser().parse_args(shlex.split(
        "--dataset Digits --epochs 2 --amp 1 --out_dataset Folder --out_dir photos --ood A=a B=b/c"))
    with pytest.raises(UserError, match="no images in a"):
        ablation.main(args)
    assert not commands and not list(Path().iterdir())
    for folder in ("a", "b/c"):
        Path(folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(f"{folder}/x.png")
    with pytest.raises(SystemExit) as stop:
        ablation.main(args)
    *others, evaluation = commands
    assert stop.value.code == 3 and evaluation[-3:] == ["--ood", "A=../../a", "B=../../b/c"]
    trainings = [" ".join(command) for command in others if command[0] == "run_training.py"]
    assert len(trainings) == 1 + len(ablation.VARIANTS)
    assert all("--epochs 2 --amp 1" in training and "--out_dir ../../photos" in training for training in trainings)
    assert sum("--PCA 0" in training for training in trainings) == 1


def test_the_ablation_tells_errors_aucs_and_radii_of_each_model(digits_run, tmp_path, monkeypatch):
    def run(command, cwd):
        if "--label" in command:
            label = command[command.index("--label") + 1]
            (cwd / "checkpoints/Digits").mkdir(parents=True, exist_ok=True)
            shutil.copy(digits_run / f"checkpoints/Digits/{'Base' if label == 'Base' else 'CCU'}.pt",
                        cwd / f"checkpoints/Digits/{label}.pt")
        elif Path(command[1]).name == "gen_eval.py":
            columns = pd.MultiIndex.from_product([["Base", *ablation.VARIANTS], ["MMC", "AUC"]])
            aucs = [[value for i in range(7) for value in (50.0, row + i)] for row in (0, 80, 90)]
            pd.DataFrame(aucs, ["orig", "Noise", "Uniform"], columns).to_csv(cwd / "table2.csv")
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    monkeypatch.chdir(tmp_path)
    ablation.main(ablation.parser().parse_args(["--dataset", "Digits"]))
    table = pd.read_csv("results/ablation_Digits.csv", index_col=0)
    assert list(table.index) == ["Base", *ablation.VARIANTS]
    base, ccu = (load_model(digits_run / f"checkpoints/Digits/{label}.pt").meta for label in ("Base", "CCU"))
    assert table["TE"].tolist() == pytest.approx([base["test_error"]] + 6 * [ccu["test_error"]], abs=1e-4)
    assert table["AUC mean"].tolist() == [85, 86, 87, 88, 89, 90, 91]
    assert table.loc["Base", ["R", "R / distance", "R > 0"]].isna().all()
    ccus = table.drop(index="Base")
    assert (ccus["R"] > 0).all() and (ccus["R > 0"] == 100).all()
    assert (ccus["R / distance"].between(1, 100)).all()         # a test image is not certified to be far from the data
