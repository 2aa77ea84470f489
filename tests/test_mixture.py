"""Metric, densities, EM and the CCU model against scipy, scikit-learn and closed forms."""

import math
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import run_script
from scipy.stats import Covariance, multivariate_normal
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

import gen_gmm
import params
from models import CCU, GMM, LeNet, PCAMetric
from models.gmm import squared_distances
from utils import checkpoints
from utils.data import load_in_dist
from utils.fit import Fit, em, fit_gmm, kmeans_start
from utils.objectives import CEDA_GMM
from utils.out_data import load_out
from utils.state import State


def random_gmm(D, K, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    X = torch.rand(4 * D, D, generator=g) * torch.linspace(0.05, 1, D)
    metric = PCAMetric.fit(X)
    mu, logvar = torch.rand(K, D, generator=g), torch.randn(K, generator=g) - 3
    alpha = torch.randn(K, generator=g).log_softmax(0)
    return GMM(mu, logvar, alpha, metric).to(dtype)


def scipy_log_prob(gmm, x):
    """log p(x) from scipy's full-covariance density; the covariance of component k is var_k V^T diag(s) V."""
    V, s = (t.double().numpy() for t in (gmm.metric.comp_vecs, gmm.metric.singular_values))
    root = np.linalg.cholesky((V.T * s) @ V)
    terms = [np.log(w) + multivariate_normal(m, Covariance.from_cholesky(var ** 0.5 * root)).logpdf(x)
             for m, var, w in zip(gmm.mu.detach().numpy().astype(float), gmm.logvar.exp().tolist(),
                                  gmm.alpha.exp().tolist(), strict=True)]
    return np.logaddexp.reduce(terms, axis=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_log_prob_agrees_with_scipy(dtype, tolerance):
    gmm = random_gmm(784, 2, dtype=dtype)
    x = torch.rand(20, 784, dtype=dtype)
    expected = scipy_log_prob(gmm, x.double().numpy())
    np.testing.assert_allclose(gmm.log_prob(x).detach().double().numpy(), expected, rtol=tolerance)


def test_densities_stay_out_of_autocast():
    """In bf16 they would be off by several units; the classifier's precision is the model's own matter (`amp`)."""
    gmm_in, gmm_out = (random_gmm(784, 20, seed=0, dtype=torch.float32) for _ in range(2))
    ccu, x = CCU(LeNet(1, 28, 10), gmm_in, gmm_out, 0.0, 10).eval(), torch.rand(8, 1, 28, 28)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside, alone = ccu.log_densities(x), gmm_in.component_log_prob(x)
    with torch.no_grad():
        assert torch.equal(torch.stack(inside), torch.stack(ccu.log_densities(x)))
        assert torch.equal(alone, gmm_in.component_log_prob(x))


def test_density_integrates_to_one_in_2d():
    gmm = random_gmm(2, 3)
    axis = torch.linspace(-6, 7, 1301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    assert gmm.log_prob(grid).exp().sum().item() * 0.01 ** 2 == pytest.approx(1, abs=1e-6)


def test_metric_agrees_with_sklearn_pca():
    X = torch.rand(300, 12) @ torch.rand(12, 12)
    metric = PCAMetric.fit(X)
    pca = PCA(svd_solver="full").fit(X.double().numpy())
    np.testing.assert_allclose(metric.singular_values, pca.singular_values_, rtol=1e-5)
    np.testing.assert_allclose((metric.comp_vecs.numpy() * pca.components_).sum(1).__abs__(), 1, atol=1e-4)


def test_metric_with_fewer_images_than_pixels_is_complete_and_floored():
    metric = PCAMetric.fit(torch.rand(10, 40), min_sv_factor=1e4)
    s = metric.singular_values
    torch.testing.assert_close(metric.comp_vecs @ metric.comp_vecs.T, torch.eye(40), atol=1e-5, rtol=0)
    assert (s[9:] == s[-1]).all()
    assert s[0] / s[-1] == pytest.approx(1e4, rel=1e-5)


@pytest.mark.parametrize("n", [20, 5000])
def test_whitened_training_data_have_unit_variance(n):
    X = torch.randn(n, 6) @ torch.randn(6, 6)
    z = PCAMetric.fit(X, whiten=True).transform(X)
    torch.testing.assert_close(z.T.cov(), torch.eye(6), atol=1e-3, rtol=0)


def test_metric_of_more_images_than_are_taken_at_once():
    """The first ones are brighter than the others, so that a block's mean is not that of all."""
    X = torch.rand(9000, 5) @ torch.rand(5, 5)
    X[:8192] += 1
    centred = (X.double() - X.double().mean(0)).numpy()
    _, s, V = np.linalg.svd(centred, full_matrices=False)
    metric = PCAMetric.fit(X)
    np.testing.assert_allclose(metric.singular_values, s, rtol=1e-5)
    np.testing.assert_allclose((metric.comp_vecs.numpy() * V).sum(1).__abs__(), 1, atol=1e-4)


def test_metrics_are_equal_if_both_parts_are():
    metric = PCAMetric(torch.eye(3), torch.arange(1.0, 4).flip(0))
    assert metric.equals(PCAMetric(torch.eye(3), torch.arange(1.0, 4).flip(0)))
    assert not metric.equals(PCAMetric(torch.eye(3).flip(0), metric.singular_values))
    assert not metric.equals(PCAMetric(torch.eye(3), 2 * metric.singular_values))


def test_inverse_undoes_transform():
    metric = random_gmm(9, 2).metric
    x = torch.rand(4, 9, dtype=torch.float64)
    torch.testing.assert_close(metric.inverse(metric.transform(x)), x, atol=1e-6, rtol=0)


def test_squared_distances_survive_a_large_offset():
    a, b = torch.rand(5, 30, dtype=torch.float64), torch.rand(3, 30, dtype=torch.float64)
    near = squared_distances((a + 100).float(), (b + 100).float())
    exact = torch.cdist((a + 100).float().double(), (b + 100).float().double()).square()
    torch.testing.assert_close(near.double(), exact, rtol=1e-4, atol=1e-4)


def blobs(n=3000, D=10, K=5, seed=0, spread=3.0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(K, D)) * spread
    x = centres[rng.integers(K, size=n)] + rng.normal(size=(n, D))
    return torch.tensor(x - x.mean(0), dtype=torch.float32)


@pytest.mark.parametrize("reg_covar", [1e-6, 1e-2])
def test_em_reaches_sklearn_from_the_same_start(reg_covar):
    z = blobs()
    start = kmeans_start(z, 5, seed=0, reg_covar=reg_covar)
    fit = em(z, start, reg_covar, update_weights=True, tol=1e-6, max_iter=200)
    weights = start.weights.double().numpy()
    reference = GaussianMixture(5, covariance_type="spherical", reg_covar=reg_covar, tol=1e-6, max_iter=200,
                                means_init=start.means.numpy(), weights_init=weights / weights.sum(),
                                precisions_init=1 / start.variances.double().numpy()).fit(z.numpy())
    assert fit.log_likelihoods[-1] == pytest.approx(reference.score(z.numpy()), abs=1e-3)


def test_a_step_of_em_over_several_blocks_is_scikit_learns(monkeypatch):
    monkeypatch.setattr("utils.fit.BLOCK", 700)      # the last is smaller
    z = blobs(spread=1.0).double()
    start = Fit(z[:5], torch.linspace(0.5, 2, 5).double(), torch.tensor([1, 1, 2, 2, 4]).double() / 10, [])
    found = em(z, start, 1e-3, update_weights=True, max_iter=1)
    reference = GaussianMixture(5, covariance_type="spherical", reg_covar=1e-3, max_iter=1, means_init=start.means,
                                weights_init=start.weights.numpy(), precisions_init=1 / start.variances)
    with pytest.warns(ConvergenceWarning):
        reference.fit(z)
    np.testing.assert_allclose(found.means, reference.means_, rtol=1e-8)
    np.testing.assert_allclose(found.variances, reference.covariances_, rtol=1e-8)
    np.testing.assert_allclose(found.weights, reference.weights_, rtol=1e-8)
    assert found.log_likelihoods[1] == pytest.approx(reference.score(z), rel=1e-10)


def test_the_start_is_scikit_learns_k_means_of_the_seed_and_its_clusters_spreads():
    z = blobs(spread=1.0)       # blobs that overlap: another seed ends elsewhere
    for seed in (0, 7):
        kmeans = KMeans(8, n_init=1, max_iter=params.KMEANS_STEPS, tol=params.KMEANS_TOL, random_state=seed)
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
        centres = kmeans.fit(z[order].numpy()).cluster_centers_.astype(np.float64)
        points = z.numpy().astype(np.float64)
        nearest = ((points[:, None] - centres) ** 2).sum(2).argmin(1)
        start = kmeans_start(z, 8, seed, 1e-3)
        for k in range(8):
            cluster = points[nearest == k]
            np.testing.assert_allclose(start.means[k], cluster.mean(0), rtol=0, atol=1e-5)
            assert start.variances[k].item() == pytest.approx(cluster.var(0).mean() + 1e-3, rel=1e-4)
            assert start.weights[k].item() == pytest.approx(len(cluster) / len(z), rel=1e-5)


@pytest.mark.parametrize("update_weights", [False, True])
def test_em_never_loses_likelihood(update_weights):
    z = blobs(K=8, seed=1, spread=1.0).double()
    start = kmeans_start(z, 6, seed=3, reg_covar=0.0)
    start = Fit(z[:6], start.variances * 2, torch.full((6,), 1 / 6, dtype=z.dtype), [])
    values = em(z, start, 0.0, update_weights, tol=1e-7, max_iter=100).log_likelihoods
    assert len(values) > 5
    assert min(np.diff(values)) > -1e-9


def test_em_survives_a_component_without_images():
    z = blobs()
    start = kmeans_start(z, 4, seed=0, reg_covar=1e-3)
    means = torch.cat((start.means, torch.full((1, 10), 1e3)))
    fit = em(z, Fit(means, start.variances.mean().expand(5), torch.full((5,), 0.2), []), 1e-3)
    assert fit.means.isfinite().all() and fit.variances.isfinite().all()


def test_fit_gmm_has_uniform_weights_and_one_shared_variance():
    z = blobs()
    metric = PCAMetric.euclidean(10)
    gmm, fit = fit_gmm(z, metric, 5, 1e-3, 0)
    torch.testing.assert_close(gmm.alpha.exp(), torch.full((5,), 0.2))
    torch.testing.assert_close(gmm.logvar.exp(), fit.variances.mean().expand(5))
    assert not (fit.variances == fit.variances[0]).all()
    # its last log-likelihood is that of the fitted components with equal weights
    log_probs = [multivariate_normal(mean, var).logpdf(z - z.mean(0)) for mean, var in
                 zip(fit.means.numpy(), fit.variances.tolist(), strict=True)]
    expected = (np.logaddexp.reduce(log_probs) - math.log(5)).mean()
    assert fit.log_likelihoods[-1] == pytest.approx(expected, abs=1e-5)


def test_em_does_not_go_on_in_other_coordinates(tmp_path, monkeypatch):
    """The components of a metric have other signs on another machine or number of threads."""
    monkeypatch.setattr("utils.state.SAVE_EVERY", 0.0)
    z = blobs()
    V = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0)))[0]
    signs = torch.tensor([1.0, -1.0]).repeat(5)
    metrics = [PCAMetric(rows, torch.ones(10)) for rows in (V, signs[:, None] * V)]

    class Killed(Exception):
        pass

    def kill(iteration, log_likelihood):
        if iteration == 1:
            raise Killed
    with pytest.raises(Killed):
        fit_gmm(metrics[0].transform(z), metrics[0], 5, 1e-3, 0, kill, State(tmp_path / "em", {}, True))
    # in its own coordinates it goes on, in others it is as if nothing had been saved
    for metric, steps in ((metrics[1], 0), (metrics[0], 1)):
        path = shutil.copy(tmp_path / "em", tmp_path / "copy")
        progress = mock.Mock()
        fit_gmm(metric.transform(z), metric, 5, 1e-3, 0, progress, State(path, {}, True))
        assert progress.call_args_list[0].args[0] == steps


