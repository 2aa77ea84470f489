"""Tables: printed, and written as .csv and, in LaTeX, as .txt."""

from pathlib import Path

import pandas as pd

import params
from utils import files


def percent(value: float | None) -> str:
    """Two decimals; a dash where a number would have no meaning."""
    return "–" if pd.isna(value) else f"{value:.2f}"


def significant(value: float | None) -> str:
    """Four digits or, of large numbers, all before the point; empty where there is none."""
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def benchmark_cells(figure: dict) -> tuple[str, ...]:
    """Value, unit, baseline, ratio, target and whether it is met, of a figure of benchmarks/run.py."""
    return (significant(figure["value"]), figure["unit"], significant(figure["baseline"]), significant(figure["ratio"]),
            figure["target"] or "", {True: "yes", False: "no", None: ""}[figure["met"]])


def show(table: pd.DataFrame, title: str) -> None:
    print(f"\n{title}\n{table.map(percent).to_string()}")


def files_of(stem: str | Path) -> list[str]:
    """What `write` writes."""
    return [f"{stem}.csv", f"{stem}.txt"]


def write(table: pd.DataFrame, stem: str | Path, title: str, notes: list[str]) -> list[Path]:
    """stem.csv: the bare table.  stem.txt: LaTeX, title and notes as comments."""
    comments = "".join(f"% {line}\n" for line in [title, *notes])
    latex = table.map(percent).to_latex(escape=True).replace("–", "--")
    csv, txt = files_of(stem)
    return [files.write_text(csv, table.round(4).to_csv()), files.write_text(txt, comments + latex)]


def notes(stem: str | Path) -> list[str]:
    """Title and notes that `write` left in stem.txt."""
    lines = Path(f"{stem}.txt").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("% ") for line in lines if line.startswith("% ")]


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
             made.get("warmstart") and "from Base's weights",
             made.get("source")]
    return ", ".join(filter(None, parts)) or "of unknown origin"


def by_making(made: dict[str, dict]) -> dict[str, list[str]]:
    """label -> meta or run record, turned round: how made -> labels."""
    ways: dict[str, list[str]] = {}
    for label, one in made.items():
        ways.setdefault(how_made(one), []).append(label)
    return ways
