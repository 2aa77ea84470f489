"""Certified upper bounds on a CCU's confidence in a ball (README: Certificate).

If p(x|i) <= lam b p(x|o) for all x in the ball d(x, x0) <= R, each of them has

    max_y p(y|x) <= (1 + M b) / (M (1 + b)) = 1/M + (1 - 1/M) b / (1 + b).                              (1)

`method="paper"`: b = U(R) / (lam L(R)), from the triangle inequality (log_U, log_L): x may run towards all
mu_k and away from all nu_l at once, which one point cannot do.

`method="tight"`: for any weights q on the components of p(x|o), Jensen's inequality gives

    log p(x|o) = log sum_l q_l (beta_l N_l(x) / q_l) >= sum_l q_l (log beta_l N_l(x) - log q_l),        (2)

so that for each k, as both mixtures are spherical in one metric, with u = z_x - z_x0

    log( alpha_k N_k(x) / p(x|o) ) <= h_k + g_k.u - a_k |u|^2 / 2,                                      (3)
    a_k = 1/sigma_k^2 - sum_l q_l/theta_l^2,   g_k = sum_l q_l (z_x0 - nu_l)/theta_l^2 - (z_x0 - mu_k)/sigma_k^2,

an isotropic quadratic, whose maximum over the ball is exact (ball_max) whether a_k is positive, zero or
negative.  The bound sums, over k, the smallest of these maxima over several q, none of which depends on R
(so that the bound grows with R), or is the paper's if that is smaller:
  - q = one component l: the pairs (k, l), and sum_k min_l is never above min_l sum_k;
  - q = the shares of L's terms for several R; for R = 0 they are p(l|x0, o), with equality in (2) at x0, so that the
    bound there is the confidence of a sure classifier;
  - q = p(l|x*, o) at maximisers x* of (3) over balls of several sizes (mixed).  For sigma < theta, (3)
    is concave in x and convex in q, so that the best q gives the exact maximum for each k; what remains then is
    that different k have their maxima at different x.
With p(x|o) = 1 (single mixture) both methods are U(R), exact for each k.

All is float64 and reduces to squared distances between x0, mu_k and nu_l.  Rounding goes to the safe side:
with unit roundoff u and sums of n terms, z is off by at most u n |V/sqrt(s)|_F |x|, which is added to R;
a squared distance by u n (|a| + |b|)^2, which times the precisions is added to log b (`slack`), or to the square
itself where its root counts (log_L, rounded_up).
"""

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models.ccu import CCU
from models.gmm import squared_distances

CERTIFICATES = ("paper", "tight")
RADII = (0, 0.25, 0.5, 0.75, 1, 1.5)        # for which `mixed` weights are made, in distances to the nearest mu_k
BLOCK = {"cpu": 2 ** 19, "cuda": 2 ** 24}   # numbers in a tensor: they fit a CPU's cache, keep a GPU busy
RELATIVE = 1e-9                             # of certified_radius
EPS = torch.finfo(torch.float64).eps        # 2 u


def peak_of(norm: Tensor, a: Tensor) -> Tensor:
    """How far along g, norm = |g|, the quadratic g.u - a |u|^2 / 2 increases: for ever if it is linear or convex."""
    return torch.where(a > 0, norm / a, math.inf)


def ball_max(h: Tensor, norm: Tensor, a: Tensor, peak: Tensor, R: Tensor) -> Tensor:
    """max of h + g.u - a |u|^2 / 2 over |u| <= R, from norm = |g|.

    On |u| = t it is h + |g| t - a t^2 / 2, at u along g (Cauchy-Schwarz), so that t = min(R, peak).
    """
    t = torch.minimum(R, peak)
    return torch.addcmul(norm, a, t, value=-0.5).mul_(t).add_(h)


