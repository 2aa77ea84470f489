"""The commands: what they write, what they print, and how they refuse."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script
from sklearn.metrics import roc_auc_score

from utils import cli, files, load_model
from utils.backups import ATTACK
from utils.data import load_in_dist, load_ood

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = {**dict.fromkeys(("gen_gmm.py", "run_training.py", "gen_eval.py", "gen_attack_stats.py", "gen_figures.py",
                            "load_pretrained.py", "benchmarks/ablation.py", "benchmarks/attack_strength.py"),
                           " --data"),
           "gen_results.py": "", "benchmarks/run.py": " --gpu 0"}       # script -> how its example goes on
HELP = """
import runpy, sys
for script in sys.argv[1:]:         # in one process: importing PyTorch takes longer than all else
    sys.argv, sys.path[0] = [script, "--help"], script.rpartition("/")[0]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, script
"""


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_help_answers_without_data_or_gpu(tmp_path):
    done = subprocess.run([sys.executable, "-c", HELP, *(REPOSITORY / script for script in SCRIPTS)], cwd=tmp_path,
                          text=True, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert all(f"python {script}{options}" in done.stdout for script, options in SCRIPTS.items())
    assert not list(tmp_path.iterdir())


def test_gen_eval_writes_table_2(work, capsys):
    Path("checkpoints/Digits/._Base.pt").write_bytes(b"what a Mac leaves beside Base.pt")
    run_script("gen_eval.py --dataset Digits --drop_mmc 1 --output results/t2")
    printed = capsys.readouterr()
    table = pd.read_csv("results/t2.csv", index_col=0)
    assert list(table.columns) == ["Base", "CCU"] and list(table.index) == ["Patches", "Noise", "Uniform"]
    test = load_in_dist("Digits", "test", "data")
    model = load_model("checkpoints/Digits/Base.pt")
    ood = load_ood("Patches", test, "data", seed=0)
    with torch.no_grad():
        inside, outside = model.score(test.floats()), model.score(ood.floats())
        wrong = (model(test.floats()).argmax(1) != test.labels).sum().item()
    assert f"\nBase: test error {100 * wrong / len(test):.2f} %\nCCU: test error " in printed.err
    expected = roc_auc_score([1] * len(inside) + [0] * len(outside), torch.cat((inside, outside)))
    assert table.loc["Patches", "Base"] == pytest.approx(100 * expected, abs=1e-3)
    latex = Path("results/t2.txt").read_text()
    assert "\\begin{tabular}" in latex and "% command: python gen_eval.py" in latex and "Photos" in latex
    for path in ("results/t2.csv", "results/t2.txt", "results/t2_fpr95.csv", "results/backup/t2.pt"):
        assert f"wrote {path}" in printed.out and Path(path).exists()
    assert "FMNIST" in printed.err and "dataset-fashion-mnist" in printed.err       # a set that is not there
    assert "not trained: CEDA, OE," in printed.err and "--train_type CEDA" in printed.err       # nor are these models


def test_gen_eval_with_mmc_and_average_precision(work):
    run_script("gen_eval.py --dataset Digits --aupr 1 --models CCU --output t")
    table = pd.read_csv("t.csv", header=[0, 1], index_col=0)
    assert list(table.columns) == [("CCU", "MMC"), ("CCU", "AP")]
    assert list(table.index) == ["orig", "Patches", "Noise", "Uniform"]
    assert table.loc["orig", ("CCU", "MMC")] > 50 and table.loc["Uniform", ("CCU", "MMC")] == pytest.approx(10, abs=0.5)


def test_gen_attack_stats_writes_table_1_and_its_backup(work, capsys):
    command = ("gen_attack_stats.py --datasets Digits --wide_format 1 --fit_out 1 --steps 3 --restarts 2 --batches 2 "
               "--batch_size 5 --output results/t1")
    run_script(command)
    table = pd.read_csv("results/t1.csv", index_col=[0, 1])
    assert list(table.columns) == ["Base", "CCU"]
    assert list(table.index) == [("Digits", row) for row in ("TE", "MMC", "SR", "AUC")]
    assert table.loc[("Digits", "MMC"), "CCU"] <= 11 and table.loc[("Digits", "SR"), "CCU"] == 0
    backup = files.load("results/backup/t1_Digits.pt", ATTACK)
    ccu, radii = load_model("checkpoints/Digits/CCU.pt"), backup["radii"]
    metric = ccu.double().gmm_in.metric
    assert backup["classes"] == 10 and backup["seeds"].shape == (10, 1, 28, 28) and (radii > 0).all()
    differ = False
    for label, attacked in backup["models"].items():
        x = attacked["samples"].double()
        distance = (metric.transform(x) - metric.transform(backup["seeds"].double())).norm(dim=1)
        assert (distance <= radii * (1 + 1e-6)).all() and x.min() >= 0 and x.max() <= 1
        assert (attacked["score"] >= attacked["seed_score"] - 1e-5).all()
        model = load_model(f"checkpoints/Digits/{label}.pt")
        for images, score in ((attacked["samples"], "score"), (backup["seeds"], "seed_score")):
            torch.testing.assert_close(model.score(images).detach(), attacked[score], atol=1e-5, rtol=0)
        assert torch.equal(attacked["prediction"], model(attacked["samples"]).argmax(1))
        differ |= not torch.equal(attacked["prediction"], model(backup["seeds"]).argmax(1))
        assert table.loc[("Digits", "SR"), label] == pytest.approx(
            100 * (attacked["score"].numpy() >= np.median(backup["scores_in"][label])).mean())
    assert differ and not [name for name in everything(work) if ".attack_" in name]
    run_script(command.replace("t1", "again"))
    assert Path("results/again.csv").read_bytes() == Path("results/t1.csv").read_bytes()
    run_script(command.replace("t1", "loaded") + " --load_seeds results/backup/t1_Digits.pt")
    assert Path("results/loaded.csv").read_bytes() == Path("results/t1.csv").read_bytes()


def test_a_table_is_written_whatever_becomes_of_what_is_printed(work):
    """Standard output without the dash's letter, and one that a reader has closed."""
    options = shlex.split("--dataset Digits --models Base --gpu -1 --output")
    command = [sys.executable, REPOSITORY / "gen_eval.py", *options]
    done = subprocess.run([*command, "ascii"], text=True, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "orig" in done.stdout and Path("ascii.csv").exists()
    run = subprocess.Popen([*command, "closed"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert "Traceback" not in run.stderr.read() and run.wait() == 141 and Path("closed.csv").exists()


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory")])
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    def main(args):
        raise error
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stop:
        cli.run(main, cli.Parser("A script.").common())
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("script: out of memory: choose a smaller --batch_size (of an attack: --points), "
                                       "or fewer images or centroids\n")


def test_a_script_counts_numbers_below_1e_38_as_zero_and_leaves_that_to_itself(monkeypatch):
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot")
    seen = []
    monkeypatch.setattr(sys, "argv", ["script"])
    cli.run(lambda args: seen.append((torch.tensor(1e-30) * 1e-10).item()), cli.Parser("A script.").common())
    assert seen == [0.0] and (torch.tensor(1e-30) * 1e-10).item() > 0
