"""How fast it is, against the bare network and against the plain way of doing each thing.

    python benchmarks/run.py                # the CPU
    python benchmarks/run.py --gpu 0        # a GPU
    python benchmarks/run.py --quick 1      # few repeats, small sizes: does it run?

What is compared runs in turn, in one process, and medians count; but the naive step, memory, and an epoch in two
processes are measured in processes of their own, unrecorded steps after the recorded ones, and the fits, the loader
with PIL and brentq once each.  Prints a table and one JSON line a figure, and writes these to
results/benchmark_<machine>.json.  Where the target is an upper limit, a ratio is ours / baseline, where it is a lower
one, how many times better ours is.  The baselines (baselines.py) are simple: naive = rotate every difference of an
image and a centroid, as the published code does; scikit-learn's fit; scipy's brentq, point by point; a DataLoader with
PIL transforms.  Nothing else should run beside it.  About 15 minutes on two cores.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from baselines import NaiveCCU, brentq_radius, pil_epoch
from fits import gmm_fits
from measure import Operations, Report, climb, in_child, interleaved, reset_peak, several, status

import model_paths
import params
from models import CCU, GMM, PCAMetric, Softmax, build_classifier, certified_radius
from utils import cli, files, records
from utils.attack import attack, score_and_gradient
from utils.batches import Augmentation, ImageSet, batches
from utils.evaluation import evaluate
from utils.graphs import WARM_UP, recorded
from utils.objectives import CEDA, CEDA_GMM, Plain
from utils.region import Coordinates, Region
from utils.state import State
from utils.training import Settings, make_optimizer, take_step, train

NETWORKS = {"LeNet": (1, 28), "ResNet18": (3, 32)}      # channels, size
K, M, B = params.CENTROIDS, 10, params.BATCH_SIZE


def repeats(arch: str, device: torch.device, quick: bool) -> int:
    return 2 if quick else 3 if arch == "ResNet18" and device.type == "cpu" else 7


# --- what is measured on ------------------------------------------------------------------------------------------

def make_ccu(arch: str, device: torch.device, shape: tuple[int, int] | None = None) -> CCU:
    """A CCU of the default shape or of [channels, size]; it takes the same time whatever the numbers are."""
    channels, size = shape or NETWORKS[arch]
    D = channels * size ** 2
    generator = torch.Generator().manual_seed(0)
    metric = PCAMetric(torch.linalg.qr(torch.randn(D, D, generator=generator))[0], torch.linspace(10, 0.1, D))
    gmms = [GMM(torch.rand(K, D, generator=generator), torch.full((K,), math.log(var)),
                torch.full((K,), -math.log(K)), metric) for var in (0.05, 0.5)]
    base = build_classifier(arch, channels, size, M)
    return CCU(base, *gmms, 0.0, M).to(device).to(memory_format=torch.channels_last)


def make_batch(arch: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    channels, size = NETWORKS[arch]
    x, z = torch.rand(2, B, channels, size, size, device=device)
    return x, torch.arange(B, device=device) % M, z


def settings(arch: str, epochs: int = 1) -> Settings:
    optimizer = params.NETWORKS[arch]["optimizer"]
    return Settings(optimizer, params.LR[optimizer] / 100, params.LR_GMM, params.WEIGHT_DECAY, ("mu", "var"), epochs,
                    B, 0)


KINDS = {"ceda": CEDA, "ccu": CEDA_GMM, "naive_ccu": NaiveCCU}


def make_step(kind: str, arch: str, amp: bool, device: torch.device, compiled: bool = False, record: bool = True):
    """A training step on images that are there already; compiled: by torch.compile, the whole loss.

    Recorded, on a GPU, as in training.
    """
    model, objective = make_ccu(arch, device), KINDS[kind]()
    if kind == "ceda":
        model = Softmax(model.base_model)
    model.amp = amp
    if compiled:
        objective.loss = torch.compile(objective.loss)
    model.train()
    objective.constrain(model)
    step = partial(take_step, model, objective, make_optimizer(model, settings(arch)), *make_batch(arch, device), None)
    return recorded(step, device) if record else step


# --- the figures -----------------------------------------------------------------------------------------------------

def steps(report: Report, device: torch.device, quick: bool) -> None:
    """ccu_step / ceda_step, and naive_ccu_step / ccu_step with the memory of all three."""
    for arch in NETWORKS:
        for amp in (False, True) if cli.has_bf16(device) else (False,):
            kinds = {kind: make_step(kind, arch, amp, device) for kind in ("ceda", "ccu")}
            often = 3 if quick else {"LeNet": 41, "ResNet18": 7}[arch] if device.type == "cpu" else 100
            took = interleaved(kinds, often, device)
            most = 1.10 if device.type == "cuda" else 1.05 if arch == "ResNet18" else 1.35 if amp else 1.10
            report.add(f"ccu_step / ceda_step, {arch}{', bf16' * amp}", 1e3 * took["ccu"], "ms", 1e3 * took["ceda"],
                       took["ccu"] / took["ceda"], most)
            if device.type == "cuda":
                for kind in kinds:
                    plain = make_step(kind, arch, amp, device, record=False)
                    ms = 1e3 * interleaved({"plain": plain}, 3 if quick else 30, device)["plain"]
                    report.add(f"unrecorded {kind}_step / {kind}_step, {arch}{', bf16' * amp}", 1e3 * took[kind], "ms",
                               ms, ms / (1e3 * took[kind]))
        if quick and arch == "ResNet18" and device.type == "cpu":
            continue
        # another way of the step: kind, whether freed memory is kept, and the targets of its time and memory
        others = {"naive_ccu_step": ("naive_ccu", False, {"LeNet": 15, "ResNet18": 4}[arch], 0.25),
                  "ceda_step": ("ceda", True, None, None)}
        if device.type == "cpu":
            others |= {"naive_ccu_step, freed memory kept": ("naive_ccu", True, None, None),
                       "ccu_step, freed memory not kept": ("ccu", False, None, None)}
        often = 1 if quick else 3
        ours, needs = in_child(cost_of_step, "ccu", arch, device.index, True, often)
        for name, (kind, keep, least, most) in others.items():
            ms, mib = in_child(cost_of_step, kind, arch, device.index, keep, often)
            if kind != "ceda":
                report.add(f"{name} / ccu_step, {arch}", ours, "ms", ms, ms / ours, least=least)
            if mib is not None:
                report.add(f"memory of ccu_step / {name}, {arch}", needs, "MiB", mib, needs / mib, most=most)


def operations(report: Report, device: torch.device, quick: bool) -> None:
    """How many operations a step is, on any device: where they are small, a GPU waits for the next one's launch."""
    for arch in ("LeNet",) if quick else NETWORKS:
        counts = {}
        for kind in ("ceda", "ccu"):
            step = make_step(kind, arch, False, device)
            step()
            with Operations() as seen:
                step()
            counts[kind] = seen.count
        report.add(f"operations of ccu_step / ceda_step, {arch}", counts["ccu"], "operations", counts["ceda"],
                   counts["ccu"] / counts["ceda"])


