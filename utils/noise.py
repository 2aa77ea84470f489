"""The two OOD sets that are made of noise (Table 2: Uniform and Noise)."""

import numpy as np
import torch

SIGMA = (1.0, 2.5)      # of the Gaussian blur, in pixels, uniform per image                    [code]
GAMMA = (5.0, 30.0)     # of the contrast sigmoid, uniform per image                            [code]
TRUNCATE = 4.0          # the blur's kernel ends at this many sigma, as scipy.ndimage's


def uniform_images(n: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """n images of independent uniform pixels, uint8 [n, *shape]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8))


def noise_images(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Smooth noise with the pixel statistics of `images`, uint8 [N, C, H, W] -> uint8 [N, C, H, W].

    Each channel's pixels are permuted (independently), blurred by a Gaussian with sigma uniform in SIGMA, and
    sharpened by sigmoid(gamma (x - 1/2)), gamma uniform in GAMMA; x in [0, 1]; one sigma and gamma an image.

    Deviation: the published code blurs across the colour channels too; here each channel is blurred alone.
    """
    n, channels, height, width = images.shape
    rng = np.random.default_rng(seed)
    sigma = torch.from_numpy(rng.uniform(*SIGMA, n).astype(np.float32))
    gamma = torch.from_numpy(rng.uniform(*GAMMA, n).astype(np.float32))
    out = torch.empty((n, channels, height, width), dtype=torch.uint8)
    for part in torch.arange(n).split(1024):   # bounds the memory
        pixels = images[part.to(images.device)].cpu().flatten(2).numpy()           # [n, C, HW]
        x = torch.from_numpy(rng.permuted(pixels, axis=2)).view(-1, channels, height, width) / 255
        rows = blur_matrix(sigma[part], height)[:, None]                           # [n, 1, H, H]
        cols = blur_matrix(sigma[part], width)[:, None]
        x = rows @ x @ cols.transpose(2, 3)
        out[part] = (255 * torch.sigmoid(gamma[part, None, None, None] * (x - 0.5))).round().to(torch.uint8)
    return out.to(images.device)


def blur_matrix(sigma: torch.Tensor, size: int) -> torch.Tensor:
    """Gaussian blur along one axis as a matrix, one per sigma: [n] -> [n, size, size], rows sum to 1.

    Kernel and border (mirrored with the border pixel repeated) are those of scipy.ndimage.gaussian_filter1d.
    """
    reach = int(TRUNCATE * float(sigma.max()) + 0.5)
    offset = torch.arange(-reach, reach + 1)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)                      # [n, offsets]
    weight = weight * (offset.abs() <= (TRUNCATE * sigma[:, None] + 0.5).int())
    weight = weight / weight.sum(1, keepdim=True)
    source = (torch.arange(size)[:, None] + offset) % (2 * size)                   # [size, offsets]
    source = torch.where(source < size, source, 2 * size - 1 - source)
    matrix = torch.zeros(len(sigma), size, size)
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1), weight[:, None].expand(-1, size, -1))
