"""How strong the attack is: mean score reached against gradients, beside plain gradient steps.

    python benchmarks/attack_strength.py --dataset Digits

Attacks trained models of a data set (--models) from uniform noise, inside 1, 0.02 and 0.003 times the radius that CCU
certifies, once from each seed.  `plain` takes un-normalised gradient steps in the metric's coordinates, with the same
projection, and for each number of gradients the best of its step sizes, chosen afterwards.  The last line of a block
is how many gradients the attack needs for what plain reaches, up to a millionth.  Of CCU the score is
log(confidence - 1/M), as in Table 1.  The first blocks are of linear scores, whose maximum is known: the share of it,
in %, on average and at the worst of the seeds.  Some minutes on a CPU.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from measure import climb

from models import CCU, PCAMetric, certified_radius
from utils import cli
from utils.attack import score_and_gradient
from utils.data import load_in_dist
from utils.errors import UserError
from utils.region import Coordinates, Region
from utils.trained import check_fit, load_ccu, load_models

CHECKPOINTS = (10, 25, 50, 100)
ROUNDING = 1e-6         # of a score in float32
FRACTIONS = (1.0, 0.02, 0.003)
STEP_SIZES = {False: (0.1, 1.0, 10.0, 100.0, 1e3, 1e4), True: (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)}    # True: CCU


class Recorder:
    """An objective that remembers the mean and the least of the best scores after each call."""

    def __init__(self, objective):
        self.objective, self.best, self.history, self.worst = objective, None, [], []

    def __call__(self, x):
        score = self.objective(x)
        now = score.detach().nan_to_num(nan=-torch.inf)
        self.best = now if self.best is None else torch.maximum(self.best, now)
        self.history.append(self.best.mean().item())
        self.worst.append(self.best.min().item())
        return score


def plain(objective, region: Region, steps: int, eta: float) -> None:
    """Un-normalised gradient ascent in the metric's coordinates."""
    backward, weights = region.coordinates.backward, region.coordinates.weights
    point = region.start(torch.zeros_like(region.seeds))
    for k in range(steps):
        _, gradient = score_and_gradient(objective, region.images(point.delta))
        g = eta * gradient.flatten(1) @ backward.T
        length = (g.square() / weights).sum(1, keepdim=True).sqrt().clamp_min(1e-30)
        point = region.project(point.along + g / weights, point, length, region.coordinates.penalty(k))


def known_maximum(metric: PCAMetric, seeds: torch.Tensor, radii: torch.Tensor, seed: int):
    """Gradients [N, D] of linear scores, their greatest rise [N] in ball and cube, and the balls' radii [N]; float64.

    By Karush, Kuhn and Tucker, x is maximal in the cube and the ball on whose border it lies if the gradient is
    A (x - seed) + n, A the metric's matrix, with n pointing out of the cube.  x is random at most `radii` away.
    """
    V, s = metric.comp_vecs.double(), metric.singular_values.double()
    start = seeds.flatten(1).double()
    z, share = torch.randn(2, *start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(V)
    x = (start + radii[:, None] * z / z.norm(dim=1, keepdim=True) * s.sqrt() @ V).clamp(0, 1)
    normal = (x - start) @ V.T / s @ V
    outwards = (x == 1).double() - (x == 0).double()
    gradient = normal + normal.abs().mean(1, keepdim=True) * share.abs() * outwards
    return gradient, ((x - start) * gradient).sum(1), ((x - start) * normal).sum(1).sqrt()


def header(title: str) -> str:
    return f"\n{title}".ljust(25) + "".join(f"{n:>14}" for n in CHECKPOINTS)


@torch.no_grad()
def main(args):
    device = cli.device(args.gpu)
    cli.keep_freed_memory()
    test = load_in_dist(args.dataset, "test", args.data_dir, args.download, args.image_size)
    models = load_models(args.dataset, args.models, device)
    ccu = load_ccu(args.dataset, "CCU", device)
    check_fit(models | {"CCU": ccu}, test)
    seeds = torch.rand(args.n, *test.images.shape[1:], generator=torch.Generator().manual_seed(args.seed)).to(device)
    radii = certified_radius(ccu, seeds, method="paper")
    if zero := int((radii == 0).sum()):
        raise UserError(f"nothing is certified around {zero} of {len(radii)} seeds, where no attack can move: choose "
                        "another --seed, or another CCU")
    steps, metric = max(CHECKPOINTS), ccu.gmm_in.metric
    coordinates = Coordinates(metric)
    for fraction in FRACTIONS:
        gradient, best, balls = known_maximum(metric, seeds, fraction * radii, args.seed)
        ours = Recorder(lambda x, g=gradient, b=best: ((x - seeds).flatten(1).double() * g).sum(1) / b)
        climb(ours, Region(coordinates, seeds, balls), steps)
        print(header(f"{args.dataset} linear, {fraction:g} R"))
        for name, values in {"mean": ours.history, "worst": ours.worst}.items():
            print(name.ljust(24) + "".join(f"{100 * values[n - 1]:14.4f}" for n in CHECKPOINTS), flush=True)
    for label, model in models.items():
        for fraction in FRACTIONS:
            region = Region(coordinates, seeds, radii * fraction)
            ours = Recorder(model.attack_score)
            climb(ours, region, steps)
            plains = []
            for eta in STEP_SIZES[isinstance(model, CCU)]:
                plains.append(Recorder(model.attack_score))
                plain(plains[-1], region, steps, eta)
            best = [max(p.history[n - 1] for p in plains) for n in CHECKPOINTS]
            enough = [b - ROUNDING * abs(b) for b in best]
            needed = [next((i + 1 for i, value in enumerate(ours.history) if value >= b), None) for b in enough]
            print(header(f"{args.dataset} {label}, {fraction:g} R"))
            print("attack".ljust(24) + "".join(f"{ours.history[n - 1]:14.6g}" for n in CHECKPOINTS))
            print("plain, best step size".ljust(24) + "".join(f"{b:14.6g}" for b in best))
            print("attack needs".ljust(24) + "".join(f"{'never' if n is None else n:>14}" for n in needed), flush=True)


def parser() -> cli.Parser:
    p = cli.Parser(__doc__).dataset().common()
    p.add_argument("--models", nargs="+", metavar="LABEL", default=["Base", "CCU"], help="labels (Base CCU)")
    p.add_argument("--n", type=cli.integer(1), default=16, help="seeds (16)")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
