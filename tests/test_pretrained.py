"""The authors' state dicts, built here key by key, against the formulas of the published model."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script

import load_pretrained
import params
from utils import files, load_model


def layer(g, *shape):
    return torch.randn(shape, generator=g) * (2 / math.prod(shape[1:])) ** 0.5


def lenet_weights(g):
    return {"conv1.weight": layer(g, 32, 1, 5, 5), "conv1.bias": torch.zeros(32),
            "conv2.weight": layer(g, 64, 32, 5, 5), "conv2.bias": torch.zeros(64),
            "fc1.weight": layer(g, 1024, 3136), "fc1.bias": torch.zeros(1024),
            "fc2.weight": layer(g, 10, 1024), "fc2.bias": torch.zeros(10)}


def lenet(w, x):
    x = F.max_pool2d(F.relu(F.conv2d(x, w["conv1.weight"], w["conv1.bias"], padding=2)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, w["conv2.weight"], w["conv2.bias"], padding=2)), 2)
    x = F.relu(x.flatten(1) @ w["fc1.weight"].T + w["fc1.bias"])
    return x @ w["fc2.weight"].T + w["fc2.bias"]


def bn(g, name, planes):
    return {f"{name}.weight": torch.rand(planes, generator=g) + 0.5, f"{name}.bias": torch.randn(planes, generator=g),
            f"{name}.running_mean": torch.randn(planes, generator=g),
            f"{name}.running_var": torch.rand(planes, generator=g) + 0.5,
            f"{name}.num_batches_tracked": torch.tensor(7)}


def resnet_weights(g):
    w = {"conv1.weight": layer(g, 64, 3, 3, 3), **bn(g, "bn1", 64)}
    width = 64
    for stage, planes in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            w |= {f"{name}.conv1.weight": layer(g, planes, width, 3, 3), **bn(g, f"{name}.bn1", planes)}
            w |= {f"{name}.conv2.weight": layer(g, planes, planes, 3, 3), **bn(g, f"{name}.bn2", planes)}
            if width != planes:
                w |= {f"{name}.shortcut.0.weight": layer(g, planes, width, 1, 1), **bn(g, f"{name}.shortcut.1", planes)}
            width = planes
    return w | {"linear.weight": layer(g, 10, 512), "linear.bias": torch.zeros(10)}


def resnet(w, x):
    def norm(name, x):
        return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"],
                            w[f"{name}.bias"])
    x = F.relu(norm("bn1", F.conv2d(x, w["conv1.weight"], padding=1)))
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(f"{name}.bn1", F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1)))
            y = norm(f"{name}.bn2", F.conv2d(y, w[f"{name}.conv2.weight"], padding=1))
            if f"{name}.shortcut.0.weight" in w:
                x = norm(f"{name}.shortcut.1", F.conv2d(x, w[f"{name}.shortcut.0.weight"], stride=stride))
            x = F.relu(x + y)
    return F.avg_pool2d(x, 4).flatten(1) @ w["linear.weight"].T + w["linear.bias"]


def authors_state(dataset, K=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    info = params.DATASETS[dataset]
    D = info.channels * info.size ** 2
    weights = lenet_weights(g) if info.arch == "LeNet" else resnet_weights(g)
    s = torch.logspace(2, -1, D)
    V = torch.linalg.qr(torch.randn(D, D, generator=g))[0]
    state = {f"base_model.{key}": value for key, value in weights.items()}
    for name, var in (("mm", 0.02), ("mm_out", 0.3)):
        state |= {f"{name}.mu": torch.rand(K, D, generator=g), f"{name}.alpha": torch.full((K,), -math.log(K)),
                  f"{name}.logvar": torch.rand(K, generator=g) + math.log(var),
                  f"{name}.norm_const": D / 2 * math.log(2 * math.pi) + s.log().sum() / 2,
                  f"{name}.metric.comp_vecs": V, f"{name}.metric.singular_values": s,
                  f"{name}.metric.singular_values_sqrt": s.sqrt()}
    return weights, state | {"loglam": torch.tensor(0.5), "log_K": torch.tensor(-math.log(10))}


def published_output(state, log_softmax, x):
    """numpy, float64, every difference rotated: the published model's arithmetic."""
    state = {key: value.double().numpy() for key, value in state.items()}
    log_p = []
    for name in ("mm", "mm_out"):
        m = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        difference = x.flatten(1).double().numpy()[None] - m["mu"][:, None]                     # [K, B, D]
        rotated = difference @ m["metric.comp_vecs"].T / m["metric.singular_values_sqrt"]
        D = x[0].numel()
        terms = (m["alpha"] - D / 2 * m["logvar"] - m["norm_const"])[:, None] - \
            (rotated ** 2).sum(2) / (2 * np.exp(m["logvar"]))[:, None]
        log_p.append(np.logaddexp.reduce(terms, axis=0))
    p_in, p_out = log_p[0][:, None], log_p[1][:, None] + state["loglam"]
    return np.logaddexp(log_softmax.double().numpy() + p_in, p_out + state["log_K"]) - np.logaddexp(p_in, p_out)


