"""The attack: feasible to rounding, never worse than its seed, as good as a convex solver, reproducible."""

import math

import numpy as np
import pytest
import torch
from attack_strength import known_maximum
from scipy.optimize import minimize

from gen_gmm import one_pass
from models.detectors import Detector
from models.metric import PCAMetric
from utils import attack as utils_attack
from utils.attack import linf_pgd, nearest, unit_ball
from utils.batches import Augmentation
from utils.data import load_in_dist
from utils.region import Coordinates, Region, distances
from utils.state import State


class Function(torch.nn.Module):
    """A detector as far as the attack is concerned: x [B, C, H, W] -> f(flat x) [B]."""

    def __init__(self, f):
        super().__init__()
        self.attack_score = lambda x: f(x.flatten(1))
        self.eval()


def gen(seed):
    return torch.Generator().manual_seed(seed)


def attack(detector, metric, *args, **kwargs):
    return utils_attack.attack(detector, Coordinates(metric), *args, **kwargs)


def random_metric(D, condition, seed, dtype=torch.float32):
    """Random rotation, singular values log-uniform over `condition`."""
    V, _ = torch.linalg.qr(torch.randn(D, D, generator=gen(seed), dtype=torch.float64))
    s = 10 ** (torch.linspace(0, -math.log10(condition), D, dtype=torch.float64))
    return PCAMetric(V.to(dtype), s.to(dtype))


def digits_metric():
    """Of Digits, as training augments them."""
    return PCAMetric.fit(one_pass(load_in_dist("Digits", "train", "data"), Augmentation(2, "constant", False), 0))


def small_net(D, seed=0):
    """A ReLU network's largest log-confidence: piecewise smooth, many local maxima."""
    W1, W2 = torch.randn(D, 32, generator=gen(seed)), torch.randn(32, 5, generator=gen(seed + 1)) / 4
    return Function(lambda x: ((x - 0.5) @ W1.to(x)).relu().matmul(W2.to(x)).log_softmax(1).amax(1))


def seeds_of(B, D, seed=0, dtype=torch.float32):
    return torch.rand(B, 1, 1, D, generator=gen(seed), dtype=dtype)


@pytest.mark.parametrize("condition", [1, 1e3, 1e6])
@pytest.mark.parametrize("D", [3, 30])
def test_every_point_is_in_ball_and_cube_in_float64_and_no_worse_than_its_seed(D, condition):
    metric, net = random_metric(D, condition, seed=D), small_net(D)
    seeds = seeds_of(12, D)
    seeds[:3] = seeds[:3].round()                                       # corners of the cube
    radii = torch.logspace(-8, 4, 12, dtype=torch.float64)
    radii[5] = torch.inf
    found = attack(net, metric, seeds, radii, steps=20, restarts=5, generator=gen(0))
    assert found.samples.shape == seeds.shape and found.samples.dtype == torch.float32
    assert found.samples.min() >= 0 and found.samples.max() <= 1
    z = (found.samples.double() - seeds.double()).flatten(1) @ metric.comp_vecs.double().T
    d = (z / metric.singular_values.double().sqrt()).norm(dim=1)
    assert (d <= radii).all() and torch.equal(d, found.distance)
    delta = (found.samples.numpy().astype(np.float64) - seeds.numpy().astype(np.float64)).reshape(12, D)
    by_numpy = np.sqrt(np.einsum("bi,ij,bj->b", delta, distance_matrix(metric), delta))
    np.testing.assert_allclose(d.numpy(), by_numpy, rtol=1e-9)
    assert (found.attack_score >= net.attack_score(seeds) - 1e-6).all()
    assert torch.allclose(found.attack_score, net.attack_score(found.samples), atol=1e-6)
    assert (found.attack_score - net.attack_score(seeds))[6:].mean() > 0.1


