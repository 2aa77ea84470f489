"""Turn a state dict of the authors' CCU models into a checkpoint of ours.

    python load_pretrained.py --dataset CIFAR10 --pretrained CIFAR10.pt

Reads tensors only, checks every key and shape against the data set, and writes checkpoints/CIFAR10/CCU.pt, which
gen_eval.py and gen_attack_stats.py then find.
"""

import math

import torch

import model_paths
import params
from models import CCU, GMM, PCAMetric, Softmax, build_classifier
from utils import checkpoints, cli, files
from utils.errors import UserError, warn


def main(args):
    state = files.load(args.pretrained, mend="give the authors' state dict")
    path = model_paths.model(args.dataset, args.label)
    files.check_writable(path)
    try:
        model = from_authors(state, params.DATASETS[args.dataset])
    except ValueError as error:
        raise UserError(f"{args.pretrained} is no state dict of a CCU model for {args.dataset}: {error}") from error
    files.lock(path)        # a training may be making it
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} exists; --overwrite 1 replaces it, --label NAME puts the new one beside it")
    checkpoints.save_model(model, path, {"dataset": args.dataset, "label": args.label, "train_type": "CEDA_GMM",
                                         "source": "the authors' weights"})
    print(f"{model.gmm_in.components} + {model.gmm_out.components} centroids, log lambda {model.loglam:.3g}\n"
          f"wrote {path}")


def from_authors(state: dict, dataset: params.Dataset) -> CCU:
    """The CCU model of a state dict with the keys base_model.*, mm.*, mm_out.*, loglam, log_K.

    Raises ValueError with the first key that is missing, superfluous, misshapen, or at odds with another.
    """
    checkpoints.check_state_dict(state)
    D = dataset.channels * dataset.size ** 2
    state = dict(state)
    network = Softmax(build_classifier(dataset.arch, dataset.channels, dataset.size, dataset.classes))
    checkpoints.load_state(network, {key: state.pop(key) for key in list(state) if key.startswith("base_model.")})

    def take(key: str, *shape: int | None) -> torch.Tensor:
        if key not in state:
            raise ValueError(f"missing key {key}")
        value = state.pop(key)
        if len(value.shape) != len(shape) or any(want not in (None, got) for want, got in
                                                 zip(shape, value.shape, strict=True)):
            raise ValueError(f"{key} must have shape {['K' if s is None else s for s in shape]}, "
                             f"got {list(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"{key} has values that are not finite")
        return value.detach().float()

    gmms, metric = [], None
    for name in ("mm", "mm_out"):
        s = take(f"{name}.metric.singular_values", D)
        own = PCAMetric(take(f"{name}.metric.comp_vecs", D, D), s)
        agree(f"{name}.metric.singular_values_sqrt", take(f"{name}.metric.singular_values_sqrt", D), s.sqrt())
        if metric is None and not torch.allclose(own.comp_vecs @ own.comp_vecs.T, torch.eye(D), atol=1e-3):
            raise ValueError(f"{name}.metric.comp_vecs has rows that are not orthonormal")
        if metric is not None and not own.equals(metric):
            raise ValueError("mm.metric and mm_out.metric differ, and the certificate needs one metric")
        metric = metric or own
        norm_const = D / 2 * math.log(2 * math.pi) + metric.log_det / 2
        agree(f"{name}.norm_const", take(f"{name}.norm_const"), norm_const, atol=1e-2)      # a sum of D logarithms
        mu = take(f"{name}.mu", None, D)
        K = len(mu)
        alpha = take(f"{name}.alpha", K)
        if abs(total := alpha.logsumexp(0).item()) > 1e-3:
            warn(f"the weights exp({name}.alpha) sum to {math.exp(total):.4g}, not to 1")
        gmms.append(GMM(mu, take(f"{name}.logvar", K), alpha, metric))
    if gmms[1].logvar.min() <= gmms[0].logvar.max():
        warn("not all variances of mm_out are above all of mm: far from the data the confidence need not fall to 1/M")
    agree("log_K", take("log_K"), torch.tensor(-math.log(dataset.classes)))
    loglam = take("loglam").item()
    if state:
        raise ValueError(f"unexpected key {next(iter(state))}")
    return CCU(network.base_model, *gmms, loglam, dataset.classes)


def agree(key: str, value: torch.Tensor, expected: torch.Tensor, atol: float = 0.0) -> None:
    """A constant that our model derives must be what the file says, up to float32's rounding."""
    if not torch.allclose(value, expected, rtol=1e-5, atol=atol):
        raise ValueError(f"{key} is not what the file's metric and classes give")


def parser() -> cli.Parser:
    p = cli.Parser(__doc__).common()
    p.add_argument("--dataset", required=True, choices=[name for name in params.DATASETS if name != "Folder"],
                   metavar="D", help="the in-distribution of the model")
    p.add_argument("--pretrained", type=cli.path, required=True, metavar="FILE", help="the authors' state dict (.pt)")
    p.add_argument("--label", type=cli.name, default="CCU", help="label in the tables (CCU)")
    p.add_argument("--overwrite", type=cli.flag, default=False, help="1 = replace an existing checkpoint (0)")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
