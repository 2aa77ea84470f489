"""The certificates hold, against random points, gradient ascent, grids and published formulas in numpy."""

import copy
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logsumexp

from models import CCU, GMM, PCAMetric, Softmax, certified_radius, confidence_bound
from models.certificate import Balls, Mixtures, ball_max, peak_of
from utils.checkpoints import load_model

VARIANCES = ("4x", "larger", "any", "equal", "nearly")     # the out-variances against the in-variances


class Sure(torch.nn.Module):
    """A classifier that is certain of class 0 everywhere: the confidence is what the mixtures allow."""

    spec = {}

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), self.classes).to(x.dtype) * 1e4


class Linear(torch.nn.Linear):
    """A classifier whose confidence depends on x."""

    spec = {}


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_ccu(seed: int, D=2, K=5, L=5, variances="4x", classes=10, loglam=0.0, single=False, sure=True,
             low=0.05, high=0.4) -> CCU:
    """A float32 CCU of random mixtures in the cube [-1, 1]^D, with a random metric; in-variances in [low, high]."""
    g = torch.Generator().manual_seed(seed)

    def uniform(a, b, *shape):
        return a + (b - a) * torch.rand(*shape, generator=g)

    def log_weights(n):
        return uniform(0, 2, n).log_softmax(0)

    V = torch.linalg.qr(torch.randn(D, D, generator=g))[0]
    metric = PCAMetric(V, uniform(math.log(0.5), math.log(2), D).exp())
    logvar_in = uniform(math.log(low), math.log(high), K)
    logvar_out = uniform(math.log(low), math.log(high), L)
    if variances in ("4x", "larger"):
        logvar_out = (logvar_out + 1).clamp_min(logvar_in.max() + (math.log(4) if variances == "4x" else 0.01))
    elif variances in ("equal", "nearly"):
        logvar_in = logvar_in[:1].expand(K).clone()
        logvar_out = logvar_in[:1].expand(L) + (uniform(-1e-5, 1e-5, L) if variances == "nearly" else 0)
    gmm_in = GMM(uniform(-1, 1, K, D), logvar_in, log_weights(K), metric)
    gmm_out = None if single else GMM(uniform(-1, 1, L, D), logvar_out, log_weights(L), metric)
    base = Sure(classes) if sure else Linear(D, classes)
    return CCU(base, gmm_in, gmm_out, loglam, classes)


def in_mpmath(tensor) -> mpmath.matrix:
    return mpmath.matrix(tensor.detach().double().tolist())


def in_float64(ccu: CCU) -> CCU:
    return copy.deepcopy(ccu).double()


@st.composite
def ccus(draw, max_dim=20, **fixed) -> CCU:
    options = {
        "D": draw(st.integers(2, max_dim)), "K": draw(st.integers(1, 8)), "L": draw(st.integers(1, 8)),
        "variances": draw(st.sampled_from(VARIANCES)), "classes": draw(st.sampled_from([2, 10, 100])),
        "loglam": draw(st.floats(-3, 3)), "single": draw(st.sampled_from([False, False, False, True])),
        "sure": draw(st.sampled_from([True, True, False])), **fixed}
    return make_ccu(draw(st.integers(0, 2 ** 32)), **options)