def test_fit_gmm_survives_a_large_offset():
    z, metric = blobs(), PCAMetric.euclidean(10)
    near, far = (fit_gmm(x, metric, 5, 1e-3, 0)[0] for x in (z, z + 1000))
    torch.testing.assert_close(far.logvar, near.logvar, rtol=0, atol=1e-3)
    torch.testing.assert_close(far.mu - 1000, near.mu, rtol=0, atol=1e-3)


def tiny_ccu(two=True, classes=10, loglam=0.3):
    torch.manual_seed(0)
    gmm_in = random_gmm(784, 4, dtype=torch.float32)
    gmm_out = GMM(torch.rand(3, 784), torch.zeros(3), torch.full((3,), 1 / 3).log(), gmm_in.metric)
    if not two:     # a density that competes with p(x|o) = 1 at the means
        loglam += gmm_in.log_prob(gmm_in.mu).mean().item()
    return CCU(LeNet(classes=classes), gmm_in, gmm_out if two else None, loglam, classes)


@pytest.mark.parametrize("two", [True, False])
def test_ccu_is_the_mixture_of_the_paper(two):
    """Section 2's quotient itself, in float64, where densities are moderate enough to exponentiate."""
    model = tiny_ccu(two).double()
    log_softmax = torch.randn(6, 10, dtype=torch.float64).log_softmax(1)
    log_p_in, log_p_out = torch.randn(6, dtype=torch.float64) * 5, torch.randn(6, dtype=torch.float64) * 5
    log_p_in += model.loglam
    p_in, p_out, lam = log_p_in.exp()[:, None], log_p_out.exp()[:, None], model.loglam.exp()
    expected = (log_softmax.exp() * p_in + lam / 10 * p_out) / (p_in + lam * p_out)
    memberships = model.log_memberships(log_p_in, log_p_out)
    torch.testing.assert_close(model.posterior(log_softmax, *memberships).exp(), expected, rtol=1e-6, atol=0)


