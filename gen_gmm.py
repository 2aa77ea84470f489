"""Fit and save the two Gaussian mixtures that a CCU model starts from.

    python gen_gmm.py --dataset MNIST --PCA 1 --augm_flag 1

Fits the metric and the in-mixture on the in-distribution's training images and the out-mixture, in the same
metric, on about 25,000 out-images; writes checkpoints/<dataset>/gmm/<metric>_n<n>_<out_dataset>.pt.  MNIST with
100 centroids takes about half a minute on two cores; --dataset Digits needs no data and takes seconds.
"""

import time
from pathlib import Path

import torch
from tqdm import tqdm

import model_paths
import params
from models import PCAMetric
from utils import checkpoints, cli, files
from utils.batches import Augmentation, ImageSet, augment
from utils.data import load_in_dist
from utils.errors import UserError, warn
from utils.fit import fit_gmm
from utils.out_data import load_out, resolve
from utils.state import State

TOLD = ("reg_covar", "data_used")       # told in a table's notes where they are not the defaults


def main(args):
    device = cli.device(args.gpu)
    name, out_name = cli.metric_name(args), resolve(args.out_dataset, args.data_dir)
    paths = {n: model_paths.mixtures(args.dataset, name, n, out_name) for n in args.n}
    files.check_writable(*paths.values())
    data = load_in_dist(args.dataset, "train", args.data_dir, args.download, args.image_size)
    defaults = params.DATASETS[args.dataset]
    used = args.data_used or min(len(data), defaults.fit_images or len(data))
    if used > len(data):
        raise UserError(f"--data_used {used}: {args.dataset} has {len(data)} training images")
    if used < len(data):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))
        data = data.subset(order[:used])
    check_enough(args.n, data)
    out = load_out(out_name, data, args.data_dir, args.out_dir, n=params.OUT_FIT_IMAGES, seed=args.seed,
                   download=args.download)
    check_enough(args.n, out)

    jobs = {}       # file -> what decides it
    images = f"of {files.digest(data.images, out.images)}"      # a folder may have changed since
    for n, path in paths.items():
        options = {"dataset": args.dataset, "metric": name, "n": n, "out_dataset": out_name,
                   **cli.own_folders(args, out_name),
                   "seed": args.seed, "images": images, "shape": list(data.images.shape[1:]),
                   "reg_covar": args.reg_covar, "augm_flag": args.augm_flag}
        files.lock(path)
        if args.resume and is_there(options, path):
            print(f"{path} is there")
        else:
            jobs[path] = options
    if not jobs:
        return

    augmentation = Augmentation.of(defaults) if args.augm_flag else None
    X, X_out = (one_pass(images.to(device), augmentation, args.seed) for images in (data, out))
    metric = make_metric(name, X)
    z, z_out = metric.transform(X), metric.transform(X_out)
    half_log_det = metric.log_det.item() / 2        # EM's log-likelihoods are those of z; what is told is those of x
    for path, options in jobs.items():
        start, n = time.monotonic(), options["n"]
        states = [State(state, options, args.resume) for state in model_paths.em_states(path)]
        (gmm_in, fit_in), (gmm_out, fit_out) = (
            fit_gmm(images, metric, n, args.reg_covar, args.seed, progress(which, n, half_log_det, args.verbose),
                    state)
            for which, images, state in zip(("in", "out"), (z, z_out), states, strict=True))
        if not all(value.isfinite().all() for gmm in (gmm_in, gmm_out) for value in gmm.state_dict().values()):
            for state in states:
                state.remove()
            raise UserError(f"--n {n}: the fitted mixtures are not finite; choose fewer centroids or a larger "
                            "--reg_covar")
        meta = {**options, "changed": cli.spelled(cli.given(args, parser(), TOLD)),
                "variances": [gmm_in.logvar[0].exp().item(), gmm_out.logvar[0].exp().item()],
                "log_likelihoods": [fit.log_likelihoods[-1] - half_log_det for fit in (fit_in, fit_out)],
                "seconds": time.monotonic() - start}
        checkpoints.save_mixtures(gmm_in, gmm_out, path, meta)
        for state in states:
            state.remove()
        print(f"n = {n}: in-variance {meta['variances'][0]:.4g} (log-likelihood {meta['log_likelihoods'][0]:.1f} per "
              f"image of {len(z)}), out-variance {meta['variances'][1]:.4g} ({meta['log_likelihoods'][1]:.1f}, "
              f"{len(z_out)} of {out_name}), {meta['seconds']:.1f} s\nwrote {path}")


