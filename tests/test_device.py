"""The scripts keep to their device, and do not wait for it within their loops: seen on a pretended GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pretend_gpu
import pytest
import torch
from conftest import COLOURS, run_script, write_images
from torch.utils import backend_registration

from models import PCAMetric, Softmax, build_classifier
from utils import load_model, save_model
from utils.attack import attack
from utils.batches import ImageSet
from utils.evaluation import evaluate
from utils.region import Coordinates

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this PyTorch knows no backends in Python", allow_module_level=True)

ROOT = Path(__file__).parent.parent
TRAIN = "run_training.py --dataset Digits --augm_flag 1 --n 10 --epochs 1 --gpu 0"
CCU = f"{TRAIN} --train_type CEDA_GMM --fit_out 1"


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """Run commands on the pretended GPU in one folder; how often each waited."""
    folder = tmp_path_factory.mktemp("pretend")

    def run(*commands: str) -> list[dict]:
        done = subprocess.run([sys.executable, "-m", "tests.pretend_gpu", folder / "waits.json", *commands], cwd=folder,
                              env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "waits.json").read_text())
    run.folder = folder
    run("gen_gmm.py --dataset Digits --n 10 --data_used 300 --gpu 0", f"{TRAIN} --train_type plain --batch_size 90")
    return run


def test_training_does_not_wait_for_its_steps(pretended):
    train_types = ("ACET --steps 2", "CEDA_GMM --fit_out 1", "MCD", "EDL", "GAN")
    waits = pretended(*(f"{TRAIN} --train_type {train_type} --label X --batch_size {size}" for train_type in train_types
                        for size in (90, 45)))
    for train_type, few, many in zip(train_types, waits[::2], waits[1::2], strict=True):
        assert few == many, train_type
        assert few["aten::_local_scalar_dense"] < 60, train_type        # once an epoch, for each tensor


def test_numbers_are_those_of_the_cpu(pretended, tmp_path, monkeypatch):
    pretend_gpu.shorten(monkeypatch.setattr)
    pretended(f"{CCU} --batch_size 45")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_script("gen_gmm.py --dataset Digits --n 10 --data_used 300")
        run_script(f"{CCU.replace('--gpu 0', '')} --batch_size 45")
    finally:
        torch.set_num_threads(threads)
    here, there = (load_model(folder / "checkpoints/Digits/CCU.pt") for folder in (tmp_path, pretended.folder))
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], value, msg=name)


def test_tables_attack_and_calibration_keep_to_the_device(pretended):
    waits = pretended(
        f"{CCU} --batch_size 90", f"{TRAIN} --train_type DE --members 2 --batch_size 90",
        f"{TRAIN} --train_type Maha --batch_size 100", f"{TRAIN} --train_type MCD --batch_size 90",
        f"{TRAIN} --train_type ODIN --batch_size 100",
        "gen_eval.py --dataset Digits --models Base CCU MCD DE Maha ODIN --certify 1",
        *(f"gen_attack_stats.py --datasets Digits --fit_out 1 --batches 1 --batch_size 4 --restarts 2 --certify 1 "
          f"--models Base CCU Maha --steps {steps}" for steps in (2, 5)))
    assert waits[-2] == waits[-1]           # not once a step


def test_colour_images_keep_to_the_device(pretended):
    """Also ResNet18, and edges that are padded by reflection."""
    write_images(pretended.folder / "images" / "train", 40, COLOURS, 0)
    write_images(pretended.folder / "images" / "test", 8, COLOURS, 1)
    data = "--dataset Folder --data_dir images --image_size 8 --gpu 0"
    train = f"run_training.py {data} --augm_flag 1 --n 5 --epochs 1 --train_type"
    waits = pretended(f"gen_gmm.py {data} --PCA 0 --n 5 --augm_flag 1",
                      *(f"{train} {train_type} --PCA 0 --batch_size {size}"
                        for train_type in ("plain", "CEDA_GMM --fit_out 1") for size in (60, 30)),
                      f"gen_eval.py {data} --batch_size 10",
                      "gen_attack_stats.py --datasets Folder --data_dir images --image_size 8 --fit_out 1 --batches 1 "
                      "--batch_size 4 --restarts 1 --steps 2 --gpu 0")
    assert waits[1] == waits[2] and waits[3] == waits[4]


@pytest.fixture
def precisions(monkeypatch):
    """The way of convolving that is set at each pass of a Softmax: (TF32 allowed, deterministic)."""
    seen, log_softmax = [], Softmax.log_softmax

    def watched(self, x):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic))
        return log_softmax(self, x)
    monkeypatch.setattr(Softmax, "log_softmax", watched)
    yield seen
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.deterministic       # training's again


FULL, FAST = (False, True), (True, False)


def test_scores_are_of_full_precision_on_a_gpu(precisions):
    images = ImageSet("images", torch.zeros(4, 1, 28, 28, dtype=torch.uint8), None, 0)
    evaluate(Softmax(build_classifier("LeNet", 1, 28, 10)), images, 2)
    assert precisions == [FULL] * 2


def test_an_attack_climbs_fast_and_chooses_in_full_precision(precisions):
    model, seeds = Softmax(build_classifier("LeNet", 1, 8, 10)).eval(), torch.rand(3, 1, 8, 8)
    attack(model, Coordinates(PCAMetric.euclidean(64)), seeds, torch.ones(3), steps=4, restarts=1)
    assert precisions == [FULL] + 4 * [FAST] + [FULL]       # the seeds, the search, what it found


def test_a_model_from_a_gpu_holds_the_metric_once(digits_run, tmp_path, monkeypatch):
    path = digits_run / "checkpoints/Digits/CCU.pt"
    ccu = load_model(path)
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)        # as from a GPU: a copy
    copied = save_model(ccu, tmp_path / "copied.pt")
    assert copied.stat().st_size < path.stat().st_size + 10_000
