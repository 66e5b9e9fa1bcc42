import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import RandLoRA, inject
from randlora_pl.adapters.kernels import randlora_linear
from randlora_pl.lab.bench import METHODS, Gemm
from randlora_pl.lab.bench.report import DEFAULTS, Point, Reading, cases, methods_at, readings
from randlora_pl.lab.bench.steps import Case, Measured, measure, ticks

CPU = torch.device("cpu")


def case(name: str, calls: list[str], error: Exception | None = None, after: int = 0, **options: object) -> Case:
    x = torch.randn(3, 4)
    done: list[str] = []

    def loss(model: nn.Module) -> Tensor:
        if not calls or calls[-1] != name:
            calls.append(name)
        done.append(name)
        if error is not None and len(done) > after:
            raise error
        return model(x).square().mean()

    return Case(name, name.title(), nn.Linear(4, 2), loss, [x], device=CPU, **options)  # type: ignore[arg-type]


def test_cases_are_counted_once_and_then_timed_in_turns() -> None:
    calls: list[str] = []
    told: list[str] = []
    kept: list[int] = []
    cases = [case("a", calls), case("b", calls)]
    found = measure(cases, Gemm(CPU, torch.float32, 8), 2, told.append, lambda some: kept.append(len(some[0].seconds)))
    assert calls == ["a", "b", "a", "b", "a"]  # counted, timed, timed backwards; b twice in a row is one entry
    assert told == ["a", "b", "matrix product", "a", "b", "b", "a", "matrix product"] and len(told) == ticks(2, 2)
    assert kept == [1, 2]
    for one in found:
        assert len(one.seconds) == len(one.rates) == 2 and min(one.seconds) > 0
        assert one.flops == 2 * (2 * 3 * 4 * 2) and one.trained == 10 and one.peak is None
        share, ratio = one.of_peak(), one.ratio(found[0])
        assert share is not None and share > 0 and ratio is not None
    assert found[0].label == "A"


def test_a_step_trains_and_leaves_no_gradient() -> None:
    one = case("a", [])
    before = one.model.weight.clone()  # type: ignore[operator, union-attr]
    one.step()
    assert not torch.equal(one.model.weight, before)  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in one.model.parameters())
    still = case("a", [], optimize=False)
    before = still.model.weight.clone()  # type: ignore[operator, union-attr]
    still.step()
    assert torch.equal(still.model.weight, before)  # type: ignore[arg-type]


def test_each_repetition_builds_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    make = randlora_linear.mixed_stack
    monkeypatch.setattr(randlora_linear, "mixed_stack", lambda *args: built.append(1) or make(*args))  # type: ignore[func-returns-value]
    model, x = nn.Sequential(nn.Linear(8, 16)), torch.randn(400, 8, requires_grad=True)
    inject(model, RandLoRA(rank=2), ["all"])
    one = Case("a", "a", model, lambda model: model(x).sum(), [x], device=CPU, precision="32", optimize=False)
    counts = []
    for _ in range(4):
        built.clear()
        one.step()
        counts.append(len(built))
    assert counts[0] and counts == counts[:1] * 4


def test_products_are_in_bfloat16_where_that_is_asked_for() -> None:
    x = torch.randn(3, 4)
    seen: list[torch.dtype] = []

    def loss(model: nn.Module) -> Tensor:
        y = model(x)
        seen.append(y.dtype)
        return y.float().mean()

    models = {precision: nn.Linear(4, 2) for precision in ("32", "bf16", "bf16-frozen")}
    for precision, model in models.items():
        model.weight.requires_grad_(False)
        Case("a", "a", model, loss, [x], device=CPU, precision=precision).step()  # type: ignore[arg-type]
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert [model.weight.dtype for model in models.values()] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("after", [0, 1])
def test_a_case_without_memory_is_told_and_the_others_go_on(after: int) -> None:
    full = case("full", [], RuntimeError("CUDA out of memory. Tried"), after)
    found = measure([full, case("b", [])], Gemm(CPU, torch.float32, 8), 2)
    assert found[0] == Measured("full", "Full", "out of memory")
    assert found[0].spread() is found[0].ratio(found[1]) is found[0].of_peak() is None
    assert len(found[1].seconds) == 2 and found[1].ratio(found[0]) is None
    assert not list(full.model.parameters()) and math.isnan(full.seconds())


