"""Table 1: worst-case adversarial noise, inside the balls that the CCU model certifies.

    python gen_attack_stats.py --datasets MNIST --wide_format 1 --fit_out 1

Seeds are uniform noise; around each the CCU model (CCUs without --fit_out 1) certifies a radius within which its
confidence stays below 1.1/M.  Every model is attacked in the same balls, intersected with the unit cube, by
projected gradient ascent on its score (a search whose start has no gradient begins on the way to a test image).
Rows: TE test error, MMC mean maximal confidence, SR share of attacked points that score at least as high as half of
the test images, AUC of test images against attacked points.  Writes the table to results/ and seeds, radii, samples
and scores to results/backup/ (README, "Backups").  torchrun --nproc_per_node=N gen_attack_stats.py ... shares the
batches of all models out over N processes.  On two CPU cores the default takes 20 minutes to an hour a LeNet;
--steps 100 --restarts 2 is for trying it out.

--certify 1 adds, for models with a certificate: mean and median radius by both bounds, the mean of the certified upper
bounds (the tight ones) on the confidence in the attacked balls, the share of balls where it is at most 1.1/M, and
GAUC, the AUROC of the test images' scores against these bounds, which no attack in the balls can lower.
"""

import math
import shutil
import time
from pathlib import Path

import pandas as pd
import torch

import model_paths
import params
from models import CCU, certified_radius, confidence_bound
from models.certificate import CERTIFICATES
from utils import cli, evaluation, files, parallel, records, tables
from utils.attack_batches import attack_all, merge, unit_folder
from utils.backups import ATTACK, check_replaceable, meta_of
from utils.data import KNOWN_OOD, load_in_dist, load_ood
from utils.errors import UserError, warn
from utils.out_data import load_out, resolve
from utils.region import Coordinates
from utils.trained import check_fit, load_ccu, load_models, name_untrained

BALLS = {True: "CCU", False: "CCUs"}        # --fit_out: whose certificate gives the radii


def main(args):
    device = cli.device(args.gpu)
    cli.keep_freed_memory()
    if sum(map(bool, (args.load_seeds, args.seeds, args.out_seeds))) > 1:
        raise UserError("give one of --seeds, --out_seeds and --load_seeds")
    if args.load_seeds and len(args.datasets) > 1:
        raise UserError("--load_seeds holds the seeds of one data set: give one to --datasets")
    if not args.out_seeds and (args.out_dataset != "auto" or args.out_dir):
        warn("--out_dataset and --out_dir have no use without --out_seeds 1")
    stem = Path(args.output or model_paths.table(1, f"{'_'.join(args.datasets)}_{model_paths.stamp()}"))
    backups = {dataset: model_paths.backup(stem, dataset) for dataset in args.datasets}
    files.check_writable(stem, *tables.files_of(stem), *backups.values())
    for path in backups.values():
        check_replaceable(path, ATTACK)
    jobs = {dataset: prepare(dataset, args, device) for dataset in args.datasets}      # all checks before any work
    files.lock(stem)
    rows, notes, written, finished = {}, [f"command: {records.of(args)['command']}"], [], []
    for dataset, (models, ccu, test, seeds, radii) in jobs.items():
        if args.models is None:
            name_untrained(dataset)
        if args.radius is None and (zero := int((radii == 0).sum())) > len(radii) / 2:
            warn(f"{zero} of {len(radii)} radii of {dataset} are 0: nothing is certified around these seeds, "
                 "and their attacks cannot move")
        start = time.monotonic()
        on_device = test.to(device)     # a model that gives NaN is found before the attack, not after
        at_once = min(params.EVAL_BATCH_SIZE, args.points)
        errors, scores_in = {}, {}
        for label, model in models.items():
            errors[label], scores_in[label], doubts = evaluation.evaluate_test(label, model, on_device, at_once)
            notes += doubts
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))[:params.ATTACK_IMAGES]
        images = test.floats(chosen)
        folders = {label: unit_folder(stem, dataset, label, model, ccu, seeds, images, args)
                   for label, model in models.items()}
        finished += folders.values()
        parallel.barrier()      # rank 0 has emptied the folders
        units = attack_all(models, Coordinates(ccu.gmm_in.metric), seeds, radii, images, folders, args, device)
        if parallel.rank() > 0:
            continue
        result = {label: merge(paths) for label, paths in units.items()}
        for label, model in models.items():
            if stuck := count_stuck(model, seeds, radii, result[label]):
                notes.append(f"{dataset}: the attack on {label} gains nothing over {stuck} of {len(seeds)} seeds: the "
                             "score may have no gradient there; its MMC, SR and AUC say little")
                warn(notes[-1])
            rows[dataset, label] = statistics(model, errors[label], scores_in[label], result[label]["score"])
            if args.certify:
                rows[dataset, label] |= certify(model, seeds.to(device), radii, scores_in[label])
                if (bound := rows[dataset, label]["bound"]) is not None:
                    notes.append(f"{dataset}, {label}: MMC {rows[dataset, label]['MMC']:.4f} <= {bound:.4f} certified")
        notes.append(f"{dataset}: {describe_balls(args, radii)}")
        notes += [f"{dataset}, {note}" for note in records.model_notes(models)]
        notes += [f"{dataset}, {label}: attacked by way of log(confidence - 1/M), since the score is flat far out"
                  for label, model in models.items() if isinstance(model, CCU)]
        written.append(files.save({
            "format": ATTACK, "record": records.of(args, seconds=time.monotonic() - start),
            "dataset": dataset, "seeds": seeds, "radii": radii, "models": result,
            "meta": meta_of(models),
            "scores_in": {label: scores.cpu() for label, scores in scores_in.items()},
            "labels_in": test.labels.cpu(), "classes": test.classes}, backups[dataset]))
    if parallel.rank() > 0:
        return
    table = layout(rows, args)
    title = f"Table 1: adversarial noise (%{'; R in units of the metric' * args.certify})"
    written = tables.write(table, stem, title, notes) + written
    for parts in finished:      # only now is nothing lost that a killed run could need
        shutil.rmtree(parts)
    tables.show(table, title)
    print("", *notes, sep="\n")
    print("", *(f"wrote {path}" for path in written), sep="\n")


