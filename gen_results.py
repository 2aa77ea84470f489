"""Write the README's results: the tables in results/, beside the authors' figures of May 2019.

    python gen_results.py

Replaces what stands between the two "results" marks of README.md with results/table2_D.csv and _runs.json,
table1_D.csv and .txt of each data set D, as `make tables DATASET=D` leaves them, and all ablation_*.csv.  Models that
differ in their seed alone (Base, Base-seed1, ...) become mean ± standard deviation.
"""

import csv
from pathlib import Path

import pandas as pd

import model_paths
import params
from utils import cli, files
from utils.errors import UserError
from utils.tables import percent

README = Path("README.md")
BEGIN, END = "<!-- results: written by gen_results.py -->\n", "<!-- end of results -->\n"
AUTHORS = Path(__file__).parent / "results" / "authors_2019-05.csv"


def main(args):
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{README} has no lines {BEGIN.strip()} and {END.strip()}: run this where the README is")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    print(f"wrote {files.write_text(README, before + BEGIN + results() + END + after)}")


def results() -> str:
    """All sections as Markdown."""
    datasets = [d for d in params.DATASETS if table_path(2, d).exists()]
    ablations = sorted(model_paths.RESULTS.glob("ablation_*.csv"))
    return "".join([*map(section, datasets), *map(ablation, ablations)])


def table_path(number: int, dataset: str) -> Path:
    return model_paths.RESULTS / f"table{number}_{dataset}.csv"


def section(dataset: str) -> str:
    """Heading, how the models were made, our figures, ours beside the authors'."""
    table2 = table_path(2, dataset)
    stem = table2.with_suffix("")
    if not (runs := files.load_run(model_paths.table_runs(stem))):
        raise UserError(f"{table2} has no {model_paths.table_runs(stem).name} beside it; write both anew: python "
                        f"gen_eval.py --dataset {dataset} --drop_mmc 0 --output {stem}")
    figures = over_seeds(read_figures(dataset, runs))
    archs = {run["options"].get("arch") or params.DATASETS[dataset].arch for run in runs.values()}
    parts = [f"### {dataset}, {' and '.join(sorted(archs))}\n\n", how(dataset, runs), "\n",
             markdown(figures.map(show))]
    authors = read_authors(dataset)
    labels = [label for label in figures if label in authors]
    if labels:
        common = figures.loc[[row for row in figures.index if published(row) in authors.index], labels]
        beside = common.map(show) + " / " + pd.DataFrame(
            {label: [percent(authors.loc[published(row), label]) for row in common.index] for label in labels},
            common.index)
        difference = pd.DataFrame({label: [f" ({common.loc[row, label][0] - authors.loc[published(row), label]:+.2f})"
                                           for row in common.index] for label in labels}, common.index)
        parts += ["\nOurs / the authors' of May 2019 (difference):\n\n", markdown(beside + difference)]
    return "".join(parts) + "\n"


def read_figures(dataset: str, runs: dict) -> pd.DataFrame:
    """Rows "test error", "AUC <OOD set>", "adversarial noise <statistic>"; a column a model; percent, NaN = none."""
    table2 = pd.read_csv(table_path(2, dataset), header=[0, 1], index_col=0)
    if "orig" not in table2.index:
        raise UserError(f"{table_path(2, dataset)} has no row orig: write it with gen_eval.py --drop_mmc 0")
    table2 = table2.xs("AUC", axis=1, level=1)
    errors = pd.DataFrame({label: {"test error": run["test_error"]} for label, run in runs.items()})
    parts = [errors.reindex(columns=table2.columns), table2.drop(index="orig").rename(lambda name: f"AUC {name}")]
    if table_path(1, dataset).exists():
        table1 = pd.read_csv(table_path(1, dataset), index_col=[0, 1]).loc[dataset].drop(index="TE")
        parts.append(table1.rename(lambda name: f"adversarial noise {name}").reindex(columns=table2.columns))
    return pd.concat(parts)


def over_seeds(figures: pd.DataFrame) -> pd.DataFrame:
    """A column a label; cells (mean, standard deviation over seeds or None)."""
    labels = list(dict.fromkeys(map(model_paths.without_seed, figures)))
    def cell(row, label):
        values = row[[name for name in figures if model_paths.without_seed(name) == label]]
        return values.mean(), values.std(ddof=1) if len(values) > 1 else None
    return pd.DataFrame({label: [cell(row, label) for _, row in figures.iterrows()] for label in labels},
                        figures.index)