def test_memberships_keep_their_digits_in_float32():
    """Where the densities are about equal their logarithms, of thousands, leave the odds; a quotient needs no more."""
    model = tiny_ccu()
    log_p_in = torch.linspace(-3010, -2990, 81)
    found = torch.stack(model.log_memberships(log_p_in, torch.full((81,), -3000.0))).exp().double()
    lam = math.exp(model.loglam.item())
    odds = np.exp(log_p_in.double().numpy() + 3000)
    np.testing.assert_allclose(found.detach(), [odds / (odds + lam), lam / (odds + lam)], rtol=2e-6)


@pytest.mark.parametrize("two", [True, False])
def test_the_trained_likelihood_keeps_the_smaller_log_density_s_digits(two):
    """Far from the in-distribution log p(x|i) is -1e9, and log p(x) is log p_out p(x|o); float32 beside float64."""
    model = tiny_ccu(two).eval()
    model.gmm_in.logvar.data.fill_(-18)
    x, z, y = *torch.rand(2, 5, 1, 28, 28), torch.arange(5)
    objective = CEDA_GMM(model.loglam.item())
    assert model.gmm_in.log_prob(z).max() < -1e8
    found = objective.loss(model, x, y, z)[1]["log_density_out"].item()
    if two:
        _, log_p_out = model.double().log_densities(z.double())
        assert found == pytest.approx(log_p_out.mean().item() + math.log(objective.p_out), rel=1e-5)
    else:
        assert found == pytest.approx(math.log(objective.p_out), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("two", [True, False])
def test_confidences_sum_to_one_and_attack_score_is_the_excess_confidence(two):
    model = tiny_ccu(two).eval()
    x = torch.rand(8, 1, 28, 28)
    x = torch.cat((x, model.gmm_in.mu.detach().reshape(-1, 1, 28, 28)))       # far out and close in
    log_p = model(x)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(12), atol=1e-5, rtol=0)
    model64 = model.double()
    excess = (model64.score(x.double()).exp() - 0.1)[8:]
    torch.testing.assert_close(model64.attack_score(x.double())[8:].exp(), excess, rtol=1e-6, atol=1e-15)


