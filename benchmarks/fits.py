"""How fast and in how much memory the mixtures are fitted; a section of run.py."""

import time
import warnings

import torch
from measure import Report, in_child, synchronise

import params
from models import PCAMetric
from utils.data import load_in_dist
from utils.errors import MissingData
from utils.fit import em, fit_gmm, kmeans_start


def gmm_fits(report: Report, device: torch.device, quick: bool, data_dir: str) -> None:
    """60,000 x 784, K = 100, to the same log-likelihood as scikit-learn; and the memory of 50,000 x 3,072."""
    from sklearn.mixture import GaussianMixture
    try:
        X, source = load_in_dist("MNIST", "train", data_dir).floats().flatten(1), "MNIST"
    except MissingData:
        X, source = synthetic(60_000, 784), "synthetic"
    X = X[:3_000] if quick else X
    metric = PCAMetric.fit(X)
    z = metric.transform(X)
    z -= z.mean(0)
    z_device = z.to(device)
    K_, reg = (10 if quick else params.CENTROIDS), params.REG_COVAR

    z_device[:K_] @ z_device[:K_].T         # a GPU's first product takes its time
    synchronise(device)

    def ours():
        start = kmeans_start(z_device, K_, 0, reg)
        return em(z_device, start, reg, update_weights=True, tol=1e-3, max_iter=200)
    start = time.perf_counter()
    fit = ours()
    synchronise(device)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    theirs = GaussianMixture(K_, covariance_type="spherical", reg_covar=reg, tol=1e-3, max_iter=200,
                             random_state=0).fit(z.numpy())
    baseline = time.perf_counter() - start
    likelihoods = {"ours": fit.log_likelihoods[-1], "scikit-learn": float(theirs.score(z.numpy()))}
    report.add("gmm_fit", seconds, "s", baseline, baseline / seconds, least=3, data=source, images=len(X),
               log_likelihood=likelihoods, iterations={"ours": len(fit.log_likelihoods) - 1,
                                                       "scikit-learn": int(theirs.n_iter_)})
    # from the same start, step for step
    shared = kmeans_start(z_device, K_, 0, reg)
    count = min(10, int(theirs.n_iter_))
    start = time.perf_counter()
    fit = em(z_device, shared, reg, update_weights=True, tol=0, max_iter=count)
    synchronise(device)
    seconds = time.perf_counter() - start
    theirs = GaussianMixture(K_, covariance_type="spherical", reg_covar=reg, tol=0, max_iter=count, random_state=0,
                             means_init=shared.means.cpu().numpy(), weights_init=shared.weights.cpu().numpy(),
                             precisions_init=1 / shared.variances.cpu().numpy(), init_params="random_from_data")
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # that it has not converged is meant
        theirs.fit(z.numpy())
    baseline = time.perf_counter() - start
    report.add("gmm_fit, EM alone from one start", seconds, "s", baseline, baseline / seconds, data=source,
               iterations=count, log_likelihood={"ours": fit.log_likelihoods[-1],
                                                 "scikit-learn": float(theirs.score(z.numpy()))})
    if not quick:
        report.add("gmm_fit, memory of 50,000 x 3,072", in_child(peak_of_fit, 50_000, 3_072) / 2 ** 30, "GiB",
                   most=8)


def synthetic(n: int, D: int) -> torch.Tensor:
    """Images-like vectors [n, D] in [0, 1] whose variance falls off as a power of the component."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(100, D, generator=generator) / torch.arange(1, 101)[:, None]
    return torch.cat([(torch.randn(len(block), 100, generator=generator) @ basis / 4 + 0.5 +
                       0.02 * torch.randn(len(block), D, generator=generator)).clamp_(0, 1)
                      for block in torch.arange(n).split(5_000)])


def peak_of_fit(n: int, D: int) -> int:
    """Peak bytes of a process that makes the images, fits metric and mixture, and has loaded PyTorch for it."""
    X = synthetic(n, D)
    metric = PCAMetric.fit(X)
    fit_gmm(metric.transform(X), metric, params.CENTROIDS, params.REG_COVAR, 0)
    import resource
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
