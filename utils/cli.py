"""The command line: one parser for flags, one way to fail, one choice of device."""

import argparse
import contextlib
import ctypes
import errno
import os
import re
import sys
import traceback
import warnings
from pathlib import Path

import torch

import params
from utils import files, parallel
from utils.errors import UserError, check_name, warn
from utils.out_data import KNOWN_OUT

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # of glibc's malloc.h


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a flag's values."""

    def _get_default_metavar_for_optional(self, action):
        return "0|1" if action.type is flag else super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, exit code 2, and name the closest known value."""

    def __init__(self, doc: str):
        summary, _, details = doc.strip().partition("\n\n")
        super().__init__(description=summary, epilog=details, allow_abbrev=False,
                         formatter_class=HelpFormatter)
        # argparse takes -1e-1 for an option before Python 3.14
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
        self.shared = self.add_argument_group("common")
        self.shared.add_argument("--debug", type=flag, default=False, help="1 = show the traceback of an error (0)")

    def exit(self, status=0, message=None):
        """Of several processes only the first to fail says why."""
        super().exit(status, message if parallel.first_to_fail() else None)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        for text in unknown:
            if not text.startswith("-"):
                self.error(f"{text} belongs to no option")
            try:
                check_name(text.partition("=")[0], self._option_string_actions, "option")
            except UserError as error:
                self.error(str(error))
        return args

    def error(self, message):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the options)\n")

    def _check_value(self, action, value):
        if action.choices is not None:
            try:
                check_name(str(value), map(str, action.choices), "value")
            except UserError as error:
                raise argparse.ArgumentError(action, str(error)) from None

    def gpu(self, what: str = "GPU to use; -1 = CPU (default: GPU 0 where there is one)") -> "Parser":
        self.shared.add_argument("--gpu", type=int, help=what)
        return self

    def common(self) -> "Parser":
        """Options of all scripts that compute."""
        self.gpu()
        self.shared.add_argument("--seed", type=integer(0), default=0, help="seed of all random draws (0)")
        self.shared.add_argument("--download", type=flag, default=False, help="1 = fetch missing data sets that "
                                 "torchvision or pytorch-ood can fetch (0)")
        return self.data_dir()

    def data_dir(self) -> "Parser":
        self.shared.add_argument("--data_dir", type=path, default="data", help="where the data sets are (data)")
        return self

    def dataset(self) -> "Parser":
        self.add_argument("--dataset", required=True, choices=list(params.DATASETS), help="the in-distribution: "
                          + ", ".join(params.DATASETS) + " (your own images: --data_dir with train/<class>/ and "
                          "test/<class>/)", metavar="D")
        return self.image_size()

    def datasets(self) -> "Parser":
        self.add_argument("--datasets", nargs="+", required=True, choices=list(params.DATASETS), metavar="D",
                          help="in-distributions: " + ", ".join(params.DATASETS))
        return self.image_size()

    def image_size(self) -> "Parser":
        self.add_argument("--image_size", type=size, default=params.IMAGE_SIZE, metavar="N", help="of the data "
                          "set Folder, whose images are resized to N x N; a multiple of 4, 8 to 64 "
                          f"({params.IMAGE_SIZE})")
        return self

    def out_dataset(self) -> "Parser":
        self.add_argument("--out_dataset", default="auto", choices=("auto", *KNOWN_OUT), metavar="D",
                          help="out-distribution: TinyImages, RandomImages300k, Folder (photos in --out_dir), "
                          "Photos (crops of a photograph that scikit-learn brings) or another data set (auto: the "
                          "first of TinyImages and RandomImages300k whose file is in --data_dir, else Photos)")
        self.add_argument("--out_dir", type=path, help="folder of photos for --out_dataset Folder")
        return self

    def table(self) -> "Parser":
        self.add_argument("--models", nargs="+", action="extend", metavar="LABEL", help="labels (all that are trained)")
        self.add_argument("--drop_mmc", type=flag, default=False, help="1 = leave out MMC, the mean maximal "
                          "confidence (0)")
        return self

    def metric(self) -> "Parser":
        self.add_argument("--PCA", type=flag, default=True, help="1 = metric from a PCA, 0 = Euclidean (1)")
        self.add_argument("--metric", choices=("pca", "mahalanobis"), default="pca", help="with --PCA 1: divide "
                          "by the root of the singular values, as the published code does, or whiten (pca)")
        return self


def flag(text: str) -> bool:
    """0/1 and true/false; `bool` would read '0' as true."""
    values = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")
    return values[text.lower()]


def size(text: str) -> int:
    """argparse type: a side that the networks can halve twice and whose metric, [C N^2, C N^2], fits into memory."""
    if (value := integer(8, 64)(text)) % 4:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 4")
    return value


def name(text: str) -> str:
    """argparse type: a name that is a file's too."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: letters, digits and _ . + - only")
    return text