def check_enough(n: list[int], images: ImageSet) -> None:
    if max(n) > len(images):
        raise UserError(f"--n {max(n)}: {images.name} has {len(images)} images; choose fewer centroids")


def is_there(options: dict, path: Path) -> bool:
    """Whether the mixtures are finished: fitted with these options, and no state left by a run that was killed."""
    if not path.exists():
        return False
    meta = checkpoints.load_mixtures(path, "start without --resume")[2]
    return meta | options == meta and not any(state.exists() for state in model_paths.em_states(path))


def one_pass(images: ImageSet, augmentation: Augmentation | None, seed: int) -> torch.Tensor:
    """Every image once, augmented as in training: [n, D] in [0, 1]."""
    generator = torch.Generator(images.images.device).manual_seed(seed)
    index = torch.arange(len(images), device=images.images.device)
    return torch.cat([augment(images.images, block, augmentation, generator).flatten(1)
                      for block in index.split(8192)])


def make_metric(name: str, X: torch.Tensor) -> PCAMetric:
    if name == "euclidean":
        return PCAMetric.euclidean(X.shape[1]).to(X.device)
    try:
        metric = PCAMetric.fit(X, params.MIN_SV_FACTOR, whiten=name == "mahalanobis")
    except ValueError as error:
        raise UserError(f"{error}: are these the data set's own files?") from error
    s = metric.singular_values          # descending, the floored ones equal
    floored, few = (s == s[-1]).sum().item(), len(X) <= len(s)
    if few or floored > len(s) / 2:
        more = (f"; {len(X)} images span no more than {len(X) - 1} directions, so that new ones will look far away: "
                "give more images, a smaller --image_size, or --PCA 0" if few else "")
        warn(f"{floored} of {len(s)} singular values are at the floor: the images hardly vary in these "
             f"directions, and any change along them counts as far away{more}")
    return metric


def progress(which: str, n: int, half_log_det: float, verbose: bool):
    """A line or a bar that follows EM."""
    bar = tqdm(desc=f"EM {which}, n = {n}", unit="step", leave=False, disable=True if verbose else None)

    def follow(iteration: int, log_likelihood: float):
        log_likelihood -= half_log_det
        bar.update()
        bar.set_postfix(log_likelihood=f"{log_likelihood:.2f}")
        if verbose:
            print(f"EM {which}, n = {n}, step {iteration}: log-likelihood {log_likelihood:.4f}")
    return follow


def parser() -> cli.Parser:
    p = cli.Parser(__doc__).dataset().metric().out_dataset().common()
    p.add_argument("--augm_flag", type=cli.flag, default=False, help="1 = fit on augmented images (0)")
    p.add_argument("--n", type=cli.integer(1), nargs="+", default=[params.CENTROIDS], help="centroids per mixture; "
                   f"several values write several files ({params.CENTROIDS})")
    p.add_argument("--data_used", type=cli.integer(2), help="fit on so many in-images (all; of SVHN "
                   f"{params.DATASETS['SVHN'].fit_images})")
    p.add_argument("--reg_covar", type=cli.number(0, 1e6), default=params.REG_COVAR,
                   help=f"added to the fitted variances ({params.REG_COVAR})")
    p.add_argument("--resume", type=cli.flag, default=False, help="1 = go on with an interrupted run, keep the files "
                   "that it finished (0)")
    p.add_argument("--verbose", type=cli.flag, default=False, help="1 = print the log-likelihood of every step (0)")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
