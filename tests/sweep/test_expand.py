from contextlib import nullcontext
from typing import Any

import pytest

from randlora_pl.models import load_clip
from randlora_pl.sweep.expand import check_first, counts, data_of
from randlora_pl.sweep.plan import trial_config
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.sweep.grids import GRID, cells_of


def one(**changes: Any) -> Any:
    return cells_of(**({"methods": {"x": {"adapter": "LoRA", "rank": 4}}} | changes))[0].tree


def test_counts_are_those_of_the_model() -> None:
    found = counts(one())
    model: Any = load_clip("tiny", "random").model
    assert found is not None
    assert found.total - found.trainable == sum(p.numel() for p in model.parameters())


def test_a_linear_probe_trains_its_head_alone() -> None:
    found = counts(one(methods={"x": {"config": "linear_probe"}}))
    assert found is not None and found.trainable == 0


@in_one_item(
    ("configs", "trainable"),
    [("coop", 2_048), ("cocoop", 35_360), ("promptsrc", 46_080), ("maple_dept", 3_555_072), ("clip_lora", 184_320),
     ("tip_adapter", 0), (["coop", "randlora"], 3_135_848)],
)  # fmt: skip
def test_prompts_are_counted_without_weights(configs: Any, trainable: int) -> None:
    adamw = {"model.optimizer": "adamw", "model.schedule": "cosine"}
    options = {"rank": 10, "set": adamw} if isinstance(configs, list) else {}
    tree = trial_config({"config": "clip_vitb32"}, {"config": configs} | options, {}, None, untrained=False)
    found = counts(tree)
    assert found is not None and found.trainable == trainable


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": {"x": {"adapter": "LoRA", "rank": 9999}}}, "rank 9999 is larger"),
        ({"methods": {"x": {"adapter": "LinearProbe"}}}, "give it task: LinearHeadTask"),
        (
            {"methods": {"x": {"adapter": "LoRA", "set": {"model.learning_rate": -1}}}},
            "learning_rate: expected a positive number",
        ),
        (
            {"methods": {"x": {"adapter": "LoRA", "set": {"model.learning_rate": "fast"}}}},
            "expected a positive number, not fast",
        ),
    ],
)
def test_impossible_models_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        counts(one(**change))


LORA = {"adapter": "LoRA", "rank": 4}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"adapter": "RandLoRA", "first": LORA | {"form": "absorbed"}}, ""),
        ({"adapter": "VeRA", "first": LORA}, ""),
        ({"adapter": "VeRA", "first": LORA | {"form": "absorbed"}}, "VeRA cannot absorb a LoRA"),
        ({"adapter": "FullFineTuning", "first": LORA}, "trains the model's own tensors"),
        ({"adapter": "RandLoRA", "qkv": "split", "first": LORA}, "the LoRA of first has qkv packed"),
        (
            {
                "adapter": "RandLoRA",
                "set": {"model.targets": ["qkv"]},
                "first": LORA | {"set": {"model.targets": ["mlp"]}},
            },
            r"first has model.targets \['mlp'\], the method \['qkv'\]. Set the same model.targets in set and first.set",
        ),
        ({"adapter": "RandLoRA", "first": LORA | {"set": {"model.targets": ["mlp"]}}}, ""),
        ({"adapter": "RandLoRA", "first": LORA | {"set": {"model.name": "ViT-B-32"}}}, "first has model.name ViT-B-32"),
        ({"adapter": "RandLoRA", "first": LORA | {"task": "LinearHeadTask"}}, "first has the task LinearHeadTask"),
        ({"adapter": "RandLoRA", "rank": 3, "first": LORA | {"rank": 64, "form": "absorbed"}}, "lead is 64, but"),
        ({"adapter": "RandLoRA", "variant": "a", "first": LORA | {"form": "absorbed"}}, "variant a sums its bases"),
        ({"adapter": "AutoLoRA", "first": LORA}, "AutoLoRA cannot be a part"),
        ({"adapter": "Together", "parts": [LORA, {"adapter": "RandLoRA"}], "first": LORA}, ""),
        ({"adapter": "RandLoRA", "first": {"adapter": "LoRA", "match": "randlora:6", "form": "absorbed"}}, ""),
    ],
)
def test_a_method_must_be_able_to_start_from_its_lora(method: dict[str, Any], said: str) -> None:
    (cell,) = cells_of(methods={"x": method})
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_first(cell)


def test_impossible_data_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size"):
        data_of(one(set=GRID["set"] | {"data.batch_size": 0}))
