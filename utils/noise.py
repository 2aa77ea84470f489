"""The two OOD sets that are made of noise (Table 2: Uniform and Noise)."""

import numpy as np
import torch

SIGMA = (1.0, 2.5)      # of the Gaussian blur, in pixels, uniform per image                    [code]
GAMMA = (5.0, 30.0)     # of the contrast sigmoid, uniform per image                            [code]


def uniform_images(n: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """n images of independent uniform pixels, uint8 [n, *shape]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8))


def noise_images(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Smooth noise with the pixel statistics of `images`, uint8 [N, C, H, W] -> uint8 [N, C, H, W].

    Each channel's pixels are permuted (independently), blurred by a Gaussian with sigma uniform in SIGMA, and
    sharpened by sigmoid(gamma (x - 1/2)), gamma uniform in GAMMA; x in [0, 1]; one sigma and gamma an image.

    Deviation: the published code blurs across the colour channels too; here each channel is blurred alone.
    """
    # not at once: importing it takes longer than --help may
    from scipy.ndimage import gaussian_filter
    from scipy.special import expit

    n, channels, height, width = images.shape
    rng = np.random.default_rng(seed)
    sigma, gamma = rng.uniform(*SIGMA, n), rng.uniform(*GAMMA, n)
    out = np.empty(images.shape, np.uint8)
    for i, pixels in enumerate(images.flatten(2).cpu().numpy()):                    # [C, HW]
        x = rng.permuted(pixels, axis=1).reshape(channels, height, width) / 255
        x = gaussian_filter(x, (0, sigma[i], sigma[i]))
        out[i] = np.rint(255 * expit(gamma[i] * (x - 0.5)))
    return torch.from_numpy(out).to(images.device)