def points_and_radii(ccu: CCU, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """n points (the first is a mu_k, others near and far), and certified (tight) and random radii [n] for them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, ccu.gmm_in.metric.dim, generator=g) * torch.linspace(0.3, 3, n)[:, None]
    x[0] = ccu.gmm_in.mu[0].detach()
    ratio = 1 + 0.1 * (ccu.classes - 1) / 9
    return x, certified_radius(ccu, x, ratio), 2 * torch.rand(n, generator=g, dtype=torch.float64)


def step_into_ball(metric: PCAMetric, x: torch.Tensor, u: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Pixel-space points x + (what has coordinates u), pulled back to d(x, x') <= radius where they left the ball."""
    delta = metric.inverse(u)
    distance = metric.transform(delta).norm(dim=1)
    return x + delta * (radius / distance.clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)[:, None]


def log_ratio(ccu: CCU, x: torch.Tensor) -> torch.Tensor:
    log_in, log_out = ccu.log_densities(x)
    return log_in - log_out


def gradient_in_z(ccu: CCU, points: torch.Tensor) -> torch.Tensor:
    """Of log_ratio at the points [N, D], with respect to the metric's coordinates."""
    z = ccu.gmm_in.metric.transform(points).detach().requires_grad_()
    return torch.autograd.grad(log_ratio(ccu, ccu.gmm_in.metric.inverse(z)).sum(), z)[0]


def worst_confidence(ccu: CCU, x, radius, seed: int, samples: int, starts: int, steps: int):
    """The largest confidence [B] of a float64 `ccu` found in the balls, and the number of points evaluated."""
    g = torch.Generator().manual_seed(seed)
    shape, x, metric = x.shape[1:], x.flatten(1), ccu.gmm_in.metric
    B, D = x.shape

    def in_ball(n):
        u = torch.randn(B * n, D, generator=g, dtype=torch.float64)
        length = radius.repeat_interleave(n) * torch.rand(B * n, generator=g, dtype=torch.float64) ** (1 / D)
        length[::2] = radius.repeat_interleave(n)[::2]                          # half of them on the sphere
        return u / u.norm(dim=1, keepdim=True) * length[:, None]

    def confidence(points):
        with torch.no_grad():
            return ccu(points.reshape(-1, *shape)).amax(1).exp().reshape(B, -1).amax(1)

    def spread(n):
        return x.repeat_interleave(n, 0), radius.repeat_interleave(n)

    worst = confidence(step_into_ball(metric, spread(samples)[0], in_ball(samples), spread(samples)[1]))
    start, limit = spread(starts)
    u = in_ball(starts)
    for step in range(steps):                           # normalised ascent on log p(x|i)/p(x|o) in z
        points = step_into_ball(metric, start, u, limit)
        gradient = gradient_in_z(ccu, points)
        u = metric.transform(points - start)
        size = limit * 0.5 * 0.02 ** (step / steps)
        u = u + gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-300) * size[:, None]
        worst = torch.maximum(worst, confidence(step_into_ball(metric, start, u, limit)))
    return worst, B * (samples + starts * steps)


def test_no_confidence_above_the_bound():
    evaluated = 0

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(ccus(), st.integers(0, 2 ** 32))
    def holds(ccu, seed):
        nonlocal evaluated
        x, certified, random = points_and_radii(ccu, seed, 6)
        bounds = {}
        for radius in (certified, random):
            worst, n = worst_confidence(in_float64(ccu), x.double(), radius, seed, 1000, 25, 40)
            evaluated += n
            for method in ("tight", "paper"):
                bounds[method] = confidence_bound(ccu, x, radius, method)
                assert (worst <= bounds[method] + 1e-9).all(), (method, (worst - bounds[method]).max())
            assert (bounds["tight"] <= bounds["paper"]).all()

    holds()
    assert evaluated >= 1_000_000


def test_a_trained_ccu_stays_below_the_bound(digits_run):
    ccu = load_model(digits_run / "checkpoints/Digits/CCU.pt")
    x = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    x[3:] *= torch.linspace(0, 0.2, 3)[:, None, None, None]                     # dark: nearer to the data
    paper, tight = (certified_radius(ccu, x, method=method) for method in ("paper", "tight"))
    assert (tight >= paper).all() and (tight[:3] > 0).all()
    for radius in (tight, 1.02 * tight, tight + ccu.gmm_in.metric.transform(x).norm(dim=1).double() / 10):
        worst, _ = worst_confidence(in_float64(ccu), x.double(), radius, seed=0, samples=100, starts=5, steps=20)
        for method in ("tight", "paper"):
            assert (worst <= confidence_bound(ccu, x, radius, method) + 1e-9).all()


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(ccus(max_dim=8, low=0.2, high=2.0), st.integers(0, 2 ** 32))
def test_a_float32_model_stays_below_the_bound(ccu, seed):
    x, certified, _ = points_and_radii(ccu, seed, 6)
    metric, n = ccu.gmm_in.metric, 1000
    u = torch.randn(6 * n, metric.dim, generator=torch.Generator().manual_seed(seed))
    u = u / u.norm(dim=1, keepdim=True) * certified.float().repeat_interleave(n)[:, None]
    with torch.no_grad():
        points = step_into_ball(metric, x.repeat_interleave(n, 0), u, certified.float().repeat_interleave(n))
        worst = ccu(points).amax(1).exp().reshape(6, n).amax(1)
    assert (worst <= confidence_bound(ccu, x, certified) + 1e-5).all()


# In two dimensions: the true maximum


