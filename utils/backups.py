"""What the figures are made of: the files that the tables leave in results/backup (README: Backups)."""

import contextlib
from pathlib import Path

import torch
from torch import Tensor

import model_paths
from models import Detector
from utils import files, records
from utils.errors import UserError, warn

ATTACK, SCORES = "CCU attack, version 3", "CCU scores, version 2"        # of gen_attack_stats.py, of gen_eval.py
KIND = {ATTACK: "attack on", SCORES: "scores for"}
MEND = {ATTACK: "python gen_attack_stats.py --datasets {} --wide_format 1 --fit_out 1",
        SCORES: "python gen_eval.py --dataset {}"}


def command(format: str, dataset: str) -> str:
    """What makes a backup of this format."""
    return MEND[format].format(dataset + " --data_dir DIR" * (dataset == "Folder"))


def load(dataset: str, format: str, file: str | Path | None = None) -> dict:
    """The backup `file`, or the newest of this data set and format."""
    mend = command(format, dataset)
    if file is not None:
        backup = files.load(file, format, f"make one: {mend}")
        if backup["dataset"] != dataset:
            raise UserError(f"{file} is of {backup['dataset']}, not of {dataset}")
        return backup
    newest_first = sorted(model_paths.BACKUP.glob("*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first:
        try:
            backup = files.load(path)
        except UserError as error:      # it may be of another data set
            warn(error)
            continue
        if isinstance(backup, dict) and (backup.get("format"), backup.get("dataset")) == (format, dataset):
            return backup
    demo = ", or: make demo" * (dataset == "Digits")
    raise UserError(f"{model_paths.BACKUP} holds no {KIND[format]} {dataset} yet; run: {mend}{demo}")


def check_replaceable(path: Path, format: str) -> None:
    """UserError where the other table's backup would be lost."""
    backup = None
    with contextlib.suppress(UserError):        # none is there, or a damaged one
        backup = files.load(path)
    if isinstance(backup, dict) and backup.get("format") in KIND.keys() - {format}:
        raise UserError(f"{path} is the backup of another table, the {KIND[backup['format']]} {backup.get('dataset')}: "
                        "choose another --output")


def meta_of(models: dict[str, Detector]) -> dict[str, dict]:
    """label -> how the model was made, for a backup."""
    return {label: model.meta | {"score_is_confidence": model.score_is_confidence} for label, model in models.items()}


def caption(backup: dict) -> str:
    """What a reader of a figure has to know of the run: data set, command, and how each model was made."""
    models_made = "; ".join(f"{', '.join(labels)}: {how}" for how, labels in records.by_making(backup["meta"]).items())
    return f"**{backup['dataset']}**. {models_made}. `{backup['record']['command']}`"


def confidences(attack: dict, scores: dict) -> dict[str, dict[str, Tensor]]:
    """label -> set -> confidences [N], test set first and adversarial noise last, of the models in both backups."""
    sets: dict[str, dict[str, Tensor]] = {}
    both = "; ".join(command(format, attack["dataset"]) for format in (ATTACK, SCORES))
    for label, meta in attack["meta"].items():
        if not meta["score_is_confidence"] or f"{label}/orig" not in scores["scores"]:
            continue
        mine = {key.removeprefix(f"{label}/"): value for key, value in scores["scores"].items()
                if key.startswith(f"{label}/")}
        a, b = mine["orig"], attack["scores_in"][label]
        if a.shape != b.shape or not torch.allclose(a, b, atol=1e-3):
            raise UserError(f"the two backups are of different models {label}; make both again: {both}")
        sets[label] = {f"{attack['dataset']} (test)": mine.pop("orig"), **mine,
                       "adversarial noise": attack["models"][label]["score"]}
    if not sets:
        raise UserError("no method whose score is a confidence is in both backups; run both on the same --models: "
                        f"{both}")
    return {label: {name: score.double().exp() for name, score in of.items()} for label, of in sets.items()}
