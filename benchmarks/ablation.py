"""What should a user choose?  CCU with each metric, one or two mixtures, and several numbers of centroids.

    python benchmarks/ablation.py --dataset MNIST --epochs 2 --amp 1

Departs from the default (metric pca, two mixtures, K = 100) in one choice at a time, trains each model anew with the
repository's own scripts in ablation/<name>/, and writes results/ablation_<name>.csv and .txt: test error, AUC against
each OOD set and their mean, and the radii certified (tight bound, ratio 1.1) around uniform noise.  Radii of
two metrics do not compare, so each also stands as a share of the distance to the closest test image in its metric.
What the same options have made already is kept.  On MNIST the fits take some 6 minutes on a CPU
core; then come seven trainings.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch

import model_paths
import params
from models import CCU, certified_radius
from utils import checkpoints, cli, evaluation, files, records, tables
from utils.data import load_in_dist
from utils.images import list_images
from utils.records import ROOT

VARIANTS = {        # label -> metric, mixtures, centroids
    "sqrt-s": ("--PCA 1", "--fit_out 1", 100),
    "mahalanobis": ("--PCA 1 --metric mahalanobis", "--fit_out 1", 100),
    "euclidean": ("--PCA 0", "--fit_out 1", 100),
    "one-mixture": ("--PCA 1", "--fit_out 0", 100),
    "K10": ("--PCA 1", "--fit_out 1", 10),
    "K300": ("--PCA 1", "--fit_out 1", 300),
}
SEEDS = 1000            # uniform noise around which radii are certified


def main(args):
    name = args.name or args.dataset
    stem = model_paths.ablation(name)
    files.check_writable(stem, *tables.files_of(stem))
    test = load_in_dist(args.dataset, "test", args.data_dir, args.download, args.image_size)
    for _, images in args.ood:      # is it there?
        list_images(images)
    folder = Path("ablation") / name
    folder.mkdir(parents=True, exist_ok=True)

    def from_there(path):
        return os.path.relpath(path, folder)

    def run(script, *options):
        print(f"\n{script} {' '.join(options)}", flush=True)
        if code := subprocess.run([sys.executable, ROOT / script, *options], cwd=folder).returncode:
            sys.exit(code)

    def train(label, *method):
        run("run_training.py", *training, *method, "--label", label, "--resume", "1")

    common = [*f"--dataset {args.dataset} --image_size {args.image_size} --seed {args.seed}".split(),
              "--download", str(int(args.download)), "--data_dir", from_there(args.data_dir)]
    if args.gpu is not None:
        common += ["--gpu", str(args.gpu)]
    out = ["--out_dataset", args.out_dataset]
    if args.out_dir:
        out += ["--out_dir", from_there(args.out_dir)]
    training = [*common, *out, *f"--augm_flag 1 --epochs {args.epochs} --amp {args.amp:d}".split()]
    if args.arch:
        training += ["--arch", args.arch]

    for metric in dict.fromkeys(metric for metric, *_ in VARIANTS.values()):
        n = sorted({str(k) for m, _, k in VARIANTS.values() if m == metric}, key=int)
        run("gen_gmm.py", *common, *out, *metric.split(), "--augm_flag", "1", "--resume", "1", "--n", *n)
    train("Base", "--train_type", "plain")
    for label, (metric, mixtures, n) in VARIANTS.items():
        train(label, *f"--train_type CEDA_GMM {metric} {mixtures} --n {n}".split())
    evaluation = [*common, "--models", "Base", *VARIANTS, "--output", "table2"]
    if args.ood:
        evaluation += ["--ood", *(f"{label}={from_there(images)}" for label, images in args.ood)]
    run("gen_eval.py", *evaluation)

    auc = pd.read_csv(folder / "table2.csv", header=[0, 1], index_col=0)
    auc = auc.xs("AUC", axis=1, level=1).drop(index="orig")
    noise = torch.rand(SEEDS, *test.images.shape[1:], generator=torch.Generator().manual_seed(args.seed))
    rows = {}
    for label in ("Base", *VARIANTS):
        model = checkpoints.load_model(folder / model_paths.model(args.dataset, label))
        rows[label] = {"TE": model.meta["test_error"], **auc[label].rename(lambda ood: f"AUC {ood}"),
                       "AUC mean": auc[label].mean(), **radii(model, noise, test.floats())}
    table = pd.DataFrame(rows, dtype=float).T
    notes = [f"command: {records.of(args)['command']}",
             f"all models: {records.how_made(model.meta | {'out_dir': args.out_dir, 'mixtures': None})}",
             f"R: median radius (tight, ratio {params.RATIO}) around uniform noise, in units of the metric; "
             "R / distance: its median share (%) of the distance to the closest test image; R > 0: share of seeds (%)"]
    title = f"Ablation, {name}"
    tables.show(table, title)
    print(*(f"wrote {file}" for file in tables.write(table, stem, title, notes)), sep="\n")


@torch.no_grad()
def radii(model, noise, test) -> dict:
    """Median certified radius around `noise` [N, C, H, W], and its share of the way to the closest of `test`."""
    if not isinstance(model, CCU):
        return dict.fromkeys(("R", "R / distance", "R > 0"))
    radius = certified_radius(model, noise, params.RATIO)
    z, z_test = (model.gmm_in.metric.transform(x) for x in (noise, test))
    distance = torch.cdist(z.double(), z_test.double()).amin(1)
    return {"R": evaluation.median(radius), "R / distance": 100 * evaluation.median(radius / distance),
            "R > 0": 100 * (radius > 0).double().mean().item()}


def parser() -> cli.Parser:
    p = cli.Parser(__doc__).dataset().out_dataset().common()
    p.add_argument("--name", type=cli.name, help="of the files written (the data set's)")
    p.add_argument("--epochs", type=cli.integer(1), default=params.EPOCHS, help=f"epochs of training ({params.EPOCHS})")
    p.add_argument("--arch", choices=tuple(params.NETWORKS), metavar="A", help="LeNet or ResNet18")
    p.add_argument("--amp", type=cli.flag, default=False, help="1 = classifier in bf16 (0)")
    p.add_argument("--ood", nargs="+", action="extend", type=cli.assignment, default=[], metavar="NAME=FOLDER",
                   help="more OOD sets: folders of images")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
