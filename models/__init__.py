"""What is computed: classifiers, metric, mixtures, CCU, its certificate, and the methods beside it."""

import torch

from models.ccu import CCU
from models.certificate import certified_radius, confidence_bound
from models.classifiers import CLASSIFIERS, LeNet, ResNet18
from models.detectors import Detector, Softmax
from models.gmm import GMM
from models.metric import PCAMetric


def build_classifier(arch: str, channels: int, size: int, classes: int) -> torch.nn.Module:
    """A freshly initialised classifier from its spec."""
    return CLASSIFIERS[arch](channels, size, classes)


def build(spec: dict) -> Detector:
    """The detector that `spec` describes; load a state dict to give it its weights."""
    base_model = build_classifier(**spec["base_model"])
    if spec["kind"] == "Softmax":
        return Softmax(base_model)
    if spec["kind"] == "CCU":
        D = spec["dim"]
        metric = PCAMetric(torch.empty(D, D), torch.empty(D))
        gmms = [GMM(torch.empty(K, D), torch.empty(K), torch.empty(K), metric) if K else None
                for K in (spec["components_in"], spec["components_out"])]
        return CCU(base_model, *gmms, 0.0, spec["classes"])
    raise ValueError(f"unknown kind of model {spec['kind']!r}")


__all__ = ["CCU", "CLASSIFIERS", "Detector", "GMM", "LeNet", "PCAMetric", "ResNet18", "Softmax", "build",
           "build_classifier", "certified_radius", "confidence_bound"]
