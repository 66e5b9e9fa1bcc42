"""Training samples held out for a search, and their batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus

from randlora_pl.data import ImageData
from randlora_pl.data.base import PlannedData
from randlora_pl.data.splits import search_parts
from randlora_pl.utils.errors import UserError
from tests.language.classify import reviews, write_csv
from tests.language.test_data import Given

LOOP = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0))))


def trainer(searches: bool = True, world: int = 1, rank: int = 0) -> Any:
    """A stand-in for a trainer whose task searches."""
    adapter = SimpleNamespace(searches=searches)
    task = SimpleNamespace(adapter=adapter, vocabulary=Given._given, blended_labels=True)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=Path, barrier=str)
    state = SimpleNamespace(status=TrainerStatus.INITIALIZING, fn="fit")
    return SimpleNamespace(
        lightning_module=task, world_size=world, global_rank=rank, accumulate_grad_batches=2, max_epochs=1,
        global_step=0, num_devices=1, strategy=strategy, state=state, fit_loop=LOOP,
    )  # fmt: skip


def planned(data: PlannedData, **options: Any) -> Any:
    data.trainer = trainer(**options)
    data.setup("fit")
    return data


def images(**options: Any) -> ImageData:
    given = {"dataset": "digits", "image_size": 8, "batch_size": 20, "steps": 6, "flip": True}
    return ImageData(**{**given, **options})


def indices(data: Any, steps: int, part: str = "search") -> list[int]:
    batches = [data.search_batch(step, part) for step in range(steps)]
    return torch.cat([batch["index"] for batch in batches]).tolist()


def drawn(data: Any) -> set[int]:
    batches = data.train_dataloader().batches
    return set(torch.cat([batches[number]["index"] for number in range(len(batches))]).tolist())


@pytest.mark.parametrize("sampling", ["with_replacement", "epochs"])
def test_a_search_has_its_own_part_of_each_class(sampling: Any) -> None:
    data = planned(images(shots=10, sampling=sampling))
    labels = data.samples("train").labels
    search, train = (set(indices(data, 6, part)) for part in ("search", "train"))
    assert not search & train and not search & drawn(data) and drawn(data) <= set(range(100))
    assert len(search) == 30 or (sampling == "with_replacement" and len(search) > 20)
    chosen = data.search_plans["search"].chosen.numpy()
    assert np.bincount(labels[chosen]).tolist() == [3] * 10
    facts = data.summary()
    assert facts["train"] == 100 and facts["search"] == 30
    assert "30 of train for the search" in data.summary_lines(facts)["data"]
    plain = planned(images(shots=10, sampling=sampling), searches=False)
    assert len(drawn(plain)) > 80 and not plain.search_plans
    assert plain.samples("val").keys == data.samples("val").keys
    with pytest.raises(UserError, match="AutoLoRA"):
        plain.search_batch(0)


def test_a_batch_is_a_function_of_the_step_alone() -> None:
    data, other = planned(images(mixup=0.2, randaugment=9)), planned(images(mixup=0.2, randaugment=9))
    drawn(data)
    for step in (4, 1):
        first, second = data.search_batch(step), other.search_batch(step)
        assert first.keys() == second.keys() and "target" not in first and "mix" not in first
        for name, value in first.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[name])), name
        assert first["micro_batches"] == 1 and first["weight"].sum() == pytest.approx(1)
        assert first["index"].tolist() != data.search_batch(step + 1)["index"].tolist()
    assert indices(planned(images(seed=1)), 2) != indices(data, 2)


def test_ranks_share_a_batch_whose_weights_average_to_its_mean() -> None:
    whole = planned(images(batch_size=20))
    ranks = [planned(images(batch_size=10), world=2, rank=rank) for rank in (0, 1)]
    parts = [each.search_batch(3) for each in ranks]
    assert torch.cat([part["index"] for part in parts]).tolist() == whole.search_batch(3)["index"].tolist()
    assert sum(float(part["weight"].sum()) for part in parts) == pytest.approx(2)


def test_texts_have_search_batches(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "one.csv", reviews())
    data = planned(Given(dataset="csv", root=str(file), batch_size=8, search_fraction=0.25, balance="sampler"))
    search = set(indices(data, 4))
    assert not search & drawn(data) and len(data.search_plans["search"].chosen) == len(reviews()) // 4
    assert data.search_batch(1)["input_ids"].tolist() == data.search_batch(1)["input_ids"].tolist()


def test_parts_keep_groups_and_every_class() -> None:
    labels, numbers = np.repeat(np.arange(3), 4), np.arange(12)
    kept, chosen = search_parts(labels, numbers, 0.5, 0)
    assert np.bincount(labels[kept]).tolist() == np.bincount(labels[chosen]).tolist() == [2, 2, 2]
    groups = np.repeat(np.arange(6), 2)
    kept, chosen = search_parts(labels, numbers, 0.5, 0, groups)
    assert not set(groups[kept]) & set(groups[chosen]) and len(chosen) == 6
    with pytest.raises(UserError, match="shots 2 or more"):
        search_parts(np.arange(5), np.arange(5), 0.3, 0)
    with pytest.raises(UserError, match=r"search_fraction is 1\. Set a number between 0 and 1"):
        images(search_fraction=1)