def disc() -> torch.Tensor:
    """A grid of 20,000 points in the unit disc, 200 of them on its edge."""
    angle = torch.arange(200, dtype=torch.float64) * (2 * math.pi / 200)
    length = torch.linspace(0, 1, 100, dtype=torch.float64).sqrt()[:, None]
    return torch.stack([length * angle.cos(), length * angle.sin()], 2).reshape(-1, 2)


def gaps(variances: str, examples: int, points=10) -> dict[str, torch.Tensor]:
    """log b - (maximum of log p(x|i)/p(x|o) over the ball), for a sure classifier, both methods, from a grid."""
    found = {"tight": [], "paper": []}
    for seed in range(examples):
        ccu = make_ccu(seed, variances=variances)
        exact = in_float64(ccu)
        g = torch.Generator().manual_seed(seed)
        x, radius = torch.randn(points, 2, generator=g), torch.rand(points, generator=g).double() + 0.05
        for i in range(points):
            with torch.no_grad():
                ball = step_into_ball(exact.gmm_in.metric, x[i].double(), disc() * radius[i], radius[i])
                true = log_ratio(exact, ball).max()
            for method in found:
                bound = confidence_bound(ccu, x[i:i + 1], radius[i], method)[0]
                found[method].append(torch.logit((bound - 0.1) / 0.9) - true)
    return {method: torch.stack(values) for method, values in found.items()}


@pytest.mark.parametrize("variances, median", [("4x", 0.17), ("larger", 0.17), ("any", 0.13), ("equal", 0.09)])
def test_tight_in_two_dimensions(variances, median):
    """Medians of gaps that any weight q left out would widen."""
    gap = gaps(variances, examples=8)
    assert gap["tight"].min() > -1e-9 and (gap["tight"] <= gap["paper"] + 1e-9).all()
    assert gap["tight"].median() < median and gap["tight"].median() < 0.5 * gap["paper"].median()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(ccus(K=1, L=1, single=False, sure=True, classes=10), st.integers(0, 2 ** 32))
def test_one_pair_is_exact(ccu, seed):
    """With one component each, the maximum is on the line through x0 along the gradient: found on a fine grid."""
    x, _, radius = points_and_radii(ccu, seed, 4)
    exact = in_float64(ccu)
    metric = exact.gmm_in.metric
    points = x.double()
    direction = gradient_in_z(exact, points)
    direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-300)
    share = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for i in range(4):
        line = points[i] + metric.inverse(share[:, None] * radius[i] * direction[i])
        with torch.no_grad():
            true = log_ratio(exact, line).max()
        bound = confidence_bound(ccu, x[i:i + 1], radius[i])[0]
        odds = torch.exp(true - exact.loglam)
        expected = (1 + 10 * odds) / (10 * (1 + odds))
        # the metric's float32 rows are orthonormal to 1e-7 only
        assert abs(bound - expected) < 1e-5


# Against the published formulas


def numpy_mixtures(ccu: CCU):
    """(centres in z, variances, log(weight c)) of both mixtures, and the coordinates' map, in numpy."""
    metric = ccu.gmm_in.metric
    s = metric.singular_values.numpy().astype(np.float64)
    W = metric.comp_vecs.numpy().astype(np.float64) / np.sqrt(s)[:, None]
    out = []
    for gmm in (ccu.gmm_in, ccu.gmm_out):
        var = np.exp(gmm.logvar.detach().numpy().astype(np.float64))
        log_c = gmm.alpha.numpy().astype(np.float64) - len(s) / 2 * np.log(2 * np.pi * var) - np.log(s).sum() / 2
        out.append((gmm.mu.detach().numpy().astype(np.float64) @ W.T, var, log_c))
    return *out, W


def published_log_b(ccu: CCU, x: np.ndarray, R: float) -> float:
    (mu, var_in, log_in), (nu, var_out, log_out), W = numpy_mixtures(ccu)
    d_in, d_out = (np.linalg.norm(W @ x - centres, axis=1) for centres in (mu, nu))
    upper = logsumexp(log_in - np.maximum(d_in - R, 0) ** 2 / 2 / var_in)
    return upper - logsumexp(log_out - (d_out + R) ** 2 / 2 / var_out) - float(ccu.loglam)


