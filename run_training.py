"""Train one model and write checkpoints/<dataset>/<label>.pt.

    python run_training.py --dataset MNIST --train_type plain --augm_flag 1
    python run_training.py --dataset MNIST --train_type ACET --augm_flag 1
    python run_training.py --dataset MNIST --train_type CEDA_GMM --augm_flag 1 --use_gmm 1 --PCA 1 --fit_out 1

CEDA_GMM with --fit_out 1 is CCU, without it CCUs; both start from the mixtures of gen_gmm.py.  DE trains --members
networks.  ODIN and Maha train nothing: they choose their hyperparameters on the model Base, which has to be there.
torchrun --nproc_per_node=N run_training.py ... trains in N processes, each on a GPU of its own (README, "Several
GPUs").

On two cores an epoch of MNIST takes about 40 s for plain and 70 s for CCU.  TensorBoard scalars go to logs/.
"""

import shlex
import time
from dataclasses import replace

import torch

import model_paths
import params
from models import CCU, DE, EDL, MCD, Detector, Softmax, build_classifier
from utils import checkpoints, cli, files, objectives, parallel, records
from utils.batches import Augmentation
from utils.calibration import calibrate
from utils.data import load_in_dist
from utils.errors import UserError, warn
from utils.evaluation import evaluate_test
from utils.out_data import load_out, resolve
from utils.state import State
from utils.trained import check_fit, load_models
from utils.training import Settings, train

TOLD = ("arch", "batch_size", "lr", "lr_gmm", "decay", "loglam", "grad_vars")     # as in gen_gmm.py


def main(args):
    device = cli.device(args.gpu)
    check(args)
    if args.amp and not cli.has_bf16(device):
        warn("this machine only imitates bf16 arithmetic: training with --amp 1 is slower than without")
    options = parser()
    if unused := cli.given(args, options, useless(args)):
        without = " without --fit_out 1" * (args.train_type == "ACET" and not args.fit_out)
        warn(f"--train_type {args.train_type}{without} has no use for --{', --'.join(unused)}")
        for name in unused:     # nor do the record and a table's notes say that it was trained with them
            setattr(args, name, options.get_default(name))
    label = args.label or model_paths.label(args.train_type, args.fit_out)
    path = model_paths.model(args.dataset, label)
    calibrated = args.train_type in params.CALIBRATED
    takes_out = objectives.takes_out_images(args.train_type, args.fit_out)
    out_name = resolve(args.out_dataset, args.data_dir) if takes_out else None
    changed = cli.spelled(cli.given(args, options, TOLD))
    if not calibrated:
        fill_in(args)

    networks = networks_of(args, label, path)
    files.check_writable(path, model_paths.run_record(path), *(state for _, _, state in networks),
                         model_paths.log_dir(args.dataset, label) / "events")

    # what has to be there already comes first
    base_label = model_paths.base_of(label)
    base = load_models(args.dataset, [base_label], device)[base_label] if args.warmstart or calibrated else None
    mixtures = load_mixtures(args, out_name) if args.use_gmm else None
    args.n = mixtures[0].components if mixtures else first(args.n, params.CENTROIDS)
    files.lock(path)
    parallel.barrier()      # none of several processes looks before: from here on no other run writes what is there
    if args.resume and not base and is_there(path, args, out_name, mixtures):
        print(f"{path} is there")
        return
    data, test = (load_in_dist(args.dataset, split, args.data_dir, args.download, args.image_size).to(device)
                  for split in ("train", "test"))
    check_fit({base_label: base} if base else {}, test)
    if mixtures and (pixels := data.images[0].numel()) != mixtures[0].metric.dim:
        raise UserError(f"the mixtures were fitted on images of {mixtures[0].metric.dim} values, {args.dataset}'s have "
                        f"{pixels}: run gen_gmm.py again, with the same --image_size")
    out = None
    if out_name:
        how_many = {"n": params.CALIBRATION_IMAGES} if calibrated else {
            "uses": args.epochs * len(data) * objectives.OBJECTIVES[args.train_type].out_batch_ratio}
        out = load_out(out_name, data, args.data_dir, args.out_dir, seed=args.seed, download=args.download, **how_many)
    cli.keep_freed_memory()
    if path.exists() and parallel.rank() == 0:
        warn(f"{path} is there and will be replaced; --label NAME keeps both")

    model, history, seconds = fit(args, networks, data, out, base, mixtures)
    if parallel.rank() > 0:
        return
    error, _, _ = evaluate_test(label, model.eval(), test, args.batch_size)
    meta = {"dataset": args.dataset, "label": label, "train_type": args.train_type, "out_dataset": out_name,
            "epochs": args.epochs, "seed": args.seed, "augm_flag": args.augm_flag, "amp": args.amp, "test_error": error,
            "mixtures": mixtures and mixtures[2], "class_names": list(data.class_names), "steps": args.steps,
            "members": args.members, "out_dir": args.out_dir, "warmstart": args.warmstart, "changed": changed,
            "source": base and base.meta.get("source")}
    if calibrated:
        meta |= {key: base.meta.get(key) for key in ("epochs", "augm_flag", "amp", "changed")}
        chosen = {name: getattr(model, name).item() for name in history[0] if name != "auroc"}
        meta |= chosen
        print(", ".join(f"{name} {value:.4g}" for name, value in chosen.items()))
    # the record first: make asks for the model alone
    files.write_json(model_paths.run_record(path), records.of(args, **meta, seconds=seconds, history=history))
    checkpoints.save_model(model, path, meta)
    for _, _, state in networks:
        state.unlink(missing_ok=True)
    print(f"test error {error:.2f} %\nwrote {path} and {model_paths.run_record(path)}")