def compiled(report: Report, device: torch.device, quick: bool) -> None:
    """Whether torch.compile would pay: run_training.py does not use it."""
    amp = device.type == "cuda"
    for arch in ("LeNet",) if quick else NETWORKS:
        try:
            took = interleaved({"plain": make_step("ccu", arch, amp, device),
                                "compiled": make_step("ccu", arch, amp, device, compiled=True)},
                               20 if amp else repeats(arch, device, quick), device)
        except Exception as error:          # no C++ compiler, say; the other figures are wanted all the same
            print(f"compiled: {error!r}"[:200], file=sys.stderr)
            continue
        report.add(f"compiled ccu_step / ccu_step, {arch}, default{', bf16' * amp}", 1e3 * took["compiled"], "ms",
                   1e3 * took["plain"], took["compiled"] / took["plain"])


def cost_of_step(kind: str, arch: str, gpu: int | None, keep: bool, repeats: int) -> tuple[float, float | None]:
    """Milliseconds of a step, and MiB that it needs on top of model, optimiser and images (None: can't be told).

    For a process of its own, which with `keep` keeps freed memory as run_training.py does.
    """
    device = cli.device(-1 if gpu is None else gpu)
    if keep:
        cli.keep_freed_memory()
    step = make_step(kind, arch, False, device)
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        needed = torch.cuda.max_memory_allocated() - before
    elif before := reset_peak():
        step()
        needed = status("VmHWM") - before
    else:
        needed = None
    several(WARM_UP if device.type == "cuda" else 0, step)      # recorded by then
    return 1e3 * interleaved({"step": step}, repeats, device)["step"], needed and needed / 2 ** 20


