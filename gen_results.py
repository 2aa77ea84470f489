"""Write the results into the pages that show them: results/README.md and, some in short, README.md.

    python gen_results.py

Replaces what stands between the two "results" marks of results/README.md with the tables of each data set D, beside
the authors' figures of May 2019: table2_D.csv, _runs.json and, where they were asked for, certificates
(_certified.csv), table1_D.csv and .txt, as `make tables DATASET=D` leaves them in results/, and further ones of that
data set, table2_D-NAME.csv and so on; then all ablation_*.csv and benchmark_*.json there.  Models that differ in their
seed alone (Base, Base-seed1, ...) become mean ± standard deviation.
"""

import contextlib
import json
from pathlib import Path

import pandas as pd

import model_paths
import params
from utils import cli, files, records, tables
from utils.errors import UserError, warn

# README.md's tables and, of their labels, these
SHORT = {"MNIST-100epochs": ("Base", "CEDA", "OE", "ODIN", "Maha", "CCUs", "CCU"),
         "MNIST-float32": ("Base", "CEDA", "OE", "ACET", "ODIN", "Maha", "CCUs", "CCU"),
         "FMNIST-LeNet": ("Base", "CEDA", "OE", "ACET", "ODIN", "Maha", "CCUs", "CCU"),
         "Folder-CIFAR10-JPEG": ("Base", "CEDA", "OE", "ACET", "ODIN", "Maha", "CCUs", "CCU")}
BEGIN, END = "<!-- results: written by gen_results.py -->\n", "<!-- end of results -->\n"
SHORTEST = params.EPOCHS / 20       # a run of fewer epochs compares with no whole one
# of a model's options those that may differ, or are compared by what came of them; of its mixtures likewise
INDIFFERENT = (*records.INDIFFERENT, "seed", "data_dir", "out_dataset", "out_dir", "arch", "gmm_path")
MEASURED = ("variances", "log_likelihoods", "seconds")
AUTHORS = Path(__file__).parent / "results" / "authors_2019-05.csv"


def main(args):
    pages = {}
    for page, make in PAGES.items():
        text = page.read_text(encoding="utf-8") if page.exists() else ""
        if text.count(BEGIN) != 1 or text.count(END) != 1:
            raise UserError(f"{page} has no lines {BEGIN.strip()} and {END.strip()}: run this in the repository")
        pages[page] = text.split(BEGIN)[0] + BEGIN + make() + END + text.split(END)[1]
    for page, text in pages.items():
        print(f"wrote {files.write_text(page, text)}")


def short() -> str:
    """The headlines."""
    parts, there = [], names_there()
    for name, labels in SHORT.items():
        if name not in there:
            continue
        with explained_tables(name):
            runs = read_runs(name)
            figures = over_seeds(read_figures(name, runs), runs)
            shown = [label for label in labels if label in figures]
            epochs = sorted(filter(None, {runs[label].get("epochs") for label in shown}))
            trained = f"{' and '.join(map(str, epochs))} epochs" if epochs else "epochs unknown"
            parts.append(f"{heading(title_of(name), runs)}, {trained} (`results/table[12]_{name}.csv`):\n\n"
                         + markdown(figures[shown].map(show)))
    return "\n".join(parts)


def results() -> str:
    """All sections as Markdown."""
    text = ""
    for name in names_there():
        with explained_tables(name):
            text += section(name)
    for path in sorted(Path().glob(f"{model_paths.ablation('*')}.csv")):
        with explained(f"{path} and its .txt", "benchmarks/ablation.py"):
            text += ablation(path)
    for path in sorted(Path().glob(str(model_paths.benchmark("*")))):
        with explained(path, "benchmarks/run.py"):
            text += speed(path)
    return text


@contextlib.contextmanager
def explained(paths: str | Path, writer: str):
    """What goes wrong with these files, as one line."""
    try:
        yield
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{paths} are not what `{writer}` writes ({type(error).__name__} {error}): write them anew, or "
                        "remove them") from error


def explained_tables(name: str):
    return explained(f"{model_paths.table(2, name)}* and {model_paths.table(1, name)}*", "make tables")


def names_there() -> list[str]:
    """D and D-NAME of the tables in results/, data set by data set."""
    prefix = model_paths.table(2, "")
    names = [path.stem.removeprefix(prefix.name) for path in prefix.parent.glob(f"{prefix.name}*.csv")]
    return [name for dataset in params.DATASETS for name in sorted(names)
            if dataset_of(name) == dataset and not name.endswith((model_paths.FPR95, model_paths.CERTIFIED))]


def dataset_of(name: str) -> str:
    return name.partition("-")[0]


def title_of(name: str) -> str:
    """The data set, of a folder of images what the table calls it."""
    dataset = dataset_of(name)
    return name.removeprefix("Folder-") if dataset == "Folder" else dataset


