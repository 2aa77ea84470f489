"""The same numbers as pytorch-ood: our models in its detectors, our scores in its metrics.

What has to be mapped.  Its outlier scores grow towards OOD, ours fall; its OOD labels are negative; its metrics are
fractions, ours percent.  Its MaxSoftmax takes logits: a detector of ours is one, as the softmax of log-confidences is
the confidences.  Its ODIN and Mahalanobis take `norm_std` and inputs already normalised; ours take images in [0, 1].
Its Mahalanobis is half of the squared distance, in a metric that is not divided by the number of images N:
our -score = 2 N x theirs.  Its AUPR-OUT is the trapezoidal area under the precision-recall curve, our average
precision the sum of steps under the same curve (scikit-learn advises against the former as too optimistic).
"""

import math

import pytest
import torch

from models import CCU, CLASSIFIERS, GMM, ODIN, Maha, Normalised, PCAMetric
from utils import evaluation
from utils.calibration import gaussian
from utils.imported import import_state_dict
from utils.torchvision_guard import datasets

M = 4


@pytest.fixture(scope="module")
def ood():
    """pytorch-ood, which imports torchvision."""
    datasets()
    import pytorch_ood.detector
    import pytorch_ood.metrics
    import pytorch_ood.model
    return pytorch_ood


@pytest.fixture(autouse=True)
def float64():
    """Confidences near 1 are equal in float32 where log-confidences are not; and its fit has the default type."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lenet():
    """With weights large enough that predictions, and scores, differ from image to image."""
    network = CLASSIFIERS["LeNet"](1, 8, M)
    for parameter in network.parameters():
        parameter.data *= 3
    return network.eval()


def test_a_ccu_model_in_its_max_softmax_and_metrics(ood):
    inside, outside = torch.rand(150, 1, 8, 8) * 0.9, torch.rand(130, 1, 8, 8)
    metric = PCAMetric.fit(inside).double()
    gmms = [GMM(centres.flatten(1)[:5].clone(), torch.full((5,), logvar), torch.full((5,), -math.log(5)), metric)
            for centres, logvar in ((inside, 0.0), (outside, 0.4))]
    model = CCU(lenet(), *gmms, 0.3, M).eval()
    detector = ood.detector.MaxSoftmax(model)
    metrics = ood.metrics.OODMetrics()
    with torch.no_grad():
        scores = [model.score(x) for x in (inside, outside)]
        for x, label in ((inside, 0), (outside, -1)):
            outlier = detector.predict(x)
            torch.testing.assert_close(outlier, -model.score(x).exp())
            metrics.update(outlier, torch.full((len(x),), label))
    theirs = metrics.compute()
    assert 0.1 < theirs["AUROC"] < 0.9 and theirs["FPR95TPR"] > 0         # a case with something to compare
    assert evaluation.auroc(*scores) / 100 == pytest.approx(theirs["AUROC"], abs=1e-6)
    outlier = -torch.cat(scores)
    labels = torch.cat((torch.zeros(len(inside)), -torch.ones(len(outside)))).long()
    precision, recall, _ = ood.metrics.functional.pr_curve(outlier, labels)             # recall falls to 0
    steps = ((recall[:-1] - recall[1:]) * precision[:-1]).sum().item()
    area = -torch.trapezoid(precision, recall).item()
    assert evaluation.average_precision(*scores) / 100 == pytest.approx(steps, abs=1e-6)
    assert theirs["AUPR-OUT"] == pytest.approx(area, abs=1e-6)
    assert evaluation.fpr95(*scores) / 100 == pytest.approx(theirs["FPR95TPR"], abs=1e-6)


@pytest.mark.parametrize("temperature, eps", [(1.0, 0.0), (1.0, 0.004), (1000.0, 0.0014)])
def test_odin(ood, temperature, eps):
    network, x = lenet(), torch.rand(40, 1, 8, 8)
    model = ODIN(network).double()
    model.temperature.fill_(temperature)
    model.eps.fill_(eps)
    theirs = ood.detector.ODIN(network, eps=eps, temperature=temperature)
    torch.testing.assert_close(model.score(x).exp(), -theirs.predict(x), rtol=1e-9, atol=0)


def test_odin_with_a_normalised_input(ood):
    mean, std = [0.3], [0.2]
    network, x = lenet(), torch.rand(40, 1, 8, 8)
    model = ODIN(Normalised(network, mean, std)).double()
    model.temperature.fill_(10)
    model.eps.fill_(0.002)
    theirs = ood.detector.ODIN(network, eps=0.002, temperature=10, norm_std=std)
    torch.testing.assert_close(model.score(x).exp(), -theirs.predict((x - 0.3) / 0.2), rtol=1e-9, atol=0)


class Narrow(torch.nn.Module):
    """Few features, so that the covariance is regular and the ridge that pytorch-ood adds is small."""

    def __init__(self):
        super().__init__()
        self.spec = {"arch": "Narrow"}
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.Softplus())

    def features(self, x):
        return self.layers(10 * x)


@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_maha(ood, eps):
    network = Narrow()
    train, labels, x = torch.rand(200, 1, 8, 8), torch.arange(200) % M, 1.5 * torch.rand(40, 1, 8, 8)
    with torch.no_grad():
        features = network.features(train)
    theirs = ood.detector.MahalanobisODIN(network.features, eps=eps).fit_features(features, labels)
    model = Maha(network, 6, M).double()
    means, whitening = gaussian(features, labels, M)
    model.means.copy_(means)
    model.whitening.copy_(whitening)
    model.eps.fill_(eps)
    torch.testing.assert_close(-model.score(x).detach(), 2 * len(train) * theirs.predict(x), rtol=1e-5, atol=1e-8)


def test_its_wide_resnet_becomes_a_model_of_ours(ood):
    torch.set_default_dtype(torch.float32)
    network = ood.model.WideResNet(num_classes=10).eval()
    model = import_state_dict({"module." + key: value for key, value in network.state_dict().items()}, "WideResNet",
                              "CIFAR10", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        normalised = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        torch.testing.assert_close(model(x), network(normalised).log_softmax(1))