def loader(report: Report, device: torch.device, quick: bool) -> None:
    """Augmented MNIST-shaped batches a second."""
    n = 4_000 if quick else 60_000
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 28, 28), np.uint8)
    data = ImageSet("MNIST", torch.from_numpy(images)[:, None], torch.zeros(n, dtype=torch.int64), M).to(device)
    generator = torch.Generator(device).manual_seed(0)
    augmentation = Augmentation.of(params.DATASETS["MNIST"])

    def ours():
        for _ in batches(data, B, generator, augmentation):
            pass
    rate = n / interleaved({"ours": ours}, 3, device)["ours"]
    few = images[:2_000 if quick else 20_000]
    rates = {workers: len(few) / pil_epoch(few, B, workers) for workers in (0, 1, 2, 4, 8) if workers <= os.cpu_count()}
    workers, baseline = max(rates.items(), key=lambda item: item[1])
    report.add("loader", rate, "images/s", baseline, rate / baseline, least=30, workers=workers)


def attacks(report: Report, device: torch.device, quick: bool) -> None:
    """A step of the attack against a forward and a backward pass, and the default Table-1 job."""
    for arch in ("LeNet",) if quick and device.type == "cpu" else NETWORKS:
        ccu = make_ccu(arch, device).eval()
        n = 500 if arch == "LeNet" or device.type == "cuda" else 50
        channels, size = NETWORKS[arch]
        x = torch.rand(n, channels, size, size, device=device)
        coordinates = Coordinates(ccu.gmm_in.metric)
        region = Region(coordinates, x, torch.full((n,), 5.0, dtype=torch.float64, device=device))
        count = 2 if quick else 100 if device.type == "cuda" else 10
        for label, model in {"Base": Softmax(ccu.base_model).eval(), "CCU": ccu}.items():
            one = recorded(partial(score_and_gradient, model.attack_score, x), device)
            few = WARM_UP + 2 if device.type == "cuda" else 1           # on a GPU recorded by then
            several(few, one)
            passes = partial(several, count, one)                       # as long as the steps
            took = interleaved({"one": partial(climb, model.attack_score, region, few),
                                "more": partial(climb, model.attack_score, region, few + count), "passes": passes},
                               repeats(arch, device, quick), device)
            step, bare = (took["more"] - took["one"]) / count, took["passes"] / count
            report.add(f"attack_step / passes, {arch}, {label}", 1e3 * step, "ms", 1e3 * bare, step / bare, most=1.15,
                       batch=n)
            if arch == "LeNet":
                seeds = params.ATTACK_BATCHES * params.ATTACK_BATCH_SIZE
                restarts, many = params.ATTACK_RESTARTS, params.ATTACK_STEPS
                if device.type == "cuda" and not quick:
                    z, radii = x[:params.ATTACK_BATCH_SIZE], region.radii[:params.ATTACK_BATCH_SIZE]    # one batch
                    batch = partial(attack, model, coordinates, z, radii, many, restarts)
                    job = params.ATTACK_BATCHES * interleaved({"batch": batch}, 1, device)["batch"]
                else:
                    job = step * many * seeds * restarts / n
                report.add(f"Table 1, {arch}, {label}: {seeds} seeds x {restarts} restarts x {many} steps", job / 3600,
                           "h", measured=device.type == "cuda" and not quick)


def certificates(report: Report, device: torch.device, quick: bool) -> None:
    """Certified radii a second, against brentq point by point on the paper's bound, also for the tight one."""
    ccu = make_ccu("LeNet", device).eval()
    ccu.gmm_in.metric.singular_values.fill_(1.0)
    with torch.no_grad():       # as on MNIST: seeds of uniform noise, centroids nearly black
        ccu.gmm_in.mu.mul_(0.3)
        ccu.gmm_out.mu.mul_(0.8)
    x = torch.rand(1000, 1, 28, 28, device=device)
    took = interleaved({method: partial(certified_radius, ccu, x, method=method) for method in
                        ("paper", "tight")}, 1 if quick else 5, device)
    points = x[:2 if quick else 5].cpu().double().flatten(1).numpy()
    start = time.perf_counter()
    found = [brentq_radius(ccu, point) for point in points]
    baseline = len(points) / (time.perf_counter() - start)
    ours = certified_radius(ccu, x[:len(points)], method="paper").cpu().numpy()
    assert np.allclose(found, ours, rtol=1e-5), (found, ours)
    for method, seconds in took.items():
        rate = len(x) / seconds
        report.add(f"certificate, {method}", rate, "radii/s", baseline, rate / baseline,
                   least=300 if method == "paper" else None)


def evaluation(report: Report, device: torch.device, quick: bool) -> None:
    """Images a second of CCU against its bare network."""
    for arch, (channels, size) in NETWORKS.items():
        ccu = make_ccu(arch, device)
        n = 1_000 if quick or arch == "ResNet18" and device.type == "cpu" else 10_000
        data = ImageSet("test", torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8), None, 0).to(device)
        models = {"ccu": ccu, "network": Softmax(ccu.base_model)}
        took = interleaved({name: partial(evaluate, model, data, 1000) for name, model in models.items()},
                           repeats(arch, device, quick), device)
        report.add(f"eval, {arch}", n / took["ccu"], "images/s", n / took["network"], took["ccu"] / took["network"],
                   most=1.1)


