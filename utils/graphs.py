"""Equal steps on a GPU, recorded once as a CUDA graph: many small operations take longer to launch than to compute."""

import sys
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

WARM_UP = 3     # calls before the recording: optimizers make their state, cuDNN finds its fastest convolutions


class Recorded:
    """function(*inputs), on a GPU recorded at its fourth call and replayed from then on, in one launch.

    inputs: tensors, None, and tuples of these.  The function computes on the GPU alone, waits for nothing and does the
    same each time; what it changes (weights, an optimizer's state) it changes in place.  Inputs of other shapes than
    the recorded ones, as a last batch's, go to the function itself, and so do all where the recording fails because
    the function waits for the GPU.  A replay overwrites what the one before returned.  Random numbers come from the
    GPU's own generator, or from `generators`, whose states go on as they would without.
    """

    def __init__(self, function: Callable, *generators: torch.Generator):
        self.function, self.generators, self.calls = function, generators, 0
        self.graph = self.inputs = self.outputs = None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.aside(inputs)
        if self.calls == WARM_UP + 1:
            self.record(inputs)
        given, mine = tree_leaves(inputs), tree_leaves(self.inputs)
        if self.graph is None or [shape(x) for x in given] != [shape(x) for x in mine]:
            return self.function(*inputs)
        for x, value in zip(mine, given, strict=True):
            if x is not None:
                x.copy_(value)
        self.graph.replay()
        return self.outputs

    def aside(self, inputs):
        """The function itself, on the stream of the recording: autograd may keep to the stream of its first call."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, inputs) -> None:
        self.inputs = tree_map_only(torch.Tensor, torch.clone, inputs)
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            print(f"warning: slower than need be, since a step waits for the GPU or does not keep to it: "
                  f"{str(error).splitlines()[0]}", file=sys.stderr)


def shape(x: torch.Tensor | None) -> torch.Size | None:
    return None if x is None else x.shape


def recorded(function: Callable, device: torch.device, *generators: torch.Generator) -> Callable:
    """`Recorded` on a GPU, the function itself on a CPU."""
    return Recorded(function, *generators) if device.type == "cuda" else function


class Beside:
    """The operations of this block run, in a recording, beside those that follow, until `join`.

    A GPU has room for many small operations at a time, and a recorded graph's branches are launched together.
    """

    def __init__(self, device: torch.device):
        self.main = torch.cuda.current_stream() if device.type == "cuda" and torch.cuda.is_current_stream_capturing() \
            else None
        self.side = self.main and torch.cuda.Stream()
        self.context = torch.cuda.stream(self.side)         # of None: does nothing

    def __enter__(self) -> "Beside":
        if self.main:
            self.side.wait_stream(self.main)
        self.context.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)

    def join(self, *results: torch.Tensor) -> None:
        """Wait for the block, whose results are used from here on."""
        if self.main:
            self.main.wait_stream(self.side)
            for result in results:
                result.record_stream(self.main)