def prepare(dataset: str, args, device):
    """Models, the CCU of the balls, test images, seeds [N, C, H, W] and radii [N] of one data set."""
    ball = BALLS[args.fit_out]
    if ball not in (trained := model_paths.trained(dataset)) and "CCU" in trained:
        raise UserError(f"there is no {dataset} model {ball}, whose balls are attacked without --fit_out 1: give it to "
                        f"attack in those of CCU, or make {ball}: {model_paths.command(dataset, ball)}")
    ccu = load_ccu(dataset, ball, device)
    models = load_models(dataset, args.models, device)
    test = load_in_dist(dataset, "test", args.data_dir, args.download, args.image_size)
    check_fit(models | {ball: ccu}, test)
    for label, model in models.items():
        if args.certify and isinstance(model, CCU) and not model.gmm_in.metric.equals(ccu.gmm_in.metric):
            raise UserError(f"--certify 1: the metrics of {label} and {ball} differ; leave {label} out of --models")
    seeds = make_seeds(args, dataset, test)
    for label, model in models.items():
        if not model.attack_score(seeds[:1].to(device).requires_grad_()).requires_grad:
            raise UserError(f"the score of {label} has no gradient, which an attack climbs; name the others: --models")
    if args.radius is not None:
        radii = torch.full((len(seeds),), args.radius, dtype=torch.float64)
    else:
        radii = parallel.broadcast(certified_radius(ccu, seeds.to(device), params.RATIO, args.certificate).cpu())
    return models, ccu, test, seeds, radii


def make_seeds(args, dataset: str, test) -> torch.Tensor:
    """[N, C, H, W]: those of --load_seeds, images of --seeds, test draws (--out_seeds 1), or uniform noise."""
    shape, n = tuple(test.images.shape[1:]), args.batches * args.batch_size
    if args.load_seeds:
        return load_seeds(args.load_seeds, dataset, shape)
    if args.seeds:
        source = load_ood(args.seeds, test, args.data_dir, args.download, args.seed, n)
    elif args.out_seeds:
        source = load_out(args.out_dataset, test, args.data_dir, args.out_dir, split="test", n=n, seed=args.seed,
                          download=args.download)
    else:
        return torch.rand(n, *shape, generator=torch.Generator().manual_seed(args.seed))
    if len(source) < n:
        raise UserError(f"{source.name} has {len(source)} images to start from, {n} are asked for")
    return source.floats()