@pytest.mark.parametrize("k", [0, 25, 1000])
def test_projection_makes_points_feasible_and_converges_to_the_nearest_in_the_metric(k):
    """With the penalty of step k of a search, be it loose or stiff."""
    D, B = 6, 12
    metric = random_metric(D, 100, seed=1, dtype=torch.float64)
    seeds, radii = seeds_of(B, D, dtype=torch.float64), torch.logspace(-1, 1, B, dtype=torch.float64)
    coordinates = Coordinates(metric)
    region, step = Region(coordinates, seeds, radii), torch.full((B, 1), 0.1, dtype=torch.float64)
    trial = torch.randn(B, D, generator=gen(2), dtype=torch.float64)
    point = region.start(torch.zeros_like(trial))
    for _ in range(500):
        point = region.project(trial @ coordinates.forward, point, step, coordinates.penalty(k))
        delta = point.delta
        torch.testing.assert_close(point.along, delta @ coordinates.forward)
        x, d = region.checked(delta)
        assert (d <= radii).all() and x.min() >= 0 and x.max() <= 1
        assert torch.allclose(x, region.seeds + delta, atol=1e-9)       # the check had next to nothing to mend
    for b in range(B):
        goal = seeds[b].flatten() + trial[b]
        best = -maximum_of_concave(metric, seeds[b], radii[b], distance_matrix(metric), goal.numpy())
        assert metric.transform(delta - trial)[b].square().sum().item() == pytest.approx(best, rel=1e-4)
    inside = region.start(0.5 * delta)
    again = region.project(inside.along, inside, step, coordinates.penalty(k))
    assert torch.allclose(again.delta, inside.delta, atol=1e-12)


@pytest.mark.parametrize("condition", [1, 1e3, 1e6, 1e20])
def test_coordinates_make_the_metric_and_its_diagonal_diagonal(condition):
    metric = random_metric(12, condition, seed=5, dtype=torch.float64)
    coordinates, delta = Coordinates(metric), torch.randn(7, 12, generator=gen(6), dtype=torch.float64)
    along = delta @ coordinates.forward
    torch.testing.assert_close(along @ coordinates.backward, delta)
    torch.testing.assert_close((along.square() * coordinates.weights).sum(1), metric.transform(delta).square().sum(1))
    A = torch.from_numpy(distance_matrix(metric))
    torch.testing.assert_close(along.square().sum(1), (delta.square() * A.diagonal()).sum(1))
    assert coordinates.weights.mean().item() == pytest.approx(1) and (coordinates.weights > 0).all()


def test_ascent_direction_is_the_closed_form():
    """A^-1 g, divided by its length in the metric; also for gradients whose squares underflow, and for 0."""
    metric = random_metric(12, 1e4, seed=5, dtype=torch.float64)
    coordinates, g = Coordinates(metric), torch.randn(7, 12, generator=gen(6), dtype=torch.float64)
    move = torch.linalg.solve(torch.from_numpy(distance_matrix(metric)), g.T).T
    move = move / metric.transform(move).norm(dim=1, keepdim=True)
    torch.testing.assert_close(coordinates.ascent_direction(g) @ coordinates.backward, move)
    torch.testing.assert_close(coordinates.ascent_direction(1e-300 * g) @ coordinates.backward, move)
    assert (coordinates.ascent_direction(0 * g) == 0).all()


def test_check_mends_what_left_the_ball_and_what_is_not_a_number():
    D, metric = 20, random_metric(20, 1e6, seed=3)
    seeds, radii = seeds_of(4, D), torch.tensor([0.0, 1e-6, 0.5, 2.0], dtype=torch.float64)
    delta = torch.randn(4, D, generator=gen(4)) * 100
    delta[3] = torch.nan
    x, d = Region(Coordinates(metric), seeds, radii).checked(delta)
    assert (d <= radii).all() and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x[3], seeds[3].flatten()) and torch.equal(x[0], seeds[0].flatten())


def distance_matrix(metric):
    V, s = metric.comp_vecs.double(), metric.singular_values.double()
    return (V.T / s @ V).numpy()