def path(text: str) -> str:
    """argparse type: a path, whether or not anything is there, without a slash at its end, and relative if it lies in
    the current folder, so that --resume 1 takes both spellings for one; from Python 3.14 on pathlib takes one that
    cannot be looked at, too long or not permitted, for one where nothing is."""
    if not text:        # a variable of the shell that is not set
        raise argparse.ArgumentTypeError("an empty path")
    text = os.path.expanduser(text)     # the shell leaves --data_dir=~/data and NAME=~/data as they are
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    folder = Path(text)
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)


def stem(text: str) -> str:
    """argparse type: PATH of PATH.csv and PATH.txt; either file's name means the same."""
    if not text or text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return os.path.expanduser(text).removesuffix(".csv").removesuffix(".txt")


def assignment(text: str) -> tuple[str, str]:
    """argparse type: NAME=FOLDER -> (NAME, FOLDER)."""
    key, _, folder = text.partition("=")
    if not key or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=FOLDER")
    return key, os.path.expanduser(folder)


def given(args: argparse.Namespace, parser: Parser, names) -> dict:
    """Those of these options that are not at their default, and their values."""
    return {name: getattr(args, name) for name in names if getattr(args, name) != parser.get_default(name)}


def spelled(options: dict) -> str:
    """{"n": 10, "grad_vars": ["mu"]} -> --n 10 --grad_vars mu."""
    return " ".join(f"--{name} {' '.join(value) if isinstance(value, list) else value}"
                    for name, value in options.items())


def _number(kind, low, high, open_low):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not (low < value if open_low else low <= value) or not value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {'above' if open_low else 'at least'}"
                                             f" {low}" + (f" and at most {high}" if high < 2 ** 40 else ""))
        return value
    return parse


def integer(low: int = 1, high: int = 2 ** 31 - 1):
    """argparse type: an integer in [low, high]."""
    return _number(int, low, high, open_low=False)


def number(low: float = 0.0, high: float = 1e300, open_low: bool = False):
    """argparse type: a finite number in [low, high], or ]low, high] with open_low."""
    return _number(float, low, high, open_low)


def metric_name(args: argparse.Namespace) -> str:
    """pca, mahalanobis or euclidean, by --PCA and --metric."""
    if args.metric == "mahalanobis" and not args.PCA:
        raise UserError("--metric mahalanobis goes with --PCA 1; --PCA 0 is the Euclidean metric")
    return args.metric if args.PCA else "euclidean"


def own_folders(args: argparse.Namespace, out_name: str) -> dict[str, str | None]:
    """--data_dir and --out_dir where they decide what images these are, else None."""
    return {"data_dir": args.data_dir if args.dataset == "Folder" else None,
            "out_dir": args.out_dir if out_name == "Folder" else None}


