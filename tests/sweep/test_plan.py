import random
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.sweep.expand import counts
from randlora_pl.sweep.plan import Labels, digest, only, result_key, shard
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.sweep.grids import GRID, cells_of

ZERO = {"zero-shot": None}


def test_the_grid_is_the_product_and_the_untrained_model_once_a_data_set() -> None:
    cells = cells_of(budgets=[1, 2, "50%"], seeds=[1, 2], methods=GRID["methods"] | ZERO)
    assert len(cells) == 3 * 2 * 2 + 1 == len({cell.hash for cell in cells}) == len({cell.labels for cell in cells})
    (untrained,) = (cell for cell in cells if cell.untrained)
    assert untrained.labels == Labels("tiny", "digits", "zero-shot", "zero-shot", 1)
    assert untrained.flat["model.adapter"] == "FullFineTuning"
    assert "data.shots" not in untrained.flat and "data.fraction" not in untrained.flat


def test_a_cell_has_what_its_labels_say() -> None:
    few, half = cells_of(budgets=[2, "50%"], methods={"LoRA-4": {"adapter": "LoRA", "rank": 4, "learning_rate": 0.5}})
    assert (few.flat["data.shots"], half.flat["data.fraction"]) == (2, 0.5)
    assert "data.fraction" not in few.flat and "data.shots" not in half.flat
    assert few.flat["model.adapter"] == "LoRA" and few.flat["model.adapter.rank"] == 4
    assert few.flat["model.learning_rate"] == 0.5 and few.flat["seed_everything"] == 1


def test_a_method_has_other_options_in_some_cases() -> None:
    cases = [{"budgets": [2], "set": {"data.steps": 7}}, {"datasets": ["mnist_5k"], "set": {"model.weight_decay": 0.1}}]
    methods = GRID["methods"] | {"LoRA-4": GRID["methods"]["LoRA-4"] | {"cases": cases}}
    cells = cells_of(methods=methods, datasets=["digits", "mnist_5k"], budgets=[1, 2])
    found = {c.labels[1:4]: (c.flat["data.steps"], c.flat.get("model.weight_decay")) for c in cells}
    assert found == {
        (dataset, f"{shots}-shot", method): (
            7 if lora and shots == 2 else 2,
            0.1 if lora and "mnist" in dataset else None,
        )
        for dataset in ("digits", "mnist_5k")
        for shots in (1, 2)
        for method, lora in (("RandLoRA-6", False), ("LoRA-4", True))
    }
    every = [{"budgets": ["2-shot"], "set": {"data.steps": 9, "model.weight_decay": 0.5}}]  # the method's own come last
    cells = cells_of(methods=methods, datasets=["digits", "mnist_5k"], budgets=[1, 2], cases=every)
    found = {c.labels[1:4]: (c.flat["data.steps"], c.flat.get("model.weight_decay")) for c in cells}
    assert found["digits", "2-shot", "LoRA-4"] == (7, 0.5) and found["mnist_5k", "2-shot", "LoRA-4"] == (7, 0.1)
    assert found["digits", "2-shot", "RandLoRA-6"] == (9, 0.5) and found["digits", "1-shot", "RandLoRA-6"] == (2, None)
    first = {"adapter": "LoRA", "set": {"data.steps": 3}, "cases": [{"budgets": [2], "set": {"data.steps": 4}}]}
    staged = {"staged": {"adapter": "RandLoRA", "rank": 6, "first": first}}
    cells = cells_of(methods=staged, budgets=[1, 2], cases=[{"set": {"data.batch_size": 2}}])
    found = {c.labels.budget: [c.flat[f"{stage}data.steps"] for stage in ("", "first.")] for c in cells}
    assert found == {"1-shot": [2, 3], "2-shot": [2, 4]}
    assert all(c.flat["data.batch_size"] == c.flat["first.data.batch_size"] == 2 for c in cells)
    wrong_first = {"staged": {"adapter": "RandLoRA", "first": first | {"rnak": 2}}}
    with pytest.raises(UserError, match=r"methods.staged.first: Unknown option --model.adapter.rnak"):
        cells_of(methods=wrong_first, budgets=[1, 2])
    with pytest.raises(UserError, match=r"^cases has '3-shot', which is none of the budgets"):
        cells_of(cases=[{"budgets": [3]}], budgets=[1, 2])
    for wrong, said in (
        ([{"budgets": [3]}], "cases has '3-shot', which is none of the budgets"),
        ([{"datasets": ["digit"]}], "which is none of the datasets. Did you mean 'digits'"),
        ([{"sets": {}}], "cases has no key 'sets'"),
        ([{"set": {"data.stepz": 1}}], "Did you mean"),
        ({"budgets": [2]}, "give a list"),
    ):
        with pytest.raises(UserError, match=said):
            cells_of(methods={"LoRA-4": {"adapter": "LoRA", "cases": wrong}}, budgets=[1, 2])


