"""The contract of every method in the tables, and the plain softmax classifier (Base, CEDA, OE, ACET)."""

import torch
from torch import Tensor, nn


class Detector(nn.Module):
    """Images [B, C, H, W] in [0, 1] -> log-confidences [B, M]; `score` [B], higher = more in-distribution.

    A detector is rebuilt from `spec`, plain values only, by `models.build`.
    """

    score_is_confidence = True      # exp(score) is a confidence, so that MMC has a meaning
    amp = False                     # bf16 autocast of the classifier; densities always stay outside

    def __init__(self, base_model: nn.Module, spec: dict):
        super().__init__()
        self.base_model = base_model
        self.spec = spec

    def log_softmax(self, x: Tensor) -> Tensor:
        """The classifier's own log p(y|x, i) [B, M]."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.base_model(x)
        return logits.to(x.dtype).log_softmax(1)

    def score(self, x: Tensor) -> Tensor:
        """The largest log-confidence [B]."""
        return self(x).amax(1)

    def attack_score(self, x: Tensor) -> Tensor:
        """What an attack on `score` climbs [B]: the score, or an increasing function of it."""
        return self.score(x)


class Softmax(Detector):
    """A classifier's softmax."""

    def __init__(self, base_model: nn.Module):
        super().__init__(base_model, {"kind": "Softmax", "base_model": base_model.spec})

    def forward(self, x: Tensor) -> Tensor:
        return self.log_softmax(x)
