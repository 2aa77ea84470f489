"""Out-distributions: the images a model learns to be uncertain on.

Train and test parts of each never share an image, so that attacks from test draws (--out_seeds) start at images that no
network was trained on.
"""

import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator

import params
from utils.batches import ImageSet
from utils.data import PLAIN, downloading, load_plain
from utils.errors import MissingData, UserError, check_name, warn
from utils.images import list_images, random_crops, read_images, sample_photo, shape_like
from utils.torchvision_guard import datasets

KNOWN_OUT = (*params.OUT_DATASETS, "Folder", *PLAIN)
Shape = tuple[int, int]   # channels, size
_FILES = {"TinyImages": "80M_Tiny_Images/tiny_images.bin", "RandomImages300k": "300K_random_images.npy"}
FIXED = (*_FILES, *PLAIN)      # images as they are; the others are crops of photos
_HOW = {
    "TinyImages": "80 Million Tiny Images was withdrawn by its owners in 2020; the field uses --out_dataset "
                  "RandomImages300k instead",
    "RandomImages300k": "give --download 1, or put 300K_random_images.npy, of the outlier exposure repository "
                        "(github.com/hendrycks/outlier-exposure), into {dir}",
}


def resolve(name: str, data_dir: str | Path) -> str:
    """`name`, or for "auto" the first of params.OUT_DATASETS whose file is there; UserError if unknown."""
    if name == "auto":   # Photos has no file and is always there
        return next(out for out in params.OUT_DATASETS
                    if out not in _FILES or Path(data_dir, _FILES[out]).is_file())
    check_name(name, KNOWN_OUT, "out-distribution")
    return name


