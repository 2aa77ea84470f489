"""How the benchmarks measure: seconds in turn, operations, peak memory, in processes of their own; and their report."""

import ctypes
import json
import multiprocessing
import re
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import params
from utils.attack import ascend
from utils.region import Region
from utils.tables import benchmark_cells


class Report:
    """Collects figures; `add` prints one as a JSON line."""

    def __init__(self, machine: dict):
        self.machine, self.figures = machine, []

    def add(self, name: str, value: float, unit: str, baseline: float | None = None, ratio: float | None = None,
            most: float | None = None, least: float | None = None, **more) -> None:
        """ratio: how it compares with the baseline.  most, least: the target, for the ratio or else the value."""
        compared = ratio if ratio is not None else value
        target = f"<= {most:g}" if most is not None else f">= {least:g}" if least is not None else None
        met = compared <= most if most is not None else compared >= least if least is not None else None
        figure = {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, "target": target,
                  "met": met, **more}
        self.figures.append(figure)
        print(json.dumps(figure | self.machine), flush=True)

    def table(self) -> str:
        columns = ["value", "unit", "baseline", "ratio", "target", "met"]
        rows = {figure["name"]: benchmark_cells(figure) for figure in self.figures}
        return pd.DataFrame.from_dict(rows, "index", columns=columns).to_string()


def interleaved(functions: dict, repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function, called in turn after one call each to warm up."""
    seconds = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def several(times: int, function, *args) -> None:
    for _ in range(times):
        function(*args)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Operations(TorchDispatchMode):
    """Counts the operations that a device is handed; views, which only look at a tensor otherwise, are none."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ != "_unsafe_view"
        return func(*args, **(kwargs or {}))


def reset_peak() -> int | None:
    """Forget the process's peak memory (Linux); bytes that it holds now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")
    except (OSError, AttributeError):
        return None


def status(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def in_child(function, *args):
    """function(*args) in a fresh process: nobody else's memory is counted."""
    with multiprocessing.get_context("spawn").Pool(1, set_up, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, args)


def set_up(threads: int) -> None:
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


@torch.no_grad()
def climb(objective, region: Region, steps: int) -> None:
    """One search of an attack from each seed."""
    start, first = region.start(torch.zeros_like(region.seeds)), params.ATTACK_ALPHA / 10 * region.search_radius
    ascend(objective, region, start, steps, first)
