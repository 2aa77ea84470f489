"""What each method minimises (README: Training, Methods).  All losses are means over images."""

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import params
from models import CCU, EDL, Detector
from models.gan import Discriminator, Generator
from utils import parallel
from utils.attack import linf_pgd
from utils.graphs import side_by_side


def uniform_cross_entropy(log_confidence: Tensor) -> Tensor:
    """-(1/M) sum_m log p(m|z), averaged over the batch."""
    return -log_confidence.mean()


def accuracy(log_confidence: Tensor, y: Tensor) -> Tensor:
    """Share of right predictions, of log-confidences [B, M] and labels y [B]: a scalar in [0, 1]."""
    return (log_confidence.detach().argmax(1) == y).float().mean()


def mean_confidence(log_confidence: Tensor) -> Tensor:
    """Mean of the largest confidence, of log-confidences [B, M]: a scalar in [1/M, 1]."""
    return log_confidence.detach().amax(1).exp().mean()


def combine(log_p: Tensor, y: Tensor, out_loss: Callable[[Tensor], Tensor], p_in: float, p_out: float
            ) -> tuple[Tensor, dict[str, Tensor]]:
    """p_in * cross-entropy(in) + p_out * out_loss(out), and its parts, of the log-confidences of [in; out]."""
    inside, outside = log_p.split((len(y), len(log_p) - len(y)))
    loss_in, loss_out = F.nll_loss(inside, y), out_loss(outside)
    return p_in * loss_in + p_out * loss_out, {
        "loss_in": loss_in.detach(), "loss_out": loss_out.detach(), "accuracy": accuracy(inside, y),
        "confidence_in": mean_confidence(inside), "confidence_out": mean_confidence(outside)}


