"""The one place that opens our own files: written whole or not at all, read without running code."""

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

from utils import parallel
from utils.errors import UserError

try:
    import fcntl
except ImportError:     # Windows: no locks
    fcntl = None

LARGEST = 4 * 2 ** 30   # bytes; the metric of a Folder at 64x64x3 alone has 0.6 GB
ABANDONED = 1.0         # seconds after which a temporary file that nobody has locked is a killed run's
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
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except (OSError, RuntimeError) as error:
        # torch.save reports whatever ends it, a full disk or Ctrl-C, as a RuntimeError
        cause = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        if isinstance(cause, KeyboardInterrupt | MemoryError):
            raise cause from None
        raise UserError(f"can't write {path}: {first_line(cause)}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def _umask() -> int:
    """What the user keeps from others; it cannot be read without being set."""
    os.umask(mask := os.umask(0o077))
    return mask


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
        _held[name] = descriptor, made
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error


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
                os.stat(path.with_name(f".{path.name}.12345678.tmp"))       # raises where the name is too long
            folder = path.parent
            while not folder.exists() and not folder.is_symlink():
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
        raise UserError(f"{path} is damaged or no checkpoint ({first_line(error)[:80]}); {mend}") from error
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


def digest(*parts) -> str:
    """16 letters that stand for modules' weights, tensors and what can be printed."""
    found = hashlib.sha256()
    for part in parts:
        tensors = part.state_dict().values() if isinstance(part, torch.nn.Module) else [part]
        for item in tensors:
            found.update(item.detach().cpu().contiguous().view(-1).numpy() if isinstance(item, torch.Tensor)
                         else f"{item};".encode())
    return found.hexdigest()[:16]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