def section(name: str) -> str:
    """Heading, how the models were made, our figures, ours beside the authors'."""
    runs = read_runs(name)
    figures = over_seeds(read_figures(name, runs), runs)
    plain = list(map(model_paths.without_seed, figures))
    if apart := [label for label, of in zip(figures, plain, strict=True) if label != of and plain.count(of) > 1]:
        warn(f"{name}: {', '.join(apart)} and the others of their label do not differ in their seed alone: "
             "not averaged; remove the checkpoints that are to be trained anew, and make tables")
    text = f"### {heading(name, runs)}\n\n{how(name, runs)}\n" + markdown(figures.map(show)) + certified(name, runs)
    authors = read_authors(dataset_of(name))
    rows = [row for row in figures.index if published(row) in authors.index]
    both = {label: [beside(figures.loc[row, label], authors.loc[published(row), label]) for row in rows]
            for label in figures if label in authors}
    epochs = [run.get("epochs") for label, run in runs.items() if model_paths.without_seed(label) in both]
    if both and rows and arch_of(runs) != params.DATASETS[dataset_of(name)].arch:
        text += "\nThe authors' figures of May 2019 are of another network.\n"
    elif both and rows and any(number and number < SHORTEST for number in epochs):
        text += f"\nToo few epochs to compare with the authors' figures of May 2019, of {params.EPOCHS} epochs.\n"
    elif both and rows:
        text += (f"\nOurs / the authors' of May 2019, of {params.EPOCHS} epochs (difference):\n\n"
                 + markdown(pd.DataFrame(both, rows)))
    return text + "\n"


def certified(name: str, runs: dict) -> str:
    """What the certificates say of each set, if `gen_eval.py --certify 1` wrote it with the rest of Table 2."""
    stem = model_paths.table(2, name)
    table2 = f"{stem}{model_paths.CERTIFIED}"
    if not Path(f"{table2}.csv").exists() or commands(table2) != commands(stem):
        return ""       # of another command: an earlier run's
    table = pd.read_csv(f"{table2}.csv", header=[0, 1], index_col=0).rename({"orig": "test images"})
    parts = {what: over_seeds(table.xs(what, axis=1, level=1), runs).map(show) for what in table.columns.unique(1)}
    labels = dict.fromkeys(label for part in parts.values() for label in part)
    return (f"\nImages that are at most {params.RATIO}/M confident, those with a certified radius R > 0 (%), and the "
            "median R of these:\n\n"
            + markdown(pd.DataFrame({f"{label}: {what}": parts[what][label] for label in labels for what in parts})))


def notes_of(stem: str | Path) -> list[str]:
    """Those of a table, none of one that is not there."""
    return tables.notes(stem) if Path(f"{stem}.txt").exists() else []


def commands(stem: str | Path) -> list[str]:
    return [note.removeprefix("command: ") for note in notes_of(stem) if note.startswith("command: ")]


def heading(name: str, runs: dict) -> str:
    return f"{name}, {arch_of(runs)}"


def arch_of(runs: dict) -> str:
    return next(iter(runs.values()))["arch"]


def read_runs(name: str) -> dict:
    """label -> how it was trained."""
    path = model_paths.table_runs(model_paths.table(2, name))
    if not (runs := records.load(path)):
        raise OSError(f"no {path.name}")
    return runs


def read_figures(name: str, runs: dict) -> pd.DataFrame:
    """Rows "test error", "AUC <OOD set>", "adversarial noise <statistic>"; a column a model; percent, NaN = none."""
    table2 = pd.read_csv(f"{model_paths.table(2, name)}.csv", header=[0, 1], index_col=0).drop(index="orig")
    table2 = table2.xs("AUC", axis=1, level=1).rename("AUC {}".format)
    errors = pd.DataFrame({label: {"test error": runs[label]["test_error"]} for label in table2})
    parts = [errors, table2]
    if (path := Path(f"{model_paths.table(1, name)}.csv")).exists():
        table1 = pd.read_csv(path, index_col=[0, 1]).loc[dataset_of(name)].reindex(columns=table2.columns)
        if ((table1.loc["TE"] - errors.loc["test error"]).abs() > 0.01).any():
            raise ValueError("the test errors of the two tables differ: they are of different models")
        parts.append(table1.drop(index="TE").rename("adversarial noise {}".format))
    return pd.concat(parts)


def over_seeds(figures: pd.DataFrame, runs: dict) -> pd.DataFrame:
    """A column a label; cells (mean, standard deviation over seeds, NaN for a single one).

    Models of a label that differ in more than their seed, or not even in that, keep a column each, and so does a single
    one of another seed than the label's.
    """
    cells: dict[str, list] = {}
    for label in dict.fromkeys(map(model_paths.without_seed, figures)):
        names = [name for name in figures if model_paths.without_seed(name) == label]
        alike = (len({all_but_seed(runs[name]) for name in names}) == 1
                 and len({runs[name].get("seed") for name in names}) == len(names))
        groups = {label: names} if alike and len(names) > 1 else {name: [name] for name in names}
        for column, group in groups.items():
            seeds = figures[group]
            cells[column] = list(zip(seeds.mean(axis=1), seeds.std(axis=1, ddof=1), strict=True))
    return pd.DataFrame(cells, figures.index)