def load_out(name: str, like: ImageSet, data_dir: str | Path, out_dir: str | Path | None = None,
             split: str = "train", n: int | None = None, seed: int = 0, download: bool = False,
             uses: int | None = None) -> ImageSet:
    """An out-distribution in the shape and on the device of `like`, in random order, without labels.

    Fixed images (TinyImages, RandomImages300k, another data set) give a seeded choice of n, or all if they
    are fewer; photos (Folder: all below out_dir, Photos: one photograph) give n random crops.  Without n:
    params.OUT_IMAGES or OUT_CROPS images for split "train", OUT_TEST for "test"; no more crops are cut than
    a training `uses`.  Raises MissingData, or UserError for what is damaged, empty, unknown or the
    in-distribution itself.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is train or test, not {split}")
    name = resolve(name, data_dir)
    if out_dir is not None and name != "Folder":
        raise UserError(f"--out_dir goes with --out_dataset Folder, not with {name}")
    shape = like.images.shape[1:3]
    rng = np.random.default_rng(seed)
    crops = name in ("Folder", "Photos")
    if n is None:
        n = (params.OUT_CROPS if crops else params.OUT_IMAGES) if split == "train" else params.OUT_TEST
        n = min(n, max(1, params.OUT_BYTES // like.images.shape[1:].numel()))
        if crops and uses is not None:
            n = min(n, uses)
    if name == "Folder" and like.name == "Folder" and out_dir is not None and any(
            one_holds(out_dir, Path(data_dir, part)) for part in ("train", "test")):
        raise UserError(f"--out_dir {out_dir} has images of the in-distribution, those in {data_dir}: choose another")
    if name == "Photos":
        images = _photo(split, n, shape, rng)
    elif name == "Folder":
        images = _folder(out_dir, split, n, shape, rng)
    elif name in _FILES:
        path = Path(data_dir, _FILES[name])
        if not path.is_file():
            if not download or name == "TinyImages":
                raise MissingData(f"{name} needs {path}: {_HOW[name].format(dir=data_dir)}")
            _download(path)
        images = (_tiny_images if name == "TinyImages" else _random_images)(path, split, n, shape, rng)
    elif name == like.name:
        raise UserError(f"--out_dataset {name} is the in-distribution itself: choose another")
    else:
        images = load_plain(name, split, data_dir, download).images
        images = shape_like(images[torch.from_numpy(rng.permutation(len(images))[:n])], *shape)
    return ImageSet(name, images, None, 0).to(like.images.device)


def one_holds(a: str | Path, b: str | Path) -> bool:
    """Whether one of two folders is the other or lies in it."""
    a, b = Path(a).resolve(), Path(b).resolve()
    return a.is_relative_to(b) or b.is_relative_to(a)


def _draw(count: int, split: str, n: int, rng: Generator, excluded: np.ndarray | None = None) -> np.ndarray:
    """n indices (or all) in random order, each once, of the first 90 % (train) or the last 10 % (test)."""
    border = count - int(count * params.OUT_HELD_OUT)
    low, high = (0, border) if split == "train" else (border, count)
    gaps = np.empty(0, np.int64) if excluded is None else np.unique(excluded)
    gaps = gaps[(gaps >= low) & (gaps < high)]
    allowed = high - low - len(gaps)
    if allowed < 1:
        raise UserError("the CIFAR overlap list leaves no image of the out-distribution")
    rank = rng.choice(allowed, min(n, allowed), replace=False)   # makes no list of 80 million
    return low + rank + np.searchsorted(gaps - low - np.arange(len(gaps)), rank, side="right")


def _gather(source: np.ndarray, index: np.ndarray, axes: tuple[int, ...], shape: Shape) -> torch.Tensor:
    """source[index] of a memory-mapped file; `axes` takes it to N, C, H, W.  Read front to back, in parts."""
    channels, size = shape
    images = torch.empty(len(index), channels, size, size, dtype=torch.uint8)
    for part in np.array_split(np.argsort(index), max(1, len(index) // 4096)):
        pixels = np.ascontiguousarray(source[index[part]].transpose(axes))
        images[torch.from_numpy(part)] = shape_like(torch.from_numpy(pixels), channels, size)
    return images


def _download(path: Path) -> None:
    """300K Random Images from where pytorch-ood has them, with its checksum."""
    with downloading("RandomImages300k", _HOW["RandomImages300k"].format(dir=path.parent), path.parent) as folder:
        download_url = datasets().utils.download_url        # pytorch-ood imports torchvision
        from pytorch_ood.dataset.img import TinyImages300k
        download_url(TinyImages300k.url, folder, path.name, TinyImages300k.md5)


def _tiny_images(path: Path, split: str, n: int, shape: Shape, rng: Generator) -> torch.Tensor:
    """80 Million Tiny Images without those that the CIFAR list names."""
    length = path.stat().st_size
    if length < 3072 / params.OUT_HELD_OUT or length % 3072:   # one image at least must fall into the test part
        raise UserError(f"{path} is empty or cut short: {length} bytes are not ten or more times 3072")
    excluded = None
    if (names := path.with_name("80mn_cifar_idxs.txt")).is_file():
        try:   # the list counts from 1, as Hendrycks' Outlier Exposure reads it
            excluded = np.array(names.read_text().split(), np.int64) - 1
        except (ValueError, OverflowError):
            raise UserError(f"{names} must hold whole numbers only, one a line") from None
    else:
        warn(f"{names} is not there: the images that are in CIFAR too are not left out")
    source = np.memmap(path, np.uint8, "r", shape=(length // 3072, 3, 32, 32))   # column by column
    return _gather(source, _draw(len(source), split, n, rng, excluded), (0, 1, 3, 2), shape)


def _random_images(path: Path, split: str, n: int, shape: Shape, rng: Generator) -> torch.Tensor:
    """300K Random Images: one array uint8 [N, 32, 32, 3]."""
    try:
        with warnings.catch_warnings(action="ignore"):       # what it says of odd headers
            source = np.lib.format.open_memmap(path, mode="r")   # never unpickles
        if source.dtype != np.uint8 or source.shape[1:] != (32, 32, 3) or len(source) < 1 / params.OUT_HELD_OUT:
            raise ValueError(f"{source.dtype} {list(source.shape)}, uint8 [N, 32, 32, 3] expected")
    except Exception as error:       # a header is read by Python's own parser, which raises what it likes
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is damaged or another file ({reason}); delete it and "
                        f"{_HOW['RandomImages300k'].format(dir=path.parent)}") from None
    return _gather(source, _draw(len(source), split, n, rng), (0, 3, 1, 2), shape)


def _folder(out_dir: str | Path | None, split: str, n: int, shape: Shape, rng: Generator) -> torch.Tensor:
    """n crops of the photos below out_dir, spread evenly over them; each photo is decoded once."""
    if out_dir is None:
        raise UserError("--out_dataset Folder needs --out_dir DIR, a folder of photos")
    photos = sorted(list_images(out_dir), key=lambda path: _hash(path.relative_to(out_dir)))
    if len(photos) < 2:
        raise UserError(f"{out_dir} holds one photo: two or more are needed, for training and for testing")
    held_out = max(1, int(len(photos) * params.OUT_HELD_OUT))
    photos = photos[:held_out] if split == "test" else photos[held_out:]
    counts = np.full(len(photos), n // len(photos))
    counts[rng.permutation(len(photos))[:n % len(photos)]] += 1
    where = np.split(rng.random((n, 3)), np.cumsum(counts)[:-1])
    chosen = np.flatnonzero(counts)
    images, _ = read_images([photos[i] for i in chosen], *shape, [where[i] for i in chosen], str(out_dir))
    return images[torch.from_numpy(rng.permutation(len(images)))]


def _hash(path: Path) -> bytes:
    """Orders photos at random, so that no class folder is held out as a whole, and for good: those already there
    hardly change their part when others are added."""
    return hashlib.sha256(os.fsencode(path.as_posix())).digest()


def _photo(split: str, n: int, shape: Shape, rng: Generator) -> torch.Tensor:
    """n crops of scikit-learn's china.jpg: of the left of it to train on, of the right to test."""
    channels, size = shape
    photo = sample_photo("china.jpg", channels)
    border = round(params.PHOTO_TRAIN * photo.width)
    left, right = (0, border) if split == "train" else (border, photo.width)
    return random_crops(photo.crop((left, 0, right, photo.height)), rng.random((n, 3)), size)
