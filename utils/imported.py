"""Classifiers that were trained elsewhere, as detectors of ours."""

from collections.abc import Sequence
from pathlib import Path

import params
from models import CLASSIFIERS, Normalised, Softmax, build_classifier
from utils import checkpoints, files
from utils.errors import check_name

PREFIXES = ("module.", "_orig_mod.")                    # of DataParallel and of torch.compile
WRAPPERS = ("state_dict", "model", "net", "model_state_dict")


def import_state_dict(source: str | Path | dict, arch: str, dataset: str, mean: Sequence[float] | None = None,
                      std: Sequence[float] | None = None) -> Softmax:
    """The softmax of a LeNet, ResNet18, VGG13 or WideResNet (40-2) whose state dict is `source`, a dict or a file.

    Names are those of models/classifiers.py, whatever PREFIXES stand before them; a state dict that lies in a
    training checkpoint under one of WRAPPERS is found.  A network trained on (x - mean) / std needs them here, one
    number a channel: they become part of the model, which takes images in [0, 1].  ValueError names the first key
    that is missing, superfluous or misshapen.  Register the result under a label:

        model = import_state_dict("wrn_oe.pt", "WideResNet", "CIFAR10", mean=(...), std=(...))
        save_model(model, model_paths.model("CIFAR10", "OE-imported"))
    """
    check_name(arch, CLASSIFIERS, "classifier")
    check_name(dataset, [name for name, spec in params.DATASETS.items() if spec.size], "data set")
    state = source if isinstance(source, dict) else files.load(source, mend="give a state dict")
    for name in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    checkpoints.check_state_dict(state)
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}

    spec = params.DATASETS[dataset]
    classifier = build_classifier(arch, spec.channels, spec.size, spec.classes)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    checkpoints.load_state(classifier, state)
    if (mean is None) != (std is None):
        raise ValueError("give both mean and std, or neither")
    if mean is not None:
        if len(mean) != spec.channels or len(std) != spec.channels or min(std) <= 0:
            raise ValueError(f"mean and std must have {spec.channels} numbers each, and std must be positive")
        classifier = Normalised(classifier, [float(m) for m in mean], [float(s) for s in std])
    model = Softmax(classifier).eval()
    model.meta = {"dataset": dataset, "source": f"{arch} trained elsewhere"}
    return model
