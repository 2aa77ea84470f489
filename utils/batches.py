"""Images resident on a device as uint8, their augmentation, and batches of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import params


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
    """A random crop and a horizontal flip; each happens to an image with probability 1/2."""

    crop: int        # padding of the random crop in pixels, 0 = no crop
    pad_mode: str    # "constant" (black), "edge" or "reflect" (without repeating the border)
    flip: bool       # random horizontal flip

    @classmethod
    def of(cls, dataset: params.Dataset) -> "Augmentation":
        """A data set's own."""
        return cls(dataset.crop, dataset.pad_mode, dataset.flip)


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