def maximum_of_concave(metric, seed, radius, Q, goal):
    """SLSQP's maximum of -(x - goal) Q (x - goal) over ball and cube."""
    x0, R, M = seed.flatten().numpy(), radius.item(), distance_matrix(metric)
    return -minimize(lambda x: (x - goal) @ Q @ (x - goal), x0, jac=lambda x: 2 * Q @ (x - goal), method="SLSQP",
                     bounds=[(0, 1)] * len(x0), options={"ftol": 1e-14, "maxiter": 500},
                     constraints={"type": "ineq", "fun": lambda x: R * R - (x - x0) @ M @ (x - x0),
                                  "jac": lambda x: -2 * M @ (x - x0)}).fun


@pytest.mark.parametrize("D, condition", [(2, 1), (2, 100), (5, 1), (5, 100), (20, 100)])
def test_reaches_the_maximum_of_a_concave_function(D, condition):
    """On balls and boxes that are active in varying combinations, to 0.1 % of the attainable rise."""
    metric = random_metric(D, condition, seed=7, dtype=torch.float64)
    B = 8
    seeds, radii = seeds_of(B, D, 8, torch.float64), torch.logspace(-1, 0.5, B, dtype=torch.float64)
    A = torch.randn(D, D, generator=gen(9), dtype=torch.float64)
    Q, goal = A @ A.T / D + 0.1 * torch.eye(D), 1.5 * torch.randn(D, generator=gen(10), dtype=torch.float64)
    quadratic = Function(lambda x: -((x - goal) @ Q * (x - goal)).sum(1))
    found = attack(quadratic, metric, seeds, radii, steps=300, restarts=2, generator=gen(11))
    start = quadratic.attack_score(seeds)
    for b in range(B):
        best = maximum_of_concave(metric, seeds[b], radii[b], Q.numpy(), goal.numpy())
        assert best - found.attack_score[b].item() <= 1e-3 * (best - start[b].item())
        assert found.attack_score[b].item() <= best + 1e-5 * abs(best)


@pytest.mark.parametrize("metric, least", [("digits", 0.999), ("pixels", 0.999), ("rotation", 0.99)])
def test_reaches_the_maximum_of_a_linear_function_of_many_ill_conditioned_pixels(metric, least):
    """In the metric of Digits, as training augments them, of 100 pixels whose variances differ, and of a rotation.

    Singular values are 4 10^4 to 10^6 apart; the random rotation, unlike images, has no pixels that hardly vary.
    """
    D, B = 100, 8
    if metric == "digits":
        D = 784
        metric = digits_metric()
    elif metric == "rotation":
        metric = random_metric(D, 1e6, seed=1)
    else:
        scale = 10 ** (-3 * torch.rand(D, generator=gen(1)))
        metric = PCAMetric.fit(0.5 + scale * (torch.randn(500, D, generator=gen(2)) @ torch.rand(D, D, generator=gen(3))
                                              ).clamp(-0.5, 0.5))
    for radius in (0.1, 1.0, 10.0):
        seeds = seeds_of(B, D, 4)
        gradient, best, radii = known_maximum(metric, seeds, torch.full((B,), radius), seed=5)

        def rise(points, seeds=seeds, gradient=gradient, best=best):
            return ((points - seeds.flatten(1)) * gradient).sum(1) / best
        found = attack(Function(rise), metric, seeds, radii, steps=200, restarts=1, generator=gen(7))
        risen = rise(found.samples.flatten(1))
        assert (found.distance <= radii).all() and risen.max() < 1 + 1e-6
        assert risen.mean() > least, (radius, risen)


def test_gets_far_in_few_gradients():
    """In a ball that reaches the cube's best corner, for linear scores that look like images.

    A projection that is stiff from the first step on, the penalty always 1, makes 84 % of the way.
    """
    metric, D = digits_metric(), 784
    seeds = seeds_of(8, D, 4)
    seed = seeds.flatten(1)
    gradient = torch.randn(8, D, generator=gen(5)) * metric.singular_values.sqrt() @ metric.comp_vecs
    corner = (gradient > 0).float()
    best, radii = ((corner - seed) * gradient).sum(1), 1.0001 * distances(metric, corner, seed)
    linear = Function(lambda points: ((points - seed) * gradient).sum(1) / best)
    found = attack(linear, metric, seeds, radii, steps=25, restarts=1, generator=gen(6))
    assert 0.98 < found.attack_score.mean() < 1