def epochs(report: Report, device: torch.device, quick: bool) -> None:
    """An epoch of FMNIST's shape (60,000 x 28 x 28, ResNet18, bf16) with the whole loop, on a GPU."""
    if device.type != "cuda":
        print("epochs of ResNet18: on a GPU only (--gpu 0)", file=sys.stderr)
        return
    n = 6_000 if quick else 60_000
    data, out = (ImageSet(name, torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8), torch.arange(n) % M, M
                          ).to(device) for name in ("FMNIST", "out"))
    for label, objective in {"Base": Plain(), "CCU": CEDA_GMM()}.items():
        ccu = make_ccu("ResNet18", device, (1, 28))
        model = ccu if label == "CCU" else Softmax(ccu.base_model)
        model.amp = True
        with tempfile.TemporaryDirectory() as scratch:
            history = train(model, objective, data, out if label == "CCU" else None,
                            Augmentation.of(params.DATASETS["FMNIST"]), settings("ResNet18", 3),
                            State(Path(scratch, "state"), {}, False), Path(scratch, "logs"), label)
        seconds = statistics.median(epoch["seconds"] for epoch in history[1:])
        report.add(f"epoch, ResNet18, {label}, bf16, {n} images", seconds, "s", hours_to_100_epochs=seconds / 36)


def processes(report: Report, device: torch.device, quick: bool) -> None:
    """An epoch of CCU on Digits in one process and in two: GPUs, or one thread of the CPU each."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        print("processes: two GPUs are needed", file=sys.stderr)
        return
    root, on = records.ROOT, "cpu" if device.type == "cpu" else "gpu"
    common = ["--dataset", "Digits", "--n", "10", *["--gpu", "-1"] * (on == "cpu")]
    with tempfile.TemporaryDirectory() as scratch:
        def script(command):
            subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})
        script([sys.executable, root / "gen_gmm.py", *common])
        seconds = []
        for n in (1, 2):
            script([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "--",
                    root / "run_training.py", *common, "--train_type", "CEDA_GMM", "--fit_out", "1", "--augm_flag", "1",
                    "--epochs", "2" if quick else "6"])
            history = json.loads(Path(scratch, "checkpoints/Digits/CCU.json").read_text())["history"]
            seconds.append(statistics.median(epoch["seconds"] for epoch in history[1:]))
    report.add("epoch of CCU on Digits, two processes", seconds[1], "s", seconds[0], seconds[0] / seconds[1], on=on)


# what might break a GPU's context comes last
SECTIONS = {function.__name__: function for function in (gmm_fits, steps, operations, loader, attacks, certificates,
                                                         evaluation, epochs, processes, compiled)}


def main(args):
    device = cli.device(-1 if args.gpu is None else args.gpu)
    machine = describe(device)
    path = args.output or records.ROOT / model_paths.benchmark(slug(machine))
    partial_path = Path(f"{path}.partial")
    files.check_writable(path, partial_path)
    report, record = Report(machine), records.of(args)
    keep = args.output or not (args.quick or args.only)
    record = {key: record[key] for key in ("command", "options", "commit", "time")}
    for section in args.only or SECTIONS:
        more = (args.data_dir,) if section == "gmm_fits" else ()
        if section != "gmm_fits":       # as training, evaluation and attack do
            cli.keep_freed_memory()
        SECTIONS[section](report, device, args.quick, *more)
        if keep:        # what a later section breaks off with leaves these, and an earlier run's file whole
            files.write_json(partial_path, record | {"machine": machine, "figures": report.figures})
    print(f"\n{report.table()}\n")
    if keep:
        print(f"wrote {partial_path.replace(path)}")


def describe(device: torch.device) -> dict:
    return {"processor": records.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None, "torch": torch.__version__,
            "python": platform.python_version()}


def slug(machine: dict) -> str:
    name = machine["gpu"] or f"{machine['processor']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parser() -> cli.Parser:
    p = cli.Parser(__doc__).gpu("GPU to use (default: the CPU)").data_dir()
    p.add_argument("--quick", type=cli.flag, default=False, help="1 = few repeats and small sizes; writes only where "
                   "--output says (0)")
    p.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="some sections; writes only where --output says")
    p.add_argument("--output", type=cli.path, help="where to write (results/benchmark_<machine>.json)", metavar="FILE")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
