"""SHiRA: its places, and memory of its backward pass; the formula is tested by the contract."""

from pathlib import Path

import torch
from torch import Tensor, nn

from randlora_pl.adapters import SHiRA, inject, load_adapter, save_adapter
from randlora_pl.adapters.methods.shira import distinct
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.select import match_budget
from tests.adapters.cases import One, randomise
from tests.adapters.reference import distinct_integers
from tests.support.products import in_one_item


@in_one_item(
    ("count", "size"), [(0, 5), (1, 1), (3, 7), (4, 7), (7, 7), (50, 100), (51, 100), (300, 4000), (90, 10**12)]
)
def test_places_are_those_of_the_slow_loop(count: int, size: int) -> None:
    found = distinct(2**40 + 7, "shira/fc", count, size)
    assert found.tolist() == distinct_integers(2**40 + 7, "shira/fc", count, size)
    assert len(found.unique()) == count
    assert found.dtype == torch.int64


def test_places_are_distinct_and_differ_by_layer_and_seed() -> None:
    def places(seed: int) -> list[Tensor]:
        model = nn.ModuleDict({"first": nn.Linear(200, 100), "second": nn.Linear(200, 100)})
        inject(model, SHiRA(rank=4, seed=seed), [".*"])
        return [layer.delta.places for layer in model.values()]  # type: ignore[union-attr,misc]

    first, second = places(1)
    assert len(first) == len(first.unique()) == 4 * 300
    assert first.dtype == torch.int32
    assert not torch.equal(first, second)
    assert torch.equal(first, places(1)[0])
    assert not torch.equal(first, places(2)[0])


def test_the_largest_weights_are_taken_and_kept(tmp_path: Path) -> None:
    model, again, x = One(12, 20), One(12, 20), torch.randn(3, 12)
    again.load_state_dict(model.state_dict())
    inject(model, SHiRA(rank=2, places="top"), ["fc"])
    delta = model.fc.delta
    mask = delta.change(torch.empty(0)).flatten().scatter(0, delta.places.long(), 1.0).bool().view(20, 12)
    weight = model.fc.weight.abs()
    assert mask.sum() == 64 and weight[mask].min() > weight[~mask].max()
    randomise(model)
    delta.places.copy_(torch.arange(64))  # as of another version: the file has the word
    save_adapter(model, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x), model(x))
    ties = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    nn.init.ones_(ties.fc.weight)  # type: ignore[arg-type]
    inject(ties, SHiRA(rank=1, places="top"), ["fc"])
    assert ties.fc.delta.places.tolist() == list(range(8))  # type: ignore[union-attr,operator]


def test_counts_and_budgets() -> None:
    shapes = [WeightShape("fc1", 30, 20), WeightShape("fc2", 20, 30)]
    assert [SHiRA(rank=12).count(shape) for shape in shapes] == [600, 600]
    assert SHiRA().sizes(shapes) == range(1, 13)
    assert match_budget(SHiRA(match="lora:12"), shapes, nn.Linear(2, 2))[0].rank == 12
