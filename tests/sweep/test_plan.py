import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.data.catalog import PAPER
from randlora_pl.models import load_clip, meta_clip
from randlora_pl.sweep import SweepConfig, budget, budget_options, is_zero_shot
from randlora_pl.sweep.expand import Counts, check_first, counts, data_of
from randlora_pl.sweep.plan import Labels, cell_config, digest, only, result_key, shard
from randlora_pl.tasks import VisionLanguageTask
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.sweep.grids import GRID, cells_of

ZERO = {"zero-shot": None}


def test_the_grid_is_the_product_and_the_untrained_model_once_a_data_set(tmp_path: Path) -> None:
    cells = cells_of(budgets=[1, 2, "50%"], seeds=[1, 2], methods=GRID["methods"] | ZERO)
    assert len(cells) == 3 * 2 * 2 + 1 == len({cell.hash for cell in cells}) == len({cell.labels for cell in cells})
    (untrained,) = (cell for cell in cells if cell.untrained)
    assert untrained.labels == Labels("tiny", "digits", "zero-shot", "zero-shot", 1)
    assert untrained.flat["model.adapter"] == "FullFineTuning"
    assert "data.shots" not in untrained.flat and "data.fraction" not in untrained.flat
    (tmp_path / "few.yaml").write_text("data: {shots: 7}")
    models = {"tiny": {"config": ["quickstart", str(tmp_path / "few.yaml")]}}
    (cell,) = cells_of(models=models, budgets=["100%"], methods={"LoRA": {"adapter": "LoRA"}})
    assert "data.shots" not in cell.flat, "a budget is not the config's own"


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
    for wrong, said in (
        ([{"budgets": [3]}], "cases has '3-shot', which is not one of the budgets"),
        ([{"datasets": ["digit"]}], "which is not one of the datasets. Did you mean 'digits'"),
        ([{"sets": {}}], "cases has no key 'sets'"),
        ([{"set": {"data.stepz": 1}}], "Did you mean"),
        ({"budgets": [2]}, "give a list"),
    ):
        with pytest.raises(UserError, match=said):
            cells_of(methods={"LoRA-4": {"adapter": "LoRA", "cases": wrong}}, budgets=[1, 2])


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


