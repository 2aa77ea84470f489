"""Adversarial noise: the search for the point of a ball of the metric at which a detector is most confident.

`attack` is the attack of Table 1, `linf_pgd` the inner maximisation of ACET.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.detectors import Detector
from models.metric import PCAMetric


class AttackResult(NamedTuple):
    samples: Tensor         # [B, C, H, W] in [0, 1], the best feasible point of each seed
    attack_score: Tensor    # [B] detector.attack_score(samples)
    distance: Tensor        # [B] float64, d(sample, seed) <= radius
    restart: Tensor         # [B] the restart that found it (0 starts at the seed); -1: the seed itself


class Region:
    """The points of [0, 1]^D at most `radius` from their seed, as pixel differences delta [N, D] = x - seed."""

    margin = 1e-6           # the ball is smaller by this share, so that rounding rarely leaves it
    rounds = 2              # of ball and cube in `project`
    relaxation = 1.7        # of the step onto the ball

    def __init__(self, metric: PCAMetric, seeds: Tensor, radii: Tensor):
        self.metric, self.seeds, self.radii = metric, seeds.flatten(1), radii
        self.shape, self.low, self.high = seeds.shape, -self.seeds, 1 - self.seeds
        # no point of the cube is farther than this: a radius may be infinite
        largest = (metric.dim / metric.singular_values.double().min()).sqrt()
        self.radius = (radii.clamp(max=largest) * (1 - self.margin)).to(seeds.dtype)[:, None]   # [N, 1]

    def clamp(self, delta: Tensor) -> Tensor:
        return delta.clamp(self.low, self.high)

    def pull_back(self, delta: Tensor) -> Tensor:
        """Along the segment to the seed until it is in the ball; a point of the cube stays in the cube."""
        norm = self.metric.transform(delta).norm(dim=1, keepdim=True)
        return delta * (self.radius / norm.clamp_min(1e-30)).clamp_max(1)

    def nearest_in_ball(self, delta: Tensor) -> Tensor:
        """The ball's point that is nearest in pixels, for [N, D], up to the solver's two steps.

        With c = delta V^T it has coordinates c s/(s + lam), where lam >= 0 solves the secular equation
        sum_i c_i^2 s_i/(s_i + lam)^2 = R^2.  The Newton step is More and Hebden's, on 1/norm, from lam = 0.
        """
        s, V = self.metric.singular_values, self.metric.comp_vecs
        c, lam, R = delta @ V.T, torch.zeros_like(self.radius), self.radius.clamp_min(1e-20)
        for _ in range(2):
            shrunk = c * (s / (s + lam))
            terms = shrunk.square() / s
            square = terms.sum(1, keepdim=True)
            slope = (terms / (s + lam)).sum(1, keepdim=True)
            lam = (lam + (square.sqrt() / R - 1) * square / slope.clamp_min(1e-30)).clamp(0, 1e30)
        return (c * (s / (s + lam))) @ V

    def project(self, delta: Tensor) -> Tensor:
        """A point of ball and cube near delta, exactly feasible up to rounding.

        The pull-back alone (radial: nearest in the metric), then the cube (nearest in pixels), then the
        pull-back again would do, but where the metric is ill-conditioned the clamped pixels are white noise,
        far away in the metric, and a pull-back that mends them shrinks the whole perturbation.  The rounds
        between remove that noise at its source.  Measured on Digits (50 centroid radii, LeNet, mean log-confidence
        after 60 gradients in balls of 0.003 and 0.02 R): pull-backs only -0.74, -0.34; two rounds -0.60, -0.15;
        two relaxed rounds -0.42, -0.06.  Dykstra's algorithm from the trial point itself does no better there and
        loses on a CCU, whose level sets are spheres of the metric: the first pull-back must come first.
        """
        delta = self.clamp(self.pull_back(delta))
        for _ in range(self.rounds):
            delta = self.clamp(delta + self.relaxation * (self.nearest_in_ball(delta) - delta))
        return self.pull_back(delta)

    def images(self, delta: Tensor) -> Tensor:
        return (self.seeds + delta).clamp(0, 1).view(self.shape)

    def checked(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Points x [N, D] and distances [N], both checked in float64 after x is rounded to its own type.

        What rounding left outside the ball is pulled back further, in the end to the seed.
        """
        x = (self.seeds + delta).clamp(0, 1)
        for shrink in (1e-6, 1e-4, 1e-2, 1.0):
            distance = distances(self.metric, x, self.seeds)
            outside = ~(distance <= self.radii)                                     # NaN is outside
            factor = self.radii / distance * (1 - shrink)
            nearer = self.seeds + factor[:, None] * (x.double() - self.seeds)
            if shrink == 1:
                nearer = self.seeds
            x = torch.where(outside[:, None], nearer.to(x.dtype).clamp(0, 1), x)
        return x, distances(self.metric, x, self.seeds)


