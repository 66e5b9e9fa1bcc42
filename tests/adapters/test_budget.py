"""Matching one method's parameters to another's, against trying every number."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from randlora_pl.adapters import Adapter, DoRA, LoRA, NoLA, RandLoRA, VeRA, inject
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.select import count_parameters, match_budget, parse_budget, select
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.support.products import in_one_item, marked

SHAPES = [WeightShape("qkv", 36, 12), WeightShape("fc1", 48, 12), WeightShape("fc2", 12, 48)]
MODEL = nn.Linear(40, 40)  # 1,640 parameters, for ``full``


def nearest(adapter: Adapter, match: str, shapes: list[WeightShape]) -> int | None:
    """The count that was chosen for this budget; None if none is near."""
    try:
        chosen, notes = match_budget(adapter.replace(match=match), shapes, MODEL)
    except UserError as error:
        assert "comes near" in str(error)
        return None
    count, budget = count_parameters(chosen, shapes), parse_budget(match, shapes, MODEL)
    assert chosen.match is None
    assert len(notes) == 1
    assert f"{count:,}" in notes[0]
    assert f"{budget:,}" in notes[0]
    return count


def brute_force(adapter: Adapter, option: str, shapes: list[WeightShape], budget: int, top: int) -> int:
    """The smallest distance to the budget over every number from 1 to top."""
    counts = [
        sum(adapter.replace(match=None, **{option: number}).count(shape) for shape in shapes)
        for number in range(1, top + 1)
    ]
    return min(abs(count - budget) for count in counts)


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
@in_one_item("match", ["lora:1", "lora:3", "lora:12", "randlora:2", "randlora:11", "vera:7", "nola:40", "full"])
def test_no_other_number_comes_nearer(adapter: Adapter, option: str, top: int, match: str) -> None:
    budget = parse_budget(match, SHAPES, MODEL)
    distance = brute_force(adapter, option, SHAPES, budget, top)
    count = nearest(adapter, match, SHAPES)
    assert (count is None) == (distance > budget / 2)
    assert count is None or abs(count - budget) == distance


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([RandLoRA(), LoRA()]),
)
def test_no_other_rank_comes_nearer_for_any_shapes(sides: list[tuple[int, int]], bases: int, adapter: Adapter) -> None:
    """The count of RandLoRA does not fall steadily: at d = 60 rank 30 has 2 bases and rank 31 has 2 larger ones."""
    shapes = [WeightShape(str(index), *pair) for index, pair in enumerate(sides)]
    budget = parse_budget(f"nola:{bases}", shapes, MODEL)
    distance = brute_force(adapter, "rank", shapes, budget, min(shape.small for shape in shapes))
    count = nearest(adapter, f"nola:{bases}", shapes)
    assert (count is None) == (distance > budget / 2)
    assert count is None or abs(count - budget) == distance


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


def test_an_adapter_without_match_comes_back_as_it_is() -> None:
    adapter = LoRA(rank=3)
    assert match_budget(adapter, SHAPES, MODEL) == (adapter, [])


def test_matching_replaces_patterns_of_ranks() -> None:
    chosen, _ = match_budget(LoRA(rank={"fc1": 2}, match="lora:4"), SHAPES, MODEL)
    assert chosen.rank == 4


@pytest.mark.parametrize("method", ["LoRA", "lora", "LORA"])
def test_budgets_ignore_case(method: str) -> None:
    assert parse_budget(f"{method}:2", SHAPES, MODEL) == 2 * (48 + 60 + 60)
    assert parse_budget("Full", SHAPES, MODEL) == 1_640


@in_one_item("text", ["", "lora", "lora:", "lora:0", "lora:-2", "lora:1.5", "lora:²", "dora:2", "full:2", "32", ":"])
def test_budgets_that_say_nothing(text: str) -> None:
    with pytest.raises(UserError, match="randlora:6"):
        parse_budget(text, SHAPES, MODEL)


def test_an_impossible_budget_says_which_rank() -> None:
    with pytest.raises(UserError, match="LoRA"):
        match_budget(RandLoRA(match="lora:99"), SHAPES, MODEL)


class Blocks(Adapter):
    """A method whose size is a divisor of 12."""

    block: int = 2

    size_option = "block"

    def sizes(self, shapes: Sequence[WeightShape]) -> list[int]:
        return [2, 3, 4, 6, 12]

    def count(self, shape: WeightShape) -> int:
        return shape.in_features * (self.block - 1)

    delta_weight = LoRA.delta_weight  # type: ignore[assignment]


def test_sizes_are_those_of_the_method() -> None:
    chosen, _ = match_budget(Blocks(match="lora:2"), SHAPES, MODEL)  # 336 parameters, of 72 each
    assert chosen.describe()["options"]["block"] == 6
    message = "no block of Blocks comes near full .1,640 parameters.: 6 .360. and 12 .792. are nearest"
    with pytest.raises(UserError, match=message):
        match_budget(Blocks(match="full"), SHAPES, MODEL)


def test_a_large_size_takes_few_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    tries, count = [], NoLA.count

    def counted(self: NoLA, shape: WeightShape) -> int:
        tries.append(self.num_bases)
        return count(self, shape)

    monkeypatch.setattr(NoLA, "count", counted)
    wide = [WeightShape("a", 40_000, 40_000)]
    assert match_budget(NoLA(match="lora:64"), wide, MODEL)[0].replace().options()["num_bases"] == 64 * 40_000
    assert len(set(tries)) < 40


class Diagonal(Adapter):
    """A method without a rank."""

    def count(self, shape: WeightShape) -> int:
        return shape.small

    delta_weight = LoRA.delta_weight  # type: ignore[assignment]


def test_a_method_without_a_rank_has_nothing_to_match() -> None:
    assert count_parameters(Diagonal(), SHAPES) == 36
    with pytest.raises(UserError, match="Diagonal has no rank"):
        match_budget(Diagonal(match="lora:2"), SHAPES, MODEL)


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
