"""Scores of a model over a data set, and what the tables make of them."""

import math

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import params
from models import CCU, Detector
from utils.batches import ImageSet, batches
from utils.errors import UserError, warn


def full_precision():
    """Convolutions in float32, not a GPU's TF32, and deterministic: all scripts compute the same scores of a model."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee")


@torch.no_grad()
@full_precision()
def evaluate(model: Detector, data: ImageSet, batch_size: int) -> tuple[Tensor, Tensor]:
    """Log-confidences [N, M] and scores [N] of the images in order; higher scores = more in-distribution.

    UserError where one is NaN, a score is infinite, or a score that says so is no log-confidence.
    """
    model.eval()
    own_score = type(model).score is not Detector.score
    log_p, scores = [], []
    for x, _ in tqdm(batches(data, batch_size), desc=f"{model.meta.get('label', 'model')} on {data.name}",
                     total=math.ceil(len(data) / batch_size), leave=False, disable=None):
        log_p.append(model(x))
        scores.append(model.score(x) if own_score else log_p[-1].amax(1))
    log_p, scores = torch.cat(log_p), torch.cat(scores)
    if log_p.isnan().any() or not scores.isfinite().all():
        raise UserError(f"the {type(model).__name__} model {model.meta.get('label', '')} gives NaN or infinite scores "
                        f"on {data.name}: its training diverged; train it again with a smaller --lr")
    if own_score and model.score_is_confidence and scores.max() > 1e-3:
        raise UserError(f"scores of the {type(model).__name__} model {model.meta.get('label', '')} are no "
                        f"log-confidences ({scores.max():.4g}): its class needs score_is_confidence = False")
    return log_p, scores


def test_error(log_p: Tensor, labels: Tensor) -> float:
    """Percent of wrong predictions."""
    return 100 * (log_p.argmax(1) != labels).double().mean().item()


def evaluate_test(label: str, model: Detector, test: ImageSet, batch_size: int) -> tuple[float, Tensor, list[str]]:
    """Test error (%), scores [N] as `evaluate`'s, and the doubts that these raise, of which it warns."""
    log_p, scores = evaluate(model, test, batch_size)
    error = test_error(log_p, test.labels)
    return error, scores, warn_of_doubts(test.name, label, model, error, scores, test.classes)


def warn_of_doubts(dataset: str, label: str, model: Detector, error: float, scores: Tensor, classes: int) -> list[str]:
    """Lines where a test error (%) is hardly better than that of guessing, or a CCU, whose confidence in noise is
    1/M, has hardly more in many test images: on stderr, and for a table's notes."""
    chance, notes = 100 * (1 - 1 / classes), []
    if error > 0.9 * chance:
        notes.append(f"{dataset}: {label} has a test error of {error:.1f} %, guessing has {chance:.1f} %: it has "
                     "learnt nothing, or from other images")
    if isinstance(model, CCU) and (unsure := uncertain(scores, classes)) > 10:
        notes.append(f"{dataset}: {label} is at most {params.RATIO}/M confident of {unsure:.0f} % of the test images, "
                     "as of noise, and its AUC and SR suffer by it: train longer, on more images, or with fewer "
                     "centroids (--n)")
    for note in notes:
        warn(note)
    return notes


def uncertain(scores: Tensor, classes: int) -> float:
    """Percent of scores, log-confidences, that are at most log(RATIO/M)."""
    return 100 * (scores <= math.log(params.RATIO / classes)).double().mean().item()


def mmc(scores: Tensor) -> float:
    """Mean maximal confidence in percent, of scores that are log-confidences."""
    return 100 * scores.double().exp().mean().item()


def median(values: Tensor) -> float:
    """Of an even number the mean of the two in the middle, where torch's is the lower of them; NaN of none."""
    return values.double().quantile(0.5).item() if len(values) else math.nan


def success_rate(attacked: Tensor, scores_in: Tensor) -> float:
    """Percent of attacked points whose score is at least the in-distribution's median score."""
    return 100 * (attacked.double() >= median(scores_in)).double().mean().item()


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Area under the ROC curve in percent; ties count half."""
    from sklearn.metrics import roc_auc_score
    return 100 * roc_auc_score(*_ood_positive(scores_in, scores_out))


def average_precision(scores_in: Tensor, scores_out: Tensor) -> float:
    """Average precision in percent, OOD positive: the step sum, where pytorch-ood's AUPR-OUT is a trapezoid.

    Deviation: so is the published code's.
    """
    from sklearn.metrics import average_precision_score
    return 100 * average_precision_score(*_ood_positive(scores_in, scores_out))


def fpr95(scores_in: Tensor, scores_out: Tensor) -> float:
    """Percent of in-images taken for OOD at the first threshold that catches 95 % of the OOD images.

    Deviation: the published code's is the share of out-confidences above 0.95.
    """
    from sklearn.metrics import roc_curve
    fpr, tpr, _ = roc_curve(*_ood_positive(scores_in, scores_out), drop_intermediate=False)
    return 100 * fpr[np.argmax(tpr >= 0.95)]


def _ood_positive(scores_in, scores_out):
    """Labels (1 = OOD) and outlier scores (higher = more OOD) as scikit-learn takes them."""
    outlier = -torch.cat((scores_in, scores_out)).double().cpu().numpy()
    return np.repeat([0, 1], [len(scores_in), len(scores_out)]), outlier
