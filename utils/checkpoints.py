"""Checkpoints of models, and files of mixtures: tensors and plain values alone.

A model's is {"format", "spec", "state", "meta"}, a mixtures' {"format", "metric", "in", "out", "meta"}.
"""

from pathlib import Path

import torch

import models
from utils.errors import UserError
from utils.files import first_line, load, save

MODEL, MIXTURES = "CCU model, version 1", "CCU mixtures, version 1"
# of a checkpoint's meta, where it is there: what the tables read
META = {"dataset": str, "label": str, "train_type": str, "out_dataset": str, "out_dir": str, "source": str,
        "changed": str, "epochs": int, "seed": int, "steps": int, "members": int, "test_error": float, "mixtures": dict,
        "class_names": list}
LARGEST_SIZE = 1024     # pixels, height and width of a model's images


def save_model(model: models.Detector, path: str | Path, meta: dict | None = None) -> Path:
    """A checkpoint of `model` that `load_model` rebuilds; `meta` (plain values) says how it was made.

    ValueError where one of META is of another type, or a value is not plain.  UserError where the model is not float32,
    or would not load again.
    """
    meta = check_meta(model.meta if meta is None else meta)
    if not _is_plain(meta):
        raise ValueError("meta must hold None, bool, int, float, str, and lists, tuples and dicts of these alone")
    # what two mixtures share, their metric, is written once, also from a GPU
    values = model.state_dict(keep_vars=True)
    copies = {id(value): value.detach().cpu().contiguous() for value in values.values()}
    state = {key: copies[id(value)] for key, value in values.items()}
    for key, value in state.items():
        if value.is_floating_point() and value.dtype != torch.float32:
            raise UserError(f"can't write {path}: {key} is {value.dtype}; save model.float()")
    try:
        _rebuild(model.spec, state)
    except Exception as error:
        raise UserError(f"can't write {path}, which would not load again: {first_line(error)[:200]}") from error
    return save({"format": MODEL, "spec": model.spec, "state": state, "meta": meta}, path)


def _is_plain(value) -> bool:
    """Whether it is read again without running code; NumPy's numbers, although floats, are not."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> models.Detector:
    """The model of a checkpoint, in evaluation mode; `model.meta` says how it was made."""
    checkpoint = load(path, MODEL, "train it with run_training.py")
    try:
        model = _rebuild(checkpoint["spec"], checkpoint["state"])
        model.meta = check_meta(checkpoint["meta"])
    except Exception as error:
        raise UserError(f"{path} does not hold a model of ours: {first_line(error)[:200]}") from error
    return model.to(device)


def _rebuild(spec: dict, state: dict) -> models.Detector:
    """The model of this spec and state dict, in evaluation mode; raises what it likes where they do not fit."""
    if (classifier := spec["base_model"]) is None:
        raise ValueError("the classifier has no spec to rebuild it from; use one of models/classifiers.py")
    if spec.get("members", 0) > len(state):
        raise ValueError(f"{spec['members']} members, but {len(state)} tensors")
    if spec.get("classes", classifier["classes"]) != classifier["classes"]:
        raise ValueError(f"{spec['classes']} and {classifier['classes']} classes")
    if not 0 < classifier["size"] <= LARGEST_SIZE:
        raise ValueError(f"images of size {classifier['size']}")
    with torch.device("meta"):      # shapes without memory: a hostile spec cannot claim any
        model = models.build(spec)
    load_state(model, state, assign=True)
    with torch.no_grad():           # do its parts fit each other?
        x = torch.zeros(1, classifier["channels"], classifier["size"], classifier["size"])
        confidence, score = model.eval()(x).exp(), model.score(x)
    if not (confidence.shape == (1, classifier["classes"]) and (confidence.sum() - 1).abs() < 1e-3
            and score.shape == (1,) and score.isfinite()):
        raise ValueError("what it computes are no confidences")
    return model


@torch.no_grad()
def check_rebuilds(model: models.Detector) -> None:
    """UserError where a checkpoint of `model`, which is on the CPU, would be refused or load as another model: to be
    asked before a training, not after it."""
    training = model.training
    try:
        twin, classifier = _rebuild(model.spec, dict(model.state_dict())), model.spec["base_model"]
        x = torch.linspace(0, 1, 2 * classifier["channels"] * classifier["size"] ** 2)
        x = x.view(2, classifier["channels"], classifier["size"], classifier["size"])
        model.eval()
        pairs = (twin(x), model(x)), (twin.score(x), model.score(x))
        if not all(torch.allclose(theirs, ours, atol=1e-4) for theirs, ours in pairs):
            raise ValueError("it gives other values; are all its settings in its spec, super().__init__(base_model, "
                             "NAME=VALUE)?")
    except Exception as error:
        raise UserError(f"a {type(model).__name__} would not load as it is saved, by models.build: "
                        f"{type(error).__name__}: {first_line(error)[:200]}") from error
    finally:
        model.train(training)


def check_meta(meta: dict) -> dict:
    """A checkpoint's `meta`; ValueError where one of META is of another type."""
    for key, kind in META.items():
        if (value := meta.get(key)) is not None and not isinstance(value, kind):
            raise ValueError(f"meta: {key} must be of type {kind.__name__}, got {value!r:.40}")
    if not all(isinstance(name, str) for name in meta.get("class_names") or ()):
        raise ValueError("meta: class_names must be names")
    return dict(meta)


