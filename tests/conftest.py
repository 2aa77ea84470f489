"""Shared by the tests: a small Digits run, made once by the scripts themselves."""

import importlib
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

COMMANDS = [
    "gen_gmm.py --dataset Digits --PCA 1 --augm_flag 1 --n 10 --data_used 600",
    "run_training.py --dataset Digits --train_type plain --augm_flag 1 --epochs 3",
    "run_training.py --dataset Digits --train_type CEDA_GMM --augm_flag 1 --use_gmm 1 --PCA 1 --fit_out 1 --n 10 "
    "--epochs 3",
]
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def run_script(command: str):
    """Run `script.py --options` in this process, as the shell would; on the CPU, also where there is a GPU."""
    name, *options = command.split()
    script = importlib.import_module(name.removesuffix(".py"))
    saved, sys.argv = sys.argv, [name, *options]
    try:
        from utils import cli
        parser = script.parser()
        if "--gpu" in parser._option_string_actions and "--gpu" not in options:
            sys.argv[1:1] = ["--gpu", "-1"]
        return cli.run(script.main, parser)
    finally:
        sys.argv = saved


def write_images(root, n, colours, seed, mode="RGB"):
    """n noisy images a class, of sizes that differ, most of them not square."""
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(n):
            height, width = rng.integers(8, 14, 2)
            pixels = np.clip(rng.normal(0, 30, (height, width, 3)) + colour, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


def killed(monkeypatch, run, command: str):
    """run(command), a training, killed before its checkpoint is written."""
    with monkeypatch.context() as patch:
        patch.setattr("run_training.evaluate_test", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(command)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A folder with the mixtures, Base and CCU of a short run; tests read it and write elsewhere."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("params.OUT_FIT_IMAGES", 2_000)
        for command in COMMANDS:
            run_script(command)
    return folder


@pytest.fixture
def work(digits_run, tmp_path, monkeypatch):
    """A copy of the small Digits run to work in."""
    shutil.copytree(digits_run / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def attacks(monkeypatch):
    """What each call of `attack` for Table 1 got, one a batch of a model; it finds nothing but the seeds."""
    import torch

    from utils import attack_batches
    from utils.attack import AttackResult
    calls = []

    def idle(model, metric, seeds, radii, steps, restarts, alpha, generator, **options):
        calls.append(SimpleNamespace(kind=type(model).__name__, seeds=seeds, radii=radii, steps=steps,
                                     restarts=restarts, alpha=alpha, seed=generator.initial_seed(),
                                     images=options["images"]))
        return AttackResult(seeds, model.attack_score(seeds), torch.zeros(len(seeds)))
    monkeypatch.setattr(attack_batches, "attack", idle)
    return calls