@pytest.mark.parametrize("dataset, network", [("MNIST", lenet), ("CIFAR10", resnet)])
def test_authors_weights_give_the_published_output(dataset, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, state = authors_state(dataset)
    torch.save(state, "authors.pt")
    run_script(f"load_pretrained.py --dataset {dataset} --pretrained authors.pt")
    model = load_model(f"checkpoints/{dataset}/CCU.pt")
    info = params.DATASETS[dataset]
    x = torch.rand(4, info.channels, info.size, info.size)
    near = state["mm.mu"][:2].reshape(2, *x.shape[1:])      # where the classifier counts
    x = torch.cat((x, near))
    expected = published_output(state, network(weights, x).log_softmax(1), x)
    with torch.no_grad():
        np.testing.assert_allclose(model(x).numpy(), expected, atol=2e-3)
    assert model(x).exp().amax(1).max() > 0.11              # some point is not uniform


def broken(change):
    _, state = authors_state("MNIST")
    change(state)
    return state


@pytest.mark.parametrize("culprit, change", [
    ("mm.mu", lambda s: s.pop("mm.mu")),
    ("base_model.fc1.weight", lambda s: s.update({"base_model.fc1.weight": torch.zeros(3, 3)})),
    ("missing key base_model.conv2.bias", lambda s: s.pop("base_model.conv2.bias")),
    ("unexpected key surprise", lambda s: s.update(surprise=torch.zeros(1))),
    ("mm_out.logvar", lambda s: s.update({"mm_out.logvar": torch.zeros(6)})),
    ("mm.norm_const", lambda s: s["mm.norm_const"].add_(0.1)),
    ("metric", lambda s: s.update({"mm_out.metric.comp_vecs": torch.eye(784)})),
    ("singular_values_sqrt", lambda s: s["mm.metric.singular_values_sqrt"].mul_(1.001)),
    ("mm.metric.comp_vecs .* not orthonormal", lambda s: s["mm.metric.comp_vecs"].mul_(2)),
    ("not finite", lambda s: s["mm.mu"].fill_(math.nan)),
    ("log_K", lambda s: s.update(log_K=torch.tensor(-math.log(100)))),
])
def test_wrong_state_dicts_are_refused_by_name(culprit, change):
    with pytest.raises(ValueError, match=culprit):
        load_pretrained.from_authors(broken(change), params.DATASETS["MNIST"])


def test_weights_that_do_not_sum_to_one_are_named(capsys):
    load_pretrained.from_authors(broken(lambda s: s["mm_out.alpha"].add_(math.log(2))), params.DATASETS["MNIST"])
    assert capsys.readouterr().err == "warning: the weights exp(mm_out.alpha) sum to 2, not to 1\n"


def test_mixtures_for_which_the_theorem_does_not_hold_are_named(capsys):
    load_pretrained.from_authors(broken(lambda s: s["mm_out.logvar"][3:4].copy_(s["mm.logvar"].max())),
                                 params.DATASETS["MNIST"])
    assert "not all variances of mm_out are above all of mm" in capsys.readouterr().err


def test_an_existing_checkpoint_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, state = authors_state("MNIST")
    torch.save(state, "authors.pt")
    load = "load_pretrained.py --dataset MNIST --pretrained authors.pt"
    run_script(load)
    path = tmp_path / "checkpoints/MNIST/CCU.pt"
    first = path.read_bytes()
    _, state = authors_state("MNIST", seed=1)
    torch.save(state, "authors.pt")
    with pytest.raises(SystemExit):
        run_script(load)
    assert "exists" in capsys.readouterr().err
    with path.with_name(".CCU.pt.lock").open("w") as training:
        files._lock(training.fileno())
        with pytest.raises(SystemExit):
            run_script(f"{load} --overwrite 1")
    assert "is being made" in capsys.readouterr().err and path.read_bytes() == first
    run_script(f"{load} --overwrite 1")
    assert path.read_bytes() != first
