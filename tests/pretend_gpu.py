"""A pretended GPU: tensors that are computed on the CPU, but mix with the CPU's as little as a GPU's do.

    python -m tests.pretend_gpu RECORD "gen_gmm.py --dataset Digits" "run_training.py ..."

runs scripts with all that they put on their device on a device `pretend`, and writes to RECORD, as JSON, for each
command how often it waited for that device: read a value, copied from or to the CPU, picked by a mask.  An operation on
tensors of both devices, or with the other device's generator, raises, as on a GPU.  The numbers are the CPU's.  It
knows nothing of autocast, of memory, of time, or of which operations a GPU has.
"""

import collections
import importlib
import json
import sys
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
COPIES = ("aten::_to_copy", "aten::copy_")
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select")
PICKS = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
waits: collections.Counter = collections.Counter()
drawing = None          # the pretended generator of the call in progress


class Tensor(torch.Tensor):
    """`values` is a tensor on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(NAME, 0))
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def tolist(self):       # which PyTorch refuses to all subclasses
        waits["tolist"] += 1
        return self.values.tolist()


class Device(TorchDispatchMode):
    """Sees what makes tensors out of nothing too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Compute on the CPU; refuse what a GPU would refuse, count what would wait for it."""
    name, to = func._schema.name, kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, Tensor)]
    stays = bool(ours) if to is None else torch.device(to).type == NAME
    if not ours and not stays:
        return func(*args, **kwargs)
    if ours and name not in COPIES and any(t.dim() for t in tensors if not isinstance(t, Tensor)):
        raise RuntimeError(f"{name} of tensors on two devices")
    if name in READS or ours and not stays or (name in COPIES and len(ours) < len(tensors)) or (
            name in PICKS and any(t is not None and t.dtype == torch.bool for t in args[1])):
        waits[name] += 1
    if kwargs.get("generator") is not None:
        kwargs = kwargs | {"generator": drawing.on_cpu}
    if to is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    result = func(*tree_map_only(Tensor, lambda t: t.values, args), **tree_map_only(Tensor, lambda t: t.values, kwargs))
    if [r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns] == [True]:    # in place
        return args[0]
    if name == "aten::_to_copy" and result is args[0]:
        result = result.clone()
    return tree_map_only(torch.Tensor, Tensor, result) if stays and name not in READS[:2] else result


class Generator(torch.Generator):
    """torch.Generator, also of the pretended device."""

    def __new__(cls, device="cpu"):
        if torch.device(device).type != NAME:
            return REAL(device)
        self = REAL.__new__(cls, "cpu")
        self.on_cpu = REAL("cpu")
        return self

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: torch.device(NAME, 0))

    def manual_seed(self, seed):
        self.on_cpu.manual_seed(seed)
        return self

    def get_state(self):
        return self.on_cpu.get_state()

    def set_state(self, state):
        self.on_cpu.set_state(state)
        return self


REAL = torch.Generator


def checked(draw):
    """torch.rand and its like, which take no generator of another device."""
    def drawn(*args, generator=None, device=None, **kwargs):
        global drawing
        ours = device is not None and torch.device(device).type == NAME
        if generator is not None and isinstance(generator, Generator) != ours:
            raise RuntimeError(f"{draw.__name__} on {device} with a generator on {generator.device}")
        drawing = generator
        return draw(*args, generator=generator, device=device, **kwargs)
    return drawn


class Module(backend_registration._DummyBackendModule):
    """What PyTorch asks of torch.pretend."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def shorten(setattr) -> None:
    """Let the scripts take few images: 180 to train on (the metric needs more), 30 for the tables."""
    import params
    for name in ("OUT_CROPS", "OUT_FIT_IMAGES"):
        setattr(params, name, 2_000)
    setattr(params, "CALIBRATION_IMAGES", 50)
    for name, n in (("gen_gmm", 360), ("run_training", 180), ("gen_eval", 30), ("gen_attack_stats", 30)):
        script = importlib.import_module(name)
        setattr(script, "load_in_dist",
                lambda *args, n=n, whole=script.load_in_dist: whole(*args).subset(slice(n)))


def main(record: str, *commands: str) -> None:
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=Module())
    # .to(device) cannot change the inside of a subclass: parameters are replaced
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Generator = Generator
    for name in ("rand", "randn", "randint", "randperm"):
        setattr(torch, name, checked(getattr(torch, name)))
    from utils import cli, state
    cli.device = lambda gpu: torch.device(NAME, 0)
    state.SAVE_EVERY = float("inf")      # saving waits for the device: rightly, but at times of its own
    shorten(setattr)
    counts = []
    for command in commands:
        script, *sys.argv[1:] = command.split()
        sys.argv[0], script = script, importlib.import_module(script.removesuffix(".py"))
        waits.clear()
        with Device():
            cli.run(script.main, script.parser())
        counts.append(dict(waits))
        Path(record).write_text(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
