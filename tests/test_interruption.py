"""Runs that are killed, run out of space, diverge, or are started twice.

One helper process (this file as a script) imports everything once and forks a child for each run: a fresh Python
would take seconds for each of the hundred runs.  The state is saved after every step, so that many kills fall
into a write.
"""

import functools
import itertools
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pandas.io.formats.style  # noqa: F401   what the scripts import late, and each child would again
import pytest
import sklearn.cluster  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard
from conftest import run_script

import gen_attack_stats
import gen_eval
import gen_gmm
import model_paths
import run_training
import utils.data
import utils.objectives
import utils.state
from models import CCU, GMM, PCAMetric, Softmax
from models.classifiers import CLASSIFIERS, LeNet
from utils import checkpoints, files
from utils.batches import ImageSet

TRAIN = "run_training.py --dataset Digits --augm_flag 1 --batch_size 8"
JOBS = {
    "ACET2": f"{TRAIN} --train_type ACET --steps 2 --epochs 3",     # draws noise in every step
    "DE": f"{TRAIN} --train_type DE --members 2 --epochs 2",
    "EM": "gen_gmm.py --dataset Digits --augm_flag 1 --n 3 5",
    "attack": "gen_attack_stats.py --datasets Digits --fit_out 1 --radius 2 --steps 10 --restarts 2 --batches 2 "
              "--batch_size 2 --points 2 --vertical 1 --output results/t",        # two blocks of points a batch
}
KILLS = {"ACET2": 20, "DE": 10, "EM": 10, "attack": 20}
FULL = ("ACET2", "EM", "attack")
SCENARIOS = [*(f"killed {job}" for job in JOBS), *(f"full disk {job}" for job in FULL), "diverged", "twice", "backups"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """scenario -> None or the traceback of what failed."""
    folder = tmp_path_factory.mktemp("interruption")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run([sys.executable, __file__], cwd=folder, env=environment, check=True)
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_lost(scenario, outcomes):
    assert outcomes[scenario] is None, outcomes[scenario]


def test_temporary_files_of_killed_writes_go_with_the_next_write(tmp_path):
    old, new, other = (tmp_path / name for name in (".a.pt.1.tmp", ".a.pt.2.tmp", ".ab.pt.3.tmp"))
    with (tmp_path / ".a.pt.4.tmp").open("w") as busy:
        for path in (old, new, other):
            path.write_text("half")
        for path in (old, other, Path(busy.name)):
            os.utime(path, (0, 0))
        files._lock(busy.fileno())
        files.write_text(tmp_path / "a.pt", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", ".a.pt.2.tmp", ".ab.pt.3.tmp", ".a.pt.4.tmp"}


@pytest.mark.parametrize("after", [1, 5, 9])
@pytest.mark.parametrize("ending", [KeyboardInterrupt, MemoryError])
def test_what_ends_a_write_is_told_as_what_it_is(ending, after, tmp_path):
    """torch.save turns it into a RuntimeError of its own, which would pass for a disk that cannot be written to."""
    class Ended:
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == after:
                raise ending
            return len(data)

        def flush(self):
            pass
    with pytest.raises(ending):
        files.write(tmp_path / "a.pt", lambda file: torch.save({"x": torch.zeros(9)}, Ended()))
    assert not list(tmp_path.iterdir())


def test_files_are_for_those_whom_the_user_lets_read(tmp_path):
    before = os.umask(0o027)
    try:
        assert stat.S_IMODE(files.write_text(tmp_path / "a", "x").stat().st_mode) == 0o640
    finally:
        assert os.umask(before) == 0o027


# --- the helper process ------------------------------------------------------------------------------------

class Small(LeNet):
    """A state of 100 kB, not 40 MB."""

    def __init__(self, *args):
        super().__init__(*args)
        self.conv1, self.conv2 = torch.nn.Conv2d(1, 2, 5, padding=2), torch.nn.Conv2d(2, 4, 5, padding=2)
        self.fc1, self.fc2 = torch.nn.Linear(196, 32), torch.nn.Linear(32, 10)


def make_folder(name):
    """A folder with an untrained Base and CCU."""
    torch.manual_seed(0)
    os.makedirs(name)
    os.chdir(name)
    metric = PCAMetric.euclidean(784)
    mixtures = [GMM(torch.rand(2, 784), torch.full((2,), v), torch.full((2,), 0.5).log(), metric) for v in (-3.0, 1.0)]
    base = Small(1, 28, 10)
    for label, model in (("Base", Softmax(base)), ("CCU", CCU(base, *mixtures, 0.0, 10))):
        checkpoints.save_model(model, model_paths.model("Digits", label), {"epochs": 0})
    os.chdir("..")


def make_small():
    CLASSIFIERS["LeNet"] = CLASSIFIERS["Small"] = Small
    full = {split: utils.data.load_in_dist("Digits", split, "data").subset(slice(48)) for split in ("train", "test")}
    out = ImageSet("Photos", torch.randint(256, (64, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte(),
                   None, 0)
    for script in (gen_gmm, run_training, gen_attack_stats, gen_eval):
        script.load_in_dist = lambda name, split, *_: full[split]
    gen_gmm.load_out = lambda *_, **__: out


def start(folder, command, prepare=lambda: None) -> int:
    """Fork a run of `command`; its output goes to folder/log."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        prepare()
        run_script(command)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(folder, command, prepare=lambda: None) -> int:
    """Its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start(folder, command, prepare), 0)[1])


def succeed(folder, command):
    assert run(folder, command) == 0, Path(folder, "log").read_text()


def plain(value):
    """Tensors as bytes, without durations and what names the run."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in ("seconds", "record")}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def results(folder, job) -> dict:
    """File -> contents of what the job wrote and is complete."""
    paths = {"EM": "checkpoints/Digits/gmm/*.pt", "attack": "results/backup/*.pt"}.get(job, f"checkpoints/*/{job}.pt")
    found = {str(path.relative_to(folder)): plain(files.load(path)) for path in Path(folder).glob(paths)}
    if job == "attack":
        return found | {path.name: path.read_bytes() for path in Path(folder).glob("results/*.csv")}
    return found | {path.name: plain(json.loads(path.read_text())["history"])
                    for path in Path(folder).glob(f"checkpoints/*/{job}.json")}


def unchanged(folder, job, whole):
    """What is there is complete, and as an uninterrupted run writes it; states can be read."""
    assert results(folder, job).items() <= whole.items()
    for path in Path(folder).rglob("*.state"):
        files.load(path, utils.state.FORMAT)


def ends_like(folder, job, whole):
    succeed(folder, f"{JOBS[job]} --resume 1")
    assert results(folder, job) == whole
    assert not [path for pattern in ("*.state", "*.lock", ".attack_*") for path in Path(folder).rglob(pattern)]


def killed(folder, job, whole, seconds):
    rng, kills = random.Random(job), 0
    while kills < KILLS[job]:
        pid = start(folder, f"{JOBS[job]} --resume 1")
        begin, moment, status = time.monotonic(), rng.uniform(0, seconds), (0, 0)
        while not status[0] and time.monotonic() - begin < moment:
            time.sleep(0.002)
            status = os.waitpid(pid, os.WNOHANG)
        if status[0]:       # it was faster
            assert status[1] == 0, Path(folder, "log").read_text()
            seconds = max(time.monotonic() - begin, 0.7 * seconds)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        unchanged(folder, job, whole)
    ends_like(folder, job, whole)


def no_space(nth):
    """The nth file that is written does not fit on the disk: none of it, or not the end of it."""
    sync, calls = os.fsync, itertools.count(1)

    def fsync(descriptor):
        if next(calls) == nth:
            raise OSError(28, "No space left on device")
        sync(descriptor)
    os.fsync = fsync


def full_disk(folder, job, whole):
    for nth in itertools.count(1):
        prepare = functools.partial(no_space, nth)
        if nth % 3 == 0:
            largest = max((path.stat().st_size for path in Path(folder).rglob("*.state")), default=9999)
            prepare = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest * nth // 99,) * 2)
        code = run(folder, f"{JOBS[job]} --resume 1", prepare)
        log = Path(folder, "log").read_text()
        unchanged(folder, job, whole)
        assert not list(Path(folder).rglob("*.tmp")) and not list(Path(folder).rglob("*.lock"))
        if code == 0:
            break
        assert code == 2 and "can't write" in log and "Traceback" not in log, log
    assert nth > 4
    ends_like(folder, job, whole)


def diverged(folder):
    """A loss that is not finite in the 4th step of the 2nd epoch leaves the state before it."""
    def prepare():
        steps, step = itertools.count(1), utils.objectives.Plain.__call__

        def diverging(self, *args):
            loss, scalars = step(self, *args)
            return loss * (float("nan") if next(steps) == 10 else 1), scalars
        utils.objectives.Plain.__call__ = diverging
    make_folder(folder)
    assert run(folder, f"{TRAIN} --train_type plain --epochs 3", prepare) == 2
    assert "not finite in epoch 2" in Path(folder, "log").read_text()
    state = files.load(Path(folder, "checkpoints/Digits/Base.state"))
    assert (len(state["history"]), state["step"]) == (1, 3)
    assert all(value.isfinite().all() for value in state["model"].values())


def twice(folder):
    """The second run of one output ends at once and names the first; killed, the first does not block."""
    make_folder(folder)
    def pause():
        lock = files.lock
        files.lock = lambda path: (lock(path), print("locked", flush=True), signal.alarm(120), signal.pause())
    for job in FULL:
        first = start(folder, JOBS[job], pause)
        deadline = time.monotonic() + 60
        while not (Path(folder, "log").exists() and "locked" in Path(folder, "log").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert run(folder, JOBS[job]) == 2
        log = Path(folder, "log").read_text()
        assert f"process {first} on" in log and log.count("\n") == 1, log
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        assert list(Path(folder).rglob("*.lock"))
        succeed(folder, JOBS[job])
        assert not list(Path(folder).rglob("*.lock"))


def backups(folder):
    """Tables of one name in two folders keep their own."""
    make_folder(folder)
    for stem in ("a/t", "b/t"):
        succeed(folder, f"gen_eval.py --dataset Digits --models Base --output {stem}")
        succeed(folder, f"{JOBS['attack']} --models Base --output {stem}")
    for name in ("a/backup/t", "b/backup/t", "a/backup/t_Digits", "b/backup/t_Digits"):
        command = files.load(Path(folder, f"{name}.pt"))["record"]["command"]
        assert command.endswith(f"--output {name[0]}/t")


def main():
    torch.set_num_threads(1)
    utils.state.SAVE_EVERY = 0.0
    make_small()
    outcomes = {}

    def attempt(name, scenario, *args):
        begin = time.monotonic()
        try:
            scenario(*args)
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - begin:.1f} s", file=sys.stderr)

    for job, command in JOBS.items():
        for use in ("whole", "killed", "full disk"):
            make_folder(f"{use} {job}")
        begin = time.monotonic()
        succeed(f"whole {job}", command)
        seconds = time.monotonic() - begin
        whole = results(f"whole {job}", job)
        attempt(f"killed {job}", killed, f"killed {job}", job, whole, seconds)
        if job in FULL:
            attempt(f"full disk {job}", full_disk, f"full disk {job}", job, whole)
    for scenario in (diverged, twice, backups):
        attempt(scenario.__name__, scenario, scenario.__name__)
    Path("outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