def test_reaches_the_maximum_over_a_grid():
    metric, net = random_metric(2, 10, seed=1), small_net(2, seed=5)
    seeds, radii = seeds_of(10, 2, 3), torch.linspace(0.1, 1.5, 10, dtype=torch.float64)
    found = attack(net, metric, seeds, radii, steps=100, restarts=20, generator=gen(0))
    side = torch.linspace(0, 1, 401)
    grid = torch.cartesian_prod(side, side)
    for b in range(10):
        inside = distances(metric, grid, seeds[b].flatten()) <= radii[b]
        assert found.attack_score[b] >= net.attack_score(grid[inside]).max() - 1e-3


def test_more_work_is_never_worse():
    metric, net = random_metric(30, 1e3, seed=2), small_net(30)
    seeds, radii = seeds_of(6, 30), torch.full((6,), 0.5)
    scores = [attack(net, metric, seeds, radii, steps, restarts, generator=gen(0), points=6).attack_score
              for steps, restarts in [(1, 1), (10, 1), (40, 1), (40, 3), (40, 6)]]
    for less, more in zip(scores, scores[1:], strict=False):
        assert (more >= less - 1e-6).all()


def test_deterministic_and_independent_of_batch_and_leaves_the_global_generator():
    metric, net = random_metric(20, 1e3, seed=3), small_net(20)
    seeds, radii = seeds_of(7, 20, dtype=torch.float64), torch.linspace(0.1, 1, 7)
    metric = PCAMetric(metric.comp_vecs.double(), metric.singular_values.double())
    state = torch.get_rng_state()
    first, *others = [attack(net, metric, seeds, radii, 15, 6, generator=gen(4), points=points)
                      for points in (500, 500, 1, 3, 10)]
    assert torch.equal(first.samples, others[0].samples) and torch.equal(state, torch.get_rng_state())
    for other in others[1:]:
        assert torch.allclose(first.samples, other.samples, atol=1e-6)
        assert torch.allclose(first.attack_score, other.attack_score, atol=1e-6)
    assert not torch.equal(first.samples, attack(net, metric, seeds, radii, 15, 6, generator=gen(5)).samples)


@pytest.mark.parametrize("sign", [1, -1])
def test_goes_on_from_a_state_unless_an_eigenvector_has_another_sign(tmp_path, sign):
    """With the same ones it goes on, to the same bits; else it begins the block of points again."""
    coordinates, net, seeds = Coordinates(random_metric(10, 100, seed=3)), small_net(10), seeds_of(4, 10)
    options = {"seeds": seeds, "radii": torch.ones(4), "steps": 12, "restarts": 3, "points": 4}
    expected = utils_attack.attack(net, coordinates, generator=gen(0), **options)

    class Always(State):
        def due(self):
            return True

    class Stop(Exception):
        pass

    calls, told, state = 0, [], Always(tmp_path / "state", {}, resume=True)

    def score(x):
        nonlocal calls
        if calls == limit:
            raise Stop
        calls += x.requires_grad
        return net.attack_score(x)
    limit = 18                  # in the second of three blocks
    with pytest.raises(Stop):
        utils_attack.attack(Function(score), coordinates, generator=gen(0), state=state, **options)
    saved = state.load()
    assert saved["finished"] == 1 and saved["search"]["taken"] == 6
    coordinates.forward[:, 3] *= sign
    coordinates.backward[3] *= sign
    calls, limit = 0, 100
    found = utils_attack.attack(Function(score), coordinates, generator=gen(9), state=state, progress=told.append,
                                **options)
    assert calls == 24 - (6 if sign == 1 else 0) and sum(told) == 4 * 3 * 12
    torch.testing.assert_close(found.samples, expected.samples, atol=0 if sign == 1 else 1e-5, rtol=0)