def all_but_seed(run: dict) -> str:
    """What decides a model, to be compared."""
    options = {key: value for key, value in run.get("options", {}).items() if key not in INDIFFERENT}
    mixtures = {key: value for key, value in (run.get("mixtures") or {}).items() if key not in MEASURED}
    return json.dumps([records.how_made(run | {"seed": None}), run.get("arch"), options, mixtures], sort_keys=True)


def show(cell: tuple) -> str:
    mean, deviation = cell
    return tables.percent(mean) + ("" if pd.isna(deviation) else f" ± {tables.percent(deviation)}")


def beside(cell: tuple, theirs: float) -> str:
    difference = round(cell[0] - theirs, 2) + 0.0       # not -0.00
    return f"{show(cell)} / {tables.percent(theirs)}" + ("" if pd.isna(difference) else f" ({difference:+.2f})")


def read_authors(dataset: str) -> pd.DataFrame:
    """Rows as in `read_figures`, a column a label, percent."""
    names = {("ood", "TE"): "test error", ("ood", "AUC"): "AUC {set}"} | {
        ("adversarial_noise", metric): "adversarial noise {metric}" for metric in ("MMC", "SR", "AUC")}
    table = pd.read_csv(AUTHORS).query("dataset == @dataset")
    table["row"] = [names.get((row["table"], row["metric"]), "").format(**row) for row in table.to_dict("records")]
    return table[table["row"] != ""].pivot(index="row", columns="label", values="percent")


def published(row: str) -> str:
    """The authors' row: they say UniformNoise, and what we read from JPEG files they read as it was published."""
    return {"AUC Uniform": "AUC UniformNoise"}.get(row, row.removesuffix("-JPEG"))


def how(name: str, runs: dict) -> str:
    """How the models were made, how long it took, where; the attack's balls; the commands."""
    lines = [f"{', '.join(labels)}: {way}." for way, labels in records.by_making(runs).items()]
    timed = {label: run for label, run in runs.items() if "seconds" in run}
    machines = set(map(on, timed.values()))
    if timed:
        lines.append(f"Minutes of training ({'; '.join(sorted(machines))}): "
                     + ", ".join(f"{label} {run['seconds'] / 60:.1f}" for label, run in timed.items()) + ".")
    stems = [model_paths.table(number, name) for number in (1, 2)]
    start = f"{dataset_of(name)}: "
    attack, evaluation = ([note.removeprefix(start) for note in notes_of(stem) if note.startswith(start)]
                          for stem in stems)
    lines += [f"Attack: {note}." for note in attack if note not in evaluation] + [f"{note}." for note in evaluation]
    lines.append(f"The models' commands are in `{model_paths.table_runs(model_paths.table(2, name))}`; the tables':")
    return "\n".join(lines) + "\n\n" + "".join(f"    {command}\n" for stem in stems for command in commands(stem))


def on(machine: dict) -> str:
    """Where a run or a benchmark was made."""
    threads = machine["threads"]
    return f"{machine.get('gpu') or machine.get('processor') or 'CPU'}, {threads} thread{'s' * (threads > 1)}"


def ablation(path: Path) -> str:
    title, command, *said = tables.notes(path.with_suffix(""))
    return (f"### {title}\n\n" + "\n".join(f"{line}." for line in said)
            + f"\n\n    {command.removeprefix('command: ')}\n\n"
            + markdown(pd.read_csv(path, index_col=0).map(tables.percent)) + "\n")


def speed(path: Path) -> str:
    """What benchmarks/run.py measured on one machine."""
    record = records.load(path)
    machine = record["machine"]
    cells = {figure["name"]: tables.benchmark_cells(figure) for figure in record["figures"]}
    rows = {name: (f"{value} {unit}", *others) for name, (value, unit, *others) in cells.items()}
    table = pd.DataFrame(rows, ["measured", "baseline", "ratio", "target", "met"]).T
    return (f"### Speed, {path.stem.removeprefix(model_paths.benchmark('').stem)}\n\n"
            f"`{path}`: {on(machine)}, PyTorch {machine['torch']}, commit {record['commit']}, {record['time']}.\n\n"
            f"    {record['command']}\n\n"
            + markdown(table) + "\n")


def markdown(table: pd.DataFrame) -> str:
    """In columns of one width, to be read as it stands too."""
    rows = [["", *table.columns], *table.reset_index().to_numpy()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "".join(f"| {row[0]:<{widths[0]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in
                                                             zip(row[1:], widths[1:], strict=True)) + " |\n"
                   for row in rows)


PAGES = {Path("README.md"): short, model_paths.RESULTS / "README.md": results}


def parser() -> cli.Parser:
    return cli.Parser(__doc__)


if __name__ == "__main__":
    cli.run(main, parser())
