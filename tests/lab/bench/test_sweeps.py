from dataclasses import replace

import pytest
import torch

from randlora_pl.lab.bench import METHODS, Gemm
from randlora_pl.lab.bench.report import BASES, DEFAULTS, Point, Reading, cases, estimated_seconds, methods_at, readings
from randlora_pl.lab.bench.steps import Case, measure

CPU = torch.device("cpu")
SMALL = Point(width=48, tokens=10, rank=6, depth=1)
NAMES = ["full", "lora", "randlora", "randlora-ternary"]


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
    assert estimated_seconds(points, 2, 1, 1e12) > 0


def test_lora_has_no_bases_to_count() -> None:
    assert methods_at("width", list(METHODS)) == list(METHODS)
    assert methods_at("rank", [*NAMES, "peft-lora", "peft-randlora"]) == [
        "full", "randlora", "randlora-ternary", "peft-randlora",
    ]  # fmt: skip
    assert methods_at("sparsity", list(METHODS)) == BASES["ternary"]


def test_costs_grow_as_they_should() -> None:
    one, wide, long, deep = (
        counted(point, "full") for point in (SMALL, Point(96, 10), Point(48, 20), Point(48, 10, depth=3))
    )
    assert one.flops == 3 * (2 * 10 * 48 * 48)
    assert (wide.flops, long.flops, deep.flops) == (4 * one.flops, 2 * one.flops, 3 * one.flops)
    assert one.saved == 10 * 48 * 4 and deep.saved == 3 * one.saved  # the input of each layer
    few, many = (counted(Point(48, 10, rank), "randlora") for rank in (12, 6))
    assert (few.trained, many.trained) == (4 * (12 + 48), 8 * (6 + 48))
    assert few.saved == many.saved == one.saved


def test_layers_of_a_stack_share_their_bases() -> None:
    (case,), _ = cases(Point(48, 10, depth=3), ["randlora"], CPU)
    assert len({layer.delta.bases for layer in case.model}) == 1  # type: ignore[union-attr, attr-defined]


def test_sparsity_reaches_the_bases_and_dense_products_have_the_same_ones() -> None:
    made, _ = cases(replace(SMALL, sparsity=100), BASES["ternary"], CPU)
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
