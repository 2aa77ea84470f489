"""Steps recorded as a CUDA graph are the steps: the same numbers, also of dropout and of the learning rates."""

import contextlib
import warnings

import pytest
import torch
from torch.utils._pytree import tree_map_only

from models import CCU, GMM, MCD, PCAMetric, Softmax, build_classifier
from models.detectors import EDL
from utils import objectives, training
from utils.attack import attack
from utils.batches import Augmentation, ImageSet
from utils.graphs import WARM_UP, Recorded, recorded, side_by_side
from utils.region import Coordinates
from utils.state import State

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZE = 12


def images(n: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    x = torch.randint(0, 200, (n, 1, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    x[torch.arange(n), 0, labels] += 50         # a bright row: there is something to learn
    return ImageSet("images", x, labels, 10).to("cuda")


def make_metric() -> PCAMetric:
    generator = torch.Generator().manual_seed(0)
    return PCAMetric.fit(torch.rand(500, SIZE ** 2, generator=generator) * torch.linspace(0.1, 1, SIZE ** 2))


def make_model(train_type: str):
    torch.manual_seed(0)
    base = build_classifier("VGG13" if train_type in ("MCD", "GAN") else "LeNet", 1, SIZE, 10)
    if train_type == "MCD":
        return MCD(base, 3)
    if train_type == "EDL":
        return EDL(base)
    if train_type != "CEDA_GMM":
        return Softmax(base)
    metric = make_metric()
    mixtures = [GMM(torch.rand(5, SIZE ** 2), torch.full((5,), logvar), torch.full((5,), 0.2).log(), metric)
                for logvar in (-1.0, 1.0)]
    return CCU(base, *mixtures, 0.0, 10)


def run(train_type, path, optimizer="adam", epochs=2, resume=False):
    """Train on 9 batches an epoch, the last one smaller; the model's and the objective's tensors, and the history."""
    data, out = images(8 * 20 + 7, 1), images(300, 2)
    model = make_model(train_type).cuda()
    objective = objectives.make(train_type, 0.0, False, 3, data.images)
    settings = training.Settings(optimizer, 1e-3, 1e-3, 1e-4, ("mu", "var"), epochs, 20, 0)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"):
        history = training.train(model, objective, data, out if objective.needs_out else None,
                                 Augmentation(2, "constant", True), settings, State(path / "state", {}, resume),
                                 path / "logs", train_type)
    return model.state_dict() | {f"{name}.{key}": value for name, network in getattr(objective, "networks", {}).items()
                                 for key, value in network.state_dict().items()}, history


def assert_same(found, expected):
    (weights, history), (others, other_history) = found, expected
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: "
                                   f"{text}")
    for epoch, other in zip(history, other_history, strict=True):
        assert {k: v for k, v in epoch.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in other.items() if k != "seconds"}, rel=1e-4)


@needs_gpu
@pytest.mark.parametrize("train_type,optimizer", [
    ("plain", "adam"), ("plain", "sgd"), ("CEDA", "nesterov"), ("OE", "sgd"), ("ACET", "adam"), ("CEDA_GMM", "adam"),
    ("CEDA_GMM", "sgd"), ("MCD", "sgd"), ("EDL", "adam"), ("GAN", "adam")])
def test_recorded_training_is_the_training(train_type, optimizer, tmp_path, monkeypatch, recwarn):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self)))
    found = run(train_type, tmp_path, optimizer)
    assert len(replays) == 2 * 8 - WARM_UP and not [w for w in recwarn if "slower" in str(w.message)]
    monkeypatch.setattr(training, "recorded", lambda function, *_: function)
    assert_same(found, run(train_type, tmp_path, optimizer))
    assert len(replays) == 2 * 8 - WARM_UP


@needs_gpu
@pytest.mark.parametrize("train_type", ["MCD", "ACET", "GAN"])
def test_a_recorded_training_is_resumed(train_type, tmp_path, monkeypatch):
    expected = run(train_type, tmp_path)
    steps = []

    class Stop(Exception):
        pass

    def stopping(self):
        steps.append(1)
        if len(steps) == 10:
            raise Stop
        replay(self)
    replay = torch.cuda.CUDAGraph.replay
    with monkeypatch.context() as patch:
        patch.setattr("utils.state.SAVE_EVERY", 0)
        patch.setattr(torch.cuda.CUDAGraph, "replay", stopping)
        with pytest.raises(Stop):
            run(train_type, tmp_path)
    assert_same(run(train_type, tmp_path, resume=True), expected)


@needs_gpu
@pytest.mark.parametrize("train_type", ["plain", "CEDA_GMM"])
def test_a_recorded_attack_is_the_attack(train_type, monkeypatch):
    model = make_model(train_type).cuda().eval()
    metric = make_metric().cuda()
    seeds = torch.rand(6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).cuda()

    def found():
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee"):
            return attack(model, Coordinates(metric), seeds, torch.full((6,), 3.0), steps=60, restarts=3,
                          generator=torch.Generator().manual_seed(0), points=9)
    recorded_one = found()
    monkeypatch.setattr("utils.attack.recorded", lambda function, *_: function)
    torch.testing.assert_close(recorded_one.attack_score, found().attack_score, rtol=1e-3, atol=1e-4)
    assert (recorded_one.attack_score > model.attack_score(seeds)).all()


