"""The classifiers: images [B, C, H, W] in [0, 1] -> logits [B, M].

Layer names are those of the authors' weights.  `features` is the penultimate layer, which Maha uses.
"""

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

    def features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.fc1(x.flatten(1)))                           # [B, 1024]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.features(x))


class BasicBlock(nn.Module):
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
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


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
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))                                           # [B, 512]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


CLASSIFIERS = {cls.__name__: cls for cls in (LeNet, ResNet18)}
