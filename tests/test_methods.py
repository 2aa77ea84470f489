"""Every method: its objective against NumPy in float64, its detector, its way through run_training.py."""

import json
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import killed
from sklearn.covariance import EmpiricalCovariance
from torch import nn

import model_paths
import params
import run_training
import utils.objectives as objectives
from models import (
    CCU,
    CLASSIFIERS,
    DE,
    EDL,
    GMM,
    MCD,
    ODIN,
    Maha,
    Normalised,
    PCAMetric,
    Softmax,
    build_classifier,
)
from utils import calibration, checkpoints, cli, files, load_model, save_model
from utils.batches import ImageSet
from utils.data import load_in_dist
from utils.errors import UserError
from utils.evaluation import auroc
from utils.imported import import_state_dict
from utils.out_data import load_out
from utils.state import State

M, D = 3, 4         # classes, pixels of the tiny images [B, 1, 2, 2]


# --- objectives against NumPy ------------------------------------------------------------------------------

class Linear(nn.Module):
    """Logits x W, features x A: small enough to differentiate by hand."""

    def __init__(self):
        super().__init__()
        self.spec = {"arch": "Linear"}
        self.W = nn.Parameter(torch.randn(D, M, dtype=torch.float64))
        self.register_buffer("A", torch.randn(D, D, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.W

    def features(self, x):
        return x.flatten(1) @ self.A


@pytest.fixture(autouse=True)
def seeded(tmp_path, monkeypatch):
    """Seeded, in an empty folder."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)


def images(n):
    return torch.rand(n, 1, 2, 2, dtype=torch.float64)


def batch():
    return images(6), torch.tensor([0, 1, 2, 0, 1, 1]), images(5)


def arrays(*tensors):
    return [t.detach().numpy().reshape(len(t), -1) for t in tensors]


def np_softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def np_cross_entropy(p, y):
    return -np.log(p[np.arange(len(y)), y]).mean()


def np_uniform_cross_entropy(p):
    return -np.log(p).mean()


def agrees(loss, reference, **weights):
    """`loss` is reference(**values of the weights), and its gradients are the central differences of `reference`."""
    loss.backward()
    values = {name: weight.detach().numpy().copy() for name, weight in weights.items()}
    assert loss.item() == pytest.approx(reference(**values), rel=1e-10)
    for name, weight in weights.items():
        numeric = np.zeros_like(values[name])
        for index in np.ndindex(numeric.shape):
            ends = []
            for h in (1e-5, -1e-5):
                moved = values[name].copy()
                moved[index] += h
                ends.append(reference(**values | {name: moved}))
            numeric[index] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(weight.grad.numpy(), numeric, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("loglam", [0.0, 0.75])
def test_plain_is_cross_entropy_times_p_in(loglam):
    x, y, z = batch()
    model = Softmax(Linear())
    loss, scalars = objectives.Plain(loglam)(model, x, y, None, None)
    X, = arrays(x)
    agrees(loss, lambda W: np_cross_entropy(np_softmax(X @ W), y) / (1 + math.exp(loglam)), W=model.base_model.W)
    expected = (np_softmax(X @ model.base_model.W.detach().numpy()).argmax(1) == y.numpy()).mean()
    assert scalars["accuracy"].item() == pytest.approx(expected)


@pytest.mark.parametrize("name, weights", [("CEDA", (1 / (1 + math.exp(0.75)), 1 / (1 + math.exp(-0.75)))),
                                           ("OE", (1, 0.5))])
def test_ceda_and_oe_push_out_images_to_uniform(name, weights):
    x, y, z = batch()
    model = Softmax(Linear())
    loss, _ = getattr(objectives, name)(0.75)(model, x, y, z, None)
    X, Z = arrays(x, z)
    agrees(loss, lambda W: weights[0] * np_cross_entropy(np_softmax(X @ W), y) +
           weights[1] * np_uniform_cross_entropy(np_softmax(Z @ W)), W=model.base_model.W)


@pytest.mark.parametrize("uniform", [False, True])
def test_acet_lowers_the_largest_confidence_on_adversarial_noise(uniform, monkeypatch):
    x, y, z = batch()
    model = Softmax(Linear()).train()
    calls = []

    def attack(score, x0, eps, steps, start):
        calls.append((x0, start, eps, steps, model.training))
        return x0 / 2 + 0.1
    monkeypatch.setattr(objectives, "linf_pgd", attack)
    torch.set_default_dtype(torch.float64)
    try:
        objective = objectives.ACET(0.75, steps=7, uniform=uniform)
        loss, _ = objective(model, x, y, None if uniform else z, torch.Generator().manual_seed(1))
        draws = torch.Generator().manual_seed(1)
        x0 = torch.rand(x.shape, generator=draws) if uniform else z
        start = torch.rand(x0.shape, generator=draws)
    finally:
        torch.set_default_dtype(torch.float32)
    assert objectives.takes_out_images("ACET", fit_out=not uniform) is not uniform and model.training
    assert calls[0][2:] == (params.ACET_EPS, 7, False)
    assert torch.equal(calls[0][0], x0) and torch.equal(calls[0][1], start)
    lam = math.exp(0.75)
    X, Z = arrays(x, x0 / 2 + 0.1)
    agrees(loss, lambda W: (np_cross_entropy(np_softmax(X @ W), y) + lam * np.log(np_softmax(Z @ W).max(1)).mean())
           / (1 + lam), W=model.base_model.W)


@pytest.mark.parametrize("loglam", [0.0, 0.75])
@pytest.mark.parametrize("double", [True, False])
def test_ccu_trains_confidences_and_densities_jointly(double, loglam):
    x, y, z = batch()
    V = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    s = torch.tensor([2.0, 1.0, 0.7, 0.3], dtype=torch.float64)
    metric = PCAMetric(V, s)
    alpha = torch.tensor([0.5, 0.5]).double().log()

    def mixture(shift):
        return GMM(torch.rand(2, D).double(), torch.randn(2).double() * 0.3 + shift, alpha, metric)
    gmm_in, gmm_out = mixture(-1), mixture(1) if double else None
    model = CCU(Linear(), gmm_in, gmm_out, loglam, M).double()
    loss, scalars = objectives.CEDA_GMM(loglam)(model, x, y, z, None)
    X, Z = arrays(x, z)
    V, s = V.numpy(), s.numpy()

    def density(x, mu, logvar):
        d2 = ((((x[:, None] - mu) @ V.T) / np.sqrt(s)) ** 2).sum(2)
        return (0.5 * np.exp(-d2 / 2 / np.exp(logvar)) * (2 * np.pi * np.exp(logvar)) ** (-D / 2)
                / np.sqrt(s.prod())).sum(1)

    def reference(W, mu, logvar, nu=None, logvar_out=None):
        lam, total = math.exp(loglam), 0.0
        for images, p_of, term in ((X, 1 / (1 + lam), lambda p: np_cross_entropy(p, y)),
                                   (Z, lam / (1 + lam), np_uniform_cross_entropy)):
            p_in = density(images, mu, logvar)
            p_out = density(images, nu, logvar_out) if double else np.ones(len(images))
            confidence = ((np_softmax(images @ W) * p_in[:, None] + lam / M * p_out[:, None])
                          / (p_in + lam * p_out)[:, None])
            total += p_of * (term(confidence) - np.log(p_in / (1 + lam) + lam / (1 + lam) * p_out).mean())
        return total

    weights = {"W": model.base_model.W, "mu": gmm_in.mu, "logvar": gmm_in.logvar}
    if double:
        weights |= {"nu": gmm_out.mu, "logvar_out": gmm_out.logvar}
    agrees(loss, reference, **weights)
    assert scalars["largest_var_in"].item() == pytest.approx(gmm_in.logvar.exp().max().item())


def test_edl_is_the_expected_squared_error():
    x, y, _ = batch()
    model = EDL(Linear())
    loss, _ = objectives.EvidentialMSE()(model, 3 * x, y, None, None)
    X, = arrays(3 * x)

    def reference(W):
        logits = X @ W
        alpha = np.where(logits > 0, logits, np.expm1(np.minimum(logits, 0))) + 2
        S = alpha.sum(1, keepdims=True)
        p = alpha / S
        return (((np.eye(M)[y] - p) ** 2).sum(1) + (p * (1 - p) / S).sum(1)).mean()
    agrees(loss, reference, W=model.base_model.W)
    alpha = model.alpha(x)
    torch.testing.assert_close(model(x).exp(), alpha / alpha.sum(1, keepdim=True))
    assert (alpha > 1).all()


def test_gan_pushes_the_classifier_to_uniform_on_generated_images(monkeypatch):
    monkeypatch.setattr(params, "GAN_BETA", 0.3)
    x, y, fake = batch()
    model = Softmax(Linear())
    loss, _ = objectives.GAN(1, 8, torch.device("cpu")).classifier_loss(model, x, y, fake)
    X, Z = arrays(x, fake)
    agrees(loss, lambda W: np_cross_entropy(np_softmax(X @ W), y) + 0.3 * (
        (1 / M * np.log(1 / M / np_softmax(Z @ W))).sum(1).mean()), W=model.base_model.W)


def test_the_gans_own_steps_minimise_their_losses_and_leave_the_classifier_alone():
    def losses(objective, noise):
        G, D = (objective.networks[name] for name in ("generator", "discriminator"))
        fake = G(noise)
        loss_d = -(D(x).sigmoid().log().mean() + (1 - D(fake.detach()).sigmoid()).log().mean())
        kl = (math.log(1 / M) - model(fake)).mean()
        return loss_d, -D(fake).sigmoid().log().mean() + params.GAN_BETA * kl

    model = Softmax(CLASSIFIERS["LeNet"](1, 8, M))
    model.base_model.fc2.weight.data.mul_(30)       # surer: images differ
    x, y = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 1])
    torch.manual_seed(5)
    objective = objectives.GAN(1, 8, torch.device("cpu"))
    torch.manual_seed(5)
    twin = objectives.GAN(1, 8, torch.device("cpu"))
    _, scalars = objective(model, x, y, None, torch.Generator().manual_seed(3))
    assert all(p.grad is None for p in model.parameters())
    # the twin makes the same two steps: on the discriminator's loss, then on the generator's against the new one
    generator = torch.Generator().manual_seed(3)
    noise = twin.noise(6, generator)
    for i, name in enumerate(("discriminator", "generator")):
        loss = losses(twin, noise)[i]
        assert scalars[f"loss_{name}"].item() == pytest.approx(loss.item(), rel=1e-4)
        twin.optimizers[name].zero_grad()
        loss.backward()
        twin.optimizers[name].step()
        for a, b in zip(objective.networks[name].parameters(), twin.networks[name].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    # and the classifier's on other images, of the noise drawn next
    fakes = [objective.networks["generator"](n).detach() for n in (twin.noise(6, generator), noise)]
    expected, of_equal_noise = (-model(fake).mean().item() - math.log(M) for fake in fakes)
    assert scalars["loss_out"].item() == pytest.approx(expected, rel=1e-4)
    assert abs(of_equal_noise - expected) > 1e-2 * expected


# --- detectors ---------------------------------------------------------------------------------------------

def detector(kind):
    """A small, untrained detector for images [B, 1, 8, 8]."""
    lenet = CLASSIFIERS["LeNet"](1, 8, M)
    if kind == "MCD":
        model = MCD(CLASSIFIERS["LeNetDropout"](1, 8, M), passes=4)
        model.draw_masks(torch.Generator().manual_seed(1))
    elif kind == "DE":
        model = DE([lenet, *(CLASSIFIERS["LeNet"](1, 8, M) for _ in range(2))])
    elif kind == "ODIN":
        model = ODIN(lenet)
        model.temperature.fill_(10)
        model.eps.fill_(0.002)
    elif kind == "Maha":
        model = Maha(lenet, 1024, M)
        means, whitening = calibration.gaussian(lenet.features(torch.rand(60, 1, 8, 8)).detach(),
                                                torch.arange(60) % M, M)
        model.means.copy_(means)
        model.whitening.copy_(whitening)
        model.eps.fill_(0.002)
    elif kind == "CCU":
        metric = PCAMetric.fit(torch.rand(80, 1, 8, 8))
        model = CCU(lenet, *(GMM(torch.rand(3, 64), torch.zeros(3), torch.zeros(3), metric) for _ in range(2)), 0.5, M)
    elif kind == "normalised":
        model = Softmax(Normalised(lenet, [0.3], [0.2]))
    else:
        model = {"Softmax": Softmax, "EDL": EDL}[kind](lenet)
    return model.eval()


KINDS = ["Softmax", "normalised", "EDL", "MCD", "DE", "ODIN", "Maha", "CCU"]


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(UserError, match=r"float64; save model.float\(\)"):
        save_model(detector("CCU").double(), tmp_path / "model.pt")
    for value in (np.float64(1.0), [np.int64(1)], {"a": {"b": torch.ones(1)}}, object()):
        with pytest.raises(ValueError, match="meta"):
            save_model(detector("Softmax"), tmp_path / "model.pt", {"accuracy": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract_and_the_way_through_a_file(kind, tmp_path):
    model, x = detector(kind), torch.rand(5, 1, 8, 8)
    save_model(model, tmp_path / "model.pt", {"test": kind})
    again = load_model(tmp_path / "model.pt")
    assert type(again) is type(model) and again.meta == {"test": kind} and again.spec == model.spec
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and torch.equal(again.score(x), model.score(x))
        log_p, score = model(x), model.score(x)
    assert log_p.shape == (5, M) and score.shape == (5,)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(5))
    assert model.score_is_confidence is (kind not in ("MCD", "Maha"))
    if model.score_is_confidence:
        assert torch.equal(score, log_p.amax(1))
    x.requires_grad_()                                      # an attack climbs the score
    (gradient,) = torch.autograd.grad(model.attack_score(x).sum(), x)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("arch, channels, size", [("LeNetDropout", 1, 28), ("VGG13", 1, 28), ("VGG13", 3, 32),
                                                  ("WideResNet", 3, 32), ("ResNet18", 1, 28)])
def test_classifiers_are_rebuilt_from_their_specs(arch, channels, size):
    classifier = CLASSIFIERS[arch](channels, size, 7).eval()
    twin = build_classifier(**classifier.spec).eval()
    twin.load_state_dict(classifier.state_dict())
    x = torch.rand(2, channels, size, size)
    with torch.no_grad():
        assert classifier(x).shape == (2, 7) and torch.equal(classifier(x), twin(x))
        assert classifier.features(x).dim() == 2
    if arch == "WideResNet":
        assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in classifier.modules()) == 37
    if arch == "VGG13":
        assert sum(isinstance(m, nn.Conv2d) for m in classifier.modules()) == 10
        classifier.train()(x[:1])           # a last batch of one image does not stop its batch norms


def test_mcd_scores_by_the_variance_over_its_passes():
    model, x = detector("MCD"), torch.rand(5, 1, 8, 8)
    net = model.base_model
    h = net.convolutions(x).detach().double().numpy()

    def linear(layer, v):
        return v @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    p = np.stack([np_softmax(linear(net.fc2, np.maximum(linear(net.fc1, h * m1), 0) * m2))
                  for m1, m2 in zip(net.dropout1.masks.numpy(), net.dropout2.masks.numpy(), strict=True)])
    with torch.no_grad():
        np.testing.assert_allclose(model.score(x).numpy(), -p.var(0).sum(1), rtol=1e-3)
        np.testing.assert_allclose(model(x).exp().numpy(), p.mean(0), rtol=1e-5)
        torch.testing.assert_close(model.score(x[2:3]), model.score(x)[2:3], rtol=1e-4, atol=0)
        assert torch.equal(model.score(x), model.score(x))      # the global generator plays no part
        assert model.score(x).amax() < 0
    assert set(net.dropout1.masks.unique().tolist()) == {0.0, 2.0}
    masks = net.dropout1.masks.clone()
    model.draw_masks(torch.Generator().manual_seed(1))          # those of `detector`
    assert torch.equal(masks, net.dropout1.masks)
    model.train()
    assert model(x).shape == (5, M) and not torch.equal(model(x), model(x))
    with pytest.raises(ValueError, match="LeNet has no dropout"):
        MCD(CLASSIFIERS["LeNet"](1, 8, M), passes=2)


def test_de_is_the_mean_of_its_members():
    model, x = detector("DE"), torch.rand(5, 1, 8, 8)
    p = np.mean([np_softmax(member(x).detach().double().numpy()) for member in model.base_model], 0)
    np.testing.assert_allclose(model(x).detach().exp().numpy(), p, rtol=1e-5)


def test_odin_moves_the_input_by_the_sign_and_an_attack_sees_the_moved_input():
    model = ODIN(Linear()).double()
    model.temperature.fill_(5)
    model.eps.fill_(0.01)
    x = images(6)
    X, = arrays(x)
    W = model.base_model.W.detach().numpy()
    p = np_softmax(X @ W / 5)
    moved = X + model.eps.item() * np.sign((W.T[p.argmax(1)] - p @ W.T) / 5)
    p = np_softmax(moved @ W / 5)
    with torch.no_grad():                                   # as `evaluate` calls it
        np.testing.assert_allclose(model.score(x).numpy(), np.log(p.max(1)), rtol=1e-12)
    x.requires_grad_()
    model.score(x).sum().backward()
    np.testing.assert_allclose(x.grad.flatten(1).numpy(), (W.T[p.argmax(1)] - p @ W.T) / 5, rtol=1e-10, atol=1e-12)
    assert model.base_model.W.grad is not None and model.base_model.W.grad.isfinite().all()


def test_maha_is_minus_the_squared_distance_to_the_closest_mean():
    model = Maha(Linear(), D, M).double()
    features, labels = torch.randn(40, D).double(), torch.arange(40) % M
    means, whitening = calibration.gaussian(features, labels, M)
    model.means.copy_(means)
    model.whitening.copy_(whitening)
    model.eps.fill_(0.01)
    F_, y, A = features.numpy(), labels.numpy(), model.base_model.A.numpy()
    mu = np.stack([F_[y == m].mean(0) for m in range(M)])
    precision = np.linalg.inv((F_ - mu[y]).T @ (F_ - mu[y]) / 40)
    np.testing.assert_allclose((whitening @ whitening.T).numpy(), precision, rtol=1e-8, atol=1e-8)

    def distances(x):
        difference = (x @ A)[:, None] - mu                                      # [B, M, D]
        return np.einsum("bmi,ij,bmj->bm", difference, precision, difference), difference
    x = images(6)
    X, = arrays(x)
    d2, difference = distances(X)
    closest = difference[np.arange(6), d2.argmin(1)]
    moved = X + model.eps.item() * np.sign(-2 * closest @ precision @ A.T)
    with torch.no_grad():
        np.testing.assert_allclose(model.score(x).numpy(), -distances(moved)[0].min(1), rtol=1e-9)
        torch.testing.assert_close(model(x), model.base_model(x).log_softmax(1))


def test_the_pseudo_inverse_ignores_features_that_never_vary():
    """And no others, however little they vary: scikit-learn's precision, on which Lee et al.'s code builds."""
    features = torch.randn(50, 6).double() * torch.tensor([1, 1, 1, 1e-2, 1e-4, 0], dtype=torch.float64)
    labels = torch.arange(50) % M
    _, whitening = calibration.gaussian(features, labels, M)
    centred = features - torch.stack([features[labels == m].mean(0) for m in range(M)])[labels]
    expected = EmpiricalCovariance(assume_centered=False).fit(centred.numpy()).precision_
    assert (np.diag(expected)[:5] > 0.1).all() and not expected[5].any()
    np.testing.assert_allclose((whitening @ whitening.T).numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["ODIN", "Maha"])
def test_calibration_takes_the_best_auroc(kind, monkeypatch):
    monkeypatch.setattr(params, "CALIBRATION_IMAGES", 30)
    monkeypatch.setattr(params, "ODIN_TEMPERATURES", (1, 100))
    monkeypatch.setattr(params, "ODIN_EPS", (0.0, 0.02))
    data = ImageSet("in", torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % M, M)
    out = ImageSet("out", torch.randint(60, 160, (40, 1, 8, 8), dtype=torch.uint8), None, 0)
    base = Softmax(CLASSIFIERS["LeNetDropout"](1, 8, M)).train()    # calibrated in evaluation mode all the same
    model, trials = calibration.calibrate(kind, base, data, out, seed=4, batch_size=16)
    assert len(trials) == {"ODIN": 4, "Maha": len(params.MAHA_EPS)}[kind]
    best = max(trials, key=lambda t: t["auroc"])
    assert model.eps.item() == pytest.approx(best["eps"])
    if kind == "ODIN":
        assert model.temperature.item() == best["temperature"]
    else:
        features = base.eval().base_model.features(data.images / 255).detach()
        torch.testing.assert_close(model.means, torch.stack([features[data.labels == m].mean(0) for m in range(M)]))
    # the report is what the detector itself gives with these values
    generator = torch.Generator().manual_seed(4)
    chosen = [s.floats(torch.randperm(len(s), generator=generator)[:30]) for s in (data, out)]
    with torch.no_grad():
        for trial in trials[::3]:
            for name in set(trial) - {"auroc"}:
                getattr(model, name).fill_(trial[name])
            assert auroc(*(model.score(x) for x in chosen)) == pytest.approx(trial["auroc"], abs=0.5)
    with pytest.raises(UserError, match="EDL"):
        calibration.calibrate(kind, detector("EDL"), data, out, 0, 16)


# --- models trained elsewhere ------------------------------------------------------------------------------

@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"module." + k: v for k, v in s.items()},
                                  lambda s: {"_orig_mod.module." + k: v for k, v in s.items()},
                                  lambda s: {"epoch": 3, "state_dict": s}])
def test_state_dicts_from_elsewhere(wrap):
    network = CLASSIFIERS["LeNet"](1, 28, 10)
    path = files.save(wrap(network.state_dict()), "elsewhere.pt")
    model = import_state_dict(path, "LeNet", "MNIST", mean=(0.1307,), std=(0.3081,))
    path = save_model(model, model_paths.model("MNIST", "elsewhere"))
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        expected = network((x - 0.1307) / 0.3081).log_softmax(1)
        torch.testing.assert_close(load_model(path)(x), expected)
        torch.testing.assert_close(import_state_dict(network.state_dict(), "LeNet", "MNIST")(x),
                                   network(x).log_softmax(1))


def test_imports_name_what_does_not_fit():
    state = CLASSIFIERS["ResNet18"](3, 32, 10).state_dict()
    without = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    import_state_dict(without, "ResNet18", "CIFAR10")           # old files have no counters
    for damaged, words in [({k: v for k, v in state.items() if k != "linear.bias"}, "missing key linear.bias"),
                           (state | {"fc.bias": torch.zeros(10)}, "unexpected key fc.bias"),
                           (state | {"bn1.weight": torch.zeros(65)}, "bn1.weight must be a tensor of shape"),
                           (state | {"bn1.weight": torch.full((64,), math.nan)}, "bn1.weight has values"),
                           ({"arch": "ResNet18"}, "names to tensors")]:
        with pytest.raises(ValueError, match=words):
            import_state_dict(damaged, "ResNet18", "CIFAR10")
    for normalisation in ({"mean": (0.5,), "std": (0.5,)}, {"mean": (0.5,) * 3},
                          {"mean": (0.5,) * 3, "std": (0.5, 0, 0.5)}):
        with pytest.raises(ValueError, match="std"):
            import_state_dict(state, "ResNet18", "CIFAR10", **normalisation)


# --- through run_training.py -------------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """run_training.py on 40 digits and 40 crops, with a mixture and a Base model, in an empty folder."""
    def few(*args, **options):
        return load_in_dist(*args, **options).subset(slice(40))

    def few_out(*args, **options):
        return load_out(*args, **options | {"n": 40})
    monkeypatch.setattr(run_training, "load_in_dist", few)
    monkeypatch.setattr(run_training, "load_out", few_out)
    monkeypatch.setattr("utils.state.SAVE_EVERY", 0.0)
    monkeypatch.setattr(params, "CALIBRATION_IMAGES", 20)
    monkeypatch.setattr(params, "ODIN_TEMPERATURES", (1, 10))
    monkeypatch.setattr(params, "ODIN_EPS", (0.0, 0.002))
    metric = PCAMetric.euclidean(784)
    gmms = (GMM(torch.rand(2, 784), torch.full((2,), v), torch.full((2,), -math.log(2)), metric) for v in (-1.0, 1.0))
    checkpoints.save_mixtures(*gmms, model_paths.mixtures("Digits", "pca", 2, "Photos"),
                              {"dataset": "Digits", "metric": "pca", "n": 2, "out_dataset": "Photos"})
    base = Softmax(CLASSIFIERS["LeNet"](1, 28, 10))
    save_model(base, model_paths.model("Digits", "Base"), {"epochs": 1})
    return tmp_path


def train(options):
    command = f"run_training.py --dataset Digits --epochs 1 --batch_size 16 {options}"
    with mock.patch.object(sys, "argv", command.split()):
        cli.run(run_training.main, run_training.parser())


def checkpoint(label):
    return load_model(model_paths.model("Digits", label))


def test_a_file_of_mixtures_says_itself_how_many_centroids_it_has(tiny):
    path = model_paths.mixtures("Digits", "pca", 2, "Photos").rename(tiny / "own.pt")
    train(f"--train_type CEDA_GMM --fit_out 1 --gmm_path {path}")
    record = json.loads(model_paths.run_record(model_paths.model("Digits", "CCU")).read_text())
    assert checkpoint("CCU").gmm_in.components == record["options"]["n"] == 2


def test_options_without_use_are_not_on_record(tiny):
    train("--train_type plain --loglam 1 --lr_gmm 0.1 --n 7 --steps 3")
    options = json.loads(model_paths.run_record(model_paths.model("Digits", "Base")).read_text())["options"]
    assert (options["loglam"], options["lr_gmm"], options["steps"]) == (1, params.LR_GMM, params.ACET_STEPS)
    assert checkpoint("Base").meta["changed"] == "--batch_size 16 --loglam 1.0"


@pytest.mark.parametrize("label", list(model_paths.LABELS))
def test_every_label_is_one_command(label, tiny):
    options = model_paths.LABELS[label] + {"DE": " --members 2"}.get(label, "") + " --n 2 --steps 2"
    train(options)
    model = checkpoint(label)
    record = json.loads(model_paths.run_record(model_paths.model("Digits", label)).read_text())
    assert record["label"] == model.meta["label"] == label and model.meta["epochs"] == 1
    assert model.meta["out_dataset"] == (None if label in ("Base", "ACET2", "MCD", "EDL", "DE", "GAN") else "Photos")
    assert 0 <= record["test_error"] <= 100 and record["history"]
    if label in ("ODIN", "Maha"):
        assert record["eps"] == pytest.approx(model.eps.item())
    assert not list(tiny.rglob("*.state"))
    assert type(model).__name__ == {"CCU": "CCU", "CCUs": "CCU"}.get(
        label, label if label in ("MCD", "EDL", "DE", "ODIN", "Maha") else "Softmax")
    assert model.base_model.spec["arch"] == ("LeNetDropout" if label == "MCD" else "LeNet")
    if label in ("CCU", "CCUs"):
        assert (model.gmm_out is None) == (label == "CCUs")


def test_a_label_with_a_seed_is_calibrated_on_the_base_of_that_seed(tiny, capsys):
    with pytest.raises(SystemExit):
        train("--train_type ODIN --seed 1 --label ODIN-seed1")
    assert "--train_type plain --seed 1 --label Base-seed1" in capsys.readouterr().err
    train("--train_type plain --seed 1 --label Base-seed1")
    train("--train_type ODIN --seed 1 --label ODIN-seed1")
    calibrated, base = (dict(checkpoint(label).base_model.named_parameters()) for label in ("ODIN-seed1", "Base-seed1"))
    assert all(torch.equal(calibrated[name], value) for name, value in base.items())


def test_mixtures_of_another_folder_of_photos_are_refused(tiny, capsys):
    path = model_paths.mixtures("Digits", "pca", 2, "Folder")
    gmm_in, gmm_out, meta = checkpoints.load_mixtures(model_paths.mixtures("Digits", "pca", 2, "Photos"), "")
    checkpoints.save_mixtures(gmm_in, gmm_out, path, meta | {"out_dataset": "Folder", "out_dir": "here"})
    with pytest.raises(SystemExit):
        train(f"{model_paths.LABELS['CCU']} --n 2 --out_dataset Folder --out_dir there")
    assert "fitted with out_dir here, not there" in capsys.readouterr().err


class Killed(Exception):
    pass


def test_a_killed_run_does_not_go_on_with_other_mixtures(tiny, monkeypatch, capsys):
    ccu = model_paths.LABELS["CCU"] + " --n 2"
    killed(monkeypatch, train, ccu)
    path = model_paths.mixtures("Digits", "pca", 2, "Photos")
    gmm_in, gmm_out, meta = checkpoints.load_mixtures(path, "")
    with torch.no_grad():
        gmm_in.mu[0, 0] += 1e-3
    checkpoints.save_mixtures(gmm_in, gmm_out, path, meta)
    with pytest.raises(SystemExit):
        train(ccu + " --resume 1")
    assert "start without --resume" in capsys.readouterr().err


def test_gan_keeps_its_generators_pass_out_of_the_running_statistics():
    """Evaluation normalises by one update a step, of the classifier's own batch [x; generated]."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(1)
    model = Softmax(torch.nn.Sequential(norm, torch.nn.Flatten(), torch.nn.Linear(784, 10))).train()
    batches = []
    norm.register_forward_hook(lambda module, inputs, output: batches.append(inputs[0].detach()))
    objective, x, y = objectives.GAN(1, 28, torch.device("cpu")), torch.rand(6, 1, 28, 28), torch.arange(6)
    objective(model, x, y, None, torch.Generator().manual_seed(0))
    generated, both = batches
    assert len(generated) == 6 and len(both) == 12 and norm.momentum == 0.1
    assert norm.running_mean.item() == pytest.approx(0.1 * both.mean().item(), rel=1e-5)


@pytest.mark.parametrize("method, after", [
    ("plain", 4), ("OE", 4), ("CEDA_GMM --fit_out 1 --n 2", 4), ("MCD", 4), ("GAN", 4), ("DE --members 2", 3),
    ("DE --members 2", 11)])
def test_a_killed_run_goes_on_to_the_same_weights(method, after, tiny, monkeypatch):
    """Out-images and mixtures, dropout, the GAN's two networks and their optimisers, and an ensemble killed in its 1st
    or 2nd member.  The state is saved after each of an epoch's 3 steps."""
    options = f"--train_type {method} --epochs 2 --augm_flag 1"
    train(options + " --label whole")
    save, count = State.save, []

    def dying(*args, **kwargs):
        save(*args, **kwargs)
        count.append(1)
        if len(count) == after:
            raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(State, "save", dying)
        with pytest.raises(Killed):
            train(options + " --label halves")
    torch.manual_seed(99)
    count.clear()
    with monkeypatch.context() as patch:
        patch.setattr(State, "save", lambda *args, **kwargs: (save(*args, **kwargs), count.append(1)))
        train(options + " --label halves --resume 1")
    assert len(count) == (12 if "DE" in method else 6) - after          # no step is made twice
    whole, halves = (checkpoint(label).state_dict() for label in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    assert not list(tiny.rglob("*.state"))
