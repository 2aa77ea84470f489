"""Two moons in the unit square, and the two networks of Figure 1 (README: Figures)."""

import contextlib

import torch
from torch import Tensor, nn

import params
from models import CCU, Detector, PCAMetric, Softmax
from utils import objectives
from utils.fit import fit_gmm
from utils.training import Settings, lr_factor, make_optimizer, set_lrs, take_step


def points(seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [n, 2] in the unit square and the moon y [n] in {0, 1} on which each lies."""
    from sklearn.datasets import make_moons
    p = params.TWO_MOONS
    x, y = make_moons(p.points, noise=p.noise, random_state=seed)
    return torch.from_numpy((x + 1.6) / 4).float(), torch.from_numpy(y)


@contextlib.contextmanager
def one_thread():
    """For tensors so small that several threads gain nothing; where other work keeps the cores busy, they would wait
    for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(train_type: str, x: Tensor, y: Tensor, epochs: int, seed: int = 0) -> Detector:
    """An MLP 2-32-64-2 on x, y: "plain", or "CEDA_GMM", which is CCUs with out-points uniform on the square."""
    p = params.TWO_MOONS
    torch.manual_seed(seed)
    mlp = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
    if train_type == "plain":
        model = Softmax(mlp)
    else:
        metric = PCAMetric.euclidean(2)
        gmm_in, _ = fit_gmm(x, metric, p.centroids, params.REG_COVAR, seed)
        model = CCU(mlp, gmm_in, None, 0.0, 2)
    objective = objectives.OBJECTIVES[train_type]()
    settings = Settings("sgd", p.lr, p.lr_gmm, params.WEIGHT_DECAY, ("mu", "var"), epochs, p.batch_size, seed)
    optimizer = make_optimizer(model, settings)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        set_lrs(optimizer, lr_factor(objective.schedule, epoch / epochs))
        for batch in torch.randperm(len(x), generator=generator).split(p.batch_size):
            z = torch.rand(len(batch), 2, generator=generator) if objective.needs_out else None
            take_step(model, objective, optimizer, x[batch], y[batch], z, generator)
    return model.eval()


@torch.no_grad()
def on_grid(model: Detector, n: int = 151) -> tuple[Tensor, Tensor]:
    """Confidence and margin [n, n] on the unit square; entry [i, j] is at x = (j, i) / (n - 1).

    The margin is log p(1|x,i) - log p(0|x,i): p(y|x) has the same decision boundary, but far from the data CCU's
    confidences differ by less than a float32 can tell.
    """
    axis = torch.linspace(0, 1, n)
    x = torch.cartesian_prod(axis, axis).flip(1)
    log_softmax = model.log_softmax(x)
    return model(x).amax(1).exp().view(n, n), (log_softmax[:, 1] - log_softmax[:, 0]).view(n, n)