def test_kinks_do_not_end_a_search():
    """Where a maximum is a crease, as in a perturbed score (Maha), steps shrink on the way: they have to grow again."""
    D = 20
    metric, seeds = random_metric(D, 100, seed=1), seeds_of(16, D, 2)
    W, goal = torch.randn(D, D, generator=gen(3)), 0.25 + 0.5 * torch.rand(D, generator=gen(4))
    largest = Function(lambda x: -((x - goal) @ W).abs().amax(1))        # 0 at the goal
    found = attack(largest, metric, seeds, torch.full((16,), 1e3), steps=300, restarts=1, generator=gen(0))
    assert found.attack_score.mean() > 0.08 * largest.attack_score(seeds).mean()


def test_a_score_that_rises_for_ever_leaves_the_numbers_finite():
    """Then every step is longer than the last."""
    rising, points = 0.0, []

    def score(x):
        nonlocal rising
        rising += 1
        points.append(x.detach())
        return 0 * x.sum(1) + x[:, 0] / 10 + rising
    found = attack(Function(score), random_metric(10, 100, seed=3), seeds_of(2, 10), torch.ones(2), steps=1000,
                   restarts=1, generator=gen(0))
    assert found.samples.isfinite().all() and all(x.isfinite().all() for x in points)


def test_radius_zero_is_the_seed():
    metric, net, seeds = random_metric(10, 100, seed=3), small_net(10), seeds_of(4, 10)
    found = attack(net, metric, seeds, torch.zeros(4), steps=5, restarts=3, generator=gen(0))
    assert torch.equal(found.samples, seeds) and (found.distance == 0).all()


def test_starts_are_uniform_in_the_ball():
    radius = unit_ball(123, list(range(4000)), 3).norm(dim=1)
    share = radius.sort().values ** 3                                   # uniform in [0, 1]
    assert (share - torch.linspace(0, 1, 4000)).abs().max() < 0.03
    assert torch.equal(unit_ball(123, [5, 7], 3), unit_ball(123, [7, 5], 3).flip(0))


def test_the_first_start_of_each_seed_is_the_seed_itself():
    """With one step a start each takes its only gradient where it starts."""
    starts, net = [], small_net(6)
    watched = Function(lambda x: (starts.append(x.detach()) if x.requires_grad else None, net.attack_score(x))[1])
    seeds = seeds_of(3, 6)
    attack(watched, random_metric(6, 10, 0), seeds, torch.ones(3), steps=1, restarts=4, generator=gen(0), points=6)
    first, *others = torch.cat(starts).split(3)
    assert torch.equal(first, seeds.flatten(1)) and len(others) == 3
    assert all((other != first).any(1).all() for other in others)


@pytest.mark.parametrize("f", [
    lambda x: x.sum(1) * 0,                                             # flat
    lambda x: (x.sum(1) - 100).clamp_min(0),                            # flat, gradient exactly 0
    lambda x: x.sum(1) * torch.nan,
    lambda x: (x - 0.5).sum(1).log(),                                   # NaN on half the cube
    lambda x: (x - x.detach()).sum(1).sqrt() + x.sum(1),                # infinite gradient
    lambda x: -(-x.sum(1) * 30).exp(),                                  # gradients of 1e-30 and less
])
def test_bad_gradients_and_scores_do_not_break_it(f):
    metric, seeds = random_metric(10, 100, seed=3), seeds_of(6, 10)
    found = attack(Function(f), metric, seeds, torch.full((6,), 0.5), steps=8, restarts=3, generator=gen(0))
    assert found.samples.isfinite().all() and not found.attack_score.isnan().any()
    assert (found.distance <= 0.5).all()
    x = linf_pgd(f, seeds.flatten(1), 0.1, 5, seeds_of(6, 10).flatten(1))
    assert x.isfinite().all() and (x - seeds.flatten(1)).abs().max() <= 0.1001