def check(args) -> None:
    """Refuse options that only make sense together; fill in use_gmm."""
    ccu = args.train_type == "CEDA_GMM"
    if args.use_gmm is None:
        args.use_gmm = ccu
    if args.use_gmm != ccu:
        raise UserError("--use_gmm 1 and --train_type CEDA_GMM go together")
    if args.fit_out and args.train_type not in ("CEDA_GMM", "ACET"):
        raise UserError("--fit_out 1 goes with --train_type CEDA_GMM (CCU) or ACET")
    if args.warmstart and args.train_type in ("MCD", "DE", *params.CALIBRATED):
        raise UserError(f"--warmstart 1 starts one network from Base's weights: --train_type {args.train_type} has no "
                        "use for them")
    if args.gmm_path and not ccu:
        raise UserError("--gmm_path goes with --train_type CEDA_GMM")


def useless(args) -> list[str]:
    """The options that this method has no use for."""
    calibrated = args.train_type in params.CALIBRATED
    names = ["out_dataset", "out_dir"] * (not objectives.takes_out_images(args.train_type, args.fit_out))
    names += ["steps"] * (args.train_type != "ACET") + ["members"] * (args.train_type != "DE")
    names += ["PCA", "metric", "n", "lr_gmm", "grad_vars"] * (args.train_type != "CEDA_GMM")
    names += ["epochs", "amp", "lr", "decay", "arch"] * calibrated
    names += ["loglam"] * (calibrated or args.train_type in ("OE", "EDL", "GAN"))
    return names


def fill_in(args) -> None:
    """What params.py decides where no option does: recorded, so that --resume 1 notices an edit of it."""
    defaults, method = params.DATASETS[args.dataset], params.METHODS[args.train_type]
    if args.arch:
        defaults = replace(defaults, **params.NETWORKS[args.arch])
    args.network = method.arch.get(defaults.arch, defaults.arch)
    args.optimizer = method.optimizer or defaults.optimizer
    args.lr = first(args.lr, method.lr, params.LR[args.optimizer])
    args.decay = first(args.decay, method.weight_decay, params.WEIGHT_DECAY)


def networks_of(args, label, path) -> list[tuple]:
    """Seed, name and training state of each network that is trained; of DE's, seed 1 goes on where seed 0 ended."""
    if args.train_type == "DE":
        return [(args.seed * args.members + i, f"{label}.{i}", model_paths.training_state(path, i))
                for i in range(args.members)]
    return [(args.seed, label, model_paths.training_state(path))]


def load_mixtures(args, out_name):
    """gmm_in, gmm_out and how they were fitted."""
    name, n = cli.metric_name(args), first(args.n, params.CENTROIDS)
    path = args.gmm_path or model_paths.mixtures(args.dataset, name, n, out_name)
    gmm_in, gmm_out, meta = checkpoints.load_mixtures(path, (
        "leave --gmm_path out, and " * bool(args.gmm_path)
        + f"fit the mixtures: python gen_gmm.py --dataset {args.dataset} --data_dir {shlex.quote(args.data_dir)} --PCA "
        f"{int(args.PCA)} --metric {args.metric} --n {n} --augm_flag {int(args.augm_flag)} "
        f"--out_dataset {out_name}" + (f" --out_dir {shlex.quote(args.out_dir)}" if args.out_dir else "")
        + f" --image_size {args.image_size}" * (args.dataset == "Folder")))
    n = gmm_in.components if args.gmm_path and args.n is None else n
    wanted_meta = {"dataset": args.dataset, "metric": name, "n": n, "out_dataset": out_name}
    wanted_meta |= {key: wanted for key, wanted in cli.own_folders(args, out_name).items() if key in meta}
    for key, wanted in wanted_meta.items():
        if meta.get(key) != wanted:
            raise UserError(f"{path} was fitted with {key} {meta.get(key)}, not {wanted}: run gen_gmm.py with the same "
                            "options, or change them here")
    if gmm_in.components != n or gmm_out.components != n:
        raise UserError(f"{path} is damaged: it does not hold {n} centroids; run gen_gmm.py again")
    if (augm_flag := meta.get("augm_flag", args.augm_flag)) != args.augm_flag:
        warn(f"{path} was fitted with --augm_flag {int(augm_flag)}, and this training has --augm_flag "
             f"{int(args.augm_flag)}: metric and densities are not those of the images that it trains on")
    return gmm_in, gmm_out, meta


