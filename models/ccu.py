"""The CCU model: a classifier that mixes with the uniform distribution where the data ends."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.detectors import Detector
from models.gmm import GMM, component_log_probs


class CCU(Detector):
    """p(y|x) = [ p(y|x,i) p(x|i) + lam/M p(x|o) ] / [ p(x|i) + lam p(x|o) ]   (README: Model).

    gmm_out=None is the single-mixture variant CCUs: p(x|o) = 1, the uniform density on the cube.
    Both mixtures must share one metric (ValueError); where gmm_out has an equal one it takes over gmm_in's.
    loglam = log p(o)/p(i).
    """

    def __init__(self, base_model: nn.Module, gmm_in: GMM, gmm_out: GMM | None, loglam: float, classes: int):
        if gmm_out is not None and gmm_out.metric is not gmm_in.metric:
            if not gmm_out.metric.equals(gmm_in.metric):
                raise ValueError("the two mixtures must share one metric")
            gmm_out.metric = gmm_in.metric
        super().__init__(base_model, classes=classes, dim=gmm_in.metric.dim, components_in=gmm_in.components,
                         components_out=gmm_out.components if gmm_out is not None else 0)
        self.gmm_in = gmm_in
        self.gmm_out = gmm_out
        self.classes = classes
        self.register_buffer("loglam", torch.tensor(float(loglam)))

    def log_densities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x|i) [B] and log p(x|o) [B]."""
        if self.gmm_out is None:
            log_p_in = self.gmm_in.log_prob(x)
            return log_p_in, torch.zeros_like(log_p_in)
        inside, outside = component_log_probs(x, self.gmm_in, self.gmm_out)
        return inside.logsumexp(1), outside.logsumexp(1)

    def log_memberships(self, log_p_in: Tensor, log_p_out: Tensor) -> tuple[Tensor, Tensor]:
        """log p(i|x) and log p(o|x) [B] from log p(x|i) and log p(x|o) [B].

        From their difference: the log-densities are in the thousands, and a sum with one of them would lose the
        confidence's digits in float32.
        """
        log_odds = log_p_in - log_p_out - self.loglam
        return F.logsigmoid(log_odds), F.logsigmoid(-log_odds)

    def posterior(self, log_softmax: Tensor, log_member_in: Tensor, log_member_out: Tensor) -> Tensor:
        """log p(y|x) = log( p(y|x,i) p(i|x) + p(o|x)/M ) [B, M], of log p(y|x,i) [B, M] and `log_memberships` [B]."""
        return torch.logaddexp(log_softmax + log_member_in[:, None], log_member_out[:, None] - math.log(self.classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.posterior(self.log_softmax(x), *self.log_memberships(*self.log_densities(x)))

    def attack_score(self, x: Tensor) -> Tensor:
        """log( confidence - 1/M ) [B] = log( max_y p(y|x,i) - 1/M ) + log p(i|x).

        An increasing function of the score.  Far out the score is log 1/M to machine precision and its
        gradient 0; this one climbs the classifier's confidence and the log-density ratio, which is not flat there.
        """
        confidence = self.log_softmax(x).amax(1).exp()
        log_member_in, _ = self.log_memberships(*self.log_densities(x))
        tiny = torch.finfo(confidence.dtype).eps / self.classes
        return (confidence - 1 / self.classes).clamp_min(tiny).log() + log_member_in
