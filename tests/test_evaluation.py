"""What the tables are made of, a model's scores and their metrics, against NumPy and by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from models import Softmax
from utils import evaluation
from utils.batches import ImageSet
from utils.errors import UserError


def image_set(n=30) -> ImageSet:
    images = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet("random", images, None, 3)


def test_mmc_is_the_mean_confidence_in_percent():
    assert evaluation.mmc(torch.tensor([0.2, 0.8]).log()) == pytest.approx(50, rel=1e-6)
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0)).log()
    assert evaluation.mmc(scores) == pytest.approx(100 * np.exp(scores.numpy().astype(np.float64)).mean(), rel=1e-12)


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [4.0, 1.0, 2.0, 3.0], [7.0]])
def test_median_is_numpys(values):
    assert evaluation.median(torch.tensor(values)) == np.median(values)
    assert math.isnan(evaluation.median(torch.empty(0)))


def test_fpr95_is_that_of_the_first_threshold_that_catches_95_percent():
    """Tried one by one, with many ties: a threshold takes all images of equal scores or none."""
    g = torch.Generator().manual_seed(0)
    for levels, shift in ((4, 1), (10, 2), (50, 30), (1000, 500)):
        inside = (torch.randint(0, levels, (81,), generator=g) + shift).double()
        outside = torch.randint(0, levels, (67,), generator=g).double()
        for threshold in sorted({*inside.tolist(), *outside.tolist()}):        # OOD is what scores at most this
            if (outside <= threshold).double().mean() >= 0.95:
                break
        assert evaluation.fpr95(inside, outside) == pytest.approx(100 * (inside <= threshold).double().mean().item())
    exactly = torch.tensor([0.0] * 57 + [9.0] * 3)      # 95 % of 60
    assert evaluation.fpr95(torch.tensor([0.0, 1.0, 2.0, 3.0]), exactly) == 25


class Dropping(nn.Module):
    """Drops most of what it is given, but not in evaluation mode."""

    spec = {}

    def __init__(self):
        super().__init__()
        self.dropout, self.scale = nn.Dropout(0.9), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.dropout(x.flatten(1)[:, :3])


def test_a_model_is_evaluated_in_evaluation_mode_in_batches_and_in_order():
    data, model = image_set(), Softmax(Dropping()).train()
    log_p, scores = evaluation.evaluate(model, data, 7)
    expected = (data.images.flatten(1)[:, :3].double() / 255).log_softmax(1)
    torch.testing.assert_close(log_p.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(scores, log_p.amax(1)) and not log_p.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    class Scored(Softmax):
        score_is_confidence = False

        def score(self, x):
            return super().score(x).index_fill(0, torch.tensor([0]), bad)
    with pytest.raises(UserError, match="NaN or infinite scores on random.*--lr"):
        evaluation.evaluate(Scored(Dropping()), image_set(), 8)
