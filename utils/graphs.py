"""Equal steps on a GPU, recorded once as a CUDA graph: many small operations take longer to launch than to compute."""

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

WARM_UP = 3     # calls before the recording: optimizers make their state, cuDNN finds its fastest convolutions


class Recorded:
    """function(*inputs), on a GPU recorded at its fourth call of the same shapes and from then on replayed for these.

    inputs: tensors, None, and tuples of these.  The function computes on the GPU alone, waits for nothing and does the
    same each time; what it changes (weights, an optimizer's state) it changes in place.  Inputs of other shapes than
    the recorded ones, as a last batch's, go to the function itself, and so do all where the recording fails, because
    the function waits for the GPU or memory is short.  A replay overwrites what the one before returned.  Random
    numbers come from the GPU's own generator, or from `generators`, whose states go on as they would without.
    """

    def __init__(self, function: Callable, *generators: torch.Generator):
        self.function, self.generators, self.calls = function, generators, Counter()
        self.graph = self.inputs = self.outputs = None
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs):
        shapes = shapes_of(inputs)
        if self.inputs is None:
            self.calls[shapes] += 1
            if self.calls[shapes] <= WARM_UP:
                return self.aside(inputs)
            self.record(inputs)
        if self.graph is None or shapes != shapes_of(self.inputs):
            return self.function(*inputs)
        for x, value in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
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
            # the outer context restores the stream where the inner one fails to
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
            self.graph = graph
        except RuntimeError as error:
            while error.__context__:        # the first one: after it the recording cannot be ended either
                error = error.__context__
            warnings.warn("slower than need be, since a step could not be recorded (does it wait for the GPU?): "
                          f"{str(error).splitlines()[0]}", stacklevel=1)      # once, not for each block of an attack


def shapes_of(inputs: tuple) -> tuple[torch.Size | None, ...]:
    return tuple(None if x is None else x.shape for x in tree_leaves(inputs))


def recorded(function: Callable, device: torch.device, *generators: torch.Generator) -> Callable:
    """`Recorded` on the current GPU, the function itself on a CPU or on another GPU, which has streams of its own."""
    here = device.type == "cuda" and device.index in (None, torch.cuda.current_device())
    return Recorded(function, *generators) if here else function


def side_by_side(device: torch.device, beside: Callable, main: Callable) -> tuple:
    """(beside(), main()); in a recording the first runs on a stream of its own, beside the second.

    A GPU has room for many small operations at a time, and a recorded graph's branches are launched together.
    beside returns tensors, also in tuples and dicts.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        return beside(), main()
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            results = beside()
        others = main()
    finally:        # CUDA could not even give up a recording whose branches do not meet
        here.wait_stream(side)
    for result in tree_leaves(results):
        result.record_stream(here)
    return results, others