@pytest.mark.parametrize(
    "change",
    [
        {"set": GRID["set"] | {"data.steps": 3}},
        {"set": GRID["set"] | {"trainer.precision": "bf16-mixed"}},
        {"seeds": [2]},
        {"datasets": {"mine": {"dataset": "folder", "root": "here"}}},
        {"datasets": {"mine": {"dataset": "folder", "root": "there"}}},
    ],
)
def test_the_hash_depends_on_what_is_computed(change: dict[str, Any]) -> None:
    own = {"datasets": {"mine": {"dataset": "folder", "root": "here"}}}
    for other in [{}, *([own] if change != own else [])]:
        assert not {cell.hash for cell in cells_of(**other)} & {cell.hash for cell in cells_of(**change)}


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
        ({"set": {"trainer.devices": [0, 1]}}, "models.tiny with methods.RandLoRA-6: trainer.devices is [0, 1]"),
        ({"set": {"trainer.devices": -1}}, "trainer.devices is -1 and"),
        ({"set": {"trainer.num_nodes": 2}}, "trainer.num_nodes 2"),
        (
            {"methods": {"x": {"first": {"adapter": "LoRA", "set": {"trainer.devices": 2}}, "adapter": "RandLoRA"}}},
            "trainer.devices is 2",
        ),
        ({"models": {"a": {"config": ["quickstart", "linear_probe"]}}, "methods": ZERO}, "zero-shot needs a text head"),
    ],
)
def test_unknown_names_are_told_with_their_place(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        cells_of(**change)
    assert said in str(error.value)


def test_what_it_writes_it_reads_again() -> None:
    pairs = [["LoRA-4", "RandLoRA-6"]]
    more = {"budgets": [1, "50%", 0.25, "100%", "16-shot"], "seeds": [3, 1], "pairs": pairs, "baselines": True}
    told = SweepConfig.from_content(GRID | more)
    assert told.budgets == ["1-shot", "50%", "25%", "100%", "16-shot"] and told.seeds == [3, 1]
    assert SweepConfig.from_content(told.content()) == told and told.pairs == pairs


def test_all_data_sets_are_the_papers_and_labels_may_differ_from_names() -> None:
    assert list(SweepConfig.from_content(GRID | {"datasets": "all"}).datasets) == list(PAPER)
    told = SweepConfig.from_content(GRID | {"datasets": {"short": {"dataset": "digits", "steps": 1}, "digits": None}})
    assert told.datasets == {"short": {"dataset": "digits", "steps": 1}, "digits": {"dataset": "digits"}}
    assert SweepConfig.from_content(told.content()) == told


@given(st.integers(1, 10**6), st.integers(1, 100))
def test_budgets_by_their_labels(shots: int, percent: int) -> None:
    assert budget_options(budget(shots)) == {"shots": shots}
    assert budget(f"{shots}-shot") == budget(str(shots)) == budget(shots)
    assert budget(f"{percent}%") == budget(f"{percent} %") == budget(percent / 100) == f"{percent}%"
    assert budget_options(f"{percent}%") == ({} if percent == 100 else {"fraction": percent / 100})


def test_zero_shot_is_known_by_its_label() -> None:
    assert all(map(is_zero_shot, ("zero-shot", "Zero shot", "untrained")))
    assert not is_zero_shot("LoRA")


def test_union_keeps_the_older_grid() -> None:
    older = SweepConfig.from_content(GRID)
    newer = SweepConfig.from_content(GRID | {"seeds": [2], "budgets": [4], "methods": {"VeRA": {"adapter": "VeRA"}}})
    both = newer.union(older)
    assert (both.seeds, both.budgets, list(both.methods)) == (
        [1, 2], ["2-shot", "4-shot"], ["RandLoRA-6", "LoRA-4", "VeRA"],
    )  # fmt: skip


@in_one_item(
    ("change", "said"),
    [
        ({"metods": {}}, "a sweep has no key 'metods'. Did you mean 'methods'"),
        ({"models": {}}, "models is missing"),
        ({"methods": {"": {"adapter": "LoRA"}}}, "methods has the name '': give one"),
        ({"datasets": {"a\0b": {"dataset": "digits"}}}, "datasets has the name 'a\\x00b': give one"),
        ({"title": ["a"]}, "title is ['a']: give a text"),
        ({"seeds": [1, 2, 1]}, "each number once"),
        ({"models": {"a": {}}}, "models.a.config is missing"),
        ({"models": {"a": {"config": "x", "sett": {}}}}, "models.a has no key 'sett'. Did you mean 'set'"),
        ({"methods": {"LoRA": {}}}, "methods.LoRA has neither config nor adapter"),
        ({"methods": {"LoRA": {"adapter": "LoRA", "models": ["tny"]}}}, "Did you mean 'tiny'"),
        ({"methods": {"LoRA": {"adapter": "LoRA", "set": 5}}}, "methods.LoRA.set is 5"),
        ({"methods": {"zero-shot": {"adapter": "LoRA"}}}, "methods.zero-shot has no key 'adapter'"),
        ({"methods": {"a": {"adapter": "RandLoRA", "first": {"adapter": "VeRA"}}}}, "a stage needs a LoRA to start"),
        ({"methods": {"a": {"adapter": "VeRA", "first": {"adapter": "LoRA", "form": "in"}}}}, "a.first.form is 'in'"),
        ({"methods": {"a": {"adapter": "VeRA", "first": {"adapter": "LoRA", "cases": 1}}}}, "a.first.cases is 1"),
        ({"methods": {"a": {"adapter": "VeRA", "first": {"adapter": "LoRA", "config": 5}}}}, "a.first.config is 5"),
        ({"cases": [{"datasets": "digits"}]}, "cases[0].datasets is 'digits': give a list such as ["),
        ({"methods": {"a": {"adapter": "VeRA", "first": {"adapter": "LoRA", "models": []}}}}, "a.first has models"),
        ({"budgets": 4}, "budgets is 4"),
        ({"budgets": [0]}, "budgets has 0"),
        ({"budgets": ["101%"]}, "budgets has '101%'"),
        ({"seeds": [-1]}, "seeds[0] is -1"),
        ({"set": [1]}, "set is [1]"),
        ({"tune": {"rates": [1]}}, "tune has no key 'rates'"),
        ({"baselines": "pixels"}, "baselines is 'pixels': give true or false"),
        ({"notes": "a remark"}, "notes is 'a remark': give a list"),
        ({"pairs": ["LoRA-4"]}, "pairs[0] is 'LoRA-4': give a list"),
        ({"pairs": [["LoRA-4", "LoRA4"]]}, "pairs has 'LoRA4', which is not one of the trained methods. Did you mean"),
        ({"pairs": [["LoRA-4", "LoRA-4"]]}, "pairs has 'LoRA-4' with itself"),
        ({"models": {"a": {"config": ["quickstart", {"data": 1}]}}}, "models.a.config[1] is {'data': 1}"),
        ({"methods": {"LoRA": {"adapter": "LoRA", "models": {"tiny": 1}}}}, "LoRA.models is {'tiny': 1}: give a text"),
        ({"methods": {"LoRA": {"adapter": "LoRA", "learning_rate": "fast"}}}, "methods.LoRA.learning_rate is 'fast'"),
        ({"methods": {"LoRA": {"adapter": "LoRA", "head_learning_rate": -1}}}, "methods.LoRA.head_learning_rate is -1"),
        ({"set": {"data.shots": 4}}, "set has data.shots: that is what budgets are for"),
        ({"set": {"data": {"fraction": 0.5}}}, "set has data.fraction: that is what budgets are for"),
        ({"methods": {"LoRA": {"adapter": "LoRA", "set": {"seed_everything": 4}}}}, "that is what seeds are for"),
        ({"datasets": {"few": {"dataset": "digits", "shots": 4}}}, "datasets.few has data.shots: that is what budgets"),
        ({"tune": {"set": {"data.dataset": "digits"}}}, "tune.set has data.dataset: that is what datasets are for"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        SweepConfig.from_content(GRID | change)
    assert said in str(error.value) and "\n" not in str(error.value)


def one(**changes: Any) -> Any:
    return cells_of(**({"methods": {"x": {"adapter": "LoRA", "rank": 4}}} | changes))[0].tree


def test_counts_are_those_of_the_model() -> None:
    found = counts(one())
    model: Any = load_clip("tiny", "random").model
    assert found is not None
    assert found.total - found.trainable == sum(p.numel() for p in model.parameters())
    probe = counts(one(methods={"x": {"config": "linear_probe"}}))
    assert probe is not None and probe.trainable == 0, "it trains its head alone"


@in_one_item(
    ("configs", "trainable"),
    [("promptsrc", 46_080), ("clip_lora", 184_320), ("tip_adapter", 0), (["coop", "randlora"], 3_135_848)],
)
def test_prompts_are_counted_without_weights(configs: Any, trainable: int) -> None:
    adamw = {"model.optimizer": "adamw", "model.schedule": "cosine"}
    options = {"rank": 10, "set": adamw} if isinstance(configs, list) else {}
    tree = cell_config({"config": "clip_vitb32"}, {"config": configs} | options, {}, None, untrained=False)
    found = counts(tree)
    assert found is not None and found.trainable == trainable


def test_a_task_says_what_trains_beside_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = one(methods={"x": {"adapter": "LinearProbe"}})
    size = sum(p.numel() for p in meta_clip("tiny").parameters())
    for beside in ((0, True), (7, False)):
        monkeypatch.setattr(VisionLanguageTask, "beside_on_meta", lambda *_, beside=beside: beside)
        assert counts(tree) == Counts(beside[0], size + beside[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": {"x": {"adapter": "LoRA", "rank": 9999}}}, "rank 9999 is larger"),
        ({"methods": {"x": {"adapter": "LinearProbe"}}}, "give it task: LinearHeadTask"),
        ({"methods": {"x": {"adapter": "LoRA", "set": {"model.learning_rate": "fast"}}}}, "positive number, not fast"),
    ],
)
def test_impossible_models_and_data_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        counts(one(**change))
    with pytest.raises(UserError, match="batch_size"):
        data_of(one(set=GRID["set"] | {"data.batch_size": 0}))


LORA = {"adapter": "LoRA", "rank": 4}
MLP = {"set": {"model.targets": ["mlp"]}}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"adapter": "RandLoRA", "first": LORA | {"form": "absorbed"}}, ""),
        ({"adapter": "VeRA", "first": LORA}, ""),
        ({"adapter": "VeRA", "first": LORA | {"form": "absorbed"}}, "VeRA cannot absorb a LoRA"),
        ({"adapter": "RandLoRA", "qkv": "split", "first": LORA}, "the LoRA of first has qkv packed"),
        (
            {"adapter": "RandLoRA", "set": {"model.targets": ["qkv"]}, "first": LORA | MLP},
            r"first has model.targets \['mlp'\], the method \['qkv'\]. Set the same model.targets in set and first.set",
        ),
        ({"adapter": "RandLoRA", "first": LORA | MLP}, ""),
        ({"adapter": "RandLoRA", "first": LORA | {"set": {"model.name": "ViT-B-32"}}}, "first has model.name ViT-B-32"),
        ({"adapter": "RandLoRA", "first": LORA | {"task": "LinearHeadTask"}}, "first has the task LinearHeadTask"),
        ({"adapter": "Together", "parts": [LORA, {"adapter": "RandLoRA"}], "first": LORA}, ""),
        ({"adapter": "RandLoRA", "first": {"adapter": "LoRA", "match": "randlora:6", "form": "absorbed"}}, ""),
    ],
)
def test_a_method_must_be_able_to_start_from_its_lora(method: dict[str, Any], said: str) -> None:
    (cell,) = cells_of(methods={"x": method})
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_first(cell)