def test_a_budget_is_not_the_configs_own(tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("data: {shots: 7}")
    models = {"tiny": {"config": ["quickstart", str(tmp_path / "few.yaml")]}}
    (cell,) = cells_of(models=models, budgets=["100%"], methods={"LoRA": {"adapter": "LoRA"}})
    assert "data.shots" not in cell.flat


def test_a_method_may_belong_to_some_models() -> None:
    models = {"a": {"config": "quickstart"}, "b": GRID["models"]["tiny"]}
    cells = cells_of(models=models, methods=GRID["methods"] | {"VeRA": {"adapter": "VeRA", "models": ["b"]}})
    assert [cell.labels.model for cell in cells if cell.labels.method == "VeRA"] == ["b"]


def test_a_model_whose_label_is_part_of_anothers_is_not_meant() -> None:
    models = {label: {"config": "quickstart", "set": {"data.steps": n + 1}} for n, label in enumerate(["B", "B large"])}
    for listed in ("B large", ["B large"]):
        (cell,) = cells_of(models=models, methods={"LoRA": {"adapter": "LoRA", "models": listed}})
        assert cell.labels.model == "B large"
    (cell,) = cells_of(models={32: {"config": "quickstart"}}, methods={"LoRA": {"adapter": "LoRA", "models": [32]}})
    assert cell.labels.model == "32"


def test_two_names_of_one_run_are_refused() -> None:
    twins = {name: {"adapter": "LoRA", "rank": 4} for name in ("one", "two")}
    with pytest.raises(UserError, match=r"one, seed 1 and tiny, .* two, seed 1 are the same run"):
        cells_of(methods=twins)


def test_an_untrained_model_is_not_the_training_with_its_config() -> None:
    cells = cells_of(budgets=["100%"], methods={"full": {"config": "full"}, "zero-shot": None})
    untrained, full = sorted(cells, key=lambda cell: not cell.untrained)
    assert untrained.flat == full.flat and untrained.hash != full.hash


def test_methods_inside_a_method() -> None:
    lora = {"adapter": "LoRA", "match": "randlora:6"}
    dora = {"adapter": "DoRA", "inner": lora}
    both = {"adapter": "Together", "parts": [dora, {"adapter": "randlora", "rank": 9}], "rates": [2, 1]}
    around, summed = cells_of(methods={"DoRA": dora, "sum": both})
    assert around.flat["model.adapter.inner"] == "LoRA" and around.flat["model.adapter.inner.match"] == "randlora:6"
    first, second = summed.flat["model.adapter.parts"]
    assert second == {"class_path": "RandLoRA", "init_args": {"rank": 9}}
    assert first["init_args"]["inner"] == {"class_path": "LoRA", "init_args": {"match": "randlora:6"}}
    found, budget = counts(summed.tree), counts(cells_of(methods={"x": {"adapter": "RandLoRA", "rank": 6}})[0].tree)
    assert found is not None and budget is not None
    assert abs(found.trainable / budget.trainable - 1) < 0.1


def test_the_hash_is_the_same_in_every_version() -> None:
    """Changing it would make every finished cell of every user unfinished."""
    flat = {"model": "VisionLanguageTask", "model.adapter": "LoRA", "model.adapter.rank": 4, "seed_everything": 1}
    assert digest(result_key(flat)) == digest(flat) == "bc8024eb5f76"
    assert cells_of()[1].flat == {  # nothing of defaults, which later versions may add to
        "data.batch_size": 4, "data.dataset": "digits", "data.eval_batch_size": 8, "data.shots": 2, "data.steps": 2,
        "model": "VisionLanguageTask", "model.adapter": "LoRA", "model.adapter.rank": 4, "model.name": "tiny",
        "model.pretrained": "random", "seed_everything": 1, "trainer.limit_test_batches": 1,
        "trainer.limit_val_batches": 0,
    }  # fmt: skip


def test_the_hash_depends_on_neither_order_nor_spelling_nor_place() -> None:
    plain = {cell.hash for cell in cells_of()}
    rng = random.Random(0)

    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        items = list(value.items())
        rng.shuffle(items)
        return {key: shuffled(inner) for key, inner in items}

    for _ in range(5):
        assert {cell.hash for cell in cells_of(**shuffled(GRID))} == plain
    places = {"data.root": "elsewhere", "run": {"root": "there"}, "data.num_workers": 1, "checkpoint.every_n_steps": 5}
    assert {cell.hash for cell in cells_of(set=GRID["set"] | places)} == plain
    lora = {"adapter": "randlora_pl.adapters.LoRA", "rank": 4}
    spelled = {"RandLoRA-6": {"adapter": "randlora", "rank": 6}, "LoRA-4": lora}
    assert {cell.hash for cell in cells_of(methods=spelled)} == plain


@pytest.mark.parametrize("change", [{"data.steps": 3}, {"trainer.precision": "bf16-mixed"}, {"model.seed": None}])
def test_the_hash_depends_on_what_is_computed(change: dict[str, Any]) -> None:
    if "model.seed" in change:
        assert not {c.hash for c in cells_of(seeds=[1])} & {c.hash for c in cells_of(seeds=[2])}
    else:
        assert not {c.hash for c in cells_of()} & {c.hash for c in cells_of(set=GRID["set"] | change)}


def test_own_images_are_known_by_their_place() -> None:
    here, there = (
        cells_of(datasets={"mine": {"dataset": "folder", "root": root}})[0].hash for root in ("here", "there")
    )
    assert here != there


def test_shards_are_a_partition() -> None:
    cells = cells_of(seeds=[1, 2, 3, 4, 5])
    parts = [shard(cells, f"{number}/3") for number in (1, 2, 3)]
    assert sorted(cell.hash for part in parts for cell in part) == sorted(cell.hash for cell in cells)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shard(cells, None) == cells
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="--shard"):
            shard(cells, wrong)


