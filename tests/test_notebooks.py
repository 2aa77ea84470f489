"""Every notebook runs from top to bottom with the values of its first cell, and what is missing is one line."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import run_script

import gen_figures
from utils.errors import UserError

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SHORT = {"Figure1_TwoMoons": {"epochs": 2}}


@pytest.fixture(scope="module")
def backups_run(digits_run, tmp_path_factory):
    """The small Digits run with both backups in results/backup."""
    folder = tmp_path_factory.mktemp("figures")
    shutil.copytree(digits_run / "checkpoints", folder / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_script("gen_eval.py --dataset Digits")
        run_script("gen_attack_stats.py --datasets Digits --fit_out 1 --steps 2 --restarts 1 --batches 1 "
                   "--batch_size 6")
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, backups_run, monkeypatch):
    monkeypatch.chdir(backups_run)
    printed = gen_figures.run(path.stem, SHORT.get(path.stem, {}))
    written = [Path(line.removeprefix("wrote ")) for line in printed.splitlines() if line.startswith("wrote ")]
    if path.stem == "ImportModels":
        assert len(written) == 1
        return
    assert [file.suffix for file in written] == [".png", ".pdf"]
    assert written[0].read_bytes().startswith(b"\x89PNG") and written[1].read_bytes().startswith(b"%PDF")
    assert all(file.parent == Path("results/figures") and file.stem.startswith(path.stem) for file in written)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebooks_show_pictures_and_are_small(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 300_000
    if path.stem != "ImportModels":
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert any("image/png" in output.get("data", ()) for output in outputs)


def test_what_is_missing_is_one_line_and_the_rest_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, ran = gen_figures.run, []
    with pytest.raises(UserError, match="no attack on Digits yet; run: python gen_attack_stats.py .*make demo") as stop:
        run("Figure2_Samples", {})      # through a notebook's kernel
    assert "\n" not in str(stop.value) and not list(tmp_path.iterdir())

    def without_scores(name, values):
        ran.append((name, values.get("dataset")))
        if name == "Confidences" or values.get("dataset") == "MNIST":
            raise UserError("run gen_eval.py")
        return f"wrote {name}\n"
    monkeypatch.setattr(gen_figures, "run", without_scores)
    run_script("gen_figures.py --datasets Digits MNIST")
    printed = capsys.readouterr()
    assert printed.out.split() == ["wrote", "Figure1_TwoMoons", "wrote", "Figure2_Samples", "wrote",
                                   "Figure3_Histograms", "wrote", "Certificate"]
    assert ("Figure3_Histograms", "Digits") in ran
    assert printed.err.splitlines() == [f"left out {name}: run gen_eval.py" for name in
                                        ("Figure2_Samples", "Confidences", "Confidences", "Certificate")]


def test_what_a_notebook_warns_of_is_said(backups_run, monkeypatch, capsys):
    monkeypatch.chdir(backups_run)
    damaged = backups_run / "results/backup/newest_Digits.pt"
    damaged.write_bytes(b"")
    try:
        gen_figures.run("Confidences", {})
    finally:
        damaged.unlink()
    assert capsys.readouterr().err.count("newest_Digits.pt is damaged") == 1


def test_ctrl_c_ends_a_notebook_in_one_line(tmp_path):
    run = subprocess.Popen([sys.executable, gen_figures.__file__, "--datasets", "Digits"], cwd=tmp_path, text=True,
                           env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # nohup's ignores it
    while not list(tmp_path.glob("tmp*.json")) and run.poll() is None:      # how to reach the kernel
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60)[1].strip() == "gen_figures.py: interrupted" and run.returncode == 130


def test_figures_that_could_not_be_written_are_not_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gen_figures, "run", lambda *_: pytest.fail("was drawn"))
    for blocked, reason in (("results/figures/Figure1_TwoMoons.pdf/x", "it is a folder"),
                            ("results", "results is not a folder")):
        path = tmp_path / blocked
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a file")
        with pytest.raises(SystemExit) as stop:
            run_script("gen_figures.py --datasets Digits")
        assert stop.value.code == 2 and reason in capsys.readouterr().err
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