def distances(metric: PCAMetric, a: Tensor, b: Tensor) -> Tensor:
    """d(a, b) [B] in float64."""
    z = (a.double() - b.double()).flatten(1) @ metric.comp_vecs.double().T
    return (z / metric.singular_values.double().sqrt()).norm(dim=1)


def score_and_gradient(objective: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """objective(x) [N] and its gradient, like x; NaN counts as a score of -inf, what is not finite as a gradient of 0.

    The gradient is taken with respect to x alone: parameters and their .grad stay as they are.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        score = objective(x)
        gradient, = torch.autograd.grad(score.sum(), x)
    return without_nan(score.detach()), gradient.nan_to_num(0, 0, 0)


def without_nan(score: Tensor) -> Tensor:
    return score.masked_fill(score.isnan(), -torch.inf)


def choose(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where rows [N], else b, for a, b [N, ...]."""
    return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)


def ascent_direction(metric: PCAMetric, gradient: Tensor) -> Tensor:
    """The move delta [N, D] of length 1 in the metric that raises a function of this gradient [N, D] most; 0 for 0."""
    tiny = torch.finfo(gradient.dtype).tiny
    # first by the largest entry: squares of a saturated softmax's gradient would underflow
    z = metric.gradient(gradient / gradient.abs().amax(1, keepdim=True).clamp_min(tiny))
    return metric.inverse(z / z.norm(dim=1, keepdim=True).clamp_min(tiny))


MOMENTUM = 0.25         # share of the last move that is made again (0.75 for the gradient, as in Auto-PGD)
PATIENCE = 2            # gradients without a better score after which a point goes back and halves its step
GROWTH = 1.1            # of the step at each better score


def ascend(objective: Callable[[Tensor], Tensor], region: Region, delta: Tensor, steps: int,
           step: Tensor) -> Tensor:
    """The best of the `steps` points [N, D] on the way up from delta; each costs one forward and backward pass.

    step [N, 1] is the length of the first step in the metric.
    """
    def evaluate(delta):
        score, gradient = score_and_gradient(objective, region.images(delta))
        return score, gradient.flatten(1)

    shortest = 1e-6 * step
    score, gradient = evaluate(delta)
    previous, best, best_score, best_gradient = delta, delta, score, gradient
    stalled = torch.zeros_like(score)
    for _ in range(steps - 1):
        move = step * ascent_direction(region.metric, gradient) + MOMENTUM * (delta - previous)
        previous, delta = delta, region.project(delta + move)
        score, gradient = evaluate(delta)

        better = score > best_score
        best_score = torch.where(better, score, best_score)
        best, best_gradient = choose(better, delta, best), choose(better, gradient, best_gradient)
        stalled = (stalled + 1).masked_fill(better, 0)
        back = stalled == PATIENCE
        stalled = stalled.masked_fill(back, 0)
        step = (step * torch.where(better, GROWTH, torch.where(back, 0.5, 1.0))[:, None]).clamp_min(shortest)
        delta, previous = choose(back, best, delta), choose(back, best, previous)
        gradient = choose(back, best_gradient, gradient)
    return best


