"""Several processes do what one does: two on the CPU, started by torchrun as a user would.

This file is also what torchrun starts where a test looks inside the processes: `test_parallel.py NAME` calls NAME.
"""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_script
from torch import nn

import params
import run_training
from models import build_classifier
from utils import checkpoints, cli, files, load_model, objectives, parallel, state
from utils.data import load_in_dist
from utils.errors import UserError
from utils.out_data import load_out

REPOSITORY = Path(__file__).parent.parent
METHODS = {"CCU": "CEDA_GMM --fit_out 1 --n 10 --lr 1e-3 --lr_gmm 1e-6 --augm_flag 1",
           "ACET2": "ACET --steps 3", "GAN": "GAN", "DE": "DE --members 2"}


def torchrun(*command):
    """Two processes on the CPU; returns what one that starts a script sees."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           *map(str, command)], env=environment, text=True, capture_output=True, timeout=240)


def few(load, n):
    """A loader of the first n images of a data set."""
    return lambda *args, **options: load(*args, **options).subset(slice(n))


def train(*commands):
    """32 images in batches of 15, 15 and 2: not all can be halved.

    CCU with SGD: the gradient of a mean is a small difference of large terms, and of what rounding leaves of the
    smallest Adam makes whole steps.
    """
    saved, digits = (run_training.load_in_dist, run_training.load_out), params.DATASETS["Digits"]
    run_training.load_in_dist = few(load_in_dist, 32)
    run_training.load_out = lambda *args, **options: load_out(*args, **options | {"n": 50})
    try:
        for command in commands:
            args = run_training.parser().parse_args(
                f"--dataset Digits --epochs 2 --batch_size 15 --gpu -1 --train_type {command}".split())
            if args.train_type == "CEDA_GMM":
                params.DATASETS["Digits"] = dataclasses.replace(digits, optimizer="sgd")
            with parallel.quiet():
                run_training.main(args)
            params.DATASETS["Digits"] = digits
    finally:
        run_training.load_in_dist, run_training.load_out = saved


# --- run by torchrun ---------------------------------------------------------------------------------------

def trainings():
    """Every method as two processes do it, and a run with dropout in one piece and in two."""
    parallel.start()
    batch_norms_see_the_whole_batch()
    train(*(f"{command} --label two_{name}" for name, command in METHODS.items()))
    draw, steps = objectives.Plain.draw, itertools.count(1)

    def die(self, *batch):
        if next(steps) == 5:        # the second of the second epoch
            raise KeyboardInterrupt
        return draw(self, *batch)
    train("MCD --label whole --verbose 1")
    objectives.Plain.draw = die
    state.SAVE_EVERY = 0.0
    try:
        train("MCD --label halves")
    except KeyboardInterrupt:
        parallel.barrier()
    objectives.Plain.draw = draw
    assert Path("checkpoints/Digits/halves.state").exists()
    torch.manual_seed(99)
    train("MCD --label halves --resume 1")
    parallel.end()


def batch_norms_see_the_whole_batch():
    """Outputs, gradients and running statistics of a batch norm, by nn.BatchNorm2d on the batch of both processes."""
    torch.manual_seed(0)
    whole, own = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    parallel.sync_batch_norms(own, torch.device("cpu"))
    x = (torch.randn(5, 3, 4, 4) * 3 + 7).requires_grad_()
    target = torch.randn(5, 3, 4, 4)
    (whole(x) * target).mean((1, 2, 3)).square().mean().backward()
    mine = x.detach().requires_grad_()
    weight, (part, part_target) = parallel.shard(5, mine, target)
    out = own(part)
    (weight * (out * part_target).mean((1, 2, 3)).square().mean()).backward()
    parallel.sum_gradients([*own.parameters(), nn.Parameter(mine)])
    torch.distributed.all_reduce(mine.grad)     # a process has gradients of its own images only
    for a, b in [(mine.grad, x.grad), (own.weight.grad, whole.weight.grad), (own.bias.grad, whole.bias.grad),
                 *zip(own.state_dict().values(), whole.state_dict().values(), strict=True)]:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert list(own.state_dict()) == list(whole.state_dict())
    x = x.detach().bfloat16()       # as --amp 1 gives it: the statistics are of float32 all the same
    _, (part, wanted) = parallel.shard(5, x, whole(x.float()))
    torch.testing.assert_close(own(part), wanted.bfloat16())
    torch.testing.assert_close(own.running_var, whole.running_var)


def one_of_two_fails():
    def main(args):
        if parallel.rank() == 1:
            raise UserError("only here")
        parallel.barrier()
    cli.run(main, cli.Parser("A script.").common(), several=True)


# --- tests -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, size", [(128, 2), (29, 4), (5, 3), (3, 3), (2, 3), (1, 8)])
def test_shares_times_their_weights_add_up_to_the_mean_over_the_batch(n, size, monkeypatch):
    x, z, total = torch.rand(n, 4, dtype=torch.double), torch.rand(2 * n, 4, dtype=torch.double), 0
    monkeypatch.setattr(parallel, "world_size", lambda: size)
    for r in range(size):
        monkeypatch.setattr(parallel, "rank", functools.partial(int, r))
        weight, (own_x, own_z, nothing) = parallel.shard(n, x, z, None)
        assert len(own_z) == 2 * len(own_x) > 0 and nothing is None
        total = total + weight * torch.stack((own_x.mean(0), own_z.mean(0)))
    torch.testing.assert_close(total, torch.stack((x.mean(0), z.mean(0))))


def start(name):
    """The weights that a method's training starts from, by their keys."""
    weights = {}
    for i, prefix in enumerate(("base_model.0.", "base_model.1.") if name == "DE" else ("base_model.",)):
        torch.manual_seed(i)
        weights |= {prefix + key: value for key, value in build_classifier("LeNet", 1, 28, 10).state_dict().items()}
    if name == "CCU":
        *gmms, _ = checkpoints.load_mixtures("checkpoints/Digits/gmm/pca_n10_Photos.pt", "")
        for gmm, part in zip(gmms, ("in", "out"), strict=True):
            weights |= {f"gmm_{part}.{key}": value for key, value in gmm.named_parameters()}
    return weights


