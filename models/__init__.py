"""What is computed: classifiers, metric, mixtures, CCU, its certificate, and the methods beside it."""

import torch

from models.ccu import CCU
from models.certificate import certified_radius, confidence_bound
from models.classifiers import CLASSIFIERS, LeNet, Normalised, ResNet18, build_classifier
from models.detectors import DE, EDL, MCD, ODIN, Detector, Maha, Softmax
from models.gmm import GMM
from models.metric import PCAMetric


def build(spec: dict) -> Detector:
    """The detector that `spec` describes; load a state dict to give it its weights."""
    kind = spec["kind"]
    if kind == "DE":
        return DE([build_classifier(**spec["base_model"]) for _ in range(spec["members"])])
    base_model = build_classifier(**spec["base_model"])
    alone = {"Softmax": Softmax, "EDL": EDL, "ODIN": ODIN}
    if kind in alone:
        return alone[kind](base_model)
    if kind == "MCD":
        return MCD(base_model, spec["passes"])
    if kind == "Maha":
        return Maha(base_model, spec["features"], spec["classes"])
    if kind == "CCU":
        D = spec["dim"]
        metric = PCAMetric(torch.empty(D, D), torch.empty(D))
        gmms = [GMM(torch.empty(K, D), torch.empty(K), torch.empty(K), metric) if K else None
                for K in (spec["components_in"], spec["components_out"])]
        return CCU(base_model, *gmms, 0.0, spec["classes"])
    raise ValueError(f"unknown kind of model {kind!r}")


__all__ = ["CCU", "CLASSIFIERS", "DE", "Detector", "EDL", "GMM", "LeNet", "MCD", "Maha", "Normalised", "ODIN",
           "PCAMetric", "ResNet18", "Softmax", "build", "build_classifier", "certified_radius", "confidence_bound"]