@torch.no_grad()
def attack(detector: Detector, metric: PCAMetric, seeds: Tensor, radii: Tensor, steps: int = 500, restarts: int = 50,
           alpha: float = 3.0, generator: torch.Generator | None = None, batch: int = 500,
           progress: Callable[[int], object] | None = None) -> AttackResult:
    """Maximise detector.attack_score(x) over { x in [0, 1]^D : d(x, seed) <= radius }, for every seed.

    seeds [B, C, H, W] in [0, 1]; radii [B] in the metric's units, 0 to infinity.  `restarts` searches of `steps`
    gradients each: the first from the seed, the others from a point uniform in the ball (r = R u^(1/D) in the
    metric), projected into the cube.  The seed itself is a candidate.  Every candidate is checked in float64 and
    scored again before it is compared.

    A search steps along the gradient with respect to z, at length 1, with momentum, and projects (Region.project).
    alpha: length of the first step in tenths of the radius (3: 0.3 R).  The published code's is in the metric's units,
    but from data set to data set radii differ a thousandfold.  Each point has its own step: 10 % longer at
    each better score, halved after two gradients without one, when the search goes back to its best point.

    `batch` points are attacked at once; the starts, and up to rounding the result, do not depend on it.
    progress(n) is called with n more steps of `steps` done.  The detector must be in evaluation mode.
    """
    B, shape, device = len(seeds), seeds.shape[1:], seeds.device
    radii = radii.to(device, torch.float64)
    if detector.training:
        raise ValueError("the detector must be in evaluation mode")
    if radii.shape != (B,) or not (radii >= 0).all() or not ((seeds >= 0) & (seeds <= 1)).all():
        raise ValueError("seeds must lie in [0, 1], with one radius >= 0 each")
    base = torch.randint(2 ** 62, (1,), generator=generator, device=generator.device if generator else None).item()
    evaluations = told = 0

    def objective(x: Tensor) -> Tensor:
        nonlocal evaluations, told
        evaluations += len(x)
        if progress and (done := evaluations // (B * restarts)) > told:
            progress(done - told)
            told = done
        return detector.attack_score(x)

    best, distance = seeds.clone(), torch.zeros_like(radii)
    best_score = torch.cat([without_nan(detector.attack_score(x)) for x in seeds.split(batch)])
    best_restart = torch.full((B,), -1, device=device)
    for rows in torch.arange(B, device=device).split(batch):
        for block in torch.arange(restarts, device=device).split(max(1, batch // len(rows))):
            region = Region(metric, seeds[rows].repeat(len(block), 1, 1, 1), radii[rows].repeat(len(block)))
            start = unit_ball(base, (block[:, None] * B + rows).flatten().tolist(), metric.dim).to(seeds)
            start[block.repeat_interleave(len(rows)) == 0] = 0
            delta = ascend(objective, region, region.project(metric.inverse(start * region.radius)), steps,
                           alpha / 10 * region.radius)
            x, d = region.checked(delta)
            score, which = without_nan(detector.attack_score(x.view(-1, *shape))).view(len(block), -1).max(0)
            better = score > best_score[rows]
            row, found = rows[better], (which * len(rows) + torch.arange(len(rows), device=device))[better]
            best[row], distance[row] = x[found].view(-1, *shape), d[found]
            best_score[row], best_restart[row] = score[better], block[which[better]]
    return AttackResult(best, best_score, distance, best_restart)


def unit_ball(base: int, indices: list[int], D: int) -> Tensor:
    """Points [N, D] uniform in the D-dimensional unit ball; each depends on base and its own index alone."""
    points = torch.empty(len(indices), D)
    for point, index in zip(points, indices, strict=True):
        generator = torch.Generator().manual_seed(base + index)
        direction = torch.randn(D, generator=generator)
        torch.mul(direction / direction.norm(), torch.rand((), generator=generator) ** (1 / D), out=point)
    return points


@torch.no_grad()
def linf_pgd(objective: Callable[[Tensor], Tensor], x0: Tensor, eps: float, steps: int,
             generator: torch.Generator | None = None) -> Tensor:
    """Points x like x0 that raise objective(x) [B] within { x in [0, 1]^D : |x - x0| <= eps }, exactly.

    Starts uniformly in the box and takes `steps` gradients, each of one forward and backward pass.  A sign step
    that does not lower a point's objective is kept and its length grows; else the point goes back to where it
    was and halves it.  So the last point kept is the best.
    """
    low, high = box(x0, eps)
    trial = low + (high - low) * torch.rand(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    trial = trial.clamp(low, high)
    best, best_score, gradient = trial, x0.new_full((len(x0),), -torch.inf), torch.zeros_like(x0)
    step = torch.full_like(best_score, eps)
    for k in range(steps):
        score, trial_gradient = score_and_gradient(objective, trial)
        better = score >= best_score
        best, gradient = choose(better, trial, best), choose(better, trial_gradient, gradient)
        best_score = torch.where(better, score, best_score)
        if k > 0:
            step = step * torch.where(better, 1.1, 0.5)
        trial = (best + step.view(-1, *[1] * (x0.dim() - 1)) * gradient.sign()).clamp(low, high)
    return best


def box(x0: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The corners of { x in [0, 1]^D : |x - x0| <= eps }, rounded inwards."""
    low, high = (x0.double() - eps).clamp_min(0), (x0.double() + eps).clamp_max(1)
    inner = low.to(x0.dtype), high.to(x0.dtype)
    return (torch.where(inner[0] < low, inner[0].nextafter(x0), inner[0]),
            torch.where(inner[1] > high, inner[1].nextafter(x0), inner[1]))
