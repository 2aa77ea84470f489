"""What each method minimises (DESIGN: Training, The methods compared).  All losses are means over images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import params
from models import CCU, Detector
from utils.attack import linf_pgd


def uniform_cross_entropy(log_confidence: Tensor) -> Tensor:
    """-(1/M) sum_m log p(m|z), averaged over the batch."""
    return -log_confidence.mean()


def accuracy(log_confidence: Tensor, y: Tensor) -> Tensor:
    return (log_confidence.detach().argmax(1) == y).float().mean()


def mean_confidence(log_confidence: Tensor) -> Tensor:
    return log_confidence.detach().amax(1).exp().mean()


class Objective:
    """Called once a step with a batch x, y of the in-distribution and out-images z; returns the loss and
    scalars to log, as tensors on the device."""

    needs_out = True            # takes out-images
    optimizer: str | None = None        # None = params.DATASETS[...].optimizer
    schedule = "steps"
    out_batch_ratio = 1

    def __init__(self, loglam: float = 0.0):
        lam = math.exp(loglam)
        self.p_in, self.p_out = 1 / (1 + lam), lam / (1 + lam)

    def __call__(self, model: Detector, x: Tensor, y: Tensor, z: Tensor | None, generator: torch.Generator
                 ) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Before epoch 0, 1, ..."""

    def constrain(self, model: Detector) -> None:
        """Before the first step and after every step."""

    def combine(self, log_p: Tensor, y: Tensor, out_loss, p_in: float, p_out: float):
        """p_in * cross-entropy(in) + p_out * out_loss(out) of one forward pass over [in; out]."""
        inside, outside = log_p[:len(y)], log_p[len(y):]
        loss_in, loss_out = F.nll_loss(inside, y), out_loss(outside)
        return p_in * loss_in + p_out * loss_out, {
            "loss_in": loss_in.detach(), "loss_out": loss_out.detach(), "accuracy": accuracy(inside, y),
            "confidence_in": mean_confidence(inside), "confidence_out": mean_confidence(outside)}


class Plain(Objective):
    """Base: cross-entropy; times p_in, so that learning rates compare with the others'."""

    needs_out = False

    def __call__(self, model, x, y, z, generator):
        log_p = model(x)
        loss = F.nll_loss(log_p, y)
        return self.p_in * loss, {"loss_in": loss.detach(), "accuracy": accuracy(log_p, y),
                                  "confidence_in": mean_confidence(log_p)}


class CEDA(Objective):
    """Cross-entropy, and uniform labels on out-images (Hein et al. 2019)."""

    def __call__(self, model, x, y, z, generator):
        return self.combine(model(torch.cat((x, z))), y, uniform_cross_entropy, self.p_in, self.p_out)


class OE(Objective):
    """Outlier exposure (Hendrycks et al. 2019): cross-entropy + 0.5 x cross-entropy to uniform."""

    optimizer = "nesterov"
    schedule = "cosine"
    out_batch_ratio = 2

    def __call__(self, model, x, y, z, generator):
        return self.combine(model(torch.cat((x, z))), y, uniform_cross_entropy, 1.0, 0.5)


class ACET(Objective):
    """The largest log-confidence is minimised on adversarial noise around z (Hein et al. 2019).

    z are out-images (ACET) or, uniform=True, uniform noise (ACET2).
    """

    def __init__(self, loglam: float = 0.0, steps: int = 40, uniform: bool = False):
        super().__init__(loglam)
        self.final, self.steps, self.uniform = (self.p_in, self.p_out), steps, uniform
        self.needs_out = not uniform

    def start_epoch(self, epoch):
        warm = params.ACET_WARM_LAMBDA
        self.p_in, self.p_out = ((1 / (1 + warm), warm / (1 + warm)) if epoch < params.ACET_WARM_EPOCHS
                                 else self.final)

    def __call__(self, model, x, y, z, generator):
        if self.uniform:
            z = torch.rand(x.shape, generator=generator, device=x.device)
        model.eval()            # batch statistics would let the noise images of a batch act together
        z = linf_pgd(model.score, z, params.ACET_EPS, self.steps, generator)
        model.train()
        return self.combine(model(torch.cat((x, z))), y, lambda log_p: log_p.amax(1).mean(), self.p_in, self.p_out)


class CEDA_GMM(Objective):
    """CCU and CCUs: CEDA on the CCU model's confidences, and the densities' likelihood, jointly."""

    def __call__(self, model: CCU, x, y, z, generator):
        images = torch.cat((x, z))
        log_p_in, log_p_out = model.log_densities(images)
        loss, scalars = self.combine(model.posterior(model.log_softmax(images), log_p_in, log_p_out), y,
                                     uniform_cross_entropy, self.p_in, self.p_out)
        log_density = torch.logaddexp(log_p_in + math.log(self.p_in), log_p_out + math.log(self.p_out))
        density_in, density_out = log_density[:len(y)].mean(), log_density[len(y):].mean()
        loss = loss - self.p_in * density_in - self.p_out * density_out
        scalars |= {"log_density_in": density_in.detach(), "log_density_out": density_out.detach(),
                    "largest_var_in": model.gmm_in.logvar.detach().max().exp()}
        if model.gmm_out is not None:
            scalars["smallest_var_out"] = model.gmm_out.logvar.detach().min().exp()
        return loss, scalars

    @torch.no_grad()
    def constrain(self, model):
        """min theta^2 >= 4 max sigma^2: the far-field theorem needs min theta > max sigma."""
        if model.gmm_out is not None:
            floor = model.gmm_in.logvar.max() + math.log(params.VAR_RATIO)
            model.gmm_out.logvar.copy_(torch.maximum(model.gmm_out.logvar, floor))


def make(train_type: str, loglam: float, fit_out: bool, steps: int) -> Objective:
    """The objective of --train_type."""
    if train_type == "ACET":
        return ACET(loglam, steps, uniform=not fit_out)
    return {"plain": Plain, "CEDA": CEDA, "OE": OE, "CEDA_GMM": CEDA_GMM}[train_type](loglam)
