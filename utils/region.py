"""The feasible set of an attack, ball and cube at once, and the projection onto it."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.metric import PCAMetric


class Coordinates:
    """Coordinates of pixel differences delta [N, D], in which a search moves: along = delta @ forward [N, D].

    With A the metric's matrix, d(x, x + delta)^2 = delta A delta^T, and P = diag(A), the rows w of backward solve
    A w = a P w.  So both are diagonal here: delta A delta^T = sum_k a_k along_k^2, delta P delta^T = sum_k along_k^2.
    Where pixels vary by different amounts, as at an image's border and its centre, the a_k (mean 1) are far closer to
    each other than the eigenvalues of A: on MNIST's metric 340 times apart instead of a million.
    """

    def __init__(self, metric: PCAMetric):
        V, s = metric.comp_vecs.double(), metric.singular_values.double()
        A = V.T / s @ V
        scale = A.diagonal().sqrt()
        a, W = torch.linalg.eigh(A / scale / scale[:, None])            # ascending
        a = a.clamp_min(len(a) * torch.finfo(a.dtype).eps * a[-1])      # rounding may leave a tiny a_k negative
        dtype, self.metric = metric.comp_vecs.dtype, metric
        self.weights = a.to(dtype)                                                      # [D]
        self.loosest = a.quantile(0.01).to(dtype)                                       # penalty, at most 1
        self.forward = (scale[:, None] * W).to(dtype)                                   # [D, D]
        self.backward = (W.T / scale).to(dtype)                                         # [D, D], its inverse

    def penalty(self, k: int) -> Tensor:
        """rho of Region.project at step k of a search: grows geometrically to 1, the weights' mean, at step 50.

        A loose one lets the search go far in the directions in which images vary, whose weights are small, a stiff
        one brings it to the corners of ball and cube.
        """
        return self.loosest ** max(0, 1 - k / 50)

    def ascent_direction(self, gradient: Tensor) -> Tensor:
        """The move of length 1 in the metric that raises a function of this gradient most; 0 for 0.

        gradient [N, D] is with respect to the pixels, the move [N, D] in these coordinates.
        """
        tiny = torch.finfo(gradient.dtype).tiny
        # first by the largest entry: squares of a saturated softmax's gradient would underflow
        g = gradient / gradient.abs().amax(1, keepdim=True).clamp_min(tiny) @ self.backward.T
        move = g / self.weights
        return move / (g * move).sum(1, keepdim=True).sqrt().clamp_min(tiny)


class Point(NamedTuple):
    """Where a search is, and the cube's force on it (Region.project), [N, D] each."""

    delta: Tensor           # pixel differences to the seeds
    along: Tensor           # the same in Coordinates: a product with a matrix costs as much as all else in a step
    force: Tensor           # in Coordinates


class Region:
    """The points of [0, 1]^D at most `radius` from their seed, as pixel differences delta [N, D] = x - seed."""

    margin = 1e-6           # the ball is smaller by this share, so that rounding rarely leaves it
    relaxation = 1.8        # of ADMM in `project`

    def __init__(self, coordinates: Coordinates, seeds: Tensor, radii: Tensor):
        self.coordinates, self.metric = coordinates, coordinates.metric
        self.seeds, self.radii, self.shape = seeds.flatten(1), radii, seeds.shape
        self.low, self.high = -self.seeds, 1 - self.seeds
        # no point of the cube is farther than this: a radius may be infinite
        largest = (self.metric.dim / self.metric.singular_values.double().min()).sqrt()
        self.search_radius = (radii.clamp(max=largest) * (1 - self.margin)).to(seeds.dtype)[:, None]   # [N, 1]

    def clamp(self, delta: Tensor) -> Tensor:
        """delta [N, D], pulled into the cube pixel by pixel."""
        return delta.clamp(self.low, self.high)

    def start(self, delta: Tensor) -> Point:
        """The point delta [N, D] of the cube, pulled back, without a force on it."""
        along = delta @ self.coordinates.forward
        return self.pull_back(Point(delta, along, torch.zeros_like(delta)))

    def pull_back(self, point: Point) -> Point:
        """Along the segment to the seed until it is in the ball; a point of the cube stays in the cube."""
        norm = (point.along * self.coordinates.weights.sqrt()).norm(dim=1, keepdim=True)
        factor = (self.search_radius / norm.clamp_min(1e-30)).clamp_max(1)
        return point._replace(delta=point.delta * factor, along=point.along * factor)

    def project(self, trial: Tensor, current: Point, step: Tensor, rho: Tensor) -> Point:
        """A feasible point near `trial` [N, D], given in Coordinates; rho, a scalar, is the penalty of this step.

        The projection in the metric onto ball and cube: min |d - trial|_A^2 / 2 with |d|_A <= R and d = v, v in the
        cube.  A round of the alternating direction method of multipliers with the penalty rho |d - v|_P^2 / 2 is, in
        Coordinates, d = (a trial + rho (v - u)) / (a (1 + mu) + rho), where mu >= 0 puts d on the sphere (nearly:
        Newton steps of More and Hebden, which end outside), then v = clamp(d' + u), the nearest point of the cube
        because P is diagonal, and u = u + d' - v; over-relaxed, d' = v + relaxation (d - v) with the v before.

        One round does, since it starts where the last step ended: v at the feasible point `current`, and u from its
        force, which is rho u for a step [N, 1] of length 1.  So steps and rounds converge together, as a rule: where A
        stays ill-conditioned in Coordinates they may circle, and the search keeps its best point.  The pull-back makes
        the result feasible.

        Why not simply clamp and pull back: clamped pixels are far away in the metric, and a pull-back that mends them
        shrinks everything, so that the search ends below the maximum.
        """
        a, force = self.coordinates.weights, step * current.force
        c, R = (rho * current.along).addcmul_(a, trial).sub_(force), self.search_radius.clamp_min(1e-20)
        mu = torch.zeros_like(R)
        for _ in range(3):
            stiff = torch.addcmul(a + rho, a, mu)                                   # a (1 + mu) + rho
            terms = (c / stiff).square_().mul_(a)
            square = terms.sum(1, keepdim=True)
            slope = terms.mul_(a).div_(stiff).sum(1, keepdim=True)
            mu = (mu + (square.sqrt() / R - 1) * square / slope.clamp_min(1e-30)).clamp(0, 1e30)
        d = c.div_(torch.addcmul(a + rho, a, mu))
        u = (force / rho).add_(torch.lerp(current.along, d, self.relaxation))       # d' + u
        delta = self.clamp(u @ self.coordinates.backward)
        along = delta @ self.coordinates.forward
        return self.pull_back(Point(delta, along, u.sub_(along).mul_(rho / step)))

    def images(self, delta: Tensor) -> Tensor:
        """The images [N, C, H, W] that lie delta [N, D] from the seeds."""
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
    """`choose` for points of N searches."""
    return Point(*(choose(rows, new, old) for new, old in zip(a, b, strict=True)))