class Mixtures:
    """The two mixtures of a CCU in float64 (copies), and the squared distances between their centres."""

    def __init__(self, ccu: CCU):
        gmm_in, gmm_out = copy.deepcopy((ccu.gmm_in, ccu.gmm_out))
        self.metric = gmm_in.double().metric
        self.classes, self.loglam = ccu.classes, ccu.loglam.double()
        self.mu = self.metric.transform(gmm_in.mu)                              # [K, D]
        self.log_c_in, self.prec_in = gmm_in.log_norm(), torch.exp(-gmm_in.logvar)      # [K]: 1/sigma^2
        self.single = gmm_out is None
        centres = gmm_in.mu
        if not self.single:
            self.nu = self.metric.transform(gmm_out.double().mu)                # [L, D]
            self.log_c_out, self.prec_out = gmm_out.log_norm(), torch.exp(-gmm_out.logvar)  # [L]: 1/theta^2
            self.mu_nu, self.nu_nu = squared_distances(self.mu, self.nu), squared_distances(self.nu, self.nu)
            centres = torch.cat([centres, gmm_out.mu])
        self.longest_sum = sum(centres.shape)                                   # n
        # >= the sizes of what log b is summed from, which may cancel; 1 + log n: for sums of exponentials
        self.log_b_size = self.loglam.abs() + 1 + math.log(self.longest_sum)
        for gmm in filter(None, (gmm_in, gmm_out)):
            log_c = gmm.alpha.abs() + self.metric.dim / 2 * (math.log(2 * math.pi) + gmm.logvar.abs())
            self.log_b_size = self.log_b_size + log_c.max() + self.metric.singular_values.log().abs().sum() / 2
        self.frobenius = (self.metric.comp_vecs.square().sum(1) / self.metric.singular_values).sum().sqrt()
        self.reach = self.frobenius * centres.norm(dim=1).max()                 # >= |z| of every centre
        at_mu = Balls(self, gmm_in.mu, "paper")
        self.confidence_at_mu = at_mu.confidence(at_mu.log_b(torch.zeros_like(self.log_c_in)))      # [K]


