"""Matching one method's parameters to another's, against trying every number."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from randlora_pl.adapters import Adapter, DoRA, LoRA, NoLA, RandLoRA, VeRA, inject
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.select import _parse_budget, count_parameters, match_budget, select
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.support.products import in_one_item, marked

SHAPES = [WeightShape("qkv", 36, 12), WeightShape("fc1", 48, 12), WeightShape("fc2", 12, 48)]
MODEL = nn.Linear(40, 40)  # 1,640 parameters, for ``full``


def every_count(adapter: Adapter, option: str, shapes: list[WeightShape], top: int) -> list[int]:
    """Parameters with each number of the option from 1 to top."""
    tries = (adapter.replace(**{option: number}) for number in range(1, top + 1))
    return [sum(each.count(shape) for shape in shapes) for each in tries]


def assert_nearest(adapter: Adapter, match: str, shapes: list[WeightShape], counts: list[int]) -> None:
    """No count comes nearer to the budget than the one that is chosen, if one is near."""
    budget = _parse_budget(match, shapes, MODEL)
    distance = min(abs(each - budget) for each in counts)
    if distance > budget / 2:
        with pytest.raises(UserError, match="comes near"):
            match_budget(adapter.replace(match=match), shapes, MODEL)
        return
    chosen, [note] = match_budget(adapter.replace(match=match), shapes, MODEL)
    count = count_parameters(chosen, shapes)
    assert abs(count - budget) == distance and chosen.match is None
    assert f"{count:,}" in note and f"{budget:,}" in note


ADAPTERS: list[tuple[Adapter, str, int]] = [
    (RandLoRA(), "rank", 12),
    (RandLoRA(num_bases="floor+1"), "rank", 12),
    (RandLoRA(num_bases=7), "rank", 12),
    (RandLoRA(variant="a", matched_rank=3), "rank", 12),
    (RandLoRA(variant="b"), "rank", 12),
    (LoRA(), "rank", 12),
    (DoRA(LoRA()), "rank", 12),
    (DoRA(RandLoRA()), "rank", 12),
    (VeRA(), "rank", 700),
    (DoRA(VeRA()), "rank", 700),
    (NoLA(), "num_bases", 700),
]


@in_one_item(("adapter", "option", "top"), ADAPTERS)
def test_no_other_number_comes_nearer(adapter: Adapter, option: str, top: int) -> None:
    counts = every_count(adapter, option, SHAPES, top)
    for match in ("lora:1", "lora:3", "lora:12", "randlora:2", "randlora:11", "vera:7", "nola:40", "full"):
        assert_nearest(adapter, match, SHAPES, counts)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([RandLoRA(), LoRA()]),
)
def test_no_other_rank_comes_nearer_for_any_shapes(sides: list[tuple[int, int]], bases: int, adapter: Adapter) -> None:
    """The count of RandLoRA does not fall steadily: at d = 60 rank 30 has 2 bases and rank 31 has 2 larger ones."""
    shapes = [WeightShape(str(index), *pair) for index, pair in enumerate(sides)]
    counts = every_count(adapter, "rank", shapes, min(shape.small for shape in shapes))
    assert_nearest(adapter, f"nola:{bases}", shapes, counts)


PAPER = [
    ("ViT-B-32", (5, 6_202_548, 6_881_280)),
    ("ViT-L-14", (6, 16_247_952, 15_138_816)),
    ("ViT-H-14", (8, 29_294_592, 29_360_128)),
]


@pytest.mark.parametrize(("name", "expected"), marked(PAPER, lambda row: row[0] == "ViT-B-32"))
def test_lora_32_on_the_models_of_the_paper(name: str, expected: tuple[int, int, int]) -> None:
    model = zoo.clip_on_meta(name)
    report = inject(model, RandLoRA(match="lora:32"))
    rank, count, budget = expected
    assert (report.adapter.rank, report.trainable) == (rank, count)
    share = 100 * (count / budget - 1)
    note = f"matched to lora:32: rank {rank} has {count:,} parameters, lora:32 {budget:,} ({share:+.1f} %)"
    assert report.notes == [note]
    assert str(report).splitlines()[-1] == note


def test_without_a_match_with_patterns_and_in_another_case() -> None:
    adapter = LoRA(rank=3)
    assert match_budget(adapter, SHAPES, MODEL) == (adapter, [])
    assert match_budget(LoRA(rank={"fc1": 2}, match="lora:4"), SHAPES, MODEL)[0].rank == 4
    assert _parse_budget("LORA:2", SHAPES, MODEL) == _parse_budget("lora:2", SHAPES, MODEL) == 2 * (48 + 60 + 60)
    assert _parse_budget("Full", SHAPES, MODEL) == 1_640
    with pytest.raises(UserError, match="LoRA"):
        match_budget(RandLoRA(match="lora:99"), SHAPES, MODEL)


@in_one_item("text", ["", "lora", "lora:", "lora:0", "lora:-2", "lora:1.5", "lora:²", "dora:2", "full:2", "32", ":"])
def test_budgets_that_say_nothing(text: str) -> None:
    with pytest.raises(UserError, match="randlora:6"):
        _parse_budget(text, SHAPES, MODEL)


def test_a_large_size_takes_few_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tries, count = [], NoLA.count

    def counted(self: NoLA, shape: WeightShape) -> int:
        tries.append(self.num_bases)
        return count(self, shape)

    monkeypatch.setattr(NoLA, "count", counted)
    wide = [WeightShape("a", 40_000, 40_000)]
    assert match_budget(NoLA(match="lora:64"), wide, MODEL)[0].replace().options()["num_bases"] == 64 * 40_000
    assert len(set(tries)) < 40


@pytest.mark.parametrize("adapter", [LoRA(match="randlora:4"), DoRA(RandLoRA(match="lora:2")), NoLA(match="lora:1")])
def test_a_matched_adapter_is_described_by_what_it_became(adapter: Any) -> None:
    model = zoo.small_vit()
    report = inject(model, adapter)
    description = report.adapter.describe()
    assert "'match': None" in str(description)
    again = zoo.small_vit()
    assert (
        inject(again, report.adapter).trainable
        == report.trainable
        == count_parameters(report.adapter, [site.shape for site in select(zoo.small_vit(), None, False)])
    )
