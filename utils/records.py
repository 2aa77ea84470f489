"""The record that a run leaves: what it takes to repeat it, on which machine it was made, and that in words."""

import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import params
from utils import parallel

ROOT = Path(__file__).resolve().parent.parent
INDIFFERENT = ("gpu", "resume", "debug", "verbose", "download", "label")       # options that decide no result


def of(args, **more) -> dict:
    """What a run needs to be repeated: command, resolved options, commit, versions, machine."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], text=True, capture_output=True,
                            cwd=ROOT).stdout.strip() if _has_git() else ""
    on_gpu = torch.cuda.is_available() and args.gpu != -1
    gpu = torch.cuda.get_device_name(args.gpu or 0) if on_gpu else None
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    record = {"command": shlex.join(["python", str(script), *sys.argv[1:]]), "options": vars(args),
              "commit": commit or None, "time": time.strftime("%Y-%m-%d %H:%M:%S"),
              "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
              "processor": processor(), "gpu": gpu, "processes": parallel.world_size(), **more}
    return json.loads(json.dumps(record, default=str))      # plain values only, whatever they were


def load(path: Path) -> dict:
    """What `of` gave; nothing where there is no readable one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def model_notes(models: dict) -> list[str]:
    """One line a model: how it was made."""
    return [f"{label}: " + ", ".join(filter(None, (model.meta.get("train_type"), how_made(model.meta))))
            for label, model in models.items()]


def how_made(made: dict) -> str:
    """What one has to know of a model to compare it, from its meta or its run record."""
    made = made.get("options", {}) | made
    kind, epochs, mixtures = made.get("train_type"), made.get("epochs"), made.get("mixtures") or {}
    parts = [epochs and f"{epochs} epoch{'s' * (epochs > 1)}",
             made.get("amp") and "bf16",
             made.get("out_dataset") and f"out-distribution {made['out_dataset']} {made.get('out_dir') or ''}".strip(),
             kind == "ACET" and made.get("steps") and f"{made['steps']} attack step{'s' * (made['steps'] > 1)}",
             kind == "DE" and made.get("members") and f"{made['members']} members",
             mixtures and (mixtures.get("metric"), mixtures.get("n")) != ("pca", params.CENTROIDS)
             and f"{mixtures.get('metric')} metric, K = {mixtures.get('n')}",
             made.get("seed") is not None and f"seed {made['seed']}",
             made.get("augm_flag") is False and "not augmented",
             made.get("changed"),
             {mixtures.get("augm_flag"), made.get("augm_flag")} == {False, True}
             and f"mixtures {'' if mixtures['augm_flag'] else 'not '}augmented",
             mixtures.get("changed") and f"mixtures with {mixtures['changed']}",
             made.get("warmstart") and "from Base's weights",
             made.get("source")]
    return ", ".join(filter(None, parts)) or "of unknown origin"


def by_making(made: dict[str, dict]) -> dict[str, list[str]]:
    """label -> meta or run record, turned round: how made -> labels."""
    ways: dict[str, list[str]] = {}
    for label, one in made.items():
        ways.setdefault(how_made(one), []).append(label)
    return ways


def processor() -> str:
    """Its model name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        return found.group(1)
    return platform.processor() or platform.machine()


def _has_git() -> bool:
    return shutil.which("git") is not None and (ROOT / ".git").exists()