def first(*values):
    """The first that is given."""
    return next(value for value in values if value is not None)


def is_there(path, args, out_name, mixtures) -> bool:
    """Whether the model is finished: trained with the same options, from the same mixtures."""
    record = records.load(model_paths.run_record(path))
    made = record.get("options", {}) | {"out_dataset": record.get("out_dataset")}
    states = [model_paths.training_state(path, i) for i in (None, *range(args.members))]
    if (record.get("mixtures") != (mixtures and mixtures[2]) or any(state.exists() for state in states)
            or any(made.get(key) != value for key, value in decisive(args, out_name).items())):
        return False
    try:        # is the record this model's?
        return checkpoints.load_model(path).meta.get("test_error") == record.get("test_error")
    except UserError:       # none, or a damaged one
        return False


def decisive(args, out_name) -> dict:
    """The options that decide a result; auto may mean another out-distribution by now."""
    indifferent = {*records.INDIFFERENT, *useless(args), *["data_dir", "image_size"] * (args.dataset != "Folder")}
    return {key: value for key, value in vars(args).items() if key not in indifferent} | {"out_dataset": out_name}


def fit(args, networks, data, out, base, mixtures) -> tuple[Detector, list, float]:
    """The model, its history (an entry an epoch, of ODIN and Maha a setting; of DE a history a member), and seconds."""
    if args.train_type in params.CALIBRATED:
        start = time.monotonic()
        return *calibrate(args.train_type, base, data, out, args.seed, args.batch_size), time.monotonic() - start
    if not args.resume and parallel.rank() == 0:
        for _, _, state in networks:
            state.unlink(missing_ok=True)
    options = all_that_decides(args, data, out, base, mixtures)
    trained, histories = zip(*(train_network(args, seed, name, State(path, options, args.resume), data, out, base,
                                             mixtures) for seed, name, path in networks), strict=True)
    # the epochs' own times count those before an interruption too
    seconds = sum(epoch["seconds"] for epochs in histories for epoch in epochs)
    if args.train_type == "DE":
        return DE([member.base_model for member in trained]), list(histories), seconds
    return trained[0], histories[0], seconds


def all_that_decides(args, data, out, base, mixtures) -> dict:
    """`decisive`, and what else a training must find again to go on: files may have changed since."""
    options = decisive(args, out and out.name) | {
        "class_names": list(data.class_names),
        "images": f"of {files.digest(data.images, data.labels, out and out.images)}"}
    if mixtures:
        options["gmm_path"] = f"of {files.digest(*mixtures[:2])}"
    if args.warmstart:
        options["base"] = files.digest(base)
    return options


def train_network(args, seed, name, state, data, out, base, mixtures) -> tuple[Detector, list[dict]]:
    """One trained network and its history, an entry an epoch."""
    torch.manual_seed(seed)
    device = data.images.device
    model = make_model(args, args.network, seed, data, base, mixtures)
    checkpoints.check_rebuilds(model)
    model = parallel.sync_batch_norms(model.to(device), device)
    objective = objectives.make(args.train_type, args.loglam, args.fit_out, args.steps, data.images)
    settings = Settings(optimizer=args.optimizer, lr=args.lr, lr_gmm=args.lr_gmm, weight_decay=args.decay,
                        grad_vars=tuple(args.grad_vars), epochs=args.epochs, batch_size=args.batch_size, seed=seed)
    augmentation = Augmentation.of(params.DATASETS[args.dataset]) if args.augm_flag else None
    logs = model_paths.log_dir(args.dataset, name)
    model.amp = args.amp
    history = train(model, objective, data, out, augmentation, settings, state, logs, name, args.verbose)
    model.amp = False
    if parallel.rank() == 0 and logs.exists():      # not where all epochs were there
        print(f"wrote {logs}/")
    return model, history