def test_two_processes_end_in_the_weights_of_one(work):
    """To 1e-3 of the way that training moves the weights.  Sums in another order differ by 1e-7 of a gradient's terms,
    and Adam divides by the gradient's size: 1e-4 of the way was seen.  Wrong weights of the parts change 1e-1 of it,
    a step of the GAN's networks that each process makes alone 5e-2."""
    done = torchrun(__file__, "trainings")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == len(METHODS) + 3       # rank 0 alone prints; DE has two
    train(*(f"{command} --label one_{name}" for name, command in METHODS.items()))
    for name in METHODS:
        one, two = (load_model(f"checkpoints/Digits/{count}_{name}.pt").state_dict() for count in ("one", "two"))
        assert list(one) == list(two)
        begin = start(name)
        for key in one:
            way = one[key] - begin.get(key, one[key])      # 0 for what is not trained
            assert (two[key] - one[key]).norm() <= 1e-3 * way.norm(), (name, key)
        histories = [json.loads(Path(f"checkpoints/Digits/{count}_{name}.json").read_text())["history"]
                     for count in ("one", "two")]
        for a, b in zip(*(h if name != "DE" else h[0] for h in histories), strict=True):
            assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
                {k: v for k, v in b.items() if k != "seconds"}, rel=1e-3, abs=1e-5)
    whole, halves = (load_model(f"checkpoints/Digits/{name}.pt").state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    assert not list(Path("checkpoints/Digits").glob("*.state"))


def test_two_processes_make_the_same_table_1(work):
    options = ("--datasets Digits --fit_out 1 --steps 3 --restarts 2 --batches 3 --batch_size 4 --gpu -1 "
               "--certify 1 --output ")
    done = torchrun(REPOSITORY / "gen_attack_stats.py", *options.split(), "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two.csv") == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # as torchrun does: sums round differently with more
    try:
        run_script("gen_attack_stats.py " + options + "one")
    finally:
        torch.set_num_threads(threads)
    assert Path("two.csv").read_bytes() == Path("one.csv").read_bytes()
    one, two = (files.load(f"backup/{name}_Digits.pt")["models"] for name in ("one", "two"))
    assert all(torch.equal(one[label][key], two[label][key]) for label in one for key in one[label])
    assert not list(Path("backup").glob(".attack_*"))


@pytest.mark.parametrize("command, line", [
    ((REPOSITORY / "run_training.py", "--dataset", "Digits", "--train_type", "CEDA_GMM"),
     "run_training.py: there is no file"),
    ((__file__, "one_of_two_fails"), "test_parallel.py: only here"),
])
def test_an_error_ends_all_processes_with_one_line(command, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = torchrun(*command)
    assert done.returncode != 0
    said = done.stderr.split("torch/distributed/elastic")[0]        # before torchrun's own report
    assert done.stderr.count(line) == 1 and "Traceback" not in said.split(line)[0], done.stderr
    assert "Connection closed" not in done.stderr and "epoch" not in done.stdout


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
