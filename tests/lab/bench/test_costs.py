import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora_pl.adapters import RandLoRA, inject
from randlora_pl.lab.bench import (
    Gemm,
    Spread,
    counter,
    in_turns,
    machine,
    processor,
    ratios,
    saved_tensors,
)


def test_a_linear_layer_keeps_its_input() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(5, 8)
    with saved_tensors(layer.parameters()) as saved:
        layer(x).sum().backward()
    assert sum(saved.values()) == 5 * 8 * 4
    with saved_tensors([*layer.parameters(), x]) as saved:
        layer(x).sum().backward()
    assert sum(saved.values()) == 0


def test_a_storage_counts_once_and_whole() -> None:
    x = torch.randn(10, 4, requires_grad=True) * 1
    with saved_tensors([]) as saved:
        (x[:2].exp() + x[1:3].sin()).sum().backward()
    assert sum(saved.values()) == 10 * 4 * 4 + 2 * 4 * 4  # all of x for the two rows of sin; exp keeps its result


def test_a_linear_layer_costs_three_products() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(5, 8, requires_grad=True)
    with counter() as operations:
        layer(x).sum().backward()
    assert operations.get_total_flops() == 3 * (2 * 5 * 8 * 16)


@pytest.mark.parametrize(("rows", "columns"), [(8, 16), (16, 8)])
def test_the_products_of_a_custom_function_are_counted(rows: int, columns: int) -> None:
    model, x = nn.Sequential(nn.Linear(rows, columns)), torch.randn(400, rows, requires_grad=True)
    inject(model, RandLoRA(rank=2, memory="fast"), ["all"])
    with counter() as operations:
        model(x).sum().backward()
    layer = 3 * (2 * 400 * 8 * 16)  # the layer itself, both gradients
    build = 2 * (2 * 16 * 8 * 8)  # B (16, n r = 8) times the stack (8, 8), and B^T times the gradient
    reduce = 2 * (2 * 4 * 2 * 8)  # to lambda and gamma, over (n, r, d)
    assert operations.get_total_flops() == layer + build + reduce


def test_fused_attention_on_a_cpu_is_counted() -> None:
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    with counter() as operations:
        result = F.scaled_dot_product_attention(q, k, v)
    product = 2 * (2 * 3) * 7 * 7 * 4
    assert operations.get_total_flops() == 2 * product
    with counter() as operations:
        result.sum().backward()
    assert operations.get_total_flops() == 5 * product  # the scores are computed again


def test_a_large_product_has_a_rate() -> None:
    gemm = Gemm(torch.device("cpu"), torch.float32, side=64)
    assert gemm.rate() > 2 * 64**3
    assert not any(isinstance(value, torch.Tensor) for value in vars(gemm).values())  # it takes no memory of the cases


def test_cases_are_measured_in_turns() -> None:
    order: list[str] = []
    numbers = iter(range(100))

    def case(name: str) -> float:
        order.append(name)
        return next(numbers)

    told: list[str] = []
    seen: list[dict[str, list[float]]] = []
    figures = in_turns({"a": lambda: case("a"), "b": lambda: case("b")}, 2, told.append, seen.append)
    assert order == told == [*"ab", *"ba"]
    assert figures == {"a": [0, 3], "b": [1, 2]}
    assert seen == [{"a": [0], "b": [1]}, figures]


def test_ratios_are_taken_round_by_round() -> None:
    spread = ratios([2.0, 40.0, 9.0], [1.0, 10.0, 3.0])
    assert (spread.median, spread.low, spread.high) == (3, 2, 4)
    assert f"{spread:.1f}" == "3.0 (2.0 .. 4.0)"
    assert Spread.over([1.0]) == Spread(1.0, 1.0, 1.0)


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    facts = machine()
    assert facts["cores"] >= 1 and facts["processor"] and facts["torch"]
    assert list(facts) == ["processor", "cores", "threads", "torch", "gpu", "python"]
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert processor()
