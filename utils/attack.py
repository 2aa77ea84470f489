"""Adversarial noise: the search for the point of a ball of the metric at which a detector is most confident.

`attack` is the attack of Table 1, `linf_pgd` the inner maximisation of ACET.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import params
from models.detectors import Detector
from models.gmm import squared_distances
from models.metric import PCAMetric
from utils import files
from utils.evaluation import full_precision
from utils.graphs import recorded
from utils.region import Coordinates, Point, Region, choose, choose_point
from utils.state import State


class AttackResult(NamedTuple):
    """What `attack` found for B seeds."""

    samples: Tensor         # [B, C, H, W] in [0, 1], the best feasible point of each seed
    attack_score: Tensor    # [B] detector.attack_score(samples)
    distance: Tensor        # [B] float64, d(sample, seed) <= radius; 0: nothing beat the seed


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


MOMENTUM = 0.25         # share of the last move that is made again, as in Auto-PGD, which weights the new one by 0.75
PATIENCE = 3            # gradients without a better score after which a point goes back and halves its step
GROWTH = 1.1            # of the step at each better score
SHORTEST = 0.01         # of the first step: there the step is the first again, and the patience doubled
LONGEST = 1e6           # of the first step: float32 ends somewhere


class Search(NamedTuple):
    """Where N searches stand after `taken` gradients."""

    taken: int
    point: Point
    previous: Tensor        # [N, D] point.along before the last move
    gradient: Tensor        # [N, D] of the objective at `point`, with respect to the pixels
    step: Tensor            # [N, 1] length of the next step in the metric
    stalled: Tensor         # [N] gradients since the last better score
    patience: Tensor        # [N] how many may be
    best: Point
    best_score: Tensor      # [N]
    best_gradient: Tensor   # [N, D]


def ascend(objective: Callable[[Tensor], Tensor], region: Region, point: Point, steps: int, step: Tensor,
           keep: Callable[[Search], None] = lambda search: None, search: Search | None = None) -> Tensor:
    """The best of the `steps` points [N, D] on the way up from `point`; each costs one forward and backward pass.

    step [N, 1] is the length of the first step in the metric.  keep(search) is called after every step: with this
    `search` it goes on from there.
    """
    def evaluate(point):
        score, gradient = score_and_gradient(objective, region.images(point.delta))
        return score, gradient.flatten(1)

    first = step.clamp_min(1e-30)

    def advance(rho, point, previous, gradient, step, stalled, patience, best, best_score, best_gradient):
        """The search after one more gradient, without `taken`."""
        trial = torch.lerp(previous, point.along, 1 + MOMENTUM)
        trial.addcmul_(step, region.coordinates.ascent_direction(gradient))
        previous, point = point.along, region.project(trial, point, step, rho)
        score, gradient = evaluate(point)

        better = score > best_score
        best_score = torch.where(better, score, best_score)
        best, best_gradient = choose_point(better, point, best), choose(better, gradient, best_gradient)
        stalled = (stalled + 1).masked_fill(better, 0)
        back = stalled == patience
        stalled = stalled.masked_fill(back, 0)
        step = step * torch.where(better, GROWTH, torch.where(back, 0.5, 1.0))[:, None]
        step = step.minimum(LONGEST * first)
        short = step < SHORTEST * first
        step, patience = torch.where(short, first, step), torch.where(short[:, 0], 2 * patience, patience)
        point, previous = choose_point(back, best, point), choose(back, best.along, previous)
        gradient = choose(back, best_gradient, gradient)
        return point, previous, gradient, step, stalled, patience, best, best_score, best_gradient

    if search is None:
        score, gradient = evaluate(point)
        search = Search(1, point, point.along, gradient, first, torch.zeros_like(score),
                        torch.full_like(score, PATIENCE), point, score, gradient)
        keep(search)
    advance = recorded(advance, step.device)
    for k in range(search.taken, steps):
        search = Search(k + 1, *advance(region.coordinates.penalty(k), *search[1:]))
        keep(search)
    return search.best.delta


@torch.no_grad()
def attack(detector: Detector, coordinates: Coordinates, seeds: Tensor, radii: Tensor, steps: int = params.ATTACK_STEPS,
           restarts: int = params.ATTACK_RESTARTS, alpha: float = params.ATTACK_ALPHA,
           generator: torch.Generator | None = None, points: int = params.ATTACK_POINTS,
           progress: Callable[[int], object] = lambda n: None, state: State | None = None,
           images: Tensor | None = None) -> AttackResult:
    """Maximise detector.attack_score(x) over { x in [0, 1]^D : d(x, seed) <= radius }, for every seed.

    d is the metric of which `coordinates` are.  seeds [B, C, H, W] in [0, 1]; radii [B] in its units, 0 to infinity.
    `restarts` searches of `steps` gradients each: the first from the seed, the others from a point uniform in the
    ball (r = R u^(1/D) in the metric), projected into the cube.  The seed itself is a candidate.  Every candidate is
    checked in float64 and scored again before it is compared.

    A network may be so sure of noise that no pixel changes its score: from a start without any gradient no search can
    leave.  With `images` [N, C, H, W] of the in-distribution it then begins as far as the ball reaches on the straight
    way to one of them (search r of a seed: to the r-th nearest), if the score is higher there.

    A search steps along the metric's steepest ascent, scaled to the step's length, with momentum, and projects
    (Region.project).  alpha: length of the first step in tenths of the radius (3: 0.3 R).  Deviation: the published
    code's is in the metric's units, but radii differ a thousandfold between data sets.  Each point has its own step:
    10 % longer at each better score, halved after three gradients without one, when the search goes back to its
    best point.  benchmarks/attack_strength.py compares it with plain gradient steps.

    So many `points` are attacked at once; the starts, and up to rounding the result, do not depend on it.
    progress(n) is called with n more of the B * restarts * steps gradients; with `images` each search takes one more.
    The detector must be in evaluation mode.
    An attack with a `state` saves to it at intervals and goes on from there, to the same bits on the same CPU and
    number of threads.
    """
    B, shape, device, metric = len(seeds), seeds.shape[1:], seeds.device, coordinates.metric
    radii = radii.to(device, torch.float64)
    if detector.training:
        raise ValueError("the detector must be in evaluation mode")
    if radii.shape != (B,) or not (radii >= 0).all() or not ((seeds >= 0) & (seeds <= 1)).all():
        raise ValueError("seeds must lie in [0, 1], with one radius >= 0 each")
    base = torch.randint(2 ** 62, (1,), generator=generator).item()

    best, distance = seeds.clone(), torch.zeros_like(radii)
    with full_precision():      # as in the tables
        best_score = torch.cat([without_nan(detector.attack_score(x)) for x in seeds.split(points)])
    finished, search = 0, None      # blocks of points that are done; the search of the next
    # eigenvectors have other signs on another machine or number of threads
    basis = files.digest(coordinates.forward) if state is not None else None
    if state is not None and (saved := state.load()) is not None:
        finished, base = saved["finished"], saved["base"]
        best, best_score, distance = (saved[key].to(device) for key in ("best", "best_score", "distance"))
        if saved["basis"] == basis:     # else the block of points begins again
            search = Search(**{key: on_device(value, device) for key, value in saved["search"].items()})
            progress(search.taken * len(search.step))

    def keep(search: Search):
        progress(len(search.step))
        if state is not None and state.due():
            plain = search._asdict() | {"point": tuple(search.point), "best": tuple(search.best)}
            state.save(finished=finished, base=base, best=best, best_score=best_score, distance=distance, basis=basis,
                       search=plain)

    if images is not None:
        images = images.to(device).flatten(1)
        near = nearest(metric, seeds, images, restarts)                         # [B, restarts]
    blocks = [(rows, runs) for rows in torch.arange(B, device=device).split(points)
              for runs in torch.arange(restarts, device=device).split(max(1, points // len(rows)))]
    for rows, runs in blocks[:finished]:
        progress(steps * len(rows) * len(runs))
    for rows, runs in blocks[finished:]:
        # n = len(runs) * len(rows) points: all rows of one restart, then of the next
        region = Region(coordinates, seeds[rows].repeat(len(runs), 1, 1, 1), radii[rows].repeat(len(runs)))
        start = unit_ball(base, (runs[:, None] * B + rows).flatten().tolist(), metric.dim).to(seeds)
        start[runs.repeat_interleave(len(rows)) == 0] = 0
        point = region.start(region.clamp(metric.inverse(start * region.search_radius)))
        if images is not None:
            to_image = region.start(images[near[rows][:, runs].T.flatten()] - region.seeds)             # [n, D]
            point = leave_plateau(detector.attack_score, region, point, to_image)
        step = alpha / 10 * region.search_radius
        delta, search = ascend(detector.attack_score, region, point, steps, step, keep, search), None
        x, d = region.checked(delta)
        with full_precision():
            score = without_nan(detector.attack_score(x.view(-1, *shape)))
        score, which = score.view(len(runs), -1).max(0)                         # of each row's restarts
        better = score > best_score[rows]
        row, found = rows[better], (which * len(rows) + torch.arange(len(rows), device=device))[better]
        best[row], best_score[row], distance[row] = x[found].view(-1, *shape), score[better], d[found]
        finished += 1
    return AttackResult(best, best_score, distance)


def on_device(value: int | Tensor | tuple[Tensor, ...], device: torch.device) -> int | Tensor | Point:
    """What a Search holds; a tuple is a Point that was saved."""
    if isinstance(value, tuple):
        return Point(*(tensor.to(device) for tensor in value))
    return value.to(device) if isinstance(value, Tensor) else value


def nearest(metric: PCAMetric, seeds: Tensor, images: Tensor, n: int) -> Tensor:
    """Which n of the images [N, D] are nearest to each seed [B, C, H, W], over again if there are fewer: [B, n]."""
    d2 = squared_distances(metric.transform(seeds), metric.transform(images))                       # [B, N]
    order = d2.topk(min(n, len(images)), largest=False).indices
    return order[:, torch.arange(n, device=order.device) % order.shape[1]]


def leave_plateau(objective: Callable[[Tensor], Tensor], region: Region, point: Point, other: Point) -> Point:
    """`point`, but `other` where the objective has no gradient at `point` and is higher at `other`."""
    score, gradient = score_and_gradient(objective, region.images(point.delta))
    flat = (gradient.flatten(1) == 0).all(1)
    return choose_point(flat & (objective(region.images(other.delta)) > score), other, point)


def unit_ball(base: int, indices: list[int], D: int) -> Tensor:
    """Points [N, D] uniform in the D-dimensional unit ball; each depends on base and its own index alone."""
    points = torch.empty(len(indices), D)
    for point, index in zip(points, indices, strict=True):
        generator = torch.Generator().manual_seed(base + index)
        direction = torch.randn(D, generator=generator)
        torch.mul(direction / direction.norm(), torch.rand((), generator=generator) ** (1 / D), out=point)
    return points


@torch.no_grad()
def linf_pgd(objective: Callable[[Tensor], Tensor], x0: Tensor, eps: float, steps: int, start: Tensor) -> Tensor:
    """Points x like x0 that raise objective(x) [B] within { x in [0, 1]^D : |x - x0| <= eps }, exactly.

    `start`, numbers in [0, 1] like x0, says where between the box's corners it begins.  It takes `steps` gradients,
    each of one forward and backward pass.  A sign step that does not lower a point's objective is kept and its length
    grows; else the point goes back to where it was and halves it.  So the last point kept is the best.
    """
    low, high = box(x0, eps)
    trial = (low + (high - low) * start).clamp(low, high)
    best, best_score, gradient = trial, x0.new_full((len(x0),), -torch.inf), torch.zeros_like(x0)
    step = torch.full_like(best_score, eps / 4)
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
    a, b = low.to(x0.dtype), high.to(x0.dtype)
    return torch.where(a < low, a.nextafter(x0), a), torch.where(b > high, b.nextafter(x0), b)
