"""Tables: printed, and written as .csv and, in LaTeX, as .txt."""

from pathlib import Path

import pandas as pd

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
    """stem.csv: the bare table.  stem.txt: LaTeX, title, notes and the packages that it takes as comments."""
    comments = "".join(f"% {line}\n" for line in [title, *notes])
    comments += "%\\usepackage{booktabs, multirow}\n"
    latex = table.map(percent).to_latex(escape=True).replace("–", "--")
    csv, txt = files_of(stem)
    return [files.write_text(csv, table.round(4).to_csv()), files.write_text(txt, comments + latex)]


def notes(stem: str | Path) -> list[str]:
    """Title and notes that `write` left in stem.txt."""
    lines = Path(f"{stem}.txt").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("% ") for line in lines if line.startswith("% ")]
