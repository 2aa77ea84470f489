"""Image files and photographs: decoded once, resized in one way, kept as uint8 [C, H, W].

Resizing is bilinear with antialias everywhere (Pillow's BILINEAR); grey is Pillow's "L"
(0.299 R + 0.587 G + 0.114 B).
"""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.errors import MissingData, UserError, warn

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")     # not EPS, which is a program
GREY_MODES = ("1", "L", "LA", "I;16", "I", "F")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # what is too large is named below
warnings.filterwarnings("ignore", "Palette images with Transparency")   # which is left out


def list_images(path: str | Path) -> list[Path]:
    """All image files below a folder but hidden ones, sorted; MissingData if there are none, PermissionError if one may
    not look.
    """
    def refuse(error: OSError):     # what may not be read is not left out in silence
        if isinstance(error, PermissionError):
            raise error

    files, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:      # a link back to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]     # .ipynb_checkpoints and the like
        files += [Path(folder, name) for name in names
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    files.sort()
    if not files:
        raise MissingData(f"no images in {path}: it must be a folder of {' '.join(EXTENSIONS)} files")
    return files


def read_images(paths: Sequence[Path], channels: int, size: int, crops: Sequence[np.ndarray] | None = None,
                what: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Decode files of any size and mode, each once: (uint8 [n, channels, size, size], which could be read).

    Without `crops`, one image a file: its shorter side is resized to `size` and the centre is cut out;
    crops[i] [k, 3] takes k random crops of file i (see `random_crops`).  Files that cannot be read are left
    out, counted and named on one line of stderr; the second value, bool, one an image asked for, is False for
    them.  UserError if none can be read.
    """
    crops = [None] * len(paths) if crops is None else crops
    counts = [1 if crop is None else len(crop) for crop in crops]
    ends = np.cumsum(counts)
    starts = ends - counts
    out = np.empty((ends[-1], channels, size, size), np.uint8)
    bad: dict[int, str] = {}        # why, where it can be mended

    def read(i: int) -> None:
        try:
            with Image.open(paths[i], formats=FORMATS) as image:
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:     # Pillow itself only warns
                    raise Image.DecompressionBombError      # as Pillow does above twice as many
                if crops[i] is not None:   # a big JPEG may be decoded at a fraction of its size
                    image.draft(None, (8 * size, 8 * size))
                image = _decode(image, channels)
            out[starts[i]:ends[i]] = (random_crops(image, crops[i], size) if crops[i] is not None else
                                      pixels(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)))
        except Image.DecompressionBombError:
            bad[i] = f" (above {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels: scale it down)"
        except UserError as error:      # of _decode
            bad[i] = f" ({error})"
        except Exception:   # decoders raise a dozen kinds of errors on damaged files
            bad[i] = ""

    # decoding big images runs beside Python, small ones only get into each other's way
    some = paths[::max(1, len(paths) // 100)]
    big = np.mean([path.stat().st_size if path.exists() else 0 for path in some]) > 2**15   # a link may lead nowhere
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1) if big else 1) as pool:
        done = pool.map(read, range(len(paths))) if big else map(read, range(len(paths)))
        for _ in tqdm(done, total=len(paths), desc=what, unit="image", disable=None):
            pass
    kept = np.ones(len(out), bool)
    if bad:
        names = ", ".join(f"{paths[i]}{bad[i]}" for i in sorted(bad)[:5]) + (", ..." if len(bad) > 5 else "")
        if len(bad) == len(paths):
            raise UserError(f"none of the {len(paths)} images of {what} can be read: {names}")
        warn(f"{len(bad)} of {len(paths)} images cannot be read and are left out: {names}")
        for i in bad:
            kept[starts[i]:ends[i]] = False
    return torch.from_numpy(out[kept] if bad else out), torch.from_numpy(kept)


def random_crops(image: Image.Image, where: np.ndarray, size: int) -> torch.Tensor:
    """Square crops at random places and scales, resized: uint8 [k, C, size, size].

    `where` [k, 3] is uniform in [0, 1).  The side is log-uniform between `size` and the image's shorter side,
    so that an image of about the target size is used nearly whole; then left and top.
    """
    width, height = image.size
    short = min(width, height)
    side = short * (min(size, short) / short) ** where[:, 0]
    left, top = (width - side) * where[:, 1], (height - side) * where[:, 2]
    boxes = np.stack([left, top, left + side, top + side], 1).clip(0, [width, height] * 2)
    return torch.from_numpy(np.stack([pixels(image.resize((size, size), Image.Resampling.BILINEAR, tuple(box),
                                                          reducing_gap=2.0)) for box in boxes]))


def shape_like(images: torch.Tensor, channels: int, size: int) -> torch.Tensor:
    """uint8 [N, C, H, W] -> [N, channels, size, size]: to grey or grey in all channels, and resized."""
    out = []
    for x in images.split(4096):   # bounds the memory
        if x.shape[1] == 3 and channels == 1:
            r, g, b = x.int().unbind(1)
            x = ((19595 * r + 38470 * g + 7471 * b + 2**15) >> 16).to(torch.uint8)[:, None]   # as Pillow
        if x.shape[2:] != (size, size):
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        out.append(x.expand(-1, channels, -1, -1))
    return torch.cat(out) if out else images.new_empty(0, channels, size, size)


def sample_photo(name: str, channels: int) -> Image.Image:
    """One of scikit-learn's two photographs, 640 x 427, in grey or colour."""
    from sklearn.datasets import load_sample_image

    return _decode(Image.fromarray(load_sample_image(name)), channels)


def _decode(image: Image.Image, channels: int) -> Image.Image:
    """Upright, 8 bits, grey ("L") or colour ("RGB"); UserError for 32 bits."""
    deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    if image.mode in ("I", "F") and not deep:
        raise UserError("32 bits, whose white is anybody's guess: save it with 8 or 16")
    image = ImageOps.exif_transpose(image)
    if deep:        # Pillow would cut 16 bits off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def pixels(image: Image.Image) -> np.ndarray:
    """uint8 [C, H, W]."""
    return np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)


def is_grey(path: Path) -> bool:
    """Whether an image has no colour, of a JPEG at an eighth of its size; a GIF of grey values has a palette, and many
    a grey photo is stored as RGB."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode in GREY_MODES:
                return True
            image.draft(None, (1, 1))       # an eighth of a JPEG's size tells
            red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), 2, 0)
            return np.array_equal(red, green) and np.array_equal(green, blue)
    except Exception:   # named when it is read
        return True