def test_attack_score_of_an_unsure_classifier_still_climbs_the_densities():
    model = tiny_ccu().eval()
    with torch.no_grad():
        for parameter in model.base_model.fc2.parameters():     # then confidence - 1/M is 0
            parameter.zero_()
    x = (10 * torch.rand(3, 1, 28, 28)).requires_grad_()        # far out
    score = model.attack_score(x)
    gradient, = torch.autograd.grad(score.sum(), x)
    assert score.isfinite().all() and gradient.isfinite().all() and (gradient != 0).any()


def test_far_field_is_uniform_where_the_classifier_is_certain():
    model = tiny_ccu(loglam=0.0).eval()
    with torch.no_grad():
        model.base_model.fc2.weight.mul_(30)
        model.gmm_out.logvar.copy_(model.gmm_in.logvar.max().add(np.log(4)).expand(3))
        directions = torch.nn.functional.normalize(torch.randn(1000, 784), dim=1) * 10 * 784 ** 0.5
        x = directions.reshape(-1, 1, 28, 28)
        assert (model(x).exp() - 0.1).abs().max() < 1e-6
        assert model.log_softmax(x).exp().amax(1).max() > 0.9


# --- through gen_gmm.py --------------------------------------------------------------------------------------------

@pytest.fixture
def few_out(tmp_path, monkeypatch):
    """gen_gmm.py in an empty folder, with 60 out-images; those."""
    out = load_out("Photos", load_in_dist("Digits", "train", "data"), "data", n=60)
    monkeypatch.setattr(gen_gmm, "load_out", lambda *args, **options: out)
    monkeypatch.chdir(tmp_path)
    return out


