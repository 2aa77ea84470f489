"""Table 2: how well each trained model tells OOD test sets from the in-distribution's test set.

    python gen_eval.py --dataset MNIST --drop_mmc 1

Evaluates every model under checkpoints/<dataset>/ and writes the table to results/ as .csv and .txt (LaTeX), a
second one with FPR at 95 % TPR (OOD positive), how the models were trained (_runs.json), and all scores to
results/backup/.  What is not there is named: OOD sets, and how to get them; models that are not trained, and the
command that trains the first.  On two CPU cores a LeNet takes seconds, a ResNet18 some eight minutes.

--certify 1 adds a table of what CCU and CCUs promise of each set: the share of images that are at most 1.1/M confident,
the share around which this is certified within a radius R > 0, and the median R of these by both bounds.  Of the
in-distribution's test images (orig) there should be hardly any.
"""

import contextlib
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

import model_paths
import params
from models import CCU, certified_radius
from models.certificate import CERTIFICATES
from utils import cli, evaluation, files, records, tables
from utils.backups import SCORES, check_replaceable, meta_of
from utils.data import load_in_dist, load_ood, load_ood_folder
from utils.errors import MissingData, UserError, warn
from utils.out_data import FIXED, load_out, one_holds
from utils.trained import check_fit, load_models, name_untrained


def main(args):
    device = cli.device(args.gpu)
    cli.keep_freed_memory()
    rows = ["orig", *params.DATASETS[args.dataset].ood, *(name for name, _ in args.ood)]
    if twice := [name for name in rows if rows.count(name) > 1]:
        raise UserError(f"--ood: {twice[0]} is a row already; choose another name")
    stem = Path(args.output or model_paths.table(2, f"{args.dataset}_{model_paths.stamp()}"))
    backup = model_paths.backup(stem)
    stems = [stem, f"{stem}{model_paths.FPR95}", *[f"{stem}{model_paths.CERTIFIED}"] * args.certify]
    runs_file = model_paths.table_runs(stem)
    files.check_writable(stem, *(path for each in stems for path in tables.files_of(each)), runs_file, backup)
    check_replaceable(backup, SCORES)
    models = load_models(args.dataset, args.models, device)
    if args.certify and not any(isinstance(model, CCU) for model in models.values()):
        raise UserError("--certify 1: none of the models has a certificate, as CCU would: "
                        + model_paths.command(args.dataset, "CCU"))
    test = load_in_dist(args.dataset, "test", args.data_dir, args.download, args.image_size)
    check_fit(models, test)
    sets = ood_sets(args, test)
    warn_overlap(models, sets, test, args)
    files.lock(stem)
    if args.models is None:
        name_untrained(args.dataset)
    on_device = test.to(device)

    scores, test_errors, doubts = {}, {}, []
    for label, model in models.items():
        test_errors[label], scores[label, "orig"], said = evaluation.evaluate_test(label, model, on_device,
                                                                                   args.batch_size)
        doubts += said
        for name, data in sets.items():
            _, scores[label, name] = evaluation.evaluate(model, data.to(device), args.batch_size)
        # not to stdout: who reads it may be gone, and nothing is written yet
        print(f"{label}: test error {test_errors[label]:.2f} %", file=sys.stderr, flush=True)

    metric = ("AP", evaluation.average_precision) if args.aupr else ("AUC", evaluation.auroc)
    made = [(f"{metric[0]}{'' if args.drop_mmc else ' and mean maximal confidence'} (%)",
             make_table(models, sets, scores, metric, not args.drop_mmc)),
            ("FPR at 95 % TPR (%)", make_table(models, sets, scores, ("FPR95", evaluation.fpr95), False))]
    if args.certify:
        made.append((f"images that are at most {params.RATIO}/M confident, those with a certified radius R > 0 (%), "
                     "and the median R of these", certificates(models, {"orig": test, **sets}, scores)))
    record = records.of(args)
    notes = [f"command: {record['command']}",
             "test error (%): " + ", ".join(f"{label} {error:.2f}" for label, error in test_errors.items()),
             *doubts, *records.model_notes(models), "average precision and FPR at 95 % TPR: OOD is the positive class"]
    written = []
    for each, (title, table) in zip(stems, made, strict=True):
        written += tables.write(table, each, f"Table 2, {args.dataset}: {title}", notes)
    written.append(files.write_json(runs_file, runs(args.dataset, models, test_errors)))
    written.append(files.save({
        "format": SCORES, "record": record, "dataset": args.dataset,
        "test_error": test_errors, "meta": meta_of(models),
        "scores": {f"{label}/{name}": value.cpu() for (label, name), value in scores.items()}}, backup))
    for title, table in made:
        tables.show(table, f"Table 2, {args.dataset}: {title}")
    print("", *notes, sep="\n")
    print("", *(f"wrote {path}" for path in written), sep="\n")


