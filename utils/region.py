"""The feasible set of an attack, ball and cube at once, and the projection onto it."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.metric import PCAMetric


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
        self.search_radius = (radii.clamp(max=largest) * (1 - self.margin)).to(seeds.dtype)[:, None]   # [N, 1]
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
        factor = (self.search_radius / norm.clamp_min(1e-30)).clamp_max(1)
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
        0.1 % of the attainable rise of concave functions in up to 20 dimensions, singular values up to 100 apart; in
        more, and in small balls, it stays further below.
        """
        a, V, R = self.weights, self.metric.comp_vecs, self.search_radius.clamp_min(1e-20)
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


def choose(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where rows [N], else b, for a, b [N, ...]."""
    return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)


def choose_point(rows: Tensor, a: Point, b: Point) -> Point:
    return Point(*(choose(rows, new, old) for new, old in zip(a, b, strict=True)))