def load_seeds(path: str, dataset: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The seeds [N, C, H, W] of a backup; UserError if they are no images of this shape in [0, 1]."""
    seeds = files.load(path, ATTACK, "give a file of results/backup").get("seeds")
    if not isinstance(seeds, torch.Tensor) or seeds.dtype != torch.float32 or seeds.dim() != 4 or not len(seeds):
        raise UserError(f"{path} is damaged: its seeds are no images")
    if tuple(seeds.shape[1:]) != shape:
        raise UserError(f"{path} holds seeds of shape {list(seeds.shape[1:])}, {dataset} has {list(shape)}")
    if not ((seeds >= 0) & (seeds <= 1)).all():         # NaN too
        raise UserError(f"{path} is damaged: it has seeds outside [0, 1]")
    return seeds


def count_stuck(model, seeds, radii, result) -> int:
    """How many seeds the attack found nothing better than, although more was to be had; 0 if not most of them."""
    stuck = (result["samples"] == seeds).flatten(1).all(1) & (radii > 0)
    if model.score_is_confidence:
        stuck &= result["score"] < math.log(0.999)
    return int(stuck.sum()) if stuck.sum() > len(seeds) / 2 else 0


def statistics(model, error, scores_in, attacked) -> dict:
    attacked = attacked.to(scores_in.device)
    return {"TE": error,
            "MMC": evaluation.mmc(attacked) if model.score_is_confidence else None,
            "SR": evaluation.success_rate(attacked, scores_in), "AUC": evaluation.auroc(scores_in, attacked)}


def certify(model, seeds, radii, scores_in) -> dict:
    """What the certificate alone says of the balls that were attacked; None for models that have none."""
    names = [f"R {which} {method}" for method in CERTIFICATES for which in ("mean", "median")]
    if not isinstance(model, CCU):
        return dict.fromkeys([*names, "bound", "share", "GAUC"])
    certified = [certified_radius(model, seeds, params.RATIO, method=method) for method in CERTIFICATES]
    bound = confidence_bound(model, seeds, radii.to(seeds.device))
    averages = (average for r in certified for average in (r.mean().item(), evaluation.median(r)))
    return {**dict(zip(names, averages, strict=True)),
            "bound": 100 * bound.mean().item(),
            "share": 100 * (bound <= params.RATIO / model.classes).double().mean().item(),
            "GAUC": evaluation.auroc(scores_in.double(), bound.log())}


def describe_balls(args, radii) -> str:
    seeds = f"seeds of {args.load_seeds}" if args.load_seeds else f"seeds: {args.seeds or 'uniform noise'}"
    if args.out_seeds:
        seeds = f"seeds: test draws of {resolve(args.out_dataset, args.data_dir)}"
    seeds += f"; {args.steps} step{'s' * (args.steps > 1)}, {args.restarts} start{'s' * (args.restarts > 1)} a seed"
    if args.radius is not None:
        return f"{seeds}; all radii {args.radius:g}"
    return (f"{seeds}; radii of {BALLS[args.fit_out]} by the {args.certificate} certificate at ratio {params.RATIO}: "
            f"median {evaluation.median(radii):.4g}, {int((radii == 0).sum())} of {len(radii)} are 0")


def layout(rows: dict, args) -> pd.DataFrame:
    """wide: rows (data set, statistic), one column per label.  Else one row per label, data sets side by side or,
    --vertical 1, below each other."""
    table = pd.DataFrame(rows, dtype=float).T                       # rows (data set, label)
    if args.drop_mmc:
        table = table.drop(columns="MMC")
    if args.wide_format:
        return pd.concat({dataset: table.loc[dataset].T for dataset in args.datasets})
    if args.vertical:
        return table
    return pd.concat({dataset: table.loc[dataset] for dataset in args.datasets}, axis=1)


def parser() -> cli.Parser:
    p = cli.Parser(__doc__).datasets().out_dataset().common().table()
    p.add_argument("--fit_out", type=cli.flag, default=False, help="radii from CCU (1) or from CCUs (0)")
    p.add_argument("--certificate", choices=CERTIFICATES, default="paper", help="which bound gives the radii; "
                   "paper is the one that the published code computes (paper)")
    p.add_argument("--steps", type=cli.integer(1), default=params.ATTACK_STEPS,
                   help=f"gradient steps ({params.ATTACK_STEPS})")
    p.add_argument("--restarts", type=cli.integer(1, 10 ** 6), default=params.ATTACK_RESTARTS,
                   help=f"starts per seed, the first at the seed ({params.ATTACK_RESTARTS})")
    p.add_argument("--alpha", type=cli.number(0, 1e3, open_low=True), default=params.ATTACK_ALPHA,
                   help=f"length of the first step in tenths of the radius ({params.ATTACK_ALPHA:g}); radii differ a "
                   "thousandfold from data set to data set")
    p.add_argument("--batches", type=cli.integer(1), default=params.ATTACK_BATCHES,
                   help=f"batches of seeds ({params.ATTACK_BATCHES})")
    p.add_argument("--batch_size", type=cli.integer(1), default=params.ATTACK_BATCH_SIZE,
                   help=f"seeds in a batch; memory depends on --points ({params.ATTACK_BATCH_SIZE})")
    p.add_argument("--points", type=cli.integer(1), default=params.ATTACK_POINTS, help="points attacked at once, on "
                   f"the device: a matter of memory, speed and rounding ({params.ATTACK_POINTS})")
    p.add_argument("--out_seeds", type=cli.flag, default=False, help="1 = seeds are test draws of "
                   "--out_dataset instead of uniform noise (0)")
    p.add_argument("--load_seeds", type=cli.path, metavar="FILE", help="all seeds of an earlier run: a "
                   "results/backup/table1_*.pt; --batches has no use then")
    p.add_argument("--seeds", choices=KNOWN_OOD, metavar="SET", help="seeds are images of this OOD test set "
                   "instead of uniform noise")
    p.add_argument("--radius", type=cli.number(0), help="attack in balls of this radius, in units of the metric, "
                   "instead of the certified ones")
    p.add_argument("--certify", type=cli.flag, default=False, help="1 = add radii, certified bounds and GAUC (0)")
    p.add_argument("--wide_format", type=cli.flag, default=False, help="1 = one column per label (0)")
    p.add_argument("--vertical", type=cli.flag, default=False, help="without --wide_format: 1 = data sets below each "
                   "other (0)")
    p.add_argument("--resume", type=cli.flag, default=False, help="1 = go on with an interrupted run (0)")
    p.add_argument("--output", type=cli.stem, metavar="PATH",
                   help="write PATH.csv and PATH.txt (results/table1_<datasets>_<time>)")
    return p


if __name__ == "__main__":
    cli.run(main, parser(), several=True)