def ood_sets(args, test) -> dict:
    """name -> images of the OOD sets that are there; a line for each that is not."""
    own = {name: load_ood_folder(name, folder, test) for name, folder in args.ood}
    sets = {}
    for name in params.DATASETS[args.dataset].ood:
        try:
            sets[name] = load_ood(name, test, args.data_dir, args.download, args.seed)
        except MissingData as error:
            print(f"left out {name}: {error}", file=sys.stderr)
    return sets | own


def warn_overlap(models, sets, test, args) -> None:
    """Lines on stderr for OOD sets that a model was trained to be uncertain on, or that share images with those, or
    with the in-distribution's test images."""
    learnt: dict[tuple[str, str], list[str]] = {}       # out-images, OOD set -> labels
    for label, model in models.items():
        out, photos = model.meta.get("out_dataset"), model.meta.get("out_dir")
        near = {name: out for name in sets if name in (out, f"Gray{out}")}
        if out == "Folder" and photos:
            near |= {name: f"photos in {photos}" for name, folder in args.ood if one_holds(folder, photos)}
        for name, what in near.items():
            learnt.setdefault((what, name), []).append(label)
    for (out, name), labels in learnt.items():
        warn(f"{', '.join(labels)} learnt from {out}: {name} is not OOD to them")
    trained = {model.meta.get("out_dataset") for model in models.values()}
    hashes = {args.dataset: set(map(hash, image_bytes(test)))}
    for name in trained.intersection(FIXED) - {"TinyImages"}:     # of which a draw takes long; CIFAR's have their list
        with contextlib.suppress(UserError):        # not on this machine
            out = load_out(name, test, args.data_dir)
            hashes[f"the out-images of {name}"] = set(map(hash, image_bytes(out)))
    for name, data in sets.items():
        own = [hash(image) for image in image_bytes(data)]
        for what, others in hashes.items():
            if same := sum(image in others for image in own):
                warn(f"{same} of {len(own)} images of {name} are among those of {what}")


def image_bytes(data):
    """The bytes of each image."""
    return (image.tobytes() for image in data.images.cpu().numpy())


def make_table(models, sets, scores, metric, with_mmc: bool) -> pd.DataFrame:
    """One row per OOD set, one column per label; with MMC two columns per label and a first row `orig`."""
    name, function = metric
    columns = {}
    for label, model in models.items():
        values = {s: function(scores[label, "orig"], scores[label, s]) for s in sets}
        if not with_mmc:
            columns[label] = values
            continue
        columns[label, "MMC"] = {s: evaluation.mmc(scores[label, s]) if model.score_is_confidence else None
                                 for s in ("orig", *sets)}
        columns[label, name] = {"orig": None, **values}
    return pd.DataFrame(columns, dtype=float)


def certificates(models, sets, scores) -> pd.DataFrame:
    """One row per set; of each CCU the share (%) of images that are at most RATIO/M confident, the share with a
    certified radius R > 0, and the median of these R by both bounds."""
    columns, names = {}, list(sets)
    for label, model in models.items():
        if not isinstance(model, CCU):
            continue
        R = {}
        for name in tqdm(names, desc=f"certificates of {label}", leave=False, disable=None):
            x = sets[name].floats()
            R[name] = {method: certified_radius(model, x, params.RATIO, method) for method in CERTIFICATES}
        columns[label, "uncertain"] = [evaluation.uncertain(scores[label, name], model.classes) for name in names]
        columns[label, "certified"] = [100 * (R[name]["tight"] > 0).double().mean().item() for name in names]
        for method in CERTIFICATES:
            columns[label, f"R {method}"] = [evaluation.median(R[name][method][R[name][method] > 0]) for name in names]
    return pd.DataFrame(columns, names)


def runs(dataset, models, test_errors) -> dict:
    """label -> run record without the epochs' history; of a model that was not trained here what it says of itself."""
    made = {}
    for label, model in models.items():
        record = records.load(model_paths.run_record(model_paths.model(dataset, label)))
        if record.get("test_error") != model.meta.get("test_error"):      # of another model, which stood here before
            record = {}
        record.pop("history", None)
        made[label] = {**model.meta, **record, "test_error": test_errors[label],
                       "arch": model.spec["base_model"]["arch"]}
    return made


def parser() -> cli.Parser:
    p = cli.Parser(__doc__).dataset().common().table()
    p.add_argument("--batch_size", type=cli.integer(1), default=params.EVAL_BATCH_SIZE,
                   help=f"images at a time ({params.EVAL_BATCH_SIZE})")
    p.add_argument("--aupr", type=cli.flag, default=False, help="1 = average precision instead of AUC (0)")
    p.add_argument("--certify", type=cli.flag, default=False, help="1 = a table of certified radii too (0)")
    p.add_argument("--ood", nargs="+", action="extend", type=cli.assignment, default=[], metavar="NAME=FOLDER",
                   help="more OOD sets: folders of images")
    p.add_argument("--output", type=cli.stem, metavar="PATH",
                   help="write PATH.csv and PATH.txt (results/table2_<dataset>_<time>)")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