def check_state_dict(state) -> None:
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                              for key, value in state.items()):
        raise ValueError("a state dict maps names to tensors")


def load_state(model: torch.nn.Module, state: dict, assign: bool = False) -> None:
    """load_state_dict that also insists on shapes, types, finite values and a metric's positive singular values."""
    expected = model.state_dict()
    if not assign:      # batch norms of old files have no counters, which evaluation never reads
        state = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")} | state
    if missing := [key for key in expected if key not in state]:
        raise ValueError(f"missing key {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1))
    if extra := [key for key in state if key not in expected]:
        raise ValueError(f"unexpected key {extra[0]}" + f" and {len(extra) - 1} more" * (len(extra) > 1))
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.shape != expected[key].shape:
            raise ValueError(f"{key} must be a tensor of shape {list(expected[key].shape)}, got "
                             f"{list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__}")
        if value.dtype != expected[key].dtype:
            raise ValueError(f"{key} must be {expected[key].dtype}, got {value.dtype}")
    check_values(state)
    model.load_state_dict(state, assign=assign)


def check_values(state: dict) -> None:
    """ValueError for values that are not finite, or singular values that are not positive."""
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{key} has values that are not finite")
        if key.endswith("singular_values") and not (value > 0).all():
            raise ValueError(f"{key} must be positive")


def save_mixtures(gmm_in: models.GMM, gmm_out: models.GMM, path: str | Path, meta: dict) -> Path:
    """Both mixtures and their metric."""
    def tensors(gmm):
        return {"mu": gmm.mu.detach().cpu(), "logvar": gmm.logvar.detach().cpu(), "alpha": gmm.alpha.cpu()}
    metric = {key: value.cpu() for key, value in gmm_in.metric.state_dict().items()}
    return save({"format": MIXTURES, "metric": metric, "in": tensors(gmm_in), "out": tensors(gmm_out),
                 "meta": meta}, path)


def load_mixtures(path: str | Path, mend: str) -> tuple[models.GMM, models.GMM, dict]:
    """(gmm_in, gmm_out, meta) as `save_mixtures` wrote them, sharing one metric."""
    saved = load(path, MIXTURES, mend)
    try:
        metric = models.PCAMetric(**saved["metric"])
        gmms = [models.GMM(**saved[which], metric=metric) for which in ("in", "out")]
        for gmm in gmms:
            check_values(gmm.state_dict())
            if any(value.dtype != torch.float32 for value in gmm.state_dict().values()):
                raise ValueError("mixtures must be float32")
        return *gmms, dict(saved["meta"])
    except Exception as error:
        raise UserError(f"{path} does not hold mixtures of ours: {first_line(error)[:200]}; {mend}") from error
