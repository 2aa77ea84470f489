"""Several processes that work as one: torchrun starts them, torch.distributed connects them.

Without torchrun every function here does nothing, or returns what one process needs.
"""

import contextlib
import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(days=1)     # of waiting for others, who may attack for hours; a lost process ends all at once

_store = None       # what the processes share beside the group: it answers when the group is broken


def start() -> None:
    """Join the group if torchrun started this process: gloo for tensors on the CPU, nccl on GPUs."""
    global _store
    if dist.is_torchelastic_launched():
        _store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT,
                                store=dist.PrefixStore("group", _store), rank=rank, world_size=size)


def end() -> None:
    """Leave the group, all at once."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Which of this machine's processes, hence GPUs, this is."""
    return int(os.environ["LOCAL_RANK"])


@contextlib.contextmanager
def quiet():
    """Only rank 0 prints and shows progress; what ends the block is reported as ever."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def first_to_fail() -> bool:
    """Whether no other process has failed before: then this one says why."""
    try:
        return _store is None or _store.add("failed", 1) == 1
    except RuntimeError:        # the store is gone with the machine that kept it
        return False


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's x, on the CPU, in every process: on another machine it may be rounded otherwise."""
    if world_size() > 1:
        dist.broadcast(x, 0)
    return x


def shard(n: int, *tensors: Tensor | None) -> tuple[float, list[Tensor | None]]:
    """This process's part of a batch of n images, and its weight: tensors [n k, ...], k rows an image, or None.

    The parts' means times their weights add up to the mean over the batch, also where n is not divided by the number
    of processes.  A batch of fewer images than processes is computed whole by each.
    """
    r, size = rank(), world_size()
    if size == 1 or n < size:
        return 1 / size, list(tensors)
    first, last = r * n // size, (r + 1) * n // size
    return (last - first) / n, [t if t is None else t[first * (len(t) // n):last * (len(t) // n)] for t in tensors]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the processes' gradients in one all-reduce; of losses times the weights of `shard`, the batch's."""
    if world_size() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def sum_tensor(x: Tensor) -> Tensor:
    """The sum of the processes' x, in x."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def sync_batch_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with batch norms over the batches of all processes; its state dict keeps its form."""
    if world_size() > 1:
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(module)
        for part in module.modules():
            if type(part) is nn.BatchNorm2d:
                part.__class__ = BatchNorm2dOnCPU
    return module


class _Sum(torch.autograd.Function):
    """The sum over the processes, and so its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class BatchNorm2dOnCPU(nn.BatchNorm2d):
    """nn.SyncBatchNorm, which takes no tensors on the CPU, for the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()       # with --amp 1 x is bf16, in which sums and counts would be wrong
        count = _Sum.apply(x.new_tensor(x.numel() // x.shape[1]))
        mean = _Sum.apply(x.sum((0, 2, 3))) / count                                 # [C]
        centred = x - mean[:, None, None]
        var = _Sum.apply(centred.square().sum((0, 2, 3))) / count                   # [C], biased as in training
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(dtype)
