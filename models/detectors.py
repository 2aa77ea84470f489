"""The contract of every method in the tables, and the methods beside CCU."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifiers import Dropout
from models.gmm import squared_distances


class Detector(nn.Module):
    """Images [B, C, H, W] in [0, 1] -> log-confidences [B, M]; `score` [B], higher = more in-distribution.

    A detector is rebuilt from `spec`, plain values only, by `models.build`; with a classifier that has no spec (none of
    models/classifiers.py) it can compute, but not be saved.
    """

    score_is_confidence = True      # exp(score) is a confidence, so that MMC has a meaning
    meta: dict = {}                 # how the model was made: plain values
    amp = False                     # bf16 autocast of the classifier; densities always stay outside

    def __init__(self, base_model: nn.Module, **spec):
        super().__init__()
        self.base_model = base_model
        self.spec = {"kind": type(self).__name__, "base_model": getattr(base_model, "spec", None), **spec}

    def logits(self, x: Tensor) -> Tensor:
        """The classifier's logits [B, M]; [S, B, M] where it makes S passes (MCD, DE)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.base_model(x)
        return logits.to(x.dtype)

    def log_softmax(self, x: Tensor) -> Tensor:
        """The classifier's own log p(y|x, i), shaped as its logits."""
        return self.logits(x).log_softmax(-1)

    def score(self, x: Tensor) -> Tensor:
        """The largest log-confidence [B]."""
        return self(x).amax(1)

    def attack_score(self, x: Tensor) -> Tensor:
        """What an attack on `score` climbs [B]: the score, or an increasing function of it."""
        return self.score(x)


class Softmax(Detector):
    """A classifier's softmax (Base, CEDA, OE, ACET, GAN)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.log_softmax(x)


class EDL(Detector):
    """Evidential deep learning (Sensoy et al. 2018): the classifier gives a Dirichlet distribution's alpha.

    alpha = elu(logit) + 2 > 1, p = alpha / S with S = sum alpha.
    """

    def alpha(self, x: Tensor) -> Tensor:
        """The Dirichlet parameters [B, M]."""
        return F.elu(self.logits(x)) + 2

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha(x)
        return alpha.log() - alpha.sum(1, keepdim=True).log()


class MCD(Detector):
    """Monte-Carlo dropout (Gal & Ghahramani 2016): S passes through the classifier, dropout active at test time.

    The dropout masks are drawn once, S for each dropout layer, and kept with the weights: pass s applies mask s to
    every image, so that an image's score depends neither on the call, nor on the batch, nor on the device, and
    gradients are those of a fixed function.  What lies before the first dropout layer is computed once for all passes.
    """

    score_is_confidence = False

    def __init__(self, base_model: nn.Module, passes: int):
        super().__init__(base_model, passes=passes)
        if not (layers := self.dropouts()):
            raise ValueError(f"{type(base_model).__name__} has no dropout")
        self.passes = passes
        for layer in layers:
            layer.masks = torch.ones(passes, layer.features)

    def dropouts(self) -> list[Dropout]:
        return [module for module in self.base_model.modules() if isinstance(module, Dropout)]

    @torch.no_grad()
    def draw_masks(self, generator: torch.Generator) -> None:
        """New masks [S, F], 0 with probability p, else 1 / (1 - p)."""
        for layer in self.dropouts():
            keep = torch.rand(layer.masks.shape, generator=generator) >= layer.p
            layer.masks.copy_(keep / (1 - layer.p))

    def forward(self, x: Tensor) -> Tensor:
        """The log of the passes' mean softmax [B, M]; in training, of one pass under fresh dropout."""
        log_softmax = self.log_softmax(x)           # of each pass [S, B, M]; in training [B, M]
        return log_softmax if self.training else log_softmax.logsumexp(0) - math.log(self.passes)

    def score(self, x: Tensor) -> Tensor:
        """Minus the softmax's variance over the passes (divided by S), summed over the classes [B]."""
        return -self.log_softmax(x).exp().var(0, correction=0).sum(1)


class Members(nn.ModuleList):
    """Classifiers of one kind, side by side: the logits of each [E, B, M]."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__(members)
        self.spec = getattr(members[0], "spec", None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self])


class DE(Detector):
    """Deep ensemble (Lakshminarayanan et al. 2017): the mean of the members' probabilities.

    Deviation: members are trained without adversarial examples.
    """

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__(Members(members), members=len(members))

    def forward(self, x: Tensor) -> Tensor:
        return self.log_softmax(x).logsumexp(0) - math.log(len(self.base_model))


class Perturbed(Detector):
    """A detector that first moves the input by eps so that its own score grows (Liang et al. 2018).

    The move is a constant for automatic differentiation: an attack differentiates the score at the moved input.
    """

    def __init__(self, base_model: nn.Module, **spec):
        super().__init__(base_model, **spec)
        self.register_buffer("eps", torch.tensor(0.0))

    def unperturbed_score(self, x: Tensor) -> Tensor:
        """The score of x itself [B]."""
        raise NotImplementedError

    def direction(self, x: Tensor) -> Tensor:
        """sign grad_x of the unperturbed score, shaped like x; also under torch.no_grad."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.unperturbed_score(x).sum(), x)
        return gradient.sign()

    def perturb(self, x: Tensor) -> Tensor:
        return x + self.eps * self.direction(x)


class ODIN(Perturbed):
    """Liang et al. 2018: the softmax at temperature T of the input moved by eps sign grad_x log max_y p_T(y|x).

    Deviation: the published code moves by the raw gradient instead of its sign.
    """

    def __init__(self, base_model: nn.Module):
        super().__init__(base_model)
        self.register_buffer("temperature", torch.tensor(1.0))

    def log_softmax_T(self, x: Tensor) -> Tensor:
        """log p_T(y|x) [B, M], the softmax of the logits / T."""
        return (self.logits(x) / self.temperature).log_softmax(1)

    def unperturbed_score(self, x: Tensor) -> Tensor:
        return self.log_softmax_T(x).amax(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.log_softmax_T(self.perturb(x))


class Maha(Perturbed):
    """Lee et al. 2018: minus the squared Mahalanobis distance of the classifier's features to the closest class mean.

    means [M, F]; whitening W [F, F] with W W^T = Sigma^-1, the (pseudo-)inverse of the covariance that all classes
    share: d^2 = |W^T (f - mean)|^2 cannot become negative.  The log-confidences are the classifier's own, at the
    input as it is: its predictions make the test error.
    Deviation: of one layer; Lee et al. combine several.
    """

    score_is_confidence = False

    def __init__(self, base_model: nn.Module, features: int, classes: int):
        super().__init__(base_model, features=features, classes=classes)
        self.register_buffer("means", torch.zeros(classes, features))
        self.register_buffer("whitening", torch.zeros(features, features))

    def unperturbed_score(self, x: Tensor) -> Tensor:
        features = self.base_model.features(x)                                              # [B, F]
        d2 = squared_distances(features @ self.whitening, self.means @ self.whitening)      # [B, M]
        return -d2.amin(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.log_softmax(x)

    def score(self, x: Tensor) -> Tensor:
        return self.unperturbed_score(self.perturb(x))
