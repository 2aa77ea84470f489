"""Fitting a mixture: EM from a k-means start in the metric's coordinates (README: Fit).

Here coordinates are relative to their mean, z.mean(0) = 0: far from the origin, distances from one matrix product would
cancel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import params
from models import GMM, PCAMetric
from utils import files
from utils.state import State

BLOCK = 8192


@dataclass
class Fit:
    """A spherical mixture in centred coordinates, with the mean log-likelihood before every EM step and at the end."""

    means: Tensor               # [K, D]
    variances: Tensor           # [K]
    weights: Tensor             # [K]
    log_likelihoods: list[float]


def kmeans_start(z: Tensor, K: int, seed: int, reg_covar: float) -> Fit:
    """One step from the hard assignments of scikit-learn's k-means on a sample of the centred z [n, D]."""
    from sklearn.cluster import KMeans
    generator = torch.Generator().manual_seed(seed)
    sample = z[torch.randperm(len(z), generator=generator)[:max(params.KMEANS_IMAGES, K)].to(z.device)]
    kmeans = KMeans(K, n_init=1, max_iter=params.KMEANS_STEPS, tol=params.KMEANS_TOL, random_state=seed)
    kmeans.fit(sample.cpu().numpy())
    centres = torch.as_tensor(kmeans.cluster_centers_, dtype=z.dtype, device=z.device)
    means, variances, weights, _ = em_step(z, centres, hard_assignments, reg_covar)
    return Fit(means, variances, weights, [])


def hard_assignments(d2: Tensor) -> tuple[Tensor, Tensor]:
    """k-means': 1 for the nearest centre; no density."""
    return F.one_hot(d2.argmin(1), d2.shape[1]).to(d2.dtype), d2.new_zeros(len(d2))


def responsibilities(d2: Tensor, weights: Tensor, variances: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """p(k|z) [b, K] and log p(z) [b], of squared distances to the means [b, K], weights and variances [K]."""
    log_joint = weights.log() - D / 2 * (2 * math.pi * variances).log() - d2 / (2 * variances)      # [b, K]
    log_prob = log_joint.logsumexp(1)
    return (log_joint - log_prob[:, None]).exp_(), log_prob


def em(z: Tensor, start: Fit, reg_covar: float, update_weights: bool = False, tol: float = params.EM_TOL,
       max_iter: int = params.EM_STEPS, progress: Callable = lambda iteration, log_likelihood: None,
       keep: Callable[[Fit], None] = lambda fit: None) -> Fit:
    """EM for spherical components on the centred z [n, D], until the mean log-likelihood changes by less than tol.

    reg_covar is added to every variance at every step, as scikit-learn does: with 0 the log-likelihood never
    falls, with more it may.
    update_weights=False keeps the start's weights, as CCU does with 1/K.  progress(iteration, mean
    log-likelihood of z) is called at every step, keep(fit) before it: started from this fit, EM continues bit for
    bit.
    """
    means, variances, weights = start.means, start.variances, start.weights
    log_likelihoods = list(start.log_likelihoods)
    for iteration in range(len(log_likelihoods), max_iter + 1):
        keep(Fit(means, variances, weights, log_likelihoods))
        e_step = partial(responsibilities, weights=weights, variances=variances, D=z.shape[1])
        new_means, new_variances, new_weights, log_likelihood = em_step(z, means, e_step, reg_covar)
        progress(iteration, log_likelihood)
        log_likelihoods.append(log_likelihood)
        if iteration == max_iter or (iteration and abs(log_likelihood - log_likelihoods[-2]) < tol):
            return Fit(means, variances, weights, log_likelihoods)
        means, variances = new_means, new_variances
        weights = new_weights if update_weights else weights


def em_step(z: Tensor, old_means: Tensor, e_step: Callable, reg_covar: float
            ) -> tuple[Tensor, Tensor, Tensor, float]:
    """E-step and M-step: new means, variances and weights, and the mean log-density.

    `e_step` maps squared distances to the old means [b, K] to responsibilities [b, K] and log-densities [b].
    Variances come from these distances, var = E d(z, old)^2 - |new - old|^2: E|z|^2 - |mean|^2 would cancel.
    """
    n, D = z.shape
    K = len(old_means)
    counts = torch.zeros(K, dtype=torch.float64, device=z.device)
    sums = torch.zeros(K, D, dtype=torch.float64, device=z.device)
    spread = torch.zeros_like(counts)
    log_likelihood = torch.zeros((), dtype=torch.float64, device=z.device)
    old2 = old_means.square().sum(1)
    for block in z.split(BLOCK):
        d2 = torch.addmm(old2, block, old_means.T, alpha=-2).add_(block.square().sum(1, keepdim=True)).clamp_min_(0)
        r, log_prob = e_step(d2)                                                # [b, K], [b]
        counts += r.sum(0, dtype=torch.float64)
        sums += r.T @ block
        spread += (r * d2).sum(0, dtype=torch.float64)
        log_likelihood += log_prob.sum(dtype=torch.float64)
    counts = counts + 1e-10         # an empty component keeps a finite mean
    means = sums / counts[:, None]
    shift = (means - old_means.double()).square().sum(1)
    variances = (spread / counts - shift).clamp_min(0) / D + reg_covar
    return means.to(z.dtype), variances.to(z.dtype), (counts / n).to(z.dtype), log_likelihood.item() / n


def fit_gmm(z: Tensor, metric: PCAMetric, K: int, reg_covar: float, seed: int,
            progress: Callable = lambda iteration, log_likelihood: None, state: State | None = None) -> tuple[GMM, Fit]:
    """A mixture as CCU starts from it: weights 1/K, all variances the mean of the fitted ones.

    z [n, D] are the images in `metric`'s coordinates.  EM goes on from `state`, and saves to it: first the start,
    because k-means rounds differently from run to run on many threads.
    """
    # components have other signs on another device, machine or number of threads: there EM begins again
    basis = files.digest(metric) if state is not None else None

    def keep(fit: Fit):
        if state is not None and (state.due() or not fit.log_likelihoods):
            state.save(fit=vars(fit), basis=basis)

    origin = z.mean(0)
    z = z - origin
    uniform = torch.full((K,), 1 / K, dtype=z.dtype, device=z.device)
    if state is not None and (saved := state.load()) is not None and saved.get("basis") == basis:
        start = Fit(**{key: value.to(z.device) if isinstance(value, Tensor) else value
                       for key, value in saved["fit"].items()})
    else:
        start = replace(kmeans_start(z, K, seed, reg_covar), weights=uniform)
    fit = em(z, start, reg_covar, progress=progress, keep=keep)
    shared = fit.variances.mean().log().expand(K).clone()
    return GMM(metric.inverse(fit.means + origin), shared, uniform.log(), metric), fit