@pytest.mark.parametrize("metric", ["pca", "mahalanobis"])
def test_the_saved_metric_divides_by_the_root_of_s_or_whitens(metric, few_out):
    run_script(f"gen_gmm.py --dataset Digits --n 2 --metric {metric}")
    X = load_in_dist("Digits", "train", "data").images.flatten(1).numpy() / 255
    s = np.linalg.svd(X - X.mean(0), compute_uv=False)
    s = np.maximum(s, s[0] / 1e6)
    expected = s if metric == "pca" else s ** 2 / (len(X) - 1)
    gmm_in, gmm_out, _ = checkpoints.load_mixtures(f"checkpoints/Digits/gmm/{metric}_n2_Photos.pt", "")
    np.testing.assert_allclose(gmm_in.metric.singular_values.numpy(), expected, rtol=1e-3)
    assert gmm_out.metric is gmm_in.metric


@pytest.mark.parametrize("augmented", [False, True])
def test_mixtures_are_fitted_on_augmented_images_when_asked(augmented, few_out, monkeypatch):
    """In the Euclidean metric the coordinates are the pixels: each image as it is, or shifted by up to 2 pixels."""
    seen = []
    monkeypatch.setattr(gen_gmm, "fit_gmm", lambda z, *args: (seen.append(z), fit_gmm(z, *args))[1])
    run_script(f"gen_gmm.py --dataset Digits --PCA 0 --n 2 --augm_flag {int(augmented)}")
    for z, images in zip(seen, (load_in_dist("Digits", "train", "data"), few_out), strict=True):
        padded = np.pad(images.images[:, 0].numpy(), ((0, 0), (2, 2), (2, 2)))
        shifts = [(i, j) for i in range(5) for j in range(5)]
        same = np.stack([(np.rint(z.numpy() * 255).reshape(-1, 28, 28) == padded[:, i:i + 28, j:j + 28]).all((1, 2))
                         for i, j in shifts])                                           # [25, n]
        assert same.any(0).all()
        unmoved = same[shifts.index((2, 2))].mean()
        assert 0.3 < unmoved < 0.75 if augmented else unmoved == 1


def test_verbose_prints_the_log_likelihood_of_every_step(few_out, monkeypatch, capsys):
    fits = []
    monkeypatch.setattr(gen_gmm, "fit_gmm", lambda *args: (fits.append(fit_gmm(*args)), fits[-1])[1])
    run_script("gen_gmm.py --dataset Digits --n 2 --verbose 1")
    lines = capsys.readouterr().out.splitlines()
    *_, meta = checkpoints.load_mixtures("checkpoints/Digits/gmm/pca_n2_Photos.pt", "")
    for which, last in zip(("in", "out"), meta["log_likelihoods"], strict=True):
        start = f"EM {which}, n = 2, step "
        steps, values = zip(*(line.removeprefix(start).split(": log-likelihood ") for line in lines
                              if line.startswith(start)), strict=True)
        assert list(map(int, steps)) == list(range(len(steps))) and len(steps) > 1
        assert float(values[-1]) == pytest.approx(last, abs=1e-3)
    # of images, not of coordinates
    gmm, fit = fits[0]
    images = load_in_dist("Digits", "train", "data").images.flatten(1).double().numpy() / 255
    fitted = GMM(gmm.mu, fit.variances.log(), gmm.alpha, gmm.metric)
    assert meta["log_likelihoods"][0] == pytest.approx(scipy_log_prob(fitted, images).mean(), rel=1e-4)


def test_mixtures_of_equal_metrics_share_one_and_of_others_are_refused():
    ccu = tiny_ccu()
    equal, other = (GMM(ccu.gmm_out.mu, ccu.gmm_out.logvar, ccu.gmm_out.alpha, PCAMetric(
        ccu.gmm_in.metric.comp_vecs.clone(), ccu.gmm_in.metric.singular_values * factor)) for factor in (1, 2))
    again = CCU(ccu.base_model, ccu.gmm_in, equal, ccu.loglam.item(), ccu.classes).eval()
    assert again.gmm_out.metric is again.gmm_in.metric
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(again(x), ccu.eval()(x))
    with pytest.raises(ValueError, match="share one metric"):
        CCU(ccu.base_model, ccu.gmm_in, other, 0.0, ccu.classes)
