"""The classifiers: images [B, C, H, W] in [0, 1] -> logits [B, M].

Layer names are those of the authors' weights, and of the repositories that other weights come from.  `features` is
the penultimate layer, which Maha uses.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """`spec` rebuilds the network: plain values only."""

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        self.spec = {"arch": type(self).__name__, "channels": channels, "size": size, "classes": classes}


class LeNet(Classifier):
    """Two 5x5 convolutions with max-pool, 3136 -> 1024 -> M for 28x28 (MNIST)."""

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10):
        super().__init__(channels, size, classes)
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (size // 4) ** 2, 1024)
        self.fc2 = nn.Linear(1024, classes)

    def convolutions(self, x: Tensor) -> Tensor:
        # max-pool and ReLU commute: in this order the ReLU has a quarter of the work
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return x.flatten(1)                                             # [B, 3136]

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(self.convolutions(x)))                   # [B, 1024]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.features(x))


class Dropout(nn.Module):
    """Dropout of vectors [..., F]: each entry is 0 with probability p, else divided by 1 - p.

    At test time it does nothing, unless `masks` [S, F] are fixed (MCD): then x [B, F] or [S, B, F] becomes
    [S, B, F], pass s under mask s.  The linear layers that follow take all passes at once.
    """

    def __init__(self, features: int, p: float = 0.5):
        super().__init__()
        self.features, self.p = features, p
        self.register_buffer("masks", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.dropout(x, self.p)
        return x if self.masks is None else x * self.masks[:, None]


class LeNetDropout(LeNet):
    """LeNet with dropout before both fully connected layers (Gal & Ghahramani 2016)."""

    def __init__(self, channels: int = 1, size: int = 28, classes: int = 10):
        super().__init__(channels, size, classes)
        self.dropout1 = Dropout(self.fc1.in_features)
        self.dropout2 = Dropout(self.fc2.in_features)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(self.dropout1(self.convolutions(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout2(self.features(x)))


class BasicBlock(nn.Module):
    """He et al. 2016: x [B, in_planes, H, W] -> [B, planes, H/stride, W/stride]."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(out + self.shortcut(x), inplace=True)


class ResNet18(Classifier):
    """He et al. 2016, in the CIFAR style: 3x3 stem, no max-pool, 64-128-256-512."""

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10):
        super().__init__(channels, size, classes)
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.linear = nn.Linear(512, classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))                                           # [B, 512]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


class VGG13(Classifier):
    """Simonyan & Zisserman 2015, in the CIFAR style: 10 convolutions with batch norm, dropout, one linear layer.

    The fifth max-pool takes all that is left (2x2 both from 32x32 and, pooling with rounding up, from 28x28).
    """

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10):
        super().__init__(channels, size, classes)
        layers: list[nn.Module] = []
        for planes in (64, 128, 256, 512, 512):
            for _ in range(2):
                layers += [nn.Conv2d(channels, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU()]
                channels = planes
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        layers[-1] = nn.AdaptiveMaxPool2d(1)
        self.features = nn.Sequential(*layers, nn.Flatten())            # -> [B, 512]
        self.dropout = Dropout(512)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x)))


class WideBlock(nn.Module):
    """Batch norm and ReLU before each convolution; where the shape changes, before the shortcut too."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if in_planes != planes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    """Blocks one after the other: x [B, in_planes, H, W] -> [B, planes, H/stride, W/stride]."""

    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(*(WideBlock(planes if i else in_planes, planes, 1 if i else stride)
                                     for i in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(Classifier):
    """Zagoruyko & Komodakis 2016, depth 40, width 2: the network of the outlier exposure repository."""

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10):
        super().__init__(channels, size, classes)
        blocks, widths = 6, (32, 64, 128)               # (40 - 4) / 6; 2 x (16, 32, 64)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(blocks, 16, widths[0], 1)
        self.block2 = WideStage(blocks, widths[0], widths[1], 2)
        self.block3 = WideStage(blocks, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return F.relu(self.bn1(x)).mean((2, 3))                         # [B, 128]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class Normalised(nn.Module):
    """A classifier that was trained on (x - mean) / std, per channel; takes x in [0, 1] like the others."""

    def __init__(self, classifier: Classifier, mean: Sequence[float] | None = None,
                 std: Sequence[float] | None = None):
        super().__init__()
        channels = classifier.spec["channels"]
        self.spec = {**classifier.spec, "normalised": True}
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor([0.0] * channels if mean is None else mean))
        self.register_buffer("std", torch.tensor([1.0] * channels if std is None else std))

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def features(self, x: Tensor) -> Tensor:
        return self.classifier.features(self.normalise(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.normalise(x))


CLASSIFIERS = {cls.__name__: cls for cls in (LeNet, LeNetDropout, ResNet18, VGG13, WideResNet)}


def build_classifier(arch: str, channels: int, size: int, classes: int, normalised: bool = False) -> nn.Module:
    """A freshly initialised classifier from its spec."""
    classifier = CLASSIFIERS[arch](channels, size, classes)
    return Normalised(classifier) if normalised else classifier
