"""What a layer keeps over the uses of one step: the bits of a training without it, and nothing that is out of date."""

import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from randlora_pl.adapters import Adapter, LoRA, RandLoRA, inject, merge, trainable_parameters, unmerge
from randlora_pl.adapters.kernels import common, randlora_linear
from randlora_pl.adapters.kernels import randlora_linear as sums
from randlora_pl.adapters.kernels.randlora_linear import Held
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.operations import use_bases
from randlora_pl.adapters.random_bases import Bases, WeightShape
from randlora_pl.utils.device import choose_as_on_cuda
from tests.adapters.cases import randomise
from tests.support.products import covered, in_one_item

WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fast": {"memory": "fast"},
    "low": {"memory": "low"},
    "dropout": {"dropout": 0.2},
    "ternary": {"basis": "ternary", "pairing": "peft"},
    "hadamard": {"basis": "hadamard"},
    "hadamard-fast": {"basis": "hadamard", "memory": "fast"},
}


CPU = torch.device("cpu")


def stack(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 144), nn.GELU(), nn.Linear(144, 48))
    inject(model, RandLoRA(rank=5, **options), [".*"])
    randomise(model, 0.3)
    return model.train()


def deltas(model: nn.Module) -> list[RandLoRADelta]:
    return [module for module in model.modules() if isinstance(module, RandLoRADelta)]


def kept(model: nn.Module) -> list[str]:
    """Kinds of tensors that the layers keep, "S" or "built"."""
    return sorted(key[0] for delta in deltas(model) for key in delta.cache.held._made)  # type: ignore[index]


@contextmanager
def uncached() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Held, "active", False)
        yield


def train(
    model: nn.Module,
    batches: int = 1,
    steps: int = 3,
    tokens: int = 300,
    autocast: bool = False,
    recompute: bool | None = None,
    **options: Any,
) -> list[Tensor]:
    """Losses and trained values of some steps of AdamW; ``recompute`` is checkpoint's ``use_reentrant``."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01, **options)
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        for _ in range(batches):
            x = torch.randn(tokens, 48, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(x) if recompute is None else checkpoint(model, x, use_reentrant=recompute)
            (loss := output.float().square().mean()).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        assert kept(model) == []
    return [*losses, *(value.detach().clone() for value in trainable_parameters(model).values())]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@in_one_item("way", WAYS)
def test_training_has_the_bits_of_a_training_without_a_cache(way: str) -> None:
    for tokens, batches, autocast, recompute, options in (
        (300, 2, False, None, {"fused": True}),  # whose changes no version counter counts
        (300, 1, True, False, {"foreach": True}),
        (4, 4, True, None, {}),
        (4, 2, False, True, {}),
    )[list(WAYS).index(way) % 2 :: 2]:  # many tokens and few
        runs = []
        for context in (uncached, nullcontext):
            with context():
                settings = {"batches": batches, "tokens": tokens, "autocast": autocast, "recompute": recompute}
                runs.append(train(stack(**WAYS[way]), steps=2, **settings, **options))
        assert equal(*runs)


class Spy:
    """Counts the builds of S and of W0 + B S."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.counts = {"mixed_stack": 0, "effective": 0}
        for name in self.counts:
            patch.setattr(sums, name, self.counting(name, getattr(sums, name)))

    def counting(self, name: str, function: Any) -> Any:
        def count(*args: Any) -> Any:
            self.counts[name] += 1
            return function(*args)

        return count

    def of(self, model: nn.Module, steps: int = 1, **settings: Any) -> tuple[int, int]:
        """Builds of S and of W0 + B S, a layer and step."""
        self.counts.update(dict.fromkeys(self.counts, 0))
        train(model, steps=steps, **settings)
        return tuple(count / steps / 3 for count in self.counts.values())  # type: ignore[return-value]


