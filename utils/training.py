"""The training loop: one for all methods."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import params
from models import CCU, Detector
from utils import parallel
from utils.batches import Augmentation, ImageSet, batches, endless, epoch_length
from utils.errors import UserError
from utils.graphs import recorded
from utils.objectives import Objective
from utils.state import State


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
    """Mixture means and log-variances at lr_gmm without weight decay; all others, the classifier's as a rule, with."""
    mixtures = [gmm for gmm in (model.gmm_in, model.gmm_out) if gmm is not None] if isinstance(model, CCU) else []
    for gmm in mixtures:
        gmm.mu.requires_grad_("mu" in settings.grad_vars)
        gmm.logvar.requires_grad_("var" in settings.grad_vars)
    theirs = {p for gmm in mixtures for p in gmm.parameters()}
    groups = [{"params": [p for p in model.parameters() if p not in theirs], "initial_lr": settings.lr,
               "weight_decay": settings.weight_decay}]
    if chosen := [p for gmm in mixtures for p in gmm.parameters() if p.requires_grad]:
        groups.append({"params": chosen, "initial_lr": settings.lr_gmm, "weight_decay": 0.0})
    if settings.optimizer == "adam":
        # capturable: utils/graphs.py
        optimizer = torch.optim.Adam(groups, fused=True, capturable=next(model.parameters()).is_cuda)
    else:
        optimizer = torch.optim.SGD(groups, momentum=params.MOMENTUM, nesterov=settings.optimizer == "nesterov",
                                    fused=True)
    set_lrs(optimizer, 1.0)
    return optimizer


def lr_factor(schedule: str, progress: float) -> float:
    """What multiplies the learning rates when `progress` in [0, 1) of the training is done."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 0.1 ** sum(progress >= milestone for milestone in params.MILESTONES)


def set_lrs(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Learning rates of the step to come: each group's first one times `factor`."""
    for group in optimizer.param_groups:
        lr, device = group["initial_lr"] * factor, group["params"][0].device
        # a recorded step reads it where it lies on the GPU
        group["lr"] = torch.as_tensor(group["lr"], device=device).fill_(lr) if device.type == "cuda" else lr


def take_step(model: Detector, objective: Objective, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor,
              z: Tensor | None, generator: torch.Generator | None) -> dict[str, Tensor]:
    """One step on a batch x, y of the in-distribution and out-images z; the objective's scalars."""
    loss, scalars = objective(model, x, y, z, generator)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parallel.sum_gradients(model.parameters())
    optimizer.step()
    objective.constrain(model)
    return scalars


