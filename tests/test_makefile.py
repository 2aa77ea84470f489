"""`make tables` makes what is missing and keeps what is there."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


@pytest.fixture
def planned(tmp_path):
    """What `make tables` would run where the models `there` are, by name: the scripts' names and labels in turn."""
    for name in ("Makefile", "model_paths.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()

    def plan(*options, there=()):
        for label in there:
            (tmp_path / f"checkpoints/Digits/{label}.pt").parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"checkpoints/Digits/{label}.pt").touch()
        run = subprocess.run(["make", "-n", "tables", *options], cwd=tmp_path, text=True, capture_output=True)
        steps = [line.split("options(\"")[1].split('"')[0] if "run_training.py" in line else Path(line.split()[1]).stem
                 for line in run.stdout.splitlines() if ".py" in line]
        return steps, run.stderr
    return plan


def test_what_is_missing_is_made_in_order(planned):
    steps, _ = planned("LABELS=ODIN CCU-seed1")
    assert sorted(steps) == sorted(["gen_gmm", "Base", "ODIN", "CCU-seed1", "gen_eval", "CCU", "gen_attack_stats"])
    before = [("gen_gmm", "CCU"), ("gen_gmm", "CCU-seed1"), ("Base", "ODIN"), ("ODIN", "gen_eval"),
              ("CCU-seed1", "gen_eval"), ("CCU", "gen_attack_stats")]
    assert all(steps.index(first) < steps.index(then) for first, then in before)


def test_a_model_that_is_there_is_kept_without_its_mixtures(planned):
    """The authors' CCU has none here."""
    assert planned("LABELS=Base CCU", there=["Base", "CCU"])[0] == ["gen_eval", "gen_attack_stats"]
    assert planned("LABELS=Base CCU CCUs", there=["Base", "CCU"])[0] == [
        "gen_gmm", "CCUs", "gen_eval", "gen_attack_stats"]


def test_a_label_that_nothing_makes_is_refused_unless_its_model_is_there(planned):
    steps, error = planned("LABELS=CCU Mine")
    assert steps == [] and "unknown label Mine" in error
    assert planned("LABELS=CCU Mine", there=["CCU", "Mine"])[0] == ["gen_eval", "gen_attack_stats"]


def test_tables_of_other_models_are_made_anew(planned, tmp_path):
    """Those that come with the repository lie in results/, newer than the user's models perhaps."""
    tables = [tmp_path / f"results/table{i}_Digits.csv" for i in (1, 2)]
    tables[0].parent.mkdir()
    for table in tables:
        table.touch()
    assert planned("LABELS=Base CCU", there=["Base", "CCU"])[0] == ["gen_eval", "gen_attack_stats"]
    for i in (1, 2):
        (tmp_path / f"checkpoints/Digits/.table{i}").write_text("Base CCU\n")       # as make leaves them
    assert planned("LABELS=Base CCU")[0] == []
    assert planned("LABELS=CCU")[0] == ["gen_eval", "gen_attack_stats"]
    tables[0].unlink()
    assert planned("LABELS=Base CCU")[0] == ["gen_attack_stats"]


def test_a_check_leaves_the_models_that_are_there(planned, tmp_path):
    run = subprocess.run(["make", "-n", "check"], cwd=tmp_path, text=True, capture_output=True)
    demo = [line for line in run.stdout.splitlines() if ".py --dataset" in line and "echo" not in line]
    assert len(demo) == 7 and all(line.startswith("cd /") and f"cd {tmp_path} " not in line for line in demo)