def test_only_some_cells() -> None:
    cells = cells_of(seeds=[1, 2], budgets=[1, 2, 4])
    chosen = only(cells, ["budget=1-shot,4-shot", "method=LoRA-4", "seed=2"])
    assert [tuple(cell.labels)[2:] for cell in chosen] == [("1-shot", "LoRA-4", 2), ("4-shot", "LoRA-4", 2)]
    comma = cells_of(methods={"a, b": {"adapter": "LoRA"}})
    assert only(comma, ["method=a, b"]) == comma
    for word, said in (
        ("budgets=1", "Did you mean 'budget'"),
        ("method", "expected KEY=VALUE"),
        ("method=LoRA-5", "Did you mean 'LoRA-4'"),
        ("seed=9", "unknown seed '9'"),
    ):
        with pytest.raises(UserError, match=said.replace("(", r"\(")):
            only(cells, [word])


@in_one_item(
    ("change", "said"),
    [
        ({"models": {"a": {"config": "quikstart"}}}, "models.a with methods.RandLoRA-6: Unknown config"),
        ({"methods": {"x": {"adapter": "LoRAA"}}}, "methods.x: Unknown adapter 'LoRAA'"),
        ({"methods": {"x": {"config": "adapters/lorra"}}}, "Did you mean 'adapters/lora'"),
        ({"methods": {"x": {"adapter": "LoRA", "rang": 4}}}, "methods.x: Unknown option --model.adapter.rang"),
        ({"methods": {"x": {"adapter": "LoRA", "task": "Linear"}}}, "Unknown task 'Linear'"),
        ({"datasets": ["digit"]}, "datasets.digit: Unknown dataset 'digit'. Did you mean 'digits'"),
        ({"datasets": {"d": {"dataset": "digits", "shot": 1}}}, "datasets.d: Unknown option --data.shot"),
        ({"set": {"data.step": 1}}, "Unknown option --data.step. Did you mean --data.steps"),
        ({"set": {"trainer.devices": 2}}, "a cell runs on one device"),
        ({"models": {"a": {"config": ["quickstart", "linear_probe"]}}, "methods": ZERO}, "zero-shot needs a text head"),
    ],
)
def test_unknown_names_are_told_with_their_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        cells_of(**change)
    assert said in str(error.value)