def train(model: Detector, objective: Objective, data: ImageSet, out: ImageSet | None,
          augmentation: Augmentation | None, settings: Settings, state: State, log_dir: Path, name: str,
          verbose: bool = False) -> list[dict]:
    """Train `model` in place and return one dict of scalars an epoch, their means over its images.

    Weights, optimiser, generators and position are saved to `state` at intervals; a run that goes on from there ends
    in the same weights as one that was not interrupted (on a GPU up to rounding).  Within an epoch the batches up to
    the position are drawn again, from the generators' states at its start.  `name` stands before each epoch's line.
    verbose logs the scalars of every step to TensorBoard, which waits for the device each time.

    Several processes (utils/parallel.py) draw the same batches, take their parts of each and make the same steps as
    one, up to rounding; rank 0 alone logs and saves.  Dropout (MCD, GAN's VGG13) is the exception: each process draws
    masks of its own, other numbers than one process does.
    """
    from torch.utils.tensorboard import SummaryWriter
    device = data.images.device
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, settings)
    generators = {which: torch.Generator(device).manual_seed(settings.seed * 3 + i)
                  for i, which in enumerate(("in", "out", "noise"))}
    objective.constrain(model)
    history: list[dict] = []
    nothing = torch.zeros((), device=device)
    done, totals, seconds = 0, nothing, 0.0     # of the epoch: steps, sums of the scalars over images [S]
    if (saved := state.load()) is not None:
        _restore(saved, state.path, model, objective, optimizer, generators)
        history, done, seconds = saved["history"], saved["step"], saved["seconds"]
        totals = saved["totals"].to(device)
        print(f"resumed after epoch {len(history)}, step {done}")
    images = epoch_length(len(data), settings.batch_size)
    steps = math.ceil(images / settings.batch_size)
    out_batch = min(settings.batch_size, len(data)) * objective.out_batch_ratio
    main = parallel.rank() == 0
    writer = None

    def step_on(x, y, z):
        return take_step(model, objective, optimizer, x, y, z, generators["noise"])
    if parallel.world_size() == 1:      # several add up their gradients in between
        step_on = recorded(step_on, device, generators["noise"])
    for epoch in range(len(history), settings.epochs):
        start = time.monotonic() - seconds
        model.train()
        at_start = {which: generators[which].get_state() for which in ("in", "out")}
        outs = endless(out, out_batch, generators["out"], augmentation) if out is not None else None
        bar = tqdm(batches(data, settings.batch_size, generators["in"], augmentation), total=steps, leave=False,
                   desc=f"{name} epoch {epoch + 1}/{settings.epochs}", disable=None)
        for step, (x, y) in enumerate(bar):
            set_lrs(optimizer, lr_factor(objective.schedule, (epoch + step / steps) / settings.epochs))
            z = next(outs)[:len(x) * objective.out_batch_ratio] if outs is not None else None
            if step < done:
                continue
            if (size := parallel.world_size()) > 1:     # dropout differs from process to process; known when resumed
                torch.manual_seed(((settings.seed * settings.epochs + epoch) * steps + step) * size + parallel.rank())
            scalars = step_on(x, y, z)
            if main and writer is None:     # not before: a run that its first step refuses writes nothing
                writer = SummaryWriter(str(log_dir))
            values = parallel.sum_tensor(objective.weight * torch.stack(list(scalars.values())).detach())   # [S]
            totals = totals + values * len(x)
            if verbose and main:
                for scalar, value in zip(scalars, values.tolist(), strict=True):
                    writer.add_scalar(f"step/{scalar}", value, epoch * steps + step + 1)
            if main and step + 1 < steps and state.due():
                if not _finite(model, totals):
                    break
                _save(state, model, objective, optimizer, generators, at_start, history=history, step=step + 1,
                      totals=totals, seconds=time.monotonic() - start)
        means = dict(zip(scalars, (totals / images).tolist(), strict=True))
        if not _finite(model, totals):
            if writer is not None:
                writer.close()
            kept = f"; the state {state.path} is kept" if state.path.exists() else ""
            raise UserError(f"the loss is not finite in epoch {epoch + 1}{kept}: try a smaller --lr, --lr_gmm or "
                            "--decay")
        means["seconds"] = time.monotonic() - start
        history.append(means)
        for scalar, value in means.items() if main else ():
            writer.add_scalar(scalar, value, epoch + 1)
        print(f"{name} epoch {epoch + 1}/{settings.epochs}  " + "  ".join(
            f"{scalar} {value:.4g}" for scalar, value in sorted(means.items())), flush=True)
        done, totals, seconds = 0, nothing, 0.0
        if main and (state.due() or epoch + 1 == settings.epochs):
            _save(state, model, objective, optimizer, generators, {}, history=history, step=done, totals=totals,
                  seconds=seconds)
    if writer is not None:
        writer.close()
    return history


def _kind(device: torch.device) -> str:
    """The CPU or a model of GPU: devices of one kind draw the same random numbers from a seed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _finite(model, totals) -> bool:
    """The weights too: the last loss was taken before the last step."""
    return bool(totals[0].isfinite()) and all(v.isfinite().all() for v in model.state_dict().values())


def _save(state, model, objective, optimizer, generators, at_start, **position):
    """at_start: the states of those generators whose draws a resumed epoch repeats."""
    device = generators["in"].device
    state.save(model=model.state_dict(), objective=objective.state_dict(), optimizer=optimizer.state_dict(),
               device=_kind(device),
               generators={name: g.get_state() for name, g in generators.items()} | at_start,
               # dropout draws from the device's own generator
               global_rng=torch.get_rng_state(),
               cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None, **position)


def _restore(saved, path, model, objective, optimizer, generators) -> None:
    if saved["device"] != (here := _kind(generators["in"].device)):
        raise UserError(f"{path} was made on {saved['device']}, this is {here}, which draws other random numbers: use "
                        "the same --gpu, or start without --resume")
    model.load_state_dict(saved["model"])
    objective.load_state_dict(saved["objective"])
    optimizer.load_state_dict(saved["optimizer"])
    for name, generator in generators.items():
        generator.set_state(saved["generators"][name])
    torch.set_rng_state(saved["global_rng"])
    if saved["cuda_rng"] is not None:
        torch.cuda.set_rng_state(saved["cuda_rng"], generators["in"].device)
