"""ODIN and Maha: fitted to a trained classifier, their hyperparameters chosen by AUROC against out-images.

Training images and training out-images only: no test set is seen.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

import params
from models import ODIN, Detector, Maha, Softmax
from models.detectors import Perturbed
from utils.batches import ImageSet, batches
from utils.errors import UserError
from utils.evaluation import auroc, full_precision


@full_precision()
def calibrate(train_type: str, base: Detector, data: ImageSet, out: ImageSet, seed: int,
              batch_size: int) -> tuple[Perturbed, list[dict]]:
    """ODIN or Maha on the classifier of `base`, in evaluation mode, and the AUROC (%) of everything that was tried.

    The AUROC is that of params.CALIBRATION_IMAGES training images against as many of `out`, a choice that the seed
    fixes; among equals the first, with the smallest temperature and step, wins.
    """
    if not isinstance(base, Softmax):
        raise UserError(f"{train_type} builds on a plain classifier, and the model Base is a {base.spec['kind']}")
    base.eval()
    generator = torch.Generator().manual_seed(seed)
    x_in, x_out = (images.floats(torch.randperm(len(images), generator=generator)[:params.CALIBRATION_IMAGES]
                                 .to(images.images.device)) for images in (data, out))
    if train_type == "ODIN":
        model, trials = ODIN(base.base_model).to(x_in.device).eval(), []
        for temperature in tqdm(params.ODIN_TEMPERATURES, desc="ODIN", leave=False, disable=None):
            model.temperature.fill_(temperature)
            trials += [{"temperature": temperature, **trial}
                       for trial in try_steps(model, params.ODIN_EPS, x_in, x_out, batch_size)]
    else:
        model = fit_maha(base, data, batch_size)
        trials = list(try_steps(model, params.MAHA_EPS, x_in, x_out, batch_size))
    best = max(trials, key=lambda trial: trial["auroc"])
    for name, value in best.items():
        if name != "auroc":
            getattr(model, name).fill_(value)
    return model, trials


@torch.no_grad()
def try_steps(model: Perturbed, steps: tuple[float, ...], x_in: Tensor, x_out: Tensor,
              batch_size: int) -> Iterable[dict]:
    """The AUROC of x_in against x_out for each length of the input's perturbation; its direction is found once."""
    x = torch.cat((x_in, x_out))
    scores = []
    for part in x.split(batch_size):
        direction = model.direction(part)
        scores.append(torch.stack([model.unperturbed_score(part + eps * direction) for eps in steps]))
    for eps, score in zip(steps, torch.cat(scores, 1), strict=True):
        yield {"eps": eps, "auroc": auroc(score[:len(x_in)], score[len(x_in):])}


@torch.no_grad()
def fit_maha(base: Softmax, data: ImageSet, batch_size: int) -> Maha:
    """Class means and tied covariance of the penultimate features of all training images."""
    classifier, classes = base.base_model, data.classes
    features, labels = zip(*((classifier.features(x), y) for x, y in batches(data, batch_size)), strict=True)
    means, whitening = gaussian(torch.cat(features), torch.cat(labels), classes)
    model = Maha(classifier, means.shape[1], classes).to(means.device).eval()
    model.means.copy_(means)
    model.whitening.copy_(whitening)
    return model


def gaussian(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Class means [M, F] and W [F, F] with W W^T = Sigma^+ for features [N, F], labels [N]; in float64.

    Sigma = 1/N sum_n (f_n - mean of its class)(...)^T.  It is singular where a feature is always 0 (a dead ReLU):
    directions with less than F eps of the largest variance count nothing, as in scikit-learn's pseudo-inverse, which
    Lee et al.'s code takes (EmpiricalCovariance.precision_).
    """
    features = features.double()
    one_hot = torch.nn.functional.one_hot(labels, classes).double()                 # [N, M]
    means = one_hot.T @ features / one_hot.sum(0)[:, None]
    centred = features - means[labels]
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))  # Sigma = V diag(v) V^T
    kept = variances > variances[-1] * len(variances) * torch.finfo(features.dtype).eps
    return means, directions * torch.where(kept, variances, torch.inf).rsqrt()