def show(cell: tuple) -> str:
    mean, deviation = cell
    return "–" if pd.isna(mean) else percent(mean) + (f" ± {deviation:.2f}" if deviation is not None else "")


def read_authors(dataset: str) -> pd.DataFrame:
    """Rows as in `read_figures`, a column a label, percent."""
    with open(AUTHORS, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == dataset]
    names = {("ood", "TE"): "test error", ("ood", "AUC"): "AUC {set}"}
    figures: dict[str, dict] = {}
    for row in rows:
        name = ("adversarial noise {metric}" if row["table"] == "adversarial_noise" else
                names.get((row["table"], row["metric"])))
        if name:
            figures.setdefault(row["label"], {})[name.format(**row)] = float(row["percent"])
    return pd.DataFrame(figures)


def published(row: str) -> str:
    """The authors' row: a data set that is ours as JPEG files is theirs as it was published."""
    return row.removesuffix("-JPEG")


def how(dataset: str, runs: dict) -> str:
    """One paragraph: epochs, out-distribution, seeds, time, machine, commands."""
    ways: dict[str, list[str]] = {}
    for label, run in runs.items():
        options = run["options"]
        out = run.get("out_dataset") and f"out-distribution {run['out_dataset']} {run.get('out_dir') or ''}".strip()
        steps = f"{run['steps']} attack steps" if run.get("steps") else None
        members = f"{options['members']} members" if run["train_type"] == "DE" else None
        bf16 = "bf16" if options["amp"] and run["train_type"] not in ("ODIN", "Maha") else None
        way = ", ".join(filter(None, (f"{run['epochs']} epochs", bf16, out, steps, members, f"seed {run['seed']}")))
        ways.setdefault(way, []).append(label)
    minutes = ", ".join(f"{label} {run['seconds'] / 60:.1f}" for label, run in runs.items())
    machines = sorted({f"{run.get('gpu') or run.get('processor') or 'CPU'}, {run['threads']} "
                       f"thread{'s' * (run['threads'] > 1)}" for run in runs.values()})
    lines = [f"{', '.join(labels)}: {way}." for way, labels in ways.items()]
    lines.append(f"Minutes of training ({'; '.join(machines)}): {minutes}.")
    if (notes := table_path(1, dataset).with_suffix(".txt")).exists():
        lines += [f"Attack: {line}." for line in notes.read_text(encoding="utf-8").splitlines()
                  if line.startswith(f"% {dataset}: ")]
    commands = [line for number in (1, 2) if (path := table_path(number, dataset).with_suffix(".txt")).exists()
                for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("% command: ")]
    lines = [line.replace(f"% {dataset}: ", "") for line in lines]
    runs_file = model_paths.table_runs(table_path(2, dataset).with_suffix(""))
    lines.append(f"The models' commands are in `{runs_file}`; the tables':")
    return "\n".join(lines) + "\n\n" + "".join(f"    {c.removeprefix('% command: ')}\n" for c in commands)


def ablation(path: Path) -> str:
    table = pd.read_csv(path, index_col=0).map(lambda value: percent(None if pd.isna(value) else value))
    notes = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    said = [line.removeprefix("% ") for line in notes if line.startswith("% ")][1:]
    return (f"### Ablation, {path.stem.removeprefix('ablation_')}\n\n" + "\n".join(f"{line}." for line in said[1:])
            + f"\n\n    {said[0].removeprefix('command: ')}\n\n" + markdown(table) + "\n")


def markdown(table: pd.DataFrame) -> str:
    """In columns of one width, to be read as it stands too."""
    rows = [["", *table.columns], *table.reset_index().to_numpy()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "".join(f"| {row[0]:<{widths[0]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in
                                                             zip(row[1:], widths[1:], strict=True)) + " |\n"
                   for row in rows)


def parser() -> cli.Parser:
    p = cli.Parser(__doc__)
    p.add_argument("--debug", type=cli.flag, default=False, help="1 = show the traceback of an error (0)")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
