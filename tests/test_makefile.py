"""`make tables` makes what is missing and keeps what is there."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
HOUR = 3600 * 10 ** 9       # in nanoseconds
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """`make -j2 check` runs these tests, too."""
    for name in ("MAKEFLAGS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a clone").mkdir()
    return tmp_path / "a clone"


@pytest.fixture
def planned(folder):
    """What `make TARGET` would run where the models `there` are, by name: the scripts' names and labels in turn."""
    for name in ("Makefile", "model_paths.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv").mkdir()
    (folder / ".venv/.installed").touch()

    def plan(*options, there=(), target="tables"):
        for label in there:
            (folder / f"checkpoints/Digits/{label}.pt").parent.mkdir(parents=True, exist_ok=True)
            (folder / f"checkpoints/Digits/{label}.pt").touch()
        run = subprocess.run(["make", "-n", target, *options], cwd=folder, text=True, capture_output=True)
        lines = [line for line in run.stdout.splitlines() if ".py" in line]
        lines = [line.removeprefix("exec ") for line in lines]
        assert all(shlex.split(line)[0] == str(folder / ".venv/bin/python") for line in lines)
        steps = [line.split("options(\"")[1].split('"')[0] if "run_training.py" in line else
                 Path(shlex.split(line)[1]).stem for line in lines]
        return steps, run.stderr
    return plan


def test_what_is_missing_is_made_in_order(planned):
    steps, _ = planned("LABELS=ODIN CCU-seed1")
    assert sorted(steps) == sorted(["gen_gmm", "Base", "ODIN", "CCU-seed1", "gen_eval", "CCU", "gen_attack_stats"])
    before = [("gen_gmm", "CCU"), ("gen_gmm", "CCU-seed1"), ("Base", "ODIN"), ("ODIN", "gen_eval"),
              ("CCU-seed1", "gen_eval"), ("CCU", "gen_attack_stats")]
    assert all(steps.index(first) < steps.index(then) for first, then in before)


def test_one_script_fetches_the_data_before_all_others(planned):
    assert planned("LABELS=Base CCU")[0][:2] == ["Base", "gen_gmm"]
    assert planned("LABELS=Base CCU", "ARGS=--download 1")[0][:2] == ["gen_gmm", "Base"]
    for args, scripts in (("", ["gen_attack_stats"]), ("--download 1", ["gen_eval", "gen_attack_stats"])):
        assert planned("LABELS=CCU", f"ARGS={args}", there=["CCU"], target="checkpoints/Digits/.table1")[0] == scripts


@pytest.mark.parametrize("page, script", [("results", "gen_results"), ("figures", "gen_figures")])
def test_pages_are_made_of_the_tables_that_are_made_with_them(page, script, planned):
    assert planned("tables", "LABELS=Base", target=page)[0][-1] == script
    assert planned(target=page)[0] == [script]


def test_a_model_that_is_there_is_kept_without_its_mixtures(planned):
    """The authors' CCU has none here."""
    assert planned("LABELS=Base CCU", there=["Base", "CCU"])[0] == ["gen_eval", "gen_attack_stats"]
    assert planned("LABELS=Base CCU CCUs", there=["Base", "CCU"])[0] == [
        "gen_gmm", "CCUs", "gen_eval", "gen_attack_stats"]


def test_a_label_that_nothing_makes_is_refused_unless_its_model_is_there(planned):
    steps, error = planned("LABELS=CCU Mine")
    assert steps == [] and "unknown label Mine" in error
    assert planned("LABELS=CCU Mine", there=["CCU", "Mine"])[0] == ["gen_eval", "gen_attack_stats"]


@pytest.mark.parametrize("label", ["CCU-seed", "CCU-seed{1,2}", "CCU-seed1,", "CCU-seed1x"])
def test_a_mistyped_seed_is_an_unknown_label(label, planned):
    steps, error = planned(f"LABELS=CCU {label}")
    assert steps == [] and f"unknown label {label}" in error


def test_one_seed_for_labels_of_several_is_refused(planned):
    for variable in ("ARGS", "TRAIN_ARGS"):
        steps, error = planned("LABELS=CCU CCU-seed1", f"{variable}=--seed 5")
        assert steps == [] and "--seed" in error
        assert "Base" in planned("LABELS=CCU Base", f"{variable}=--seed 5")[0]


def test_variables_that_are_no_single_word(planned, folder):
    """A folder's name may have spaces; one data set and at least one label are needed."""
    command = ["make", "-n", "mixtures", "OUT_DATASET=Folder", "OUT_DIR=my photos", "DATA_DIR=my data",
               "GMM_ARGS=--PCA 0 --n 9"]
    run = subprocess.run(command, cwd=folder, text=True, capture_output=True)
    words, = (shlex.split(line) for line in run.stdout.splitlines() if "gen_gmm.py" in line)
    assert words[-4:] == ["--PCA", "0", "--n", "9"]         # the last word counts
    assert words[words.index("--out_dir") + 1] == "my photos" and words[words.index("--data_dir") + 1] == "my data"
    for option in ("DATASET=MNIST FMNIST", "LABELS="):
        steps, error = planned(option)
        assert steps == [] and f"*** {option.partition('=')[0]}: give" in error


def test_out_images_go_to_those_who_take_them(folder, planned):
    labels = "Base CEDA-seed1 OE ACET ACET-seed1 ACET2 ACET2-seed1 CCU CCUs MCD EDL DE GAN ODIN Maha"
    run = subprocess.run(["make", "-n", "tables", "OUT_DATASET=CIFAR10", f"LABELS={labels}"], cwd=folder, text=True,
                         capture_output=True)
    given = {line.split('options("')[1].split('"')[0] for line in run.stdout.splitlines()
             if "run_training.py" in line and "--out_dataset CIFAR10" in line}
    assert given == {"CEDA-seed1", "OE", "ACET", "ACET-seed1", "CCU", "CCUs", "ODIN", "Maha"}