@pytest.mark.parametrize("way", ["mps", "cpu"])
def test_a_model_without_memory_on_its_way_ends_its_own_case(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is absent here: the model stays on the CPU."""
    one = case("a", [])
    one.device = torch.device("mps")

    def move(device: torch.device) -> None:
        if device.type == way:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(one, "_move", move)
    found = measure([one, case("b", [])], Gemm(CPU, torch.float32, 8), 1)
    assert found[0] == Measured("a", "A", "out of memory") and not list(one.model.parameters())
    assert len(found[1].seconds) == 1


def test_errors_of_peft_are_told_and_our_own_are_raised() -> None:
    theirs = case("peft-lora", [], ValueError("first\nsecond"), foreign=True)
    theirs.count()
    assert theirs.problem == "ValueError: first"
    ours = case("lora", [], ValueError("first"))
    with pytest.raises(ValueError, match="first"):
        ours.count()


SMALL = Point(width=48, tokens=10, rank=6, depth=1)
NAMES = ["full", "lora", "randlora", "randlora-ternary"]
TERNARY = ["full", "randlora-ternary", "randlora-ternary-dense"]


def counted(point: Point, name: str) -> Case:
    (case,), missing = cases(point, [name], CPU)
    assert not missing
    case.count()
    return case


def test_one_thing_changes_at_a_time() -> None:
    points = readings({"width": [64, 32], "depth": [1, 2]})
    assert [(sweep, point.width, point.depth) for sweep, point in points] == [
        ("width", 32, 1), ("width", 64, 1), ("depth", 768, 1), ("depth", 768, 2),
    ]  # fmt: skip
    assert len(readings(DEFAULTS)) == sum(map(len, DEFAULTS.values()))
    sparse = [Reading(sweep, point, []) for sweep, point in readings({"sparsity": [100, "sqrt", 6, 28]})]
    assert [one.text for one in sparse] == ["6", "sqrt", "28", "100"] and 27 < sparse[1].value < 28
    assert Point(768, rank=5).bases == 154


def test_lora_has_no_bases_to_count() -> None:
    assert methods_at("width", list(METHODS)) == list(METHODS)
    assert methods_at("rank", [*NAMES, "peft-lora", "peft-randlora"]) == [
        "full", "randlora", "randlora-ternary", "peft-randlora",
    ]  # fmt: skip
    assert methods_at("sparsity", list(METHODS)) == TERNARY


def test_costs_grow_as_they_should() -> None:
    one, wide, long, deep = (
        counted(point, "full") for point in (SMALL, Point(96, 10), Point(48, 20), Point(48, 10, depth=3))
    )
    assert one.flops == 3 * (2 * 10 * 48 * 48)
    assert (wide.flops, long.flops, deep.flops) == (4 * one.flops, 2 * one.flops, 3 * one.flops)
    assert one.saved == 10 * 48 * 4 and deep.saved == 3 * one.saved  # the input of each layer
    few, many = (counted(Point(48, 10, rank), "randlora") for rank in (12, 6))
    assert (few.trained, many.trained) == (4 * (12 + 48), 8 * (6 + 48))
    assert few.saved == many.saved == one.saved + 48 * 48 * 4  # and S, which a small layer keeps


def test_layers_of_a_stack_share_their_bases() -> None:
    (case,), _ = cases(Point(48, 10, depth=3), ["randlora"], CPU)
    assert len({layer.delta.bases for layer in case.model}) == 1  # type: ignore[union-attr, attr-defined]


def test_sparsity_reaches_the_bases_and_dense_products_have_the_same_ones() -> None:
    made, _ = cases(replace(SMALL, sparsity=100), TERNARY, CPU)
    sparse, dense = (case.model[0].delta.bases for case in made[1:])  # type: ignore[index]
    assert (sparse.B.dtype, dense.B.dtype) == (torch.int8, torch.float32)
    assert torch.equal(sparse.B.float(), dense.B) and (sparse.B != 0).float().mean() < 0.1
    assert sparse.scale == dense.scale


def test_a_reading_is_a_flat_row_a_method() -> None:
    made, missing = cases(Point(24, 10), NAMES, CPU)
    assert [one.name for one in missing] == ["lora"] and "rank 32" in missing[0].problem
    reading = Reading("width", Point(24, 10), measure(made, Gemm(CPU, torch.float32, 8), 2) + missing)
    rows = list(reading.as_rows())
    assert reading.value == 24 and len(rows) == 4 and len({tuple(row) for row in rows[:3]}) == 1
    assert rows[0]["times_full"] == 1 and rows[1]["bases"] == 4 and rows[1]["label"] == "RandLoRA-6"
    assert rows[-1]["problem"] and rows[-1]["times_full"] is None


def test_a_point_too_large_for_the_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(METHODS, "full", replace(METHODS["full"], adapt=full))
    assert cases(SMALL, ["full"], CPU)[1][0].problem == "out of memory"
    failing = replace(METHODS["full"], adapt=lambda *_: (_ for _ in ()).throw(RuntimeError("else")))
    monkeypatch.setitem(METHODS, "full", failing)
    with pytest.raises(RuntimeError, match="else"):
        cases(SMALL, ["full"], CPU)