def pairwise_log_b(ccu: CCU, x: np.ndarray, R: float) -> float:
    """min_l sum_k, by the centres c_kl of the pairs' quadratics; for theta != sigma."""
    (mu, var_in, log_in), (nu, var_out, log_out), W = numpy_mixtures(ccu)
    z, values = W @ x, np.empty((len(mu), len(nu)))
    for k in range(len(mu)):
        for j in range(len(nu)):
            a = 1 / var_in[k] - 1 / var_out[j]
            c = (mu[k] / var_in[k] - nu[j] / var_out[j]) / a
            top = -((c - mu[k]) ** 2).sum() / 2 / var_in[k] + ((c - nu[j]) ** 2).sum() / 2 / var_out[j]
            distance = np.linalg.norm(z - c)
            reached = max(distance - R, 0) if a > 0 else distance + R
            values[k, j] = log_in[k] - log_out[j] + top - a / 2 * reached ** 2
    return logsumexp(values, axis=0).min() - float(ccu.loglam)


@pytest.mark.parametrize("method", ["paper", "tight"])
def test_on_a_line_away_from_all_out_centres_the_bound_is_the_maximum(method):
    """The triangle inequality is an equality there; weights q of other radii alone would bound higher."""
    for seed in range(10):
        ccu = make_ccu(seed, D=1, K=1, L=20, variances="any", low=1e-3, high=1e-1)
        with torch.no_grad():
            ccu.gmm_in.mu.fill_(3.0)
            ccu.gmm_out.mu.copy_(-ccu.gmm_out.mu.abs())
            exact = in_float64(ccu)
            balls = Balls(Mixtures(ccu), torch.zeros(1, 1, dtype=torch.float64), method)
            for share in np.linspace(0.02, 0.98, 49):       # of the way from 0 to mu
                x = torch.full((1, 1), 3 * share, dtype=torch.float64)
                bound = balls.log_b(exact.gmm_in.metric.transform(x).norm(dim=1))
                true = log_ratio(exact, x) - exact.loglam
                assert true <= bound <= true + 1e-6


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(ccus(single=False), st.integers(0, 2 ** 32))
def test_paper_is_the_published_bound(ccu, seed):
    M = ccu.classes
    x, _, radius = points_and_radii(ccu, seed, 6)
    b = np.exp([published_log_b(ccu, p, r) for p, r in zip(x.double().numpy(), radius.tolist(), strict=True)])
    assert np.allclose(confidence_bound(ccu, x, radius, "paper"), (1 + M * b) / (M * (1 + b)), rtol=0, atol=1e-9)

    ratio = 1 + 0.1 * (M - 1) / 9
    target = math.log((ratio - 1) / (M - ratio))
    for p, R in zip(x.double().numpy(), certified_radius(ccu, x, ratio, "paper").tolist(), strict=True):
        if published_log_b(ccu, p, 0) > target:
            assert R == 0
        else:
            expected = brentq(lambda r, p=p: published_log_b(ccu, p, r) - target, 0, 1e3, xtol=1e-13, rtol=1e-12)
            assert expected * (1 - 1e-8) - 1e-12 <= R <= expected * (1 + 1e-12) + 1e-12


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(ccus(single=False, D=2, K=8, L=8, variances="any", classes=10), ccus(single=False, variances="4x", classes=10),
       st.integers(0, 2 ** 32))
def test_tight_is_never_above_the_pairwise_bound(mixed, wider, seed):
    for ccu in (mixed, wider):
        x, certified, radius = points_and_radii(ccu, seed, 12)
        radius[::2] = certified[::2] * (1 + 1e-4)
        b = np.exp([pairwise_log_b(ccu, p, r) for p, r in zip(x.double().numpy(), radius.tolist(), strict=True)])
        pairwise = 1 - 0.9 / (1 + b)
        assert (confidence_bound(ccu, x, radius).numpy() <= pairwise + 1e-9).all()


def test_bound_at_radius_zero_is_the_confidence():
    for seed in range(10):
        ccu = make_ccu(seed, D=6, variances=VARIANCES[seed % 5], single=seed == 7, loglam=seed / 5 - 1)
        x = torch.randn(50, 6)
        exact = in_float64(ccu)(x.double()).amax(1).exp()
        assert torch.allclose(confidence_bound(ccu, x, 0.0), exact, rtol=0, atol=1e-9)


# The quadratic