class Balls:
    """Bounds on p(x|i) / (lam p(x|o)) over balls around B points x [B, D], for radii R [B].

    `margin` multiplies the allowances for rounding and decides nothing else, so that a larger one bounds higher.
    """

    def __init__(self, mixtures: Mixtures, x: Tensor, method: str, margin: float = 1.0):
        m, z = mixtures, mixtures.metric.transform(x)
        self.m, self.margin, self.eps = m, margin, EPS * m.longest_sum          # eps: relative error of a sum
        self.d2_in = squared_distances(z, m.mu)                                 # [B, K]
        self.log_in = m.log_c_in - self.d2_in / 2 * m.prec_in                   # log alpha_k N_k(x0)
        self.max_prec_out, farthest = 0.0, self.d2_in.amax(1)
        if not m.single:
            self.d2_out = squared_distances(z, m.nu)                            # [B, L]
            self.log_out = m.log_c_out - self.d2_out / 2 * m.prec_out           # log beta_l N_l(x0)
            self.max_prec_out = m.prec_out.max()
            farthest = torch.maximum(farthest, self.d2_out.amax(1))
        self.reach = m.frobenius * x.norm(dim=1) + m.reach                      # [B] >= |z_x0| + |z_centre|
        self.z_error = self.eps * self.reach                                    # [B]
        # [B] >= |a| + |b| in every centred product, also where points differ by less than z does by rounding
        self.size = 4 * farthest.sqrt() + 2 * self.z_error
        self.quadratics = []                            # (h, |g|, a, peak) of (3), each [B, K, number of q]
        if method == "tight" and not m.single:
            mixed = [quadratic for share in RADII for quadratic in self.mixed(share)]
            mixed = tuple(torch.stack(part, 2) for part in zip(*mixed, strict=True))
            self.quadratics = [self.rounded_up(*part, margin) for part in (self.pairs(), mixed)]

    def slack(self, R: Tensor) -> Tensor:
        """Bound on the rounding of log b [B]."""
        size = self.size + R
        products = self.eps * size.square() * (self.m.prec_in.max() + self.max_prec_out)
        return self.margin * (products + self.max_prec_out * size * self.z_error + self.eps * self.m.log_b_size)

    # The paper's bound

    def log_U(self, R: Tensor) -> Tensor:
        """log U(R) = log sum_k alpha_k c_k exp( -max(d(x0, mu_k) - R, 0)^2 / 2 sigma_k^2 )  [B]."""
        nearest = (self.d2_in.sqrt() - R[:, None]).clamp_min(0)
        return (self.m.log_c_in - nearest.square() / 2 * self.m.prec_in).logsumexp(1)

    def log_L_terms(self, R: Tensor, error: float | Tensor = 0.0) -> Tensor:
        """log beta_l e_l exp( -(d(x0, nu_l) + R)^2 / 2 theta_l^2 )  [B, L], with d^2 + error for d^2."""
        return self.m.log_c_out - ((self.d2_out + error).sqrt() + R[:, None]).square() / 2 * self.m.prec_out

    def log_L(self, R: Tensor) -> Tensor:
        """log L(R), the logarithm of the sum over l [B], rounded down; 0 for the single mixture."""
        if self.m.single:
            return torch.zeros_like(R)
        # near nu_l the root of d^2's small error is large, and is multiplied by R
        return self.log_L_terms(R, self.margin * self.eps * self.size.square()[:, None]).logsumexp(1)

    # The tight bound

    def rounded_up(self, h: Tensor, square: Tensor, a: Tensor, margin: float) -> tuple[Tensor, ...]:
        """h, |g|, a, peak of (3) from |g|^2, whose root is rounded up."""
        precision = (self.m.prec_in + self.max_prec_out).reshape(-1, *[1] * (square.dim() - 2))
        error = margin * self.eps * self.size.square().reshape(-1, *[1] * (square.dim() - 1)) * precision.square()
        norm = (square + 2 * error).clamp_min(0).sqrt()
        return h, norm, a, peak_of(norm, a)

    # |g|^2 without cancellation near a = 0: g = sum_i w_i v_i with v_i = z_x0 - centre and w = (q_l/theta_l^2,
    # -1/sigma_k^2) has |g|^2 = (sum_i w_i)(sum_i w_i |v_i|^2) - sum_{i<j} w_i w_j |v_i - v_j|^2, and sum_i w_i = -a

    def pairs(self) -> tuple[Tensor, ...]:
        """h, |g|^2, a of (3) with q = one component l  [B, K, L]."""
        m = self.m
        h = self.log_in[:, :, None] - self.log_out[:, None]
        a = m.prec_in[:, None] - m.prec_out
        between = m.prec_in[:, None] * m.prec_out * m.mu_nu
        square = a * ((m.prec_in * self.d2_in)[:, :, None] - (m.prec_out * self.d2_out)[:, None]) + between
        return h, square, a

    def quadratic(self, q: Tensor) -> tuple[Tensor, ...]:
        """h, |g|^2, a of (3) for the weights q [B, L]  [B, K]."""
        m, c = self.m, q * self.m.prec_out                                      # c_l = q_l / theta_l^2
        h = self.log_in - (q * self.log_out - torch.special.xlogy(q, q)).sum(1, keepdim=True)
        a = m.prec_in - c.sum(1, keepdim=True)
        between = m.prec_in * (c @ m.mu_nu.T) - (c * (c @ m.nu_nu)).sum(1, keepdim=True) / 2
        square = a * (m.prec_in * self.d2_in - (c * self.d2_out).sum(1, keepdim=True)) + between
        return h, square, a

    def mixed(self, share: float) -> list[tuple[Tensor, ...]]:
        """The `quadratic` of two weights q that make the bound small at R = share * d(x0, nearest mu).

        The terms of L(R), with which it is never above the paper's; and p(l|x*, o) at the maximiser x* of their
        (3) for the largest k.
        """
        m, R = self.m, share * self.d2_in.amin(1, keepdim=True).sqrt()          # [B, 1]
        q = self.log_L_terms(R[:, 0]).softmax(1)                                # [B, L]
        quadratic = self.quadratic(q)
        h, norm, a, peak = self.rounded_up(*quadratic, margin=1.0)
        k = ball_max(h, norm, a, peak, R).argmax(1, keepdim=True)               # [B, 1]
        t, norm, a, prec_in = torch.minimum(R, peak.gather(1, k)), norm.gather(1, k), a.gather(1, k), m.prec_in[k]
        c = q * m.prec_out
        g_v = ((c * self.d2_out).sum(1, keepdim=True) - prec_in * self.d2_in.gather(1, k) - a * self.d2_out
               - c @ m.nu_nu + prec_in * m.mu_nu[k[:, 0]]) / 2                  # g_k.(z_x0 - nu_l) [B, L]
        # z_x* = z_x0 + t g_k / |g_k|
        moved = t * g_v / norm.clamp_min(torch.finfo(norm.dtype).tiny) + t.square() / 2
        return [quadratic, self.quadratic((self.log_out - m.prec_out * moved).softmax(1))]

    def log_tight(self, R: Tensor) -> Tensor:
        """log sum_k min_q max over the ball of (3)  [B]."""
        maxima = [ball_max(*quadratic, R[:, None, None]).amin(2) for quadratic in self.quadratics]
        return torch.minimum(*maxima).logsumexp(1)

    # Both

    def log_b(self, R: Tensor) -> Tensor:
        """log b of (1), rounded up [B]."""
        slack, R = self.slack(R), R + self.margin * self.z_error
        log_b = self.log_U(R) - self.log_L(R)
        if self.quadratics:
            log_b = torch.minimum(log_b, self.log_tight(R))
        return log_b - self.m.loglam + slack

    def confidence(self, log_b: Tensor) -> Tensor:
        """(1), rounded up; 1 where an absurd radius overflows."""
        uniform = 1 / self.m.classes
        bound = (uniform + (1 - uniform) * torch.sigmoid(log_b)) * (1 + 4 * EPS)
        return bound.nan_to_num(nan=1.0).clamp_max(1.0)

    def largest_radius(self, bound: float) -> Tensor:
        """The largest R [B] with confidence <= bound, to RELATIVE, rounded down; 0 where x0 itself exceeds it.

        No ball may reach a mu_k whose own confidence exceeds the bound, and none need be larger than the one that
        covers the unit cube and all centres.
        """
        log_target = math.log((bound - 1 / self.m.classes) / (1 - bound))

        def excess(R: Tensor) -> Tensor:
            log_b = self.log_b(R)
            excess = (log_b - log_target).nan_to_num(nan=1e9).clamp(-1e9, 1e9)
            return torch.where(self.confidence(log_b) <= bound, excess.clamp_max(0), excess.clamp_min(EPS))

        everywhere = 2 * (self.reach + self.m.frobenius * self.m.metric.dim ** 0.5)
        high = torch.where(self.m.confidence_at_mu > bound, self.d2_in.sqrt(), math.inf).amin(1).minimum(everywhere)
        return last_negative(excess, high, EPS * self.reach)


