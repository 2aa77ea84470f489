"""Gaussian mixtures that are spherical in the shared metric (README: Densities)."""

import math

import torch
from torch import Tensor, nn

from models.metric import PCAMetric


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """||a_i - b_j||^2 for a [B, D], b [K, D] -> [B, K], from one matrix product.

    Both are centred first: |a|^2 + |b|^2 - 2ab cancels badly far from the origin.
    """
    centre = b.detach().mean(0)
    a, b = a - centre, b - centre
    a2, b2 = a.square().sum(1, keepdim=True), b.square().sum(1)
    with torch.autocast(a.device.type, enabled=False):
        return torch.addmm(a2 + b2, a, b.T, alpha=-2).relu()      # what rounding made negative is 0


class GMM(nn.Module):
    """p(x) = sum_k alpha_k N_k(x), spherical with variance exp(logvar_k) in `metric`.

    mu [K, D] in pixel space, logvar [K]; `alpha` [K], as in the authors' files, holds log alpha_k (not trained).
    """

    def __init__(self, mu: Tensor, logvar: Tensor, alpha: Tensor, metric: PCAMetric):
        super().__init__()
        K, D = mu.shape
        if logvar.shape != (K,) or alpha.shape != (K,) or metric.dim != D:
            raise ValueError(f"mu [K, D], logvar [K], alpha [K] and a metric of D dimensions do not fit: "
                             f"{list(mu.shape)}, {list(logvar.shape)}, {list(alpha.shape)}, {metric.dim}")
        self.mu = nn.Parameter(mu)
        self.logvar = nn.Parameter(logvar)
        self.register_buffer("alpha", alpha)
        self.metric = metric

    @property
    def components(self) -> int:
        return self.mu.shape[0]

    def log_norm(self) -> Tensor:
        """log(alpha_k c_k) [K]: each component's log-density at its own mean."""
        return log_norm(self.alpha, self.logvar, self.metric)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log(alpha_k N_k(x)) [B, K], weights included, for x [B, ...] in pixel space."""
        return component_log_probs(x, self)[0]

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) [B] for x [B, ...] in pixel space."""
        return self.component_log_prob(x).logsumexp(1)


def log_norm(alpha: Tensor, logvar: Tensor, metric: PCAMetric) -> Tensor:
    """log(alpha_k c_k) [K] of components with these log-weights and log-variances [K]."""
    return alpha - metric.dim / 2 * (math.log(2 * math.pi) + logvar) - metric.log_det / 2


def component_log_probs(x: Tensor, *mixtures: GMM) -> tuple[Tensor, ...]:
    """`component_log_prob` of each of the mixtures, which share a metric; one matrix product serves them all."""
    metric = mixtures[0].metric
    mu, logvar, alpha = (torch.cat(parts) for parts in zip(*((gmm.mu, gmm.logvar, gmm.alpha) for gmm in mixtures),
                                                           strict=True))
    d2 = squared_distances(metric.transform(x), metric.transform(mu))
    log_probs = torch.addcmul(log_norm(alpha, logvar, metric), d2, torch.exp(-logvar), value=-0.5)
    return log_probs.split([gmm.components for gmm in mixtures], 1)
