"""Adversarial noise: the search for the point of a ball of the metric at which a detector is most confident.

`attack` is the attack of Table 1, `linf_pgd` the inner maximisation of ACET.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import params
from models.detectors import Detector
from models.metric import PCAMetric
from utils.evaluation import full_precision
from utils.state import State


class AttackResult(NamedTuple):
    samples: Tensor         # [B, C, H, W] in [0, 1], the best feasible point of each seed
    attack_score: Tensor    # [B] detector.attack_score(samples)
    distance: Tensor        # [B] float64, d(sample, seed) <= radius; 0: nothing beat the seed


class Point(NamedTuple):
    """Pixel differences to the seeds, and the cube's force on them (Region.project), [N, D] each.

    Both also in the coordinates along the metric's components, x V^T: a product with V costs as much as all else in a
    step, and most would only undo another.
    """

    delta: Tensor
    along: Tensor           # delta V^T
    force: Tensor
    force_along: Tensor     # force V^T


class Region:
    """The points of [0, 1]^D at most `radius` from their seed, as pixel differences delta [N, D] = x - seed."""

    margin = 1e-6           # the ball is smaller by this share, so that rounding rarely leaves it
    rounds = 2              # of ADMM in `project`
    stiffness = 0.15        # its penalty is a geometric mean of the largest 1/s, with this weight, and the smallest

    def __init__(self, metric: PCAMetric, seeds: Tensor, radii: Tensor):
        self.metric, self.seeds, self.radii = metric, seeds.flatten(1), radii
        self.shape, self.low, self.high = seeds.shape, -self.seeds, 1 - self.seeds
        # no point of the cube is farther than this: a radius may be infinite
        largest = (metric.dim / metric.singular_values.double().min()).sqrt()
        self.radius = (radii.clamp(max=largest) * (1 - self.margin)).to(seeds.dtype)[:, None]   # [N, 1]
        self.weights = 1 / metric.singular_values                                               # [D]
        self.penalty = self.weights.max() ** self.stiffness * self.weights.min() ** (1 - self.stiffness)

    def clamp(self, delta: Tensor) -> Tensor:
        return delta.clamp(self.low, self.high)

    def start(self, delta: Tensor) -> Point:
        """The point delta [N, D] of the cube, pulled back, without a force on it."""
        along = delta @ self.metric.comp_vecs.T
        return self.pull_back(Point(delta, along, torch.zeros_like(delta), torch.zeros_like(delta)))

    def pull_back(self, point: Point) -> Point:
        """Along the segment to the seed until it is in the ball; a point of the cube stays in the cube."""
        norm = (point.along * self.weights.sqrt()).norm(dim=1, keepdim=True)
        factor = (self.radius / norm.clamp_min(1e-30)).clamp_max(1)
        return point._replace(delta=point.delta * factor, along=point.along * factor)

    def project(self, trial: Tensor, current: Point, step: Tensor) -> Point:
        """A feasible point near `trial` in the metric; trial [N, D] is given along the components.

        The projection in the metric onto ball and cube: min |z_d - z_trial|^2 / 2 with |z_d| <= R and d = v, v in the
        cube.  A round of the alternating direction method of multipliers, with penalty rho and a = 1/s, is, in the
        coordinates along the components, d = (a trial + rho (v - u)) / (a (1 + mu) + rho), where mu >= 0 puts d on
        the sphere (Newton steps of More and Hebden), then v = clamp(d + u) and u = u + d - v.

        Two rounds do, since they start where the last step ended: v at the feasible point `current`, and u from its
        force, which is rho u for a step of length 1.  Steps and rounds converge together.  rho grows as the
        step [N, 1] shrinks: loose it lets long steps through, stiff it finds the corners of ball and cube.
        The pull-back makes the result exact.

        Why not simply clamp and pull back: clamped pixels are far away in the metric, and a pull-back that mends them
        shrinks everything, so that the search ends below the maximum.  tests/test_attack.py holds this projection to
        0.1 % of the attainable rise of concave functions.
        """
        a, V, R = self.weights, self.metric.comp_vecs, self.radius.clamp_min(1e-20)
        rho = (self.penalty * (R / step).sqrt()).clamp(max=a.max())                 # [N, 1]
        pull, scale = trial * a, step / rho
        v, v_along, u, u_along = current.delta, current.along, current.force * scale, current.force_along * scale
        for _ in range(self.rounds):
            c, mu = torch.addcmul(pull, v_along - u_along, rho), torch.zeros_like(R)
            for _ in range(2):
                stiff = torch.addcmul(rho, a, 1 + mu)                               # a (1 + mu) + rho
                terms = (c / stiff).square_().mul_(a)
                square = terms.sum(1, keepdim=True)
                slope = terms.mul_(a).div_(stiff).sum(1, keepdim=True)
                mu = (mu + (square.sqrt() / R - 1) * square / slope.clamp_min(1e-30)).clamp(0, 1e30)
            d_along = c / torch.addcmul(rho, a, 1 + mu)
            u, u_along = u + d_along @ V, u_along + d_along                         # d + u
            v = self.clamp(u)
            v_along = v @ V.T
            u, u_along = u.sub_(v), u_along.sub_(v_along)
        return self.pull_back(Point(v, v_along, u / scale, u_along / scale))

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
            factor = (self.radii / distance * (1 - shrink)).nan_to_num(0)[:, None]
            nearer = self.seeds + factor * (x - self.seeds).double().nan_to_num(0)
            x = choose(outside, nearer.to(x.dtype).clamp(0, 1), x)
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


def choose_point(rows: Tensor, a: Point, b: Point) -> Point:
    return Point(*(choose(rows, new, old) for new, old in zip(a, b, strict=True)))


def ascent_direction(metric: PCAMetric, gradient: Tensor) -> Tensor:
    """The move [N, D] of length 1 in the metric that raises a function of this gradient [N, D] most; 0 for 0.

    Along the components: @ V makes it a difference of pixels.
    """
    tiny = torch.finfo(gradient.dtype).tiny
    # first by the largest entry: squares of a saturated softmax's gradient would underflow
    z = metric.gradient(gradient / gradient.abs().amax(1, keepdim=True).clamp_min(tiny))
    return z / z.norm(dim=1, keepdim=True).clamp_min(tiny) * metric.singular_values.sqrt()


MOMENTUM = 0.25         # share of the last move that is made again (0.75 for the gradient, as in Auto-PGD)
PATIENCE = 3            # gradients without a better score after which a point goes back and halves its step
GROWTH = 1.1            # of the step at each better score
SHORTEST = 0.01         # of the first step: there the step is the first again, and the patience doubled


def ascend(objective: Callable[[Tensor], Tensor], region: Region, point: Point, steps: int, step: Tensor,
           keep: Callable[[list], None] = lambda search: None, search: list | None = None) -> Tensor:
    """The best of the `steps` points [N, D] on the way up from `point`; each costs one forward and backward pass.

    step [N, 1] is the length of the first step in the metric.  keep(search) is called after every step: with this
    `search` it goes on from there.
    """
    def evaluate(point):
        score, gradient = score_and_gradient(objective, region.images(point.delta))
        return score, gradient.flatten(1)

    first = step = step.clamp_min(1e-30)
    if search is None:
        score, gradient = evaluate(point)
        stalled, patience = torch.zeros_like(score), torch.full_like(score, PATIENCE)
        taken, previous, best, best_score, best_gradient = 1, point.along, point, score, gradient
    else:
        taken, previous, gradient, step, stalled, patience, best_score, best_gradient = search[:8]
        point, best = Point(*search[8:12]), Point(*search[12:])
    for k in range(taken, steps):
        move = step * ascent_direction(region.metric, gradient) + MOMENTUM * (point.along - previous)
        previous, point = point.along, region.project(point.along + move, point, step)
        score, gradient = evaluate(point)

        better = score > best_score
        best_score = torch.where(better, score, best_score)
        best, best_gradient = choose_point(better, point, best), choose(better, gradient, best_gradient)
        stalled = (stalled + 1).masked_fill(better, 0)
        back = stalled == patience
        stalled = stalled.masked_fill(back, 0)
        step = step * torch.where(better, GROWTH, torch.where(back, 0.5, 1.0))[:, None]
        short = step < SHORTEST * first
        step, patience = torch.where(short, first, step), torch.where(short[:, 0], 2 * patience, patience)
        point, previous = choose_point(back, best, point), choose(back, best.along, previous)
        gradient = choose(back, best_gradient, gradient)
        keep([k + 1, previous, gradient, step, stalled, patience, best_score, best_gradient, *point, *best])
    return best.delta


@torch.no_grad()
def attack(detector: Detector, metric: PCAMetric, seeds: Tensor, radii: Tensor, steps: int = params.ATTACK_STEPS,
           restarts: int = params.ATTACK_RESTARTS, alpha: float = params.ATTACK_ALPHA,
           generator: torch.Generator | None = None, batch: int = params.ATTACK_POINTS,
           progress: Callable[[int], object] | None = None, state: State | None = None) -> AttackResult:
    """Maximise detector.attack_score(x) over { x in [0, 1]^D : d(x, seed) <= radius }, for every seed.

    seeds [B, C, H, W] in [0, 1]; radii [B] in the metric's units, 0 to infinity.  `restarts` searches of `steps`
    gradients each: the first from the seed, the others from a point uniform in the ball (r = R u^(1/D) in the
    metric), projected into the cube.  The seed itself is a candidate.  Every candidate is checked in float64 and
    scored again before it is compared.

    A search steps along the gradient with respect to z, scaled to the step's length, with momentum, and projects
    (Region.project).  alpha: length of the first step in tenths of the radius (3: 0.3 R).  The published code's
    is in the metric's units, but radii differ a thousandfold between data sets.  Each point has its own step:
    10 % longer at each better score, halved after three gradients without one, when the search goes back to its
    best point.  benchmarks/attack_strength.py compares it with plain gradient steps.

    `batch` points are attacked at once; the starts, and up to rounding the result, do not depend on it.
    progress(n) is called with n more steps of `steps` done.  The detector must be in evaluation mode.  An attack with
    a `state` saves to it at intervals and goes on from there, to the same bits on a CPU.
    """
    B, shape, device = len(seeds), seeds.shape[1:], seeds.device
    radii = radii.to(device, torch.float64)
    if detector.training:
        raise ValueError("the detector must be in evaluation mode")
    if radii.shape != (B,) or not (radii >= 0).all() or not ((seeds >= 0) & (seeds <= 1)).all():
        raise ValueError("seeds must lie in [0, 1], with one radius >= 0 each")
    base = torch.randint(2 ** 62, (1,), generator=generator).item()
    evaluations = told = 0

    def objective(x: Tensor) -> Tensor:
        nonlocal evaluations, told
        evaluations += len(x)
        if progress and (done := evaluations // (B * restarts)) > told:
            progress(done - told)
            told = done
        return detector.attack_score(x)

    best, distance = seeds.clone(), torch.zeros_like(radii)
    with full_precision():      # as in the tables
        best_score = torch.cat([without_nan(detector.attack_score(x)) for x in seeds.split(batch)])
    finished, search = 0, None      # blocks of points; the search of the next
    if state is not None and (saved := state.load()) is not None:
        finished, base, evaluations = saved["finished"], saved["base"], saved["evaluations"]
        best, best_score, distance = (saved[key].to(device) for key in ("best", "best_score", "distance"))
        search = [item.to(device) if isinstance(item, Tensor) else item for item in saved["search"]]

    def keep(search: list):
        if state is not None and state.due():
            state.save(finished=finished, base=base, evaluations=evaluations, best=best, best_score=best_score,
                       distance=distance, search=search)

    skip = finished
    for rows in torch.arange(B, device=device).split(batch):
        for block in torch.arange(restarts, device=device).split(max(1, batch // len(rows))):
            if skip:
                skip -= 1
                continue
            region = Region(metric, seeds[rows].repeat(len(block), 1, 1, 1), radii[rows].repeat(len(block)))
            start = unit_ball(base, (block[:, None] * B + rows).flatten().tolist(), metric.dim).to(seeds)
            start[block.repeat_interleave(len(rows)) == 0] = 0
            point = region.start(region.clamp(metric.inverse(start * region.radius)))
            delta, search = ascend(objective, region, point, steps, alpha / 10 * region.radius, keep, search), None
            x, d = region.checked(delta)
            with full_precision():
                score, which = without_nan(detector.attack_score(x.view(-1, *shape))).view(len(block), -1).max(0)
            better = score > best_score[rows]
            row, found = rows[better], (which * len(rows) + torch.arange(len(rows), device=device))[better]
            best[row], best_score[row], distance[row] = x[found].view(-1, *shape), score[better], d[found]
            finished += 1
    return AttackResult(best, best_score, distance)


def unit_ball(base: int, indices: list[int], D: int) -> Tensor:
    """Points [N, D] uniform in the D-dimensional unit ball; each depends on base and its own index alone."""
    points = torch.empty(len(indices), D)
    for point, index in zip(points, indices, strict=True):
        generator = torch.Generator().manual_seed(base + index)
        direction = torch.randn(D, generator=generator)
        torch.mul(direction / direction.norm(), torch.rand((), generator=generator) ** (1 / D), out=point)
    return points


@torch.no_grad()
def linf_pgd(objective: Callable[[Tensor], Tensor], x0: Tensor, eps: float, steps: int, uniform: Tensor) -> Tensor:
    """Points x like x0 that raise objective(x) [B] within { x in [0, 1]^D : |x - x0| <= eps }, exactly.

    Starts where `uniform`, numbers in [0, 1] like x0, lie between the box's corners, and takes `steps` gradients,
    each of one forward and backward pass.  A sign step that does not lower a point's objective is kept and its length
    grows; else the point goes back to where it was and halves it.  So the last point kept is the best.
    """
    low, high = box(x0, eps)
    trial = (low + (high - low) * uniform).clamp(low, high)
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