def make_model(args, arch, seed, data, base, mixtures) -> Detector:
    """The model before training."""
    base_model = build_classifier(arch, *data.images.shape[1:3], data.classes)
    if args.warmstart:
        if base.spec["base_model"].get("normalised"):
            raise UserError("--warmstart 1: the Base model normalises its input, which nothing that is trained here "
                            "does; leave --warmstart out, or import a Base that does not")
        if base.spec["base_model"] != base_model.spec or base.spec["kind"] == "DE":
            raise UserError(f"--warmstart 1: {args.train_type} takes {base_model.spec['arch']}, the Base model has "
                            "another classifier; train Base with the same --arch, or leave --warmstart out")
        base_model.load_state_dict(base.base_model.state_dict())
    if args.train_type == "EDL":
        return EDL(base_model)
    if args.train_type == "MCD":
        model = MCD(base_model, params.MCD_PASSES)
        model.draw_masks(torch.Generator().manual_seed(seed))
        return model
    if args.use_gmm:
        gmm_in, gmm_out, _ = mixtures
        return CCU(base_model, gmm_in, gmm_out if args.fit_out else None, args.loglam, data.classes)
    return Softmax(base_model)


def parser() -> cli.Parser:
    p = cli.Parser(__doc__).dataset()
    p.add_argument("--train_type", required=True, choices=tuple(params.METHODS), metavar="T",
                   help=", ".join(params.METHODS) + " (plain: the label Base; CEDA_GMM: CCU, CCUs)")
    p.metric().out_dataset().common()
    p.add_argument("--augm_flag", type=cli.flag, default=False, help="1 = augment the training images (0)")
    p.add_argument("--arch", choices=tuple(params.NETWORKS), metavar="A", help="LeNet (with Adam) or ResNet18 (with "
                   "SGD) in place of the data set's own; MCD and GAN then take LeNet or VGG13")
    p.add_argument("--use_gmm", type=cli.flag, help="1 = a CCU; with CEDA_GMM only (1 there, else 0)")
    p.add_argument("--fit_out", type=cli.flag, default=False, help="CEDA_GMM: 1 = two mixtures, 0 = one; ACET: 1 = "
                   "attacks start at out-images, 0 = at uniform noise (0)")
    p.add_argument("--epochs", type=cli.integer(1), default=params.EPOCHS, help=f"epochs of training ({params.EPOCHS})")
    p.add_argument("--batch_size", type=cli.integer(1), default=params.BATCH_SIZE,
                   help=f"in-images a step; out-images come on top ({params.BATCH_SIZE})")
    p.add_argument("--lr", type=cli.number(0, open_low=True), help="learning rate of the classifier (Adam 1e-3 with "
                   "LeNet and for EDL, Adam 2e-4 for MCD and GAN, SGD 0.1 with ResNet18 and for OE)")
    p.add_argument("--lr_gmm", type=cli.number(0), default=params.LR_GMM,
                   help=f"learning rate of the mixtures ({params.LR_GMM})")
    p.add_argument("--decay", type=cli.number(0), help=f"weight decay of the classifier ({params.WEIGHT_DECAY}; MCD 0)")
    p.add_argument("--loglam", type=cli.number(-50, 50), default=0.0, help="log p(o)/p(i) (0); OE, "
                   "EDL, GAN, ODIN and Maha have no use for it")
    p.add_argument("--n", type=cli.integer(1), help=f"centroids of the mixtures to start from ({params.CENTROIDS}, or "
                   "as many as the file of --gmm_path has)")
    p.add_argument("--grad_vars", nargs="*", choices=("mu", "var"), default=["mu", "var"],
                   help="what of the mixtures is trained (mu var)")
    p.add_argument("--gmm_path", type=cli.path, help="file of gen_gmm.py (found by data set, metric, n and "
                   "out-distribution)")
    p.add_argument("--warmstart", type=cli.flag, default=False, help="1 = start from the Base model's weights (0)")
    p.add_argument("--steps", type=cli.integer(1), default=params.ACET_STEPS,
                   help=f"gradient steps of ACET's attack ({params.ACET_STEPS})")
    p.add_argument("--members", type=cli.integer(1), default=params.MEMBERS, help=f"networks of DE ({params.MEMBERS})")
    p.add_argument("--label", type=cli.name, help="label in the tables and name of the file (by train type)")
    p.add_argument("--amp", type=cli.flag, default=False, help="1 = classifier in bf16 (0)")
    p.add_argument("--verbose", type=cli.flag, default=False, help="1 = TensorBoard scalars of every step, not only "
                   "of every epoch (0)")
    p.add_argument("--resume", type=cli.flag, default=False, help="1 = go on with an interrupted run, "
                   "and keep a finished one (0)")
    return p


if __name__ == "__main__":
    cli.run(main, parser(), several=True)