@needs_gpu
@pytest.mark.parametrize("waits", [True, False])
def test_a_function_that_waits_is_computed_all_the_same(waits, recwarn):
    generator, other = (torch.Generator("cuda").manual_seed(3) for _ in range(2))

    def function(x, generator=generator):
        x = x * torch.rand(4, generator=generator, device="cuda")
        return x * (x.sum().item() if waits else 2)
    step = recorded(function, torch.device("cuda"), generator)
    for i in range(2 * WARM_UP):
        x = torch.full((4,), float(i), device="cuda")
        assert torch.equal(step(x), function(x, other))
    assert (step.graph is None) == waits == any("could not be recorded" in str(w.message) for w in recwarn)


@needs_gpu
def test_other_shapes_and_generators():
    generator, other = (torch.Generator("cuda").manual_seed(3) for _ in range(2))

    def draws(x, y):
        return x + torch.rand(len(x), generator=generator, device="cuda") + (0 if y is None else y)
    step = recorded(draws, torch.device("cuda"), generator)
    for i in range(3 * WARM_UP):
        n = 3 if i == WARM_UP + 2 else 5
        x = torch.full((n,), float(i), device="cuda")
        expected = x + torch.rand(n, generator=other, device="cuda")
        assert torch.equal(step(x, None), expected)
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("batches", [[5, 5, 5, 3], [5, 5, 3], [5, 3]])
def test_what_comes_most_often_is_recorded(batches, monkeypatch):
    """Also where the fourth batch is an epoch's smaller last one; on a CPU, with a recording that is none."""
    class Replay(Recorded):
        def record(self, inputs):
            assert self.inputs is None
            self.inputs = tree_map_only(torch.Tensor, torch.clone, inputs)
            self.graph, self.outputs = self, torch.empty_like(self.inputs[0])

        def aside(self, inputs):
            return self.function(*inputs)

        def replay(self):
            replayed.append(len(self.outputs))
            self.outputs.copy_(self.inputs[0] + self.inputs[1][0])
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    replayed: list[int] = []
    step = Replay(lambda x, more: x + more[0])
    for epoch in range(6):
        for n in batches:
            x, y = torch.full((n,), float(epoch)), torch.rand(n)
            assert torch.equal(step(x, (y, None)), x + y)
    assert replayed == [5] * (6 * batches.count(5) - WARM_UP)


@pytest.fixture
def streams(monkeypatch):
    """Pretended streams, and the list of which waited for which."""
    waits: list[tuple] = []

    class Stream:
        def wait_stream(self, other):
            waits.append((self, other))
    here = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return waits


@pytest.mark.parametrize("fails", ["beside", "main", ""])
def test_the_branches_of_a_recording_meet_also_where_one_fails(fails, streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with contextlib.suppress(ZeroDivisionError):
        assert side_by_side(torch.device("cuda"), lambda: {}[1 / 0] if fails == "beside" else (),
                            lambda: 1 / 0 if fails == "main" else 5) == ((), 5) and not fails
    (side, here), last = streams
    assert last == (here, side)


def test_a_recording_that_fails_is_warned_of_once_and_with_the_reason(streams, monkeypatch, recwarn):
    @contextlib.contextmanager
    def recording(graph, stream):
        try:
            yield
        finally:
            raise RuntimeError("the recording cannot be ended")

    def function(x):
        if len(streams) == 2 * WARM_UP:
            streams.append(())
            raise torch.OutOfMemoryError("out of memory\nand so on")
        return x + 1
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    warnings.simplefilter("default")
    for _ in range(3):
        streams.clear()
        step = Recorded(function)
        for i in range(2 * WARM_UP):
            assert torch.equal(step(torch.full((2,), float(i))), torch.full((2,), i + 1.0))
    said, = (str(w.message) for w in recwarn)
    assert said.endswith(": out of memory")


@pytest.mark.parametrize("train_type", ["plain", "CEDA", "CEDA_GMM"])
def test_torch_compile_takes_a_loss_whole(train_type):
    objective, model = objectives.make(train_type, 0.0, True, 1, torch.zeros(1, 1, SIZE, SIZE)), make_model(train_type)
    x, z = torch.rand(2, 6, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    batch = model, x, torch.arange(6), z
    loss, scalars = torch.compile(objective.loss, backend="eager", fullgraph=True)(*batch)
    expected, others = objective.loss(*batch)
    torch.testing.assert_close((loss, scalars), (expected, others))


def test_a_cpu_records_nothing():
    assert recorded(len, torch.device("cpu")) is len