class Objective:
    """Called once a step with a batch x, y of the in-distribution and out-images z; returns the loss and
    scalars to log, the loss first, as tensors on the device.

    Of several processes (utils/parallel.py) each is called with the whole batch and takes its part: the losses add up
    to the batch's, and so do the scalars times `weight`, the share of the part.
    """

    needs_out = True            # takes out-images
    schedule = "steps"          # of the learning rate: utils.training.lr_factor
    out_batch_ratio = 1         # out-images to an in-image
    weight = 1.0                # in ]0, 1]: the share of the last batch that this process had

    def __init__(self, loglam: float = 0.0):
        lam = math.exp(loglam)
        self.p_in, self.p_out = 1 / (1 + lam), lam / (1 + lam)

    def __call__(self, model: Detector, x: Tensor, y: Tensor, z: Tensor | None,
                 generator: torch.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        draws = self.draw(x, z, generator)
        self.weight, (x, y, z, *draws) = parallel.shard(len(x), x, y, z, *draws)
        loss, scalars = self.loss(model, x, y, z, *draws)
        return self.weight * loss, {"loss": loss.detach()} | scalars

    def draw(self, x: Tensor, z: Tensor | None, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The step's random numbers, a row or more an image."""
        return ()

    def loss(self, model: Detector, x: Tensor, y: Tensor, z: Tensor | None, *draws: Tensor
             ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of (this process's part of) the batch and of what was drawn for it."""
        raise NotImplementedError

    def constrain(self, model: Detector) -> None:
        """Before the first step and after every step."""

    def state_dict(self) -> dict:
        """What a resumed run needs of the objective itself: its tensors."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)


class Plain(Objective):
    """Base, MCD and each network of DE: cross-entropy; times p_in, so that learning rates compare with the others'."""

    needs_out = False

    def loss(self, model, x, y, z):
        log_p = model(x)
        loss = F.nll_loss(log_p, y)
        return self.p_in * loss, {"loss_in": loss.detach(), "accuracy": accuracy(log_p, y),
                                  "confidence_in": mean_confidence(log_p)}


class CEDA(Objective):
    """Cross-entropy, and uniform labels on out-images (Hein et al. 2019)."""

    def loss(self, model, x, y, z):
        return combine(model(torch.cat((x, z))), y, uniform_cross_entropy, self.p_in, self.p_out)


class OE(Objective):
    """Outlier exposure (Hendrycks et al. 2019): cross-entropy + 0.5 x cross-entropy to uniform."""

    schedule = "cosine"
    out_batch_ratio = params.OE_OUT_RATIO

    def loss(self, model, x, y, z):
        return combine(model(torch.cat((x, z))), y, uniform_cross_entropy, 1.0, params.OE_WEIGHT)


class ACET(Objective):
    """The largest log-confidence is minimised on adversarial noise around z (Hein et al. 2019).

    z are out-images (ACET) or, uniform=True, uniform noise (ACET2).

    Deviation: lambda is constant; the published code's is 0.001 in the first 3 epochs.  By then a network is certain on
    its adversarial noise, where the largest log-confidence has no gradient left, for good.
    """

    def __init__(self, loglam: float, steps: int, uniform: bool):
        super().__init__(loglam)
        self.steps, self.uniform = steps, uniform

    def draw(self, x, z, generator):
        """Where the attacks start, in their boxes and, ACET2, the boxes' centres."""
        centres = torch.rand(x.shape, generator=generator, device=x.device) if self.uniform else z
        starts = torch.rand(centres.shape, generator=generator, device=x.device, dtype=centres.dtype)
        return starts, centres

    def loss(self, model, x, y, z, starts, centres):
        model.eval()            # batch statistics would let the noise images of a batch act together
        z = linf_pgd(model.score, centres, params.ACET_EPS, self.steps, starts)
        model.train()
        return combine(model(torch.cat((x, z))), y, lambda log_p: log_p.amax(1).mean(), self.p_in, self.p_out)


class CEDA_GMM(Objective):
    """CCU and CCUs: CEDA on the CCU model's confidences, and the densities' likelihood, jointly,

        p_in [-log p(y|x) - log p(x)] + p_out [-(1/M) sum_m log p(m|z) - log p(z)],   p = p_in p(.|i) + p_out p(.|o).
    """

    def loss(self, model: CCU, x, y, z):
        images = torch.cat((x, z))
        (memberships, likelihood, of_densities), log_softmax = side_by_side(
            images.device, lambda: self.densities(model, images, len(x)), lambda: model.log_softmax(images))
        loss, scalars = combine(model.posterior(log_softmax, *memberships), y, uniform_cross_entropy, self.p_in,
                                self.p_out)
        return loss - likelihood, scalars | of_densities

    def densities(self, model: CCU, images: Tensor, n: int
                  ) -> tuple[tuple[Tensor, Tensor], Tensor, dict[str, Tensor]]:
        """`log_memberships` of all images, the likelihood (the first n are in-images), and what to log."""
        log_p_in, log_p_out = model.log_densities(images)
        log_density = torch.logaddexp(log_p_in + math.log(self.p_in), log_p_out + math.log(self.p_out))
        density_in, density_out = (part.mean() for part in log_density.split((n, len(images) - n)))
        scalars = {"log_density_in": density_in.detach(), "log_density_out": density_out.detach(),
                   "largest_var_in": model.gmm_in.logvar.detach().max().exp()}
        if model.gmm_out is not None:
            scalars["smallest_var_out"] = model.gmm_out.logvar.detach().min().exp()
        likelihood = self.p_in * density_in + self.p_out * density_out
        return model.log_memberships(log_p_in, log_p_out), likelihood, scalars

    @torch.no_grad()
    def constrain(self, model):
        """min theta^2 >= 4 max sigma^2 (exp(logvar)): the far-field theorem needs min theta > max sigma."""
        if model.gmm_out is not None:
            floor = model.gmm_in.logvar.max() + math.log(params.VAR_RATIO)
            model.gmm_out.logvar.copy_(torch.maximum(model.gmm_out.logvar, floor))


class EvidentialMSE(Objective):
    """EDL (Sensoy et al. 2018): squared error and variance of one-hot labels y under the Dirichlet distribution,

        sum_m (y_m - p_m)^2 + sum_m p_m (1 - p_m) / S,    p = alpha / S,  S = sum_m alpha_m.

    Deviation: no KL term of the misleading evidence; Sensoy et al. have S + 1 under the variance and alpha = relu + 1.
    """

    needs_out = False

    def loss(self, model: EDL, x, y, z):
        alpha = model.alpha(x)                                          # [B, M]
        S = alpha.sum(1)
        p = alpha / S[:, None]
        error = (F.one_hot(y, p.shape[1]) - p).square().sum(1)
        variance = (p * (1 - p)).sum(1) / S
        return (error + variance).mean(), {
            "error": error.detach().mean(), "variance": variance.detach().mean(), "accuracy": accuracy(p, y),
            "confidence_in": p.detach().amax(1).mean()}


@contextlib.contextmanager
def fixed_statistics(model: Detector):
    """Batch norms compute with the batch's statistics, and leave their running ones alone."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class GAN(Objective):
    """The confident classifier (Lee et al. 2018): cross-entropy + beta KL(uniform || p) on generated images.

    The generator minimises its GAN loss + beta KL(uniform || p(.|G(noise))): it is drawn to the boundary of the
    data.  Before each of the classifier's steps discriminator and generator make one of their own.
    """

    needs_out = False

    def __init__(self, channels: int, size: int, device: torch.device):
        super().__init__()
        self.networks = {name: parallel.sync_batch_norms(network.to(device), device) for name, network in (
            ("generator", Generator(channels, size)), ("discriminator", Discriminator(channels, size)))}
        on_gpu = device.type == "cuda"
        self.optimizers = {name: torch.optim.Adam(network.parameters(), capturable=on_gpu, **params.GAN_ADAM)
                           for name, network in self.networks.items()}

    def draw(self, x, z, generator):
        return self.noise(len(x), generator), self.noise(len(x), generator)

    def loss(self, model, x, y, z, noise, more_noise):
        G, D = self.networks["generator"], self.networks["discriminator"]
        fake = G(noise)
        loss_d = F.softplus(-D(x)).mean() + F.softplus(D(fake.detach())).mean()     # -log D(x) - log(1 - D(fake))
        self.step("discriminator", loss_d)
        with fixed_statistics(model):
            confidence = model(fake)
        loss_g = F.softplus(-D(fake)).mean() + params.GAN_BETA * self.kl_to_uniform(confidence)
        self.step("generator", loss_g)
        with torch.no_grad():
            fake = G(more_noise)
        loss, scalars = self.classifier_loss(model, x, y, fake)
        return loss, scalars | {"loss_generator": loss_g.detach(), "loss_discriminator": loss_d.detach()}

    def classifier_loss(self, model, x, y, fake):
        return combine(model(torch.cat((x, fake))), y, self.kl_to_uniform, 1.0, params.GAN_BETA)

    @staticmethod
    def kl_to_uniform(log_confidence: Tensor) -> Tensor:
        """KL(uniform || p), averaged over the batch."""
        return uniform_cross_entropy(log_confidence) - math.log(log_confidence.shape[1])

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, Generator.noise, generator=generator, device=generator.device)

    def step(self, name: str, loss: Tensor) -> None:
        """One step of one network; the others, the classifier too, get no gradients of it."""
        weights = list(self.networks[name].parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(self.weight * loss, weights), strict=True):
            weight.grad = gradient
        parallel.sum_gradients(weights)
        self.optimizers[name].step()

    def state_dict(self):
        return {part: {name: item.state_dict() for name, item in getattr(self, part).items()}
                for part in ("networks", "optimizers")}

    def load_state_dict(self, state):
        for part, items in state.items():
            for name, item in items.items():
                getattr(self, part)[name].load_state_dict(item)


OBJECTIVES = {"plain": Plain, "MCD": Plain, "DE": Plain, "CEDA": CEDA, "OE": OE, "ACET": ACET, "CEDA_GMM": CEDA_GMM,
              "EDL": EvidentialMSE, "GAN": GAN}


def make(train_type: str, loglam: float, fit_out: bool, steps: int, images: Tensor) -> Objective:
    """The objective of --train_type; the GAN's networks are shaped like the training images [N, C, H, W]."""
    if train_type == "ACET":
        return ACET(loglam, steps, uniform=not fit_out)
    if train_type == "GAN":
        return GAN(images.shape[1], images.shape[2], images.device)
    return OBJECTIVES[train_type](loglam)


def takes_out_images(train_type: str, fit_out: bool) -> bool:
    """Whether --train_type takes out-images: to train on, or (ODIN, Maha) to choose hyperparameters on."""
    if train_type == "ACET":
        return fit_out
    return train_type in params.CALIBRATED or OBJECTIVES[train_type].needs_out