def last_negative(f: Callable[[Tensor], Tensor], high: Tensor, atol: Tensor) -> Tensor:
    """For increasing f on [0, high], all [B]: where f <= 0 ends, from below, to RELATIVE and atol; 0 if f(0) > 0.

    Chandrupatla's method (Advances in Engineering Software 28, 1997), for all points together: bisection, or
    inverse quadratic interpolation where three points say that it is safe.
    """
    old = other = low = torch.zeros_like(high)
    new, f_old, f_new = high, f(low), f(high)
    f_other = f_old
    unsolved = (f_old <= 0) & (f_new > 0)
    low, share = torch.where(f_new <= 0, high, low), torch.full_like(high, 0.5)
    for _ in range(200):                                # the root lies between new and other
        unsolved &= high - low > RELATIVE * high + atol
        if not unsolved.any():
            break
        least = RELATIVE / 4 * high / (high - low)
        R = new + share.maximum(least).minimum(1 - least) * (other - new)
        f_R = f(R)
        same = (f_R > 0) == (f_new > 0)
        old, f_old = torch.where(same, new, other), torch.where(same, f_new, f_other)
        other, f_other = torch.where(same, other, new), torch.where(same, f_other, f_new)
        new, f_new = R, f_R
        low, high = torch.where(unsolved & (f_R <= 0), R, low), torch.where(unsolved & (f_R > 0), R, high)
        xi, phi = (new - other) / (old - other), (f_new - f_other) / (f_old - f_other)
        quadratic = (f_new / (f_other - f_new) * f_old / (f_other - f_old)
                     + (old - new) / (other - new) * f_new / (f_old - f_new) * f_other / (f_old - f_other))
        share = torch.where((phi.square() < xi) & ((1 - phi).square() < 1 - xi), quadratic, 0.5)
    return low


