"""What is computed: classifiers, metric, mixtures, CCU, its certificate, and the methods beside it."""

import torch

from models.ccu import CCU
from models.certificate import certified_radius, confidence_bound
from models.classifiers import CLASSIFIERS, LeNet, Normalised, ResNet18, build_classifier
from models.detectors import DE, EDL, MCD, ODIN, Detector, Maha, Softmax
from models.gmm import GMM
from models.metric import PCAMetric

# kind in a spec -> the class that its settings make
DETECTORS = {cls.__name__: cls for cls in (EDL, MCD, ODIN, Maha, Softmax)}


def build(spec: dict) -> Detector:
    """The detector that `spec` describes; load a state dict to give it its weights."""
    settings = dict(spec)
    kind, classifier = settings.pop("kind"), settings.pop("base_model")
    if kind == "DE":
        return DE([build_classifier(**classifier) for _ in range(spec["members"])])
    base_model = build_classifier(**classifier)
    if kind == "CCU":
        D = spec["dim"]
        metric = PCAMetric(torch.empty(D, D), torch.empty(D))
        gmms = [GMM(torch.empty(K, D), torch.empty(K), torch.empty(K), metric) if K else None
                for K in (spec["components_in"], spec["components_out"])]
        return CCU(base_model, *gmms, 0.0, spec["classes"])
    if kind not in DETECTORS:
        raise ValueError(f"unknown kind of model {kind!r}; known: CCU, DE, {', '.join(DETECTORS)}")
    return DETECTORS[kind](base_model, **settings)


__all__ = ["CCU", "CLASSIFIERS", "DE", "DETECTORS", "Detector", "EDL", "GMM", "LeNet", "MCD", "Maha", "Normalised",
           "ODIN", "PCAMetric", "ResNet18", "Softmax", "build", "build_classifier", "certified_radius",
           "confidence_bound"]