@pytest.mark.parametrize("a", [3.0, 1e-3, 1e-12, 0.0, -1e-12, -2.0])
def test_ball_max_is_the_maximum_over_the_ball(a):
    u = disc() * 1.3
    for g in torch.tensor([[0.0, 0.0], [0.3, 0.4], [-3.0, 4.0]], dtype=torch.float64):
        on_grid = (u @ g - a / 2 * u.square().sum(1)).max()
        zero, length, curvature, R = torch.tensor([0.0, g.norm(), a, 1.3], dtype=torch.float64)
        found = ball_max(zero, length, curvature, peak_of(length, curvature), R)
        assert on_grid - 1e-12 <= found <= on_grid + 5e-3


@pytest.mark.parametrize("change", [-1e-3, -1e-6, 0.0, 1e-6, 1e-3])
def test_equal_variances_are_no_special_case(change):
    """theta -> sigma: the bound passes smoothly through theta = sigma, where the log-ratio is linear."""
    equal = make_ccu(3, D=5, K=4, L=4, variances="equal")
    near = copy.deepcopy(equal)
    with torch.no_grad():
        near.gmm_out.logvar += change
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    for method in ("tight", "paper"):
        here, there = confidence_bound(equal, x, 0.5, method), confidence_bound(near, x, 0.5, method)
        assert (here - there).abs().max() <= 100 * abs(change)


def test_equal_mixtures_have_odds_one():
    """p(x|i) = p(x|o): every gradient is 0, and the bound must not divide by it."""
    ccu = make_ccu(0, D=4, K=3, L=3, variances="equal")
    ccu.gmm_out.load_state_dict(ccu.gmm_in.state_dict())
    bound = confidence_bound(ccu, torch.randn(20, 4), torch.linspace(0, 0.2, 20))
    assert (bound >= 0.55).all() and bound[0] < 0.55 + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_rounding_is_on_the_safe_side(seed):
    """Log-densities of 10^6, as in pixels that are always black: never below the exact value in 60 digits."""
    D, single_pair = 12, {"K": 1, "L": 1, "variances": "4x", "low": 1e-3, "high": 2e-3}
    ccu = make_ccu(seed, D=D, **single_pair)
    with torch.no_grad():
        ccu.gmm_in.metric.singular_values *= torch.logspace(2, -4, D)
    x = torch.rand(6, D, generator=torch.Generator().manual_seed(seed))
    R = certified_radius(ccu, x)
    bounds = confidence_bound(ccu, x, R)
    with mpmath.workdps(60):
        V, s, mu, nu, points = map(in_mpmath, (ccu.gmm_in.metric.comp_vecs, ccu.gmm_in.metric.singular_values,
                                               ccu.gmm_in.mu, ccu.gmm_out.mu, x))
        prec_in, prec_out = (mpmath.exp(-mpmath.mpf(gmm.logvar.item())) for gmm in (ccu.gmm_in, ccu.gmm_out))
        log_c = [gmm.alpha.item() - mpmath.mpf(gmm.logvar.item()) * D / 2 for gmm in (ccu.gmm_in, ccu.gmm_out)]
        assert (R > 0).any()
        for i in R.nonzero()[:, 0].tolist():
            z_mu, z_nu = (mpmath.matrix([(V[j, :] * (points[i, :] - centre).T)[0] / mpmath.sqrt(s[j])
                                         for j in range(D)]) for centre in (mu, nu))
            g, a, radius = z_nu * prec_out - z_mu * prec_in, prec_in - prec_out, mpmath.mpf(R[i].item())
            t = min(radius, mpmath.norm(g) / a)
            log_b = (log_c[0] - log_c[1] - prec_in / 2 * mpmath.norm(z_mu) ** 2 + prec_out / 2 * mpmath.norm(z_nu) ** 2
                     + mpmath.norm(g) * t - a / 2 * t ** 2)
            exact = mpmath.mpf(1) / 10 + mpmath.mpf(9) / 10 / (1 + mpmath.exp(-log_b))
            assert 0.109 < exact <= mpmath.mpf(bounds[i].item()) <= 0.11