def require_ccu(model) -> None:
    """TypeError for a model that has no certificate."""
    if not isinstance(model, CCU):
        raise TypeError(f"only a CCU certifies anything, not a {type(model).__name__}")


def blocks(ccu: CCU, x: Tensor, method: str, margin: float = 1.0) -> Iterator[tuple[slice, Balls]]:
    """Slices of the points x [B, ...], whose tensors have at most BLOCK numbers, and the balls around them."""
    D = ccu.gmm_in.metric.dim
    if method not in CERTIFICATES:
        raise ValueError(f"method must be one of {', '.join(CERTIFICATES)}, got {method!r}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("points must be a tensor of floating-point numbers, images in [0, 1]")
    if x.dim() < 2 or math.prod(x.shape[1:]) != D or not x.isfinite().all():
        raise ValueError(f"points must be [B, ...] with {D} finite numbers each, got {list(x.shape)}")
    mixtures = Mixtures(ccu)
    K, L = len(mixtures.mu), 0 if mixtures.single else len(mixtures.nu)
    pairs = K * max(L, 2 * len(RADII)) if method == "tight" and L else 0
    size = max(1, BLOCK.get(mixtures.mu.device.type, BLOCK["cpu"]) // max(D, K, L, pairs))
    for block in (slice(i, i + size) for i in range(0, len(x), size)):
        yield block, Balls(mixtures, x[block].flatten(1).to(mixtures.mu), method, margin)


@torch.no_grad()
def confidence_bound(ccu: CCU, x: Tensor, radius: float | Tensor, method: str = "tight") -> Tensor:
    """Certified upper bound [B] (float64) on max_y p(y|x') over all x' with d(x, x') <= radius.

    x [B, ...] in pixel space; radius in units of the metric, one number or [B]; method "tight" or "paper".
    It bounds the exact model: where both densities are about equal, one computed in float32 may exceed it by its own
    rounding, some 1e-4, 0.1 where many of the metric's singular values are floored, anything where such are whitened;
    ccu.double() does not.
    """
    require_ccu(ccu)
    radius = torch.as_tensor(radius, dtype=torch.float64, device=ccu.loglam.device)
    if radius.shape not in ((), x.shape[:1]) or not (radius.isfinite() & (radius >= 0)).all():
        raise ValueError("radius must be one finite number >= 0, or one for each point")
    radius = radius.expand(len(x))
    bounds = [balls.confidence(balls.log_b(radius[block])) for block, balls in blocks(ccu, x, method)]
    return torch.cat([radius[:0], *bounds]).to(x.device)


@torch.no_grad()
def certified_radius(ccu: CCU, x: Tensor, ratio: float = 1.1, method: str = "tight") -> Tensor:
    """The largest radius [B] (float64) within which the confidence is certified to stay <= ratio/M.

    confidence_bound(ccu, x, R, method) <= ratio/M holds for the R returned, which is rounded down; 0 where x
    itself exceeds it.  No R is larger than what covers the unit cube and all centres.
    """
    require_ccu(ccu)
    if not 1 < ratio < ccu.classes:
        raise ValueError(f"ratio must lie between 1 and {ccu.classes}, the number of classes, got {ratio}")
    # thrice the allowance for rounding: confidence_bound, which rounds otherwise in another batch, confirms the radius
    radii = [balls.largest_radius(ratio / ccu.classes) for _, balls in blocks(ccu, x, method, margin=3.0)]
    return torch.cat([ccu.loglam.new_empty(0, dtype=torch.float64), *radii]).to(x.device)
