"""Registry: data set -> label -> file.  The only place that knows the names of what the scripts write.

All paths are relative to the current directory: checkpoints/, results/ and logs/ grow where a script runs.
A model that was trained elsewhere takes part in the tables as checkpoints/<data set>/<label>.pt.
"""

import re
import time
from pathlib import Path

CHECKPOINTS, RESULTS, LOGS = Path("checkpoints"), Path("results"), Path("logs")
BACKUP, FIGURES = RESULTS / "backup", RESULTS / "figures"
FPR95, CERTIFIED = "_fpr95", "_certified"       # what Table 2's stem has added for the tables beside it

# label in the tables, in their order -> how run_training.py makes it
LABELS = {
    "Base": "--train_type plain",
    "CEDA": "--train_type CEDA",
    "OE": "--train_type OE",
    "ACET": "--train_type ACET --fit_out 1",
    "ACET2": "--train_type ACET",
    "CCU": "--train_type CEDA_GMM --use_gmm 1 --PCA 1 --fit_out 1",
    "CCUs": "--train_type CEDA_GMM --use_gmm 1 --PCA 1",
    "MCD": "--train_type MCD",
    "EDL": "--train_type EDL",
    "DE": "--train_type DE",
    "GAN": "--train_type GAN",
    "ODIN": "--train_type ODIN",
    "Maha": "--train_type Maha",
}


def label(train_type: str, fit_out: bool) -> str:
    """The label of what run_training.py trains."""
    return next((name for name, how in LABELS.items()
                 if how.split()[1] == train_type and how.endswith("--fit_out 1") == fit_out), train_type)


def without_seed(label: str) -> str:
    """Base-seed1, which is Base trained with seed 1, -> Base."""
    return re.sub(r"-seed\d+$", "", label)


def base_of(label: str) -> str:
    """The model that a label builds on: Base for ODIN, Base-seed1 for ODIN-seed1."""
    return "Base" + label.removeprefix(without_seed(label))


def options(label: str) -> str:
    """How run_training.py makes the model of this label, which may end in -seed<n>."""
    seed = label.removeprefix(without_seed(label)).removeprefix("-seed")
    return LABELS[without_seed(label)] + (f" --seed {seed} --label {label}" if seed else "")


def command(dataset: str, label: str) -> str:
    """The command that makes the model."""
    images = " --data_dir DIR --image_size N" if dataset == "Folder" else ""
    return f"python run_training.py --dataset {dataset}{images} {options(label)} --augm_flag 1"


def model(dataset: str, label: str) -> Path:
    """A model's checkpoint."""
    return CHECKPOINTS / dataset / f"{label}.pt"


def run_record(checkpoint: Path) -> Path:
    """How a checkpoint was made, for people and for --resume 1."""
    return checkpoint.with_suffix(".json")


def training_state(checkpoint: Path, member: int | None = None) -> Path:
    """What --resume 1 continues from; each member of an ensemble has its own."""
    return checkpoint.with_suffix(".state" if member is None else f".{member}.state")


def mixtures(dataset: str, metric: str, n: int, out_dataset: str) -> Path:
    """Both mixtures, of n components each, that gen_gmm.py fits and a CCU starts from."""
    return CHECKPOINTS / dataset / "gmm" / f"{metric}_n{n}_{out_dataset}.pt"


def em_states(mixtures: Path) -> list[Path]:
    """What --resume 1 continues the fits of the in- and of the out-mixture from."""
    return [mixtures.with_suffix(f".{which}.state") for which in ("in", "out")]


def trained(dataset: str) -> dict[str, Path]:
    """label -> file of the models that exist: those of the tables in their order, then all others."""
    found = {path.stem: path for path in sorted((CHECKPOINTS / dataset).glob("[!.]*.pt"))}
    return {name: found[name] for name in [*LABELS, *found] if name in found}


def table(number: int, name: str) -> Path:
    """A table's files without their endings."""
    return RESULTS / f"table{number}_{name}"


def table_runs(stem: str | Path) -> Path:
    """How the models of Table 2 were trained."""
    return Path(f"{stem}_runs.json")


def backup(stem: str | Path, dataset: str | None = None) -> Path:
    """Where the data behind the table `stem` are kept: in the folder backup beside it."""
    return Path(stem).parent / "backup" / (Path(stem).name + (f"_{dataset}" if dataset else "") + ".pt")


def attack_units(stem: str | Path, dataset: str, label: str, digest: str) -> Path:
    """The folder of a running attack's finished batches, beside the backup of its table `stem`; `digest` stands for
    all that decides them."""
    return backup(stem).parent / f".attack_{dataset}_{label}_{digest}"


def ablation(name: str) -> Path:
    """An ablation's files without their endings."""
    return RESULTS / f"ablation_{name}"


def benchmark(machine: str) -> Path:
    """What benchmarks/run.py measured."""
    return RESULTS / f"benchmark_{machine}.json"


def figure(notebook: str, *datasets: str) -> Path:
    """What a notebook draws, without .png or .pdf."""
    return FIGURES / "_".join((notebook, *datasets))


def log_dir(dataset: str, label: str) -> Path:
    """Of a training's TensorBoard scalars; another one for each run."""
    return LOGS / dataset / f"{label}_{stamp()}"


def stamp() -> str:
    """The time, for names that are given none."""
    return time.strftime("%Y%m%d-%H%M%S")