def test_each_step_builds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """S and W0 + B S, a layer; the first step learns that there is more than one use."""
    spy = Spy(monkeypatch)
    many = {"tokens": 300, "batches": 4}  # 300 tokens build W0 + B S; 4 take the thin products
    for memory, first, later in (("auto", (2, 2), (1, 1)), ("fast", (2, 2), (1, 1)), ("low", (8, 8), (8, 8))):
        model = stack(memory=memory)
        assert (spy.of(model, **many), spy.of(model, steps=2, **many)) == (first, later)
    few = {"tokens": 4, "batches": 4}
    model = stack()
    assert (spy.of(model, **few), spy.of(model, **few)) == ((2, 0), (1, 0))  # the backward pass has the forward's S
    model = stack(basis="hadamard")  # which builds again for the backward pass, from a kept S
    assert (spy.of(model, **many), spy.of(model, **many)) == ((3, 8), (1, 8))
    for recompute in (False, True):
        model = stack()  # auto does not keep what recomputation saves
        assert spy.of(model, recompute=recompute, **few)[0] in (2, 3)
        assert spy.of(model, recompute=recompute, **few) == (1, 0)
        assert spy.of(model, recompute=recompute, **many)[1] == 8
        model = stack(memory="fast")
        spy.of(model, recompute=recompute, **many)
        assert spy.of(model, recompute=recompute, **many) == (1, 1)
    model = stack()
    assert [spy.of(model, tokens=300) for _ in range(3)] == [(1, 1)] * 3


def test_generation_keeps_s_from_the_second_token_and_drops_it_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    for context in (torch.no_grad, torch.inference_mode):
        model = stack().eval()
        with context():
            spy.counts["mixed_stack"] = 0
            outputs = [model(torch.ones(1, 48)) for _ in range(5)]
            assert all(torch.equal(output, outputs[0]) for output in outputs)
            assert spy.counts["mixed_stack"] == 2 * 3
            assert kept(model) == ["S"] * 3
            model(torch.ones(300, 48))
            assert kept(model) == ["S"] * 3  # not W0 + B S
        model.train()
        assert kept(model) == []
        train(model)


def halved(model: nn.Module) -> dict[str, Tensor]:
    return {name: value * 0.5 for name, value in model.state_dict().items()}


def other_bases(model: nn.Module) -> Bases:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    basis = "hadamard" if deltas(model)[0].structured else "uniform"
    return RandLoRA(rank=5, seed=9, basis=basis).bases([WeightShape("", *layer.weight.shape) for layer in layers], CPU)


