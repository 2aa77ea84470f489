"""The DCGAN (Radford et al. 2016) whose samples the confident classifier trains on (Lee et al. 2018)."""

import torch
from torch import Tensor, nn

WIDTH = 64      # of the discriminator's first layer; the others' are multiples


def halvings(size: int) -> int:
    """How often an image is halved until its side is odd or at most 7 (28 -> 7, 32 -> 4)."""
    return 0 if size <= 7 or size % 2 else 1 + halvings(size // 2)


class Generator(nn.Module):
    """Noise [B, 100] -> images [B, C, H, W] in [0, 1]."""

    noise = 100

    def __init__(self, channels: int, size: int):
        super().__init__()
        n = halvings(size)
        planes = WIDTH * 2 ** n
        layers = [nn.ConvTranspose2d(self.noise, planes, size >> n, bias=False), nn.BatchNorm2d(planes), nn.ReLU()]
        for _ in range(n - 1):
            layers += [nn.ConvTranspose2d(planes, planes // 2, 4, 2, padding=1, bias=False),
                       nn.BatchNorm2d(planes // 2), nn.ReLU()]
            planes //= 2
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(planes, channels, 4, 2, padding=1), nn.Sigmoid())
        self.apply(initialise)

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise[:, :, None, None])


class Discriminator(nn.Module):
    """Images [B, C, H, W] -> the logit [B] of being real."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        n = halvings(size)
        layers = [nn.Conv2d(channels, WIDTH, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(n - 1):
            layers += [nn.Conv2d(WIDTH * 2 ** i, WIDTH * 2 ** (i + 1), 4, 2, padding=1, bias=False),
                       nn.BatchNorm2d(WIDTH * 2 ** (i + 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTH * 2 ** (n - 1), 1, size >> n))
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten()


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """DCGAN's: weights from N(0, 0.02), of batch norms from N(1, 0.02)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        module.weight.normal_(0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        module.weight.normal_(1, 0.02)