def test_vanishing_gradients_are_still_followed():
    """A saturated softmax has gradients whose squares underflow in float32."""
    metric, seeds = random_metric(10, 10, seed=3), torch.full((1, 1, 1, 10), 0.1)
    f = Function(lambda x: 1e-25 * x.sum(1))
    found = attack(f, metric, seeds, torch.ones(1), steps=30, restarts=1, generator=gen(0))
    assert found.samples.mean() > 0.2


def test_leaves_a_plateau_on_the_way_to_images():
    """A rectified linear score that is 0, without a gradient, at every seed, and positive near the images."""
    D, B = 12, 5
    metric, w = random_metric(D, 100, seed=3, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
    score = Function(lambda x: (x @ w - 0.8 * D).clamp_min(0))
    seeds, images = 0.3 * seeds_of(B, D, dtype=torch.float64), 0.9 + 0.1 * seeds_of(4, D, 1, torch.float64)
    radii = distances(metric, seeds.flatten(1), images[0].flatten().expand(B, D))
    stuck = attack(score, metric, seeds, radii, steps=60, restarts=2, generator=gen(0))
    assert torch.equal(stuck.samples, seeds) and (stuck.attack_score == 0).all()
    found = attack(score, metric, seeds, radii, steps=60, restarts=2, generator=gen(0), images=images)
    assert (found.distance <= radii).all() and (found.attack_score > 0).all()
    slopes = Function(lambda x: x @ w)
    best = attack(slopes, metric, seeds, radii, steps=60, restarts=2, generator=gen(0)).attack_score - 0.8 * D
    assert torch.allclose(found.attack_score, best, rtol=1e-2)
    # where every start has a gradient, images change nothing
    assert torch.equal(attack(slopes, metric, seeds, radii, 9, 2, generator=gen(0)).samples,
                       attack(slopes, metric, seeds, radii, 9, 2, generator=gen(0), images=images).samples)


def test_a_plateau_is_left_only_for_a_higher_point_and_only_where_no_pixel_has_a_gradient():
    """score = relu(x_0 - 0.5) + x_1: flat in x_0 alone, or, without its last term, in all pixels."""
    region = Region(Coordinates(PCAMetric.euclidean(2)), torch.full((3, 1, 1, 2), 0.2), torch.ones(3).double())
    others = torch.tensor([[0.6, 0.3], [-0.2, 0.6], [0.0, 0.0]])        # higher, as low, where it is
    start, other = region.start(torch.zeros(3, 2)), region.start(others)
    for flat, expected in ((True, [True, False, False]), (False, [False, False, False])):
        def score(x, flat=flat):
            x = x.flatten(1)
            return (x[:, 0] - 0.5).relu() + (0 if flat else x[:, 1])
        left = utils_attack.leave_plateau(score, region, start, other).delta
        assert (left != start.delta).any(1).tolist() == expected


def test_each_search_leaves_its_plateau_for_an_image_near_its_own_seed():
    """Two seeds, an image beside each that alone raises the score; the ball reaches it and no other image."""
    seeds = torch.tensor([[0.1] * 4, [0.6] * 4], dtype=torch.float64).view(2, 1, 1, 4)
    near = seeds + torch.tensor([0.1, 0, 0, 0]), seeds + torch.tensor([0, 0.3, 0, 0])
    images, goals = torch.cat(near).float(), near[0].flatten(1)
    score = Function(lambda x: (0.05 - (x[:, None] - goals).norm(dim=2)).relu().sum(1))
    found = attack(score, PCAMetric(torch.eye(4).double(), torch.ones(4).double()), seeds,
                   torch.full((2,), 0.1, dtype=torch.float64), steps=2, restarts=2, generator=gen(0),
                   images=images.double())
    assert (found.attack_score > 0.01).all()


def test_nearest_images_by_brute_force():
    metric, seeds, images = random_metric(8, 100, 0), seeds_of(5, 8), seeds_of(7, 8, 1)
    found = images.flatten(1)[nearest(metric, seeds, images.flatten(1), 9)]
    for seed, ours in zip(seeds.flatten(1), found, strict=True):
        d = distances(metric, images.flatten(1), seed.expand(7, 8))
        expected = images.flatten(1)[d.argsort()]
        assert torch.equal(ours, torch.cat((expected, expected[:2])))      # over again


def test_progress_counts_all_gradients():
    told = []
    attack(small_net(6), random_metric(6, 10, 0), seeds_of(5, 6), torch.ones(5), steps=9, restarts=4,
           generator=gen(0), points=7, progress=told.append)
    assert sum(told) == 5 * 4 * 9


def test_wrong_arguments_are_refused():
    metric, net, seeds = random_metric(6, 10, 0), small_net(6), seeds_of(3, 6)
    for bad_seeds, bad_radii in [(seeds + 1, torch.ones(3)), (seeds, torch.ones(2)), (seeds, -torch.ones(3)),
                                 (seeds, torch.full((3,), torch.nan)), (seeds * torch.nan, torch.ones(3))]:
        with pytest.raises(ValueError, match="seeds must lie"):
            attack(net, metric, bad_seeds, bad_radii, 2, 1)
    with pytest.raises(ValueError, match="evaluation mode"):
        attack(net.train(), metric, seeds, torch.ones(3), 2, 1)


def test_leaves_parameters_and_detector_alone():
    class Linear(Detector):
        def __init__(self):
            super().__init__(torch.nn.Linear(6, 3))

        def forward(self, x):
            return self.log_softmax(x.flatten(1))

    model, seeds = Linear().eval(), seeds_of(3, 6)
    attack(model, random_metric(6, 10, 0), seeds, torch.ones(3), 3, 2, generator=gen(0))
    linf_pgd(model.score, seeds, 0.1, 3, seeds)
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not model.training
    assert not seeds.requires_grad


@pytest.mark.parametrize("eps", [0.0, 1 / 255, 0.3, 2.0])
def test_linf_pgd_stays_in_the_box_exactly_and_beats_its_start(eps):
    x0, net = seeds_of(50, 40), small_net(40)
    x = linf_pgd(net.attack_score, x0, eps, 15, torch.rand(x0.shape, generator=gen(1)))
    assert (x.double() - x0.double()).abs().max() <= eps + 1e-15 and x.min() >= 0 and x.max() <= 1
    start = linf_pgd(net.attack_score, x0, eps, 1, torch.rand(x0.shape, generator=gen(1)))
    assert (net.attack_score(x) >= net.attack_score(start)).all()
    if eps == 0:
        assert torch.equal(x, x0)
    else:
        assert net.attack_score(x).mean() > net.attack_score(start).mean()


def test_linf_pgd_reaches_the_maximum_of_a_linear_and_of_a_concave_function():
    x0, w = seeds_of(20, 12).flatten(1), torch.randn(12, generator=gen(1))
    x = linf_pgd(lambda x: x @ w, x0, 0.3, 40, torch.rand(x0.shape, generator=gen(2)))
    corner = (x0 + 0.3 * w.sign()).clamp(0, 1)
    assert torch.allclose(x, corner, atol=1e-6)
    goal = torch.rand(12, generator=gen(3))
    x = linf_pgd(lambda x: -(x - goal).square().sum(1), x0, 0.3, 100, torch.rand(x0.shape, generator=gen(2)))
    best = goal.clamp(x0 - 0.3, x0 + 0.3)
    assert ((x - goal).square().sum(1) - (best - goal).square().sum(1)).max() < 2e-2


def test_linf_pgd_starts_are_random_and_reproducible():
    x0, zero = seeds_of(200, 12), lambda x: 0 * x.flatten(1).sum(1)
    a, b, c = (linf_pgd(zero, x0, 0.3, 1, torch.rand(x0.shape, generator=gen(s))) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    low, high = (x0 - 0.3).clamp_min(0), (x0 + 0.3).clamp_max(1)
    share = ((a - low) / (high - low)).flatten().numpy()
    assert abs(share.mean() - 0.5) < 0.03 and abs(np.var(share) - 1 / 12) < 0.01