def test_rounding_beside_a_centroid_of_the_out_mixture_is_on_the_safe_side():
    """Points of the ball that are more likely under p(x|i), in 50 digits: d(x0, nu) is tiny, and its error is not."""
    D, var_in, var_out = 12, 0.25, 1.0
    shares = torch.logspace(-9, -4, 8, dtype=torch.float64)[:, None]        # of the way from nu_0 to mu
    checked = 0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        metric = PCAMetric(torch.linalg.qr(torch.randn(D, D, generator=generator))[0], torch.logspace(0, -3, D))
        mu, nu = torch.rand(1, D, generator=generator), torch.rand(2, D, generator=generator)
        nu[1] = nu[0] + 100 * torch.randn(D, generator=generator)           # far off: centring cancels nothing
        x = nu[:1].double() + shares * (mu - nu[:1]).double()
        with mpmath.workdps(50):
            V, s, points, centres = map(in_mpmath, (metric.comp_vecs, metric.singular_values, x, torch.cat((mu, nu))))
            logvars = [mpmath.mpf(torch.tensor(math.log(var)).item()) for var in (var_in, var_out, var_out)]
            log_alphas = [mpmath.mpf(a) for a in (0.0, *torch.full((2,), -math.log(2)).tolist())]

            def log_joint(point, k, V=V, s=s, centres=centres, logvars=logvars, log_alphas=log_alphas):
                z = [(V[j, :] * (point - centres[k, :].T))[0] / mpmath.sqrt(s[j]) for j in range(D)]
                d2 = mpmath.fsum(value ** 2 for value in z)
                return log_alphas[k] - D * logvars[k] / 2 - d2 / 2 * mpmath.exp(-logvars[k]), mpmath.sqrt(d2)
            for R in (0.5, 2.0):
                log_odds = []
                for i in range(len(x)):
                    point, target = points[i, :].T, centres[0, :].T
                    point += (target - point) * min(R / log_joint(point, 0)[1], 1)      # R towards mu
                    log_out = mpmath.log(mpmath.fsum(mpmath.exp(log_joint(point, k)[0]) for k in (1, 2)))
                    log_odds.append(log_joint(point, 0)[0] - log_out)
                ccu = CCU(Sure(10), GMM(mu, torch.tensor([math.log(var_in)]), torch.zeros(1), metric),
                          GMM(nu, torch.full((2,), math.log(var_out)), torch.full((2,), -math.log(2)), metric),
                          float(log_odds[0]), 10)
                for method in ("paper", "tight"):
                    bounds = confidence_bound(ccu, x, R, method)
                    for bound, odds in zip(bounds.tolist(), log_odds, strict=True):
                        b = mpmath.exp(odds - mpmath.mpf(ccu.loglam.item()))
                        assert mpmath.mpf(1) / 10 + mpmath.mpf(9) / 10 * b / (1 + b) <= bound
                        checked += 1
    assert checked == 96


@pytest.mark.parametrize("seed", range(4))
def test_each_rounding_error_is_within_its_allowance(seed):
    """Coordinates, squared distances and the lengths of (3), in 60 digits from the numbers they are computed of."""
    D, K = 12, 3
    ccu = make_ccu(seed, D=D, K=K, L=K, low=1e-3, high=2e-3)
    with torch.no_grad():
        ccu.gmm_in.metric.singular_values *= torch.logspace(2, -4, D)
        x = torch.rand(8, D, generator=torch.Generator().manual_seed(seed))
        x[4:] = ccu.gmm_out.mu[0] + 1e-6 * x[4:]        # beside a centroid
        mixtures = Mixtures(ccu)
        balls = Balls(mixtures, x.double(), "tight")
        z, lengths = mixtures.metric.transform(x.double()), balls.quadratics[0][1]
        assert balls.eps >= D * 2 ** -53        # the first-order bound on a sum of D terms
        for centres in (mixtures.mu, mixtures.nu):
            a, b = z - centres.mean(0), centres - centres.mean(0)
            assert (a.norm(dim=1)[:, None] + b.norm(dim=1) <= balls.size[:, None]).all()
    with mpmath.workdps(60):
        V, s, points, mu, nu = map(in_mpmath, (ccu.gmm_in.metric.comp_vecs, ccu.gmm_in.metric.singular_values, x,
                                               mixtures.mu, mixtures.nu))
        for i in range(len(x)):
            own = in_mpmath(z[i])
            true = mpmath.matrix([(V[j, :] * points[i, :].T)[0] / mpmath.sqrt(s[j]) for j in range(D)])
            assert mpmath.norm(true - own) <= balls.z_error[i].item()
            for k in range(K):
                to_mu = own - mu[k, :].T
                assert abs(mpmath.norm(to_mu) ** 2 - balls.d2_in[i, k].item()) <= balls.eps * balls.size[i].item() ** 2
                for j in range(K):
                    g = (own - nu[j, :].T) * mixtures.prec_out[j].item() - to_mu * mixtures.prec_in[k].item()
                    assert lengths[i, k, j].item() >= mpmath.norm(g)


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_large_logarithms_are_on_the_safe_side(seed):
    """At x = mu_k = nu_l = 0 log b is made of the components' constants, of 10^3, and nothing else rounds."""
    D = 300
    ccu = make_ccu(seed, D=D, K=3, L=3, low=1e-4, high=1e-3, loglam=0.1)
    with torch.no_grad():
        for gmm in (ccu.gmm_in, ccu.gmm_out):
            gmm.mu.zero_()
        log_b = Balls(Mixtures(ccu), torch.zeros(1, D, dtype=torch.float64), "paper").log_b(torch.zeros(1))
    with mpmath.workdps(60):
        density_in, density_out = (mpmath.fsum(map(mpmath.exp, in_mpmath(gmm.alpha) - in_mpmath(gmm.logvar) * D / 2))
                                   for gmm in (ccu.gmm_in, ccu.gmm_out))
        true = mpmath.log(density_in / density_out) - mpmath.mpf(ccu.loglam.item())
        assert true <= log_b.item() <= true + 1e-6