def test_tables_of_other_models_are_made_anew(planned, folder):
    """Those that come with the repository lie in results/, newer than the user's models perhaps."""
    tables = [folder / f"results/table{i}_Digits.csv" for i in (1, 2)]
    tables[0].parent.mkdir()
    for table in tables:
        table.touch()
    assert planned("LABELS=Base CCU", there=["Base", "CCU"])[0] == ["gen_eval", "gen_attack_stats"]
    for i, more in ((1, ", 100 steps, 5 restarts"), (2, "")):
        (folder / f"checkpoints/Digits/.table{i}").write_text(f"Base CCU{more}\n")       # as make leaves them
    assert planned("LABELS=Base CCU")[0] == []
    assert planned("LABELS=CCU")[0] == ["gen_eval", "gen_attack_stats"]
    own = "EVAL_ARGS=--ood \"A=my photos\" B='b c'"
    assert planned("LABELS=Base CCU", own) == (["gen_eval"], "")
    (folder / "checkpoints/Digits/.table2").write_text("Base CCU --ood A=my photos B=b c\n")
    assert planned("LABELS=Base CCU", own)[0] == []
    (folder / "checkpoints/Digits/.table2").write_text("Base CCU\n")
    assert planned("LABELS=Base CCU", "STEPS=7")[0] == ["gen_attack_stats"]
    assert planned("LABELS=Base CCU", "ARGS=--download 1")[0] == ["gen_eval"]      # there may be more OOD sets
    assert planned("LABELS=Base CCU", "ARGS=--seed 1")[0] == ["gen_eval", "gen_attack_stats"]
    assert planned("LABELS=Base CCU", "DATA_DIR=my data") == (["gen_eval", "gen_attack_stats"], "")
    now = time.time_ns()
    os.utime(tables[1], ns=(now + HOUR, now + HOUR))      # as another command leaves it
    assert planned("LABELS=Base CCU")[0] == ["gen_eval"]
    os.utime(tables[1], ns=(now - HOUR, now - HOUR))
    tables[0].unlink()
    assert planned("LABELS=Base CCU")[0] == ["gen_attack_stats"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_model_replaced_during_the_work_leaves_the_tables_to_be_made_anew(replaced, planned, folder):
    planned("LABELS=Base CCU", there=["Base", "CCU"])
    then = time.time_ns() - HOUR
    for path in (folder / "checkpoints/Digits").glob("*.pt"):
        os.utime(path, ns=(then, then))
    fake_python(folder, "test $1 = -c || mkdir -p results; case $1 in gen_eval.py) touch results/table2_Digits.csv;; "
                "gen_attack_stats.py) touch results/table1_Digits.csv; sleep 0.1" + "; touch checkpoints/Digits/Base.pt"
                * replaced + ";; esac")
    run = subprocess.run(["make", "tables", "LABELS=Base CCU"], cwd=folder, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert planned("LABELS=Base CCU")[0] == ["gen_eval", "gen_attack_stats"] * replaced
    assert not list(folder.rglob("*.begun"))


def test_what_ends_make_ends_its_training(planned, folder):
    fake_python(folder, "test $1 = -c || { echo $$ > pid; exec sleep 60; }")
    with subprocess.Popen(["make", "checkpoints/Digits/Base.pt"], cwd=folder, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as make:
        while not (folder / "pid").exists() or not (pid := (folder / "pid").read_text()):
            assert make.poll() is None
            time.sleep(0.01)
        make.terminate()
    with pytest.raises(ProcessLookupError):
        for _ in range(2000):
            os.kill(int(pid), 0)
            time.sleep(0.01)


def fake_python(folder, script):
    python = folder / ".venv/bin/python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


def test_an_interrupt_leaves_the_model_that_has_just_been_written(planned, folder):
    """make would delete it, as a target whose recipe did not end."""
    fake_python(folder, "case $1 in run_training.py) mkdir -p checkpoints/Digits; echo x > checkpoints/Digits/Base.pt; "
                "kill -INT 0;; esac")
    run = subprocess.run(["make", "checkpoints/Digits/Base.pt"], cwd=folder, text=True, capture_output=True,
                         start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # nohup's ignores it
    assert run.returncode and (folder / "checkpoints/Digits/Base.pt").exists(), run.stderr


@pytest.mark.parametrize(("flags", "threads", "expected"), [
    (["-j2"], {}, (CORES + 1) // 2), (["-j1000"], {}, 1), (["-j2"], {"OMP_NUM_THREADS": "7"}, 7), ([], {}, ""),
    (["-j"], {}, "")])
def test_trainings_side_by_side_share_the_cores(planned, folder, flags, threads, expected):
    fake_python(folder, 'case $1 in run_training.py) echo "threads: $OMP_NUM_THREADS";; esac')
    run = subprocess.run(["make", *flags, "checkpoints/Digits/Base.pt"], cwd=folder, text=True, capture_output=True,
                         env=os.environ | threads)
    assert f"threads: {expected}\n" in run.stdout, run.stderr


def test_a_check_leaves_the_models_that_are_there(planned, folder):
    run = subprocess.run(["make", "-n", "check"], cwd=folder, text=True, capture_output=True)
    demo = [line for line in run.stdout.splitlines() if ".py --dataset" in line and "echo" not in line]
    assert len(demo) == 7 and all(line.startswith('cd "/') and f'cd "{folder}"' not in line for line in demo)