class InData(torch.optim.SGD):
    """Changes no version counter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for value in group["params"]:
                value.data.mul_(0.5)


def merges(model: nn.Module) -> None:
    merge(model)
    assert kept(model) == []
    unmerge(model)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "loads": lambda model: model.load_state_dict(halved(model)),
    "assigns": lambda model: model.load_state_dict(halved(model), assign=True),
    "writes": lambda model: deltas(model)[0].gammas.mul_(2),
    "writes a": lambda model: deltas(model)[0].bases.A.mul_(2),
    "writes b": lambda model: deltas(model)[0].bases.B[1:].neg_(),
    "weighs": lambda model: model[0].weight.mul_(2),
    "replaces": lambda model: setattr(model[2].weight, "data", model[2].weight.data * 2),
    "sets values": lambda model: setattr(deltas(model)[0].gammas, "data", deltas(model)[0].gammas.data * 2),
    "sets a": lambda model: setattr(deltas(model)[0].bases.A, "data", deltas(model)[0].bases.A.data * 2),
    "sets b": lambda model: setattr(deltas(model)[0].bases.B, "data", deltas(model)[0].bases.B.data.flip(0)),
    "swaps": lambda model: use_bases(model, other_bases(model)),
    "steps": lambda model: InData(trainable_parameters(model).values(), lr=1.0).step(),
    "casts": lambda model: model.double(),
    "scales": lambda model: setattr(deltas(model)[0], "scaling", 0.5),
    "merges": merges,
}


@covered(("training", "tokens", "basis"), (False, True), (4, 300), ("uniform", "ternary", "hadamard"))
def test_nothing_is_out_of_date(training: bool, tokens: int, basis: Any) -> None:
    """Each change of a tensor of a layer, after two uses."""
    x = torch.randn(tokens, 48)
    for name, change in CHANGES.items():
        model = stack(memory="fast", basis=basis).train(training)
        before = [model(x) for _ in range(3)][-1]
        assert kept(model)
        with torch.inference_mode() if name.startswith("writes") else torch.no_grad():
            change(model)
        entry = x.to(next(model.parameters()).dtype)
        found = model(entry)
        with uncached():
            assert torch.equal(found, copy.deepcopy(model)(entry)), name
        assert name == "merges" or not torch.equal(found, before), name


def test_modes_copies_and_the_end_of_training_leave_nothing_behind() -> None:
    model = stack()
    x = torch.randn(300, 48)
    for _ in range(3):
        model(x)
    assert kept(model) == ["built"] * 3
    twin = copy.deepcopy(model)
    assert kept(twin) == []
    assert torch.equal(twin(x), model(x))
    for module in model.modules():
        module.training = False  # as Lightning does after a validation, in the other direction
    model(x)
    assert kept(model) == []
    train(model.train(), batches=2)
    held = [delta.cache.held for delta in deltas(model)]
    assert not any(each._made for each in held)
    assert len(randlora_linear._LIVE) == 0


def test_swapped_parameters_keep_nothing() -> None:
    """``functional_call`` and ``torch.func``: other tensors stand for the parameters."""
    model = stack()
    x = torch.randn(4, 48)
    values = {name: value.detach() * 2 for name, value in trainable_parameters(model).items()}
    for _ in range(3):
        torch.func.functional_call(model, values, (x,))
    assert kept(model) == []


def test_a_gpu_builds_once_for_many_small_batches() -> None:
    """Where one build costs less than the thin products of all micro-batches; a CPU keeps the form, and so its bits."""
    assert not common.cheapest(20, 48, 48, 48, 48).build
    assert common.cheapest(20, 48, 48, 48, 48, 4).build
    runs = []
    for context in (uncached, nullcontext):
        with context(), choose_as_on_cuda():
            model = stack()
            runs.append(train(model, batches=4, tokens=20))
    for one, other in zip(*runs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    with choose_as_on_cuda():
        for _ in range(2):
            model(torch.randn(20, 48))
        assert kept(model) == ["built"] * 3


# Kernels of one layer's step, chosen as on a GPU: each is a launch, by which small models are bound


ALLOCATE = {"empty", "new_empty", "empty_like", "_unsafe_view", "detach", "lift_fresh"}


class Kernels(TorchDispatchMode):
    """Counts operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ALLOCATE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def counts(sizes: tuple[int, int], micro_batches: int, **options: Any) -> list[tuple[int, int]]:
    """Kernels of the forward and of the backward pass of each micro-batch of the second step, under autocast."""
    layer = nn.Sequential(nn.Linear(*sizes)).requires_grad_(False).bfloat16()
    inject(layer, RandLoRA(rank=7, **options), [".*"])  # 133 columns
    randomise(layer, 0.1)
    optimizer = torch.optim.SGD((value for value in layer.parameters() if value.requires_grad), lr=0.1)
    inputs = list(layer[0].delta.parameters())  # type: ignore[union-attr, operator]
    result = []
    for step in range(2):
        for _ in range(micro_batches):
            x = torch.randn(2000, sizes[0], dtype=torch.bfloat16, requires_grad=True)
            with Kernels() as forward, torch.autocast("cpu", torch.bfloat16):
                output = layer(x)
            upper = torch.ones_like(output)
            with Kernels() as backward:
                torch.autograd.grad(output, [x, *inputs], upper)
            if step:
                result.append((len(forward.names), len(backward.names)))
                assert not {"item", "_local_scalar_dense", "nonzero"} & {*forward.names, *backward.names}
        optimizer.step()
    return result


