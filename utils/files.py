"""The one place that opens our own files: written whole or not at all, read without running code.

A checkpoint holds tensors and plain values: {"format", "spec", "state", "meta"}.
"""

import glob
import hashlib
import json
import os
import pickle
import socket
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import models
from utils import parallel
from utils.errors import UserError

try:
    import fcntl
except ImportError:     # Windows: no locks
    fcntl = None

MODEL, MIXTURES = "CCU model, version 1", "CCU mixtures, version 1"
# of a checkpoint's meta, where it is there: what the tables read
META = {"dataset": str, "label": str, "train_type": str, "out_dataset": str, "out_dir": str, "source": str,
        "epochs": int, "seed": int, "steps": int, "members": int, "test_error": float, "mixtures": dict,
        "class_names": list}
LARGEST = 4 * 2 ** 30   # bytes; the metric of a Folder at 64x64x3 alone has 0.6 GB
LARGEST_SIZE = 1024     # pixels, height and width of a model's images
ABANDONED = 10.0        # seconds after which a temporary file that nobody has locked is a killed run's
_held: dict[Path, tuple[int, list[Path]]] = {}     # lock file -> its descriptor, folders made for it


def write(path: str | Path, writer: Callable) -> Path:
    """Let writer(binary file) fill a temporary file beside `path`, then rename it: all or nothing."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp",
                                         delete=False) as file:
            temporary = file.name
            with suppress(OSError):     # some network file systems have no locks
                _lock(file.fileno())
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (OSError, RuntimeError) as error:      # torch.save reports a full disk as a RuntimeError
        raise UserError(f"can't write {path}: {_first_line(error)}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def _remove_abandoned(path: Path) -> None:
    """The temporary files that killed runs left of `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError), left.open("rb") as file:
            if fcntl and time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED:
                _lock(file.fileno())    # fails where it is being written
                left.unlink()


def _lock(descriptor: int) -> None:
    """Until the file is closed or the process ends, however it ends; BlockingIOError where another has it."""
    if fcntl:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock(path: str | Path) -> None:
    """Keep `path`, a file or a stem, to this run until `unlock`; UserError where another run has it."""
    name = Path(path).with_name(f".{Path(path).name}.lock")
    if name in _held or not fcntl or parallel.rank() > 0:       # rank 0 writes for all
        return
    made = [folder for folder in name.parents if not folder.exists()]
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(descriptor)
            except BlockingIOError:
                owner = os.read(descriptor, 200).decode() or "another run"
                os.close(descriptor)
                raise UserError(f"{path} is being made by {owner}: wait until it has ended, or end it") from None
            except OSError:     # some network file systems have no locks
                break
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(name)):
                    break
            os.close(descriptor)    # its owner has just removed it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
    _held[name] = descriptor, made


def unlock() -> None:
    """Give back all that `lock` keeps; folders that were made for it go where nothing was written to them."""
    while _held:
        name, (descriptor, made) = _held.popitem()
        with suppress(OSError):
            name.unlink()
            for folder in made:
                folder.rmdir()
        os.close(descriptor)


def check_writable(*paths: str | Path) -> None:
    """UserError now, before the work, where these files could not be written after it."""
    for path in map(Path, paths):
        try:
            if path.is_dir():
                raise UserError(f"can't write {path}: it is a folder; give the name of a file in it, {path / 'NAME'}")
            with suppress(FileNotFoundError, NotADirectoryError):
                os.stat(path.with_name(f".{path.name}.temporary"))      # raises where the name is too long
            folder = path.parent
            while not folder.exists():
                folder = folder.parent
        except OSError as error:
            raise UserError(f"can't write {path}: {error.strerror}") from error
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"can't write {path}: {folder} is not a folder that can be written to")


def write_text(path: str | Path, text: str) -> Path:
    # a command's path may be no UTF-8
    return write(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: str | Path, value) -> Path:
    return write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def save(value, path: str | Path) -> Path:
    """Tensors and plain values, for `load`."""
    return write(path, lambda file: torch.save(value, file))


def load(path: str | Path, format: str | None = None, mend: str = "make it anew") -> dict:
    """What `save` wrote, with tensors on the CPU.  UserError where the file is missing, damaged, too large,
    of another format, or holds anything but tensors and plain values."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; {mend}")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} is larger than any file of ours ({LARGEST >> 30} GiB)")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:      # nothing of ours is compressed
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("its entries claim more than it holds")
                if part := archive.testzip():           # torch.load compares no checksums
                    raise ValueError(f"wrong checksum of {part}")
        with warnings.catch_warnings(action="ignore"):      # what it says of odd pickles
            value = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(value)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it is damaged or holds more than tensors and plain values, so that "
                        f"loading it could run code; {mend}") from error
    except Exception as error:      # a damaged zip raises whatever the reader meets first
        raise UserError(f"{path} is damaged or no checkpoint ({_first_line(error)[:80]}); {mend}") from error
    if format is not None and (not isinstance(value, dict) or value.get("format") != format):
        raise UserError(f"{path} is not a file of the format '{format}'; {mend}")
    return value


def _check_tensors(value) -> None:
    """Tensors that are not dense, lie on no device or claim more numbers than the file has: ValueError."""
    items, seen = [value], set()
    while items:
        item = items.pop()
        if isinstance(item, torch.Tensor) and (
                item.layout != torch.strided or item.device.type != "cpu" or item.is_quantized
                or item.numel() * item.element_size() > item.untyped_storage().nbytes()):
            raise ValueError(f"a tensor of shape {list(item.shape)} that is not dense")
        if isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            items.extend(item.values() if isinstance(item, dict) else item)


def save_model(model: models.Detector, path: str | Path, meta: dict | None = None) -> Path:
    """A checkpoint of `model` that `load_model` rebuilds; `meta` (plain values) says how it was made.

    ValueError where one of META is of another type, or a value is not plain.  UserError where the model is not float32.
    """
    if model.spec["base_model"] is None:
        raise UserError(f"can't write {path}: the classifier has no spec to rebuild it from; use one of "
                        "models/classifiers.py")
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
        raise UserError(f"{path} does not hold a model of ours: {_first_line(error)[:200]}") from error
    return model.to(device)


def _rebuild(spec: dict, state: dict) -> models.Detector:
    """The model of this spec and state dict, in evaluation mode; raises what it likes where they do not fit."""
    if (classifier := spec["base_model"]) is None:
        raise ValueError("the classifier has no spec to rebuild it from")
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
                        f"{type(error).__name__}: {_first_line(error)[:200]}") from error
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


def digest(*parts) -> str:
    """16 letters that stand for modules' weights, tensors and what can be printed."""
    found = hashlib.sha256()
    for part in parts:
        tensors = part.state_dict().values() if isinstance(part, torch.nn.Module) else [part]
        for item in tensors:
            found.update(item.detach().cpu().contiguous().numpy().tobytes() if isinstance(item, torch.Tensor)
                         else f"{item};".encode())
    return found.hexdigest()[:16]


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
        raise UserError(f"{path} does not hold mixtures of ours: {_first_line(error)[:200]}; {mend}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