def device(gpu: int | None) -> torch.device:
    """The device of --gpu: None = GPU 0 where there is one, -1 = CPU.  Of several processes each has its own GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    several = parallel.world_size() > 1
    if several and gpu not in (None, -1):
        raise UserError(f"--gpu {gpu}: leave it out, torchrun gives each process a GPU of its own; or -1 for the CPU")
    if gpu is None:
        gpu = -1 if not count else parallel.local_rank() if several else 0
        if gpu >= count:
            raise UserError(f"this machine shows {count} GPU{'s' * (count != 1)} to PyTorch: start as many processes, "
                            f"torchrun --nproc_per_node={count} ..., or give --gpu -1 for the CPU")
    if gpu == -1:
        return torch.device("cpu")
    if not 0 <= gpu < count:
        raise UserError(f"--gpu {gpu}: this machine shows {count or 'no'} GPU{'s' * (count != 1)} to PyTorch; "
                        f"{'leave --gpu out' if count < 2 else f'choose 0 to {count - 1}'}, or give -1 for the CPU")
    torch.cuda.set_device(gpu)
    torch.backends.cudnn.benchmark = True       # shapes hardly vary: its fastest convolutions are worth finding
    # the densities' products in float32, also where a container's environment allows TF32
    torch.set_float32_matmul_precision("highest")
    return torch.device("cuda", gpu)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself; True where PyTorch does not tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return not known or any(value for name, value in known.items() if "bf16" in name)


def keep_freed_memory() -> None:
    """For work in equal steps on a CPU: glibc gives large tensors back to the system at once, and each 4 kB of the
    next step's cost a page fault.  Kept, they take more memory at the peak; a ResNet18 gains by it, a LeNet loses a
    little (benchmarks/run.py)."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def run(main, parser: Parser, several: bool = False) -> None:
    """Parse, call main(args), and turn what is the user's to mend into one line and exit code 2.

    several: torchrun may start it in several processes, which end together.
    """
    # far from a centroid responsibilities are numbers below 1e-38, on which many processors are ten times slower
    torch.set_flush_denormal(True)
    # None is what the shell has closed, >&-
    sys.stdout = sys.stdout or open(os.devnull, "w")        # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")        # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):     # a table's dash must not fail where there is no UTF-8
        stream.reconfigure(errors="replace")
    parallel.start()
    args = parser.parse_args()
    try:
        with parallel.quiet(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: warn(message)
            if parallel.world_size() > 1 and not several:
                raise UserError("runs in one process: start it with python, not with torchrun")
            if parallel.world_size() > 1 and args.download:
                raise UserError("--download 1: several processes would fetch the same files; run gen_gmm.py or "
                                "gen_eval.py with it first")
            main(args)
            sys.stdout.flush()
            parallel.end()
    except BrokenPipeError:         # `| head` has seen enough; at the exit Python would flush once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(141)
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")
    except Exception as error:
        if line := to_mend(error):
            if args.debug:
                traceback.print_exc()
            parser.exit(2, f"{parser.prog}: {' '.join(line.splitlines())}\n")
        if not parallel.first_to_fail():        # this is what a broken connection looks like
            parser.exit(2)
        raise
    finally:
        files.unlock()
        torch.set_flush_denormal(False)


def to_mend(error: Exception) -> str | None:
    """What the user can mend; None for an error of ours."""
    if isinstance(error, UserError):
        return str(error)
    # the CPU's allocator, CUDA and its libraries have words of their own
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(
            "can't allocate memory|out of memory|ALLOC_FAILED", str(error)):
        return "out of memory: choose a smaller --batch_size (of an attack: --points), or fewer images or centroids"
    if "Expected more than 1 value per channel" in str(error):
        return "these images are so small that a batch norm needs more than one: choose a larger --batch_size"
    if parallel.world_size() > 1 and "by peer" in str(error):       # gloo's words where the other was killed
        return "another process of this run has ended: its own message, or torchrun's report, says why"
    # files.write reports a full disk itself; TensorBoard's logs are left
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM,
                                                      errno.ENAMETOOLONG):
        return f"{error.filename or 'error'}: {error.strerror}"
    return None
