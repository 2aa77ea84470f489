"""The plain ways of doing each thing that benchmarks/run.py compares with: simple, and written for it alone.

scikit-learn's fit, and the bare network, need no code of their own.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import brentq
from scipy.special import logsumexp

from models import CCU, GMM
from utils.objectives import CEDA_GMM
from utils.torchvision_guard import datasets


class NaiveCCU(CEDA_GMM):
    """CCU's loss as the published code computes it: six [K, B, D] differences a step, each rotated."""

    @staticmethod
    def log_prob(gmm: GMM, x: torch.Tensor) -> torch.Tensor:
        difference = x.flatten(1)[None] - gmm.mu[:, None]                                   # [K, B, D]
        z = difference @ gmm.metric.comp_vecs.T / gmm.metric.singular_values.sqrt()
        d2 = z.square().sum(2)                                                              # [K, B]
        return (gmm.log_norm()[:, None] - d2 / (2 * gmm.logvar.exp()[:, None])).logsumexp(0)

    def loss(self, model, x, y, z):
        def densities(images):
            return self.log_prob(model.gmm_in, images), self.log_prob(model.gmm_out, images)

        in_x, out_x = densities(x)
        log_p = model.posterior(model.log_softmax(x), *model.log_memberships(in_x, out_x))
        in_z, out_z = densities(z)
        log_q = model.posterior(model.log_softmax(z), *model.log_memberships(in_z, out_z))
        in_x, out_x = densities(x)
        likelihood = torch.logaddexp(in_x, out_x).mean() + torch.logaddexp(in_z, out_z).mean()
        return (F.nll_loss(log_p, y) - log_q.mean() - likelihood) / 2, {}


class PILImages(torch.utils.data.Dataset):
    def __init__(self, images: np.ndarray):
        datasets()          # torchvision, also where its operators don't load
        from torchvision import transforms
        self.images = images
        self.transform = transforms.Compose([
            transforms.RandomApply([transforms.RandomCrop(28, padding=2)]), transforms.ToTensor()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), 0


def pil_epoch(images: np.ndarray, batch_size: int, workers: int) -> float:
    """Seconds of an epoch of a DataLoader with PIL transforms, after one that starts the workers."""
    batches = torch.utils.data.DataLoader(PILImages(images), batch_size, shuffle=True, num_workers=workers,
                                          persistent_workers=workers > 0)
    for _ in range(2):
        start = time.perf_counter()
        for _ in batches:
            pass
    return time.perf_counter() - start


def brentq_radius(ccu: CCU, x: np.ndarray, ratio: float = 1.1) -> float:
    """The paper's radius; every evaluation of the bound measures the distances, as the published code does."""
    V = ccu.gmm_in.metric.comp_vecs.double().cpu().numpy()
    root = ccu.gmm_in.metric.singular_values.double().cpu().sqrt().numpy()
    mu, variance, log_norm = zip(*([value.detach().double().cpu().numpy() for value in (
        gmm.mu, gmm.logvar.exp(), gmm.log_norm())] for gmm in (ccu.gmm_in, ccu.gmm_out)), strict=True)

    def log_excess(R):
        d_in, d_out = (np.linalg.norm((x - m) @ V.T / root, axis=1) for m in mu)
        log_U = logsumexp(log_norm[0] - np.maximum(d_in - R, 0) ** 2 / (2 * variance[0]))
        log_L = logsumexp(log_norm[1] - (d_out + R) ** 2 / (2 * variance[1]))
        return log_U - log_L - ccu.loglam.item() - math.log((ratio - 1) / (ccu.classes - ratio))
    return brentq(log_excess, 0, 1e3, xtol=1e-9) if log_excess(0) < 0 else 0.0
