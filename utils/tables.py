"""Tables: printed, and written as .csv and, in LaTeX, as .txt."""

from pathlib import Path

import pandas as pd

from utils import files


def percent(value: float | None) -> str:
    """Two decimals; a dash where a number would have no meaning."""
    return "–" if value is None else f"{value:.2f}"


def show(table: pd.DataFrame, title: str) -> None:
    print(f"\n{title}\n{table.map(percent).to_string()}")


def write(table: pd.DataFrame, stem: str | Path, title: str, notes: list[str]) -> list[Path]:
    """stem.csv: the bare table.  stem.txt: LaTeX, title and notes as comments."""
    comments = "".join(f"% {line}\n" for line in [title, *notes])
    latex = table.map(percent).to_latex(escape=True).replace("–", "--")
    rounded = table.map(lambda value: None if value is None else round(value, 4))
    return [files.write_text(f"{stem}.csv", rounded.to_csv()),
            files.write_text(f"{stem}.txt", comments + latex)]


def model_notes(models: dict) -> list[str]:
    """One line a model: how it was made."""
    return [f"{label}: " + ", ".join(f"{key} {model.meta[key]}" for key in
                                     ("train_type", "out_dataset", "out_dir", "epochs", "steps", "seed", "augm_flag",
                                      "source")
                                     if model.meta.get(key) is not None)
            for label, model in models.items()]