# The radius


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(ccus(loglam=0.0), st.integers(0, 2 ** 32), st.sampled_from(["tight", "paper"]))
def test_radius_is_the_largest_that_holds(ccu, seed, method):
    M, x = ccu.classes, points_and_radii(ccu, seed, 8)[0]
    ratios = [1 + share * (M - 1) for share in (0.01, 0.05, 0.3)]
    radii = torch.stack([certified_radius(ccu, x, ratio, method) for ratio in ratios])
    assert (radii >= 0).all() and radii.dtype == torch.float64 and (radii.diff(dim=0) >= 0).all()
    everywhere = 2 * (ccu.gmm_in.metric.dim ** 0.5 + x.norm(dim=1))             # at least: s >= 0.5
    for ratio, R in zip(ratios, radii, strict=True):
        centre = confidence_bound(ccu, x, 0.0, method) <= ratio / M
        assert (confidence_bound(ccu, x, R, method)[centre] <= ratio / M).all()
        assert (R[~centre] == 0).all()
        beyond = confidence_bound(ccu, x, R * (1 + 1e-8) + 1e-11, method)
        assert ((beyond > ratio / M) | (everywhere < R))[centre].all()


@pytest.mark.parametrize("method", ["tight", "paper"])
def test_radii_are_confirmed_where_roots_of_rounding_errors_count(method):
    """A radius is found with a larger allowance than it is confirmed with.  At centroids and at the peaks of pairs,
    where g of (3) is 0, roots of allowances decide."""
    certified = 0
    for seed in range(300):
        ccu = make_ccu(seed, D=1 + seed % 7, K=1 + seed % 4, L=4, variances=VARIANCES[seed % 5])
        mu, nu = ccu.gmm_in.mu.detach(), ccu.gmm_out.mu.detach()
        in_, out = 1 / ccu.gmm_in.logvar.detach().exp(), 1 / ccu.gmm_out.logvar.detach().exp()
        peaks = ((in_[:, None, None] * mu[:, None] - out[:, None] * nu) / (in_[:, None] - out)[..., None]).flatten(0, 1)
        x = torch.cat([mu, nu, peaks[peaks.isfinite().all(1) & (peaks.norm(dim=1) < 100)]])
        for ratio in (1.1, 2.0, 5.0):
            R = certified_radius(ccu, x, ratio, method)
            assert (confidence_bound(ccu, x, R, method)[R > 0] <= ratio / 10).all()
            certified += (R > 0).sum().item()
    assert certified > 1000


def test_tight_radius_is_never_below_the_papers():
    for seed in range(20):
        ccu = make_ccu(seed, D=8, variances=VARIANCES[seed % 5])
        x = 2 * torch.randn(50, 8, generator=torch.Generator().manual_seed(seed))
        tight, paper = (certified_radius(ccu, x, method=method) for method in ("tight", "paper"))
        assert (tight >= paper * (1 - 1e-9)).all()


def test_bound_grows_with_the_radius():
    ccu, radii = make_ccu(1, D=7, variances="any"), torch.linspace(0, 20, 400)
    for x in torch.randn(5, 7, generator=torch.Generator().manual_seed(0)):
        for method in ("tight", "paper"):
            bound = confidence_bound(ccu, x.expand(400, 7), radii, method)
            assert (bound.diff() >= 0).all() and bound[-1] <= 1


