"""The training loop: one for all methods."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import params
from models import CCU, Detector
from utils import files, parallel
from utils.data import Augmentation, ImageSet, batches, endless
from utils.errors import UserError
from utils.objectives import Objective

SAVE_EVERY = 30.0       # seconds between saved states, at ends of epochs


@dataclass
class Settings:
    """What the loop needs besides model, objective and data."""

    optimizer: str
    lr: float
    lr_gmm: float
    weight_decay: float
    grad_vars: tuple[str, ...]      # of the mixtures: "mu", "var"
    epochs: int
    batch_size: int
    seed: int


def make_optimizer(model: Detector, settings: Settings) -> torch.optim.Optimizer:
    """Classifier with weight decay; mixture means and log-variances at lr_gmm without."""
    groups = [{"params": list(model.base_model.parameters()), "lr": settings.lr,
               "weight_decay": settings.weight_decay}]
    if isinstance(model, CCU):
        chosen = []
        for gmm in filter(None, (model.gmm_in, model.gmm_out)):
            gmm.mu.requires_grad_("mu" in settings.grad_vars)
            gmm.logvar.requires_grad_("var" in settings.grad_vars)
            chosen += [p for p in (gmm.mu, gmm.logvar) if p.requires_grad]
        if chosen:
            groups.append({"params": chosen, "lr": settings.lr_gmm, "weight_decay": 0.0})
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, fused=True)
    return torch.optim.SGD(groups, momentum=0.9, nesterov=settings.optimizer == "nesterov", fused=True)


def lr_factor(schedule: str, progress: float) -> float:
    """What multiplies the learning rates when `progress` in [0, 1) of the training is done."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 0.1 ** sum(progress >= milestone for milestone in params.MILESTONES)


def train(model: Detector, objective: Objective, data: ImageSet, out: ImageSet | None,
          augmentation: Augmentation | None, settings: Settings, state_path: Path, resume: bool, options: dict,
          log_dir: Path, verbose: bool = False) -> list[dict]:
    """Train `model` in place and return one dict of scalars an epoch.

    The state (weights, optimiser, generators, position) is saved to state_path; with `resume` the run goes on
    from there and ends in the same weights as one that was not interrupted.  `options` are compared, so that
    a run is not continued with others.  verbose logs the scalars of every step to TensorBoard, which waits for
    the device each time.

    Several processes (utils/parallel.py) draw the same batches, take their parts of each and make the same steps as
    one, up to rounding; rank 0 alone logs and saves.  Dropout (MCD, GAN's VGG13) is the exception: each process draws
    masks of its own, other numbers than one process does.
    """
    from torch.utils.tensorboard import SummaryWriter
    device = data.images.device
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, settings)
    base_lrs = [group["lr"] for group in optimizer.param_groups]
    generators = {name: torch.Generator(device).manual_seed(settings.seed * 3 + i)
                  for i, name in enumerate(("in", "out", "noise"))}
    objective.constrain(model)
    history: list[dict] = []
    if resume and state_path.exists():
        history = _restore(state_path, model, objective, optimizer, generators, options)
        print(f"resumed after epoch {len(history)}")
    steps = math.ceil(len(data) / settings.batch_size)
    out_batch = min(settings.batch_size, len(data)) * objective.out_batch_ratio
    main = parallel.rank() == 0
    writer = SummaryWriter(str(log_dir), purge_step=len(history)) if main else None
    saved = time.monotonic()
    for epoch in range(len(history), settings.epochs):
        start = time.monotonic()
        model.train()
        objective.start_epoch(epoch)
        if (size := parallel.world_size()) > 1:     # dropout differs from process to process; known when resumed
            torch.manual_seed((settings.seed * settings.epochs + epoch) * size + parallel.rank())
        totals: dict[str, torch.Tensor] = {}
        outs = endless(out, out_batch, generators["out"], augmentation) if out is not None else None
        bar = tqdm(batches(data, settings.batch_size, generators["in"], augmentation), total=steps, leave=False,
                   desc=f"epoch {epoch + 1}/{settings.epochs}", disable=None)
        for step, (x, y) in enumerate(bar):
            factor = lr_factor(objective.schedule, (epoch + step / steps) / settings.epochs)
            for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
                group["lr"] = lr * factor
            z = next(outs)[:len(x) * objective.out_batch_ratio] if outs is not None else None
            loss, scalars = objective(model, x, y, z, generators["noise"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            parallel.sum_gradients(model.parameters())
            optimizer.step()
            objective.constrain(model)
            scalars["loss"] = loss.detach()
            for name, value in parallel.sum_scalars(scalars).items():
                totals[name] = totals.get(name, 0) + value * len(x)
                if verbose and main:
                    writer.add_scalar(f"step/{name}", value.item(), epoch * steps + step + 1)
        means = {name: (value / len(data)).item() for name, value in totals.items()}
        # the loss was taken before the last step: the weights are looked at too
        if not (math.isfinite(means["loss"]) and all(v.isfinite().all() for v in model.state_dict().values())):
            if main:
                writer.close()
            kept = f"; the state after epoch {_epochs_in(state_path)} is kept" if state_path.exists() else ""
            raise UserError(f"the loss is not finite in epoch {epoch + 1}{kept}: try a smaller --lr or --lr_gmm")
        means["seconds"] = time.monotonic() - start
        history.append(means)
        for name, value in means.items() if main else ():
            writer.add_scalar(name, value, epoch + 1)
        print(f"epoch {epoch + 1}/{settings.epochs}  " + "  ".join(
            f"{name} {value:.4g}" for name, value in sorted(means.items())), flush=True)
        if main and (time.monotonic() - saved > SAVE_EVERY or epoch + 1 == settings.epochs):
            _save(state_path, model, objective, optimizer, generators, history, options)
            saved = time.monotonic()
    if main:
        writer.close()
    return history


def _save(path, model, objective, optimizer, generators, history, options):
    device = generators["in"].device
    files.save({"format": "CCU training state, version 1", "options": options, "history": history,
                "model": model.state_dict(), "objective": objective.state_dict(),
                "optimizer": optimizer.state_dict(),
                "device": device.type,
                "generators": {name: g.get_state() for name, g in generators.items()},
                # dropout draws from the device's own generator
                "global_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}, path)


def _epochs_in(path) -> int:
    return len(files.load(path)["history"])


def _restore(path, model, objective, optimizer, generators, options) -> list[dict]:
    state = files.load(path, "CCU training state, version 1", "start without --resume")
    if changed := [key for key in options if options[key] != state["options"].get(key)]:
        key = changed[0]
        raise UserError(f"{path} was made with --{key} {state['options'].get(key)}, not {options[key]}: use the same "
                        "options, or start without --resume")
    if state["device"] != (here := generators["in"].device.type):
        raise UserError(f"{path} was made on a {state['device']} device, this is {here}, which draws other random "
                        "numbers: use the same --gpu, or start without --resume")
    model.load_state_dict(state["model"])
    objective.load_state_dict(state["objective"])
    optimizer.load_state_dict(state["optimizer"])
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])
    torch.set_rng_state(state["global_rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], generators["in"].device)
    return state["history"]
