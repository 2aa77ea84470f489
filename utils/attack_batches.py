"""Table 1's attacks, a batch of seeds of a model at a time: shared out over processes, kept for a run that is resumed.

`args` are the options of gen_attack_stats.py.
"""

import itertools
import shutil

import torch
from tqdm import tqdm

import model_paths
import params
from utils import evaluation, files, parallel
from utils.attack import attack
from utils.errors import UserError
from utils.state import FORMAT, State


def attack_all(models, coordinates, seeds, radii, images, folders, args, device) -> dict:
    """label -> files of what the attack found, one a batch; all models' batches are shared out over the processes."""
    batches = list(zip(seeds.split(args.batch_size), radii.split(args.batch_size), strict=True))
    units = {label: [folders[label] / f"{b}.pt" for b in range(len(batches))] for label in models}
    for label, b in list(itertools.product(models, range(len(batches))))[parallel.rank()::parallel.world_size()]:
        if not (path := units[label][b]).exists():
            attack_batch(label, models[label], coordinates, images, b, *batches[b], path, args, device)
    parallel.barrier()
    return units


def attack_batch(label, model, coordinates, images, b, x, r, path, args, device) -> None:
    """Worst samples and their scores of batch b, seeds x and radii r; kept in `path`, for --resume 1 too."""
    generator = torch.Generator().manual_seed(args.seed * 1000 + b)
    # another --points, as when memory ran out, repeats this batch and keeps those that are done
    state = State(path.with_suffix(f".{args.points}.state"), {}, resume=True)
    with tqdm(desc=f"{label}, batch {b + 1}", total=len(x) * args.restarts * args.steps, unit=" gradients",
              unit_scale=True, leave=False, disable=None) as bar:
        found = attack(model, coordinates, x.to(device), r.to(device), args.steps, args.restarts, args.alpha, generator,
                       points=args.points, progress=bar.update, state=state, images=images)

    def in_parts(function, x):
        return torch.cat([function(part) for part in x.split(args.points)]).cpu()
    with torch.no_grad(), evaluation.full_precision():
        unit = {"samples": found.samples.cpu(), "score": in_parts(model.score, found.samples),
                "prediction": in_parts(model, found.samples).argmax(1),
                "seed_score": in_parts(model.score, x.to(device))}
    if bad := int((~unit["score"].isfinite()).sum()):
        raise UserError(f"{label}, batch {b + 1}: the score is NaN or infinite at all points that the attack tried "
                        f"around {bad} of {len(x)} seeds; leave {label} out of --models")
    files.save(unit, path)
    state.remove()
    print(f"{label}, batch {b + 1}: mean score {unit['seed_score'].mean():.4f} -> {unit['score'].mean():.4f}",
          flush=True)


def merge(paths) -> dict:
    """The batches of one model, one after the other."""
    units = [files.load(path) for path in paths]
    return {key: torch.cat([unit[key] for unit in units]) for key in units[0]}


def unit_folder(stem, dataset, label, model, ccu, seeds, images, args):
    """Where a model's finished batches are kept: named after all that decides them, emptied unless --resume 1.

    The radii stand there as what they come from: their last digits differ on another machine or number of threads.
    """
    folder = model_paths.attack_units(stem, dataset, label, files.digest(
        FORMAT, dataset, label, args.steps, args.restarts, args.alpha, args.batch_size, args.seed, seeds, images, model,
        model.spec, ccu, args.radius, args.certificate, params.RATIO))
    files.lock(folder)
    if folder.exists() and not args.resume and parallel.rank() == 0:
        shutil.rmtree(folder)
    return folder