def test_radius_where_nothing_exceeds_the_bound():
    """lam so large that no point is confident: the radius is finite, verified, and covers the unit cube."""
    for single, scale in itertools.product((True, False), (1e-3, 1.0, 1e3)):       # of the centres' coordinates
        ccu, x = make_ccu(2, D=3, loglam=1e9, single=single), torch.rand(5, 3)
        x[0] = 0
        with torch.no_grad():
            for gmm in filter(None, (ccu.gmm_in, ccu.gmm_out)):
                gmm.mu *= scale
        R = certified_radius(ccu, x)
        reached = torch.cat([torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3),
                             *(gmm.mu.detach() for gmm in (ccu.gmm_in, ccu.gmm_out) if gmm is not None)])
        z, ends = ccu.gmm_in.metric.transform(x), ccu.gmm_in.metric.transform(reached)
        assert R.isfinite().all() and (confidence_bound(ccu, x, R) <= 0.11).all()
        assert (torch.cdist(z, ends).amax(1) < R).all()
    assert (confidence_bound(ccu, x, 1e300) == 1).all()


# The interface


def test_points_of_any_shape_type_and_batch():
    ccu = make_ccu(5, D=16)
    x = torch.rand(300, 1, 4, 4)
    together = certified_radius(ccu, x)
    assert torch.allclose(certified_radius(ccu, x.flatten(1).double()), together, rtol=1e-9)
    alone = torch.cat([certified_radius(ccu, x[i:i + 1]) for i in range(20)])
    assert torch.allclose(alone, together[:20], rtol=1e-8)
    bounds = torch.cat([confidence_bound(ccu, x[i:i + 1], together[i]) for i in range(20)])
    assert ((bounds <= 0.11) | (together[:20] == 0)).all() and (together > 0).any()
    assert confidence_bound(ccu, x[:0], 1.0).shape == certified_radius(ccu, x[:0]).shape == (0,)


def test_blocks_do_not_change_the_result(monkeypatch):
    ccu, x = make_ccu(5, D=16), torch.rand(30, 16)
    whole = confidence_bound(ccu, x, torch.linspace(0, 1, 30))
    monkeypatch.setattr("models.certificate.BLOCK", {"cpu": 100})
    assert torch.allclose(confidence_bound(ccu, x, torch.linspace(0, 1, 30)), whole, rtol=0, atol=1e-12)


def test_the_model_is_left_alone():
    ccu = make_ccu(5)
    before = copy.deepcopy(ccu).state_dict()
    certified_radius(ccu, torch.rand(4, 2))
    assert ccu.gmm_in.mu.requires_grad and ccu.gmm_in.mu.grad is None
    for name, value in ccu.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


@pytest.mark.parametrize("call, message", [
    (lambda ccu, x: certified_radius(ccu, x, ratio=1.0), "ratio"),
    (lambda ccu, x: certified_radius(ccu, x, ratio=10.0), "ratio"),
    (lambda ccu, x: certified_radius(ccu, x, ratio=math.nan), "ratio"),
    (lambda ccu, x: certified_radius(ccu, x, method="best"), "method"),
    (lambda ccu, x: confidence_bound(ccu, x, 1.0, "best"), "method"),
    (lambda ccu, x: confidence_bound(ccu, x, -1.0), "radius"),
    (lambda ccu, x: confidence_bound(ccu, x, math.inf), "radius"),
    (lambda ccu, x: confidence_bound(ccu, x, math.nan), "radius"),
    (lambda ccu, x: confidence_bound(ccu, x, torch.ones(3)), "radius"),
    (lambda ccu, x: confidence_bound(ccu, x[:, :1], 1.0), "points"),
    (lambda ccu, x: certified_radius(ccu, x * math.nan), "points"),
])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_ccu(0), torch.rand(4, 2))


def test_only_a_ccu_certifies_and_only_floating_point_images():
    for function in (certified_radius, lambda *args: confidence_bound(*args, 1.0)):
        with pytest.raises(TypeError, match="only a CCU"):
            function(Softmax(Sure(10)), torch.rand(4, 2))
        for points in (torch.full((4, 2), 255, dtype=torch.uint8), torch.rand(4, 2).numpy()):
            with pytest.raises(TypeError, match="points must be .* floating-point"):
                function(make_ccu(0), points)
