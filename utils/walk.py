"""The straight way from a test image out to noise, and what is certified along it (README: Figures)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import params
from models import CCU, Detector, certified_radius, confidence_bound
from models.certificate import CERTIFICATES
from utils.errors import UserError
from utils.region import distances


@dataclass
class Walk:
    """n points on the way; all but the images are float64, distances and radii in units of the metric."""

    images: Tensor                  # [n, C, H, W]
    distance: Tensor                # [n] to the image where it begins
    confidence: dict[str, Tensor]   # label -> [n]
    bound: dict[str, Tensor]        # method -> [n]: certified on the ball around the noise that reaches to the point
    radius: dict[str, Tensor]       # method -> [n]: certified around each point at params.RATIO


@torch.no_grad()
def walk(models: dict[str, Detector], label: str, image: Tensor, noise: Tensor, n: int = 241) -> Walk:
    """From `image` to `noise` [C, H, W], with steps that grow, so that most points lie near the image.

    models[label] is the CCU whose certificate and metric are shown.
    """
    if not isinstance(ccu := models[label], CCU):
        raise UserError(f"{label} is no CCU model and certifies nothing; choose CCU or CCUs")
    if strange := [name for name, model in models.items() if not model.score_is_confidence]:
        raise UserError(f"the score of {strange[0]} is no confidence; leave it out")
    t = torch.linspace(0, 1, n, device=image.device).square().view(-1, 1, 1, 1)
    images = (1 - t) * image + t * noise                                        # [n, C, H, W]
    around, metric = noise.expand_as(images), ccu.gmm_in.metric
    to_noise = distances(metric, images, around)
    return Walk(images, distances(metric, images, image.expand_as(images)),
                {name: model(images).amax(1).double().exp() for name, model in models.items()},
                {method: confidence_bound(ccu, around, to_noise, method) for method in CERTIFICATES},
                {method: certified_radius(ccu, images, params.RATIO, method) for method in CERTIFICATES})
