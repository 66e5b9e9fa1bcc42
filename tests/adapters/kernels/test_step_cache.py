"""What a layer keeps over the uses of one step: the bits of a training without it, and nothing that is out of date."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora_pl.adapters import RandLoRA, inject, merge, trainable_parameters, unmerge
from randlora_pl.adapters.kernels import common, randlora_linear
from randlora_pl.adapters.kernels import randlora_linear as sums
from randlora_pl.adapters.kernels.randlora_linear import Held
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.operations import use_bases
from randlora_pl.utils.device import choose_as_on_cuda
from tests.adapters.cases import randomise
from tests.support.products import in_one_item

WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fast": {"memory": "fast"},
    "low": {"memory": "low"},
    "dropout": {"dropout": 0.2},
    "ternary": {"basis": "ternary", "pairing": "peft"},
    "hadamard": {"basis": "hadamard"},
    "hadamard-fast": {"basis": "hadamard", "memory": "fast"},
}


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
        (4, 4, True, None, {}),
        (300, 1, True, False, {"foreach": True}),
        (4, 2, False, True, {}),
    ):
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
    assert (spy.of(model, **few), spy.of(model, **few)) == ((3, 0), (1, 0))
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


def test_nothing_is_out_of_date() -> None:
    """Each change of a tensor of a layer, after two uses."""
    x = torch.randn(4, 48)

    def loads(model: nn.Module) -> None:
        model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})

    def assigns(model: nn.Module) -> None:
        model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()}, assign=True)

    def writes(model: nn.Module) -> None:
        with torch.no_grad():
            deltas(model)[0].gammas.mul_(2)

    def weighs(model: nn.Module) -> None:
        with torch.no_grad():
            model[0].weight.mul_(2)  # type: ignore[index]

    def replaces(model: nn.Module) -> None:
        model[2].weight.data = model[2].weight.data * 2  # type: ignore[index]

    def swaps(model: nn.Module) -> None:
        use_bases(model, RandLoRA(rank=5, seed=9).bases(shapes(model), torch.device("cpu")))  # type: ignore[arg-type]

    def steps_in_data(model: nn.Module) -> None:
        class InData(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:
                for value in deltas(model):
                    value.gammas.data.mul_(0.5)

        InData(trainable_parameters(model).values(), lr=1.0).step()

    def casts(model: nn.Module) -> None:
        model.double()

    def merges(model: nn.Module) -> None:
        merge(model)
        assert kept(model) == []
        unmerge(model)

    for training in (False, True):
        for tokens in (x, torch.randn(300, 48)):
            for change in (loads, assigns, writes, weighs, replaces, swaps, steps_in_data, casts, merges):
                model = stack(memory="fast").train(training)
                before = [model(tokens) for _ in range(3)][-1]
                assert kept(model)
                change(model)
                entry = tokens.to(next(model.parameters()).dtype)
                found = model(entry)
                with uncached():
                    assert torch.equal(found, model(entry))
                assert change is merges or not torch.equal(found, before)


def shapes(model: nn.Module) -> list[Any]:
    from randlora_pl.adapters.random_bases import WeightShape

    return [WeightShape("", *module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)]


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


def test_a_gpu_keeps_what_takes_a_twentieth_of_the_products_to_build() -> None:
    def keeps(tokens: int, large: int, small: int, width: int, structured: bool = False) -> bool:
        build = common.build_time(large, small, width, structured)
        return 20 * build > common.product_time(tokens, large, small)

    assert keeps(128 * 50, 3072, 768, 768)  # ViT-B/32: 0.2 GB
    assert not keeps(64 * 257, 4096, 1024, 1024)  # ViT-L/14
    assert keeps(4096, 14336, 4096, 64, structured=True)  # Llama-3