@in_one_item(
    ("way", "options", "wide", "tall"),
    [
        # Forward and backward pass of the first micro-batch, and of the second. Without copies of B, turned blocks and
        # a kept S: dense 8 + 15, dropout 11 + 18, hadamard 21 + 40, or 31 + 30 if wider than tall. Of each build of
        # W0 + B S, five are the rounding of a bfloat16 sum.
        ("dense", {}, [(14, 8), (1, 8)], [(14, 8), (1, 8)]),
        ("low", {"memory": "low"}, [(14, 21), (14, 21)], [(14, 21), (14, 21)]),
        ("dropout", {"dropout": 0.1}, [(10, 12), (6, 12)], [(9, 13), (5, 13)]),
        ("ternary", {"basis": "ternary"}, [(14, 8), (1, 8)], [(14, 8), (1, 8)]),
        ("hadamard", {"basis": "hadamard"}, [(23, 11), (5, 11)], [(19, 15), (1, 15)]),
    ],
)
def test_a_layer_needs_few_kernels(
    way: str, options: dict[str, Any], wide: list[tuple[int, int]], tall: list[tuple[int, int]]
) -> None:
    with choose_as_on_cuda():
        for sizes, budget in (((128, 384), tall), ((384, 128), wide)):
            for found, most in zip(counts(sizes, 2, **options), budget, strict=True):
                assert found[0] <= most[0]
                assert found[1] <= most[1]


class Operators(TorchDispatchMode):
    """Counts operators, also those that only view."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def host_work(adapter: Adapter) -> tuple[int, int]:
    """Calls of Python functions, and operators, of one layer's step with one row: what a fast GPU waits for."""
    layer = nn.Sequential(nn.Linear(48, 48))
    inject(layer, adapter, [".*"])
    x, one, calls = torch.randn(1, 48, requires_grad=True), torch.ones(1, 48), 0

    def step() -> None:
        layer(x).backward(one)
        randlora_linear.end_step()

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    for _ in range(2):
        step()
    with Operators() as operators:
        step()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(before)
    return calls, operators.count


def test_a_step_of_a_layer_has_few_calls_beside_loras() -> None:
    """Counted over LoRA's; without kept forms, bases, views and S: dense 165 and 17, hadamard 236 and 44."""
    least = host_work(LoRA(rank=4))
    for basis, calls, operators in (("uniform", 110, 6), ("ternary", 135, 6), ("hadamard", 170, 22)):
        found = host_work(RandLoRA(rank=4, basis=basis))
        assert found[0] <= least[0] + calls and found[1] <= least[1] + operators, (basis, found, least)


def test_frozen_parts_are_the_same_objects_until_the_bases_change() -> None:
    model = stack(basis="ternary")
    x = torch.randn(4, 48)

    def parts() -> list[Any]:
        model(x)
        return [delta.cache._frozen for delta in deltas(model)]

    first = parts()
    train(model, steps=2)
    assert all(one is two for one, two in zip(first, parts(), strict=True))
    assert all(delta.cache._frozen is None for delta in deltas(copy.deepcopy(model)))
    with choose_as_on_cuda():
        assert all(one is not two for one, two in zip(first, parts(), strict=True))
    for change in (lambda: model[0].delta.bases.B.neg_(), lambda: use_bases(model, other_bases(model))):
        first, before = parts(), model(x)
        change()
        assert all(one is not two for one, two in zip(first, parts(), strict=True))
        assert not torch.equal(model(x), before)


def test_threads_and_switched_precisions_get_the_outputs_of_one_call() -> None:
    x = torch.randn(4, 48)
    for way in ("dense", "ternary", "hadamard"):
        model = stack(**WAYS[way]).eval()

        def outputs(model: nn.Module) -> list[Tensor]:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                inner = model(x)
                with torch.autocast("cpu", enabled=False):
                    return [inner, model(x)]

        expected = outputs(copy.deepcopy(model))
        with ThreadPoolExecutor(4) as pool:
            assert all(equal(each, expected) for each in pool.map(outputs, [model] * 40))
