"""The trained models of a data set, by label."""

import sys

import torch

import model_paths
from models import CCU, Detector
from utils import checkpoints
from utils.batches import ImageSet
from utils.errors import UserError, check_name


def load_models(dataset: str, labels: list[str] | None, device: torch.device) -> dict[str, Detector]:
    """label -> model in evaluation mode, in the order of `labels`; without them all that exist, in the tables' order.

    A label asked for that does not exist is an error.
    """
    found = model_paths.trained(dataset)
    if not found and not labels:
        raise UserError(f"no {dataset} model is trained yet; begin with {model_paths.command(dataset, 'Base')}")
    if labels is None:
        labels = list(found)
    for label in labels:
        if label not in found:
            if model_paths.without_seed(label) not in model_paths.LABELS:
                check_name(label, {**found, **model_paths.LABELS}, "model")
            raise UserError(f"there is no {dataset} model {label}; make it: {model_paths.command(dataset, label)}")
    # channels_last: a LeNet's passes take a quarter less time on a CPU
    models = {label: checkpoints.load_model(found[label], device).to(memory_format=torch.channels_last)
              for label in labels}
    for label, model in models.items():
        if (model.meta.get("dataset") or dataset) != dataset:
            raise UserError(f"{found[label]} was trained on {model.meta['dataset']}, not on {dataset}; remove it, and "
                            "train one: run_training.py")
    return models


def load_ccu(dataset: str, label: str, device: torch.device) -> CCU:
    """The CCU model of this label, for its certificate; UserError where it is none."""
    model = load_models(dataset, [label], device)[label]
    if not isinstance(model, CCU):
        raise UserError(f"{model_paths.model(dataset, label)} is no CCU model and certifies nothing; make one: "
                        f"{model_paths.command(dataset, label)}")
    return model


def check_fit(models: dict[str, Detector], data: ImageSet) -> None:
    """UserError for a model for images of another shape than those of its data set or, of a Folder, other classes."""
    shape = dict(zip(("channels", "size", "classes"), (*data.images.shape[1:3], data.classes), strict=True))
    for label, model in models.items():
        path = model_paths.model(data.name, label)
        for key, wanted in shape.items():
            if (has := model.spec["base_model"][key]) != wanted:
                hint = f" (--image_size {has})" if data.name == "Folder" and key == "size" else ""
                raise UserError(f"{path} has {key} {has}, {data.name} has {wanted}: it is a model for other images"
                                f"{hint}; use them, or remove it")
        if (names := tuple(model.meta.get("class_names") or ())) != data.class_names:
            raise UserError(f"{path} was trained on the classes {', '.join(names)[:80] or '?'}, not on "
                            f"{', '.join(data.class_names)[:80]}: give its own --data_dir, or remove it")


def name_untrained(dataset: str) -> None:
    """Print which of the tables' labels are not trained yet, and the command that trains the first."""
    found = model_paths.trained(dataset)
    if untrained := [label for label in model_paths.LABELS if label not in found]:
        print(f"left out, since they are not trained: {', '.join(untrained)}; {untrained[0]} comes from: "
              f"{model_paths.command(dataset, untrained[0])}", file=sys.stderr)
