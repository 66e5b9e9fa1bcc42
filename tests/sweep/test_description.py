from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.data.catalog import PAPER
from randlora_pl.sweep.description import SweepConfig, budget, budget_options, is_zero_shot
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.sweep.grids import GRID


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
        ({"methods": {"../../x": {"adapter": "LoRA"}}}, "methods has the name '../../x': give one"),
        ({"datasets": {"a\0b": {"dataset": "digits"}}}, "datasets has the name 'a\\x00b': give one"),
        ({"title": ["a"]}, "title is ['a']: give a text"),
        ({"seeds": [1, 2, 1]}, "each number once"),
        ({"models": {"a": {}}}, "models.a.config is missing"),
        ({"models": {"a": {"config": "x", "sett": {}}}}, "models.a has no key 'sett'. Did you mean 'set'"),
        ({"models": ["a"]}, "models is ['a']"),
        ({"methods": {"LoRA": {}}}, "methods.LoRA has neither config nor adapter"),
        ({"methods": {"LoRA": {"adapter": "LoRA", "models": ["tny"]}}}, "Did you mean 'tiny'"),
        ({"methods": {"LoRA": {"adapter": "LoRA", "set": 5}}}, "methods.LoRA.set is 5"),
        ({"methods": {"zero-shot": {"adapter": "LoRA"}}}, "methods.zero-shot has no key 'adapter'"),
        ({"methods": {"a": {"adapter": "RandLoRA", "first": {"adapter": "VeRA"}}}}, "a stage starts from LoRA alone"),
        ({"methods": {"a": {"adapter": "VeRA", "first": {"adapter": "LoRA", "form": "in"}}}}, "a.first.form is 'in'"),
        ({"methods": {"a": {"adapter": "VeRA", "first": {"adapter": "LoRA", "cases": 1}}}}, "a.first.cases is 1"),
        ({"methods": {"a": {"adapter": "VeRA", "first": {"adapter": "LoRA", "config": 5}}}}, "a.first.config is 5"),
        ({"cases": [{"datasets": "digits"}]}, "cases[0].datasets is 'digits': give a list such as ["),
        ({"cases": [{"datasets": None}]}, "cases[0].datasets is None"),
        ({"methods": {"a": {"adapter": "VeRA", "first": {"adapter": "LoRA", "models": []}}}}, "a.first has models"),
        ({"datasets": "digits"}, "datasets is 'digits'"),
        ({"budgets": 4}, "budgets is 4"),
        ({"budgets": ["many"]}, "budgets has 'many'"),
        ({"budgets": [0]}, "budgets has 0"),
        ({"budgets": ["101%"]}, "budgets has '101%'"),
        ({"budgets": [True]}, "budgets has True"),
        ({"seeds": [-1]}, "seeds[0] is -1"),
        ({"seeds": []}, "seeds is []"),
        ({"set": [1]}, "set is [1]"),
        ({"tune": {"rates": [1]}}, "tune has no key 'rates'"),
        ({"keep_adapters": "no"}, "keep_adapters is 'no'"),
        ({"baselines": "pixels"}, "baselines is 'pixels': give true or false"),
        ({"notes": "a remark"}, "notes is 'a remark': give a list"),
        ({"pairs": ["LoRA-4"]}, "pairs[0] is 'LoRA-4': give a list"),
        ({"pairs": [["LoRA-4", "LoRA4"]]}, "pairs has 'LoRA4', which is none of the trained methods. Did you mean"),
        ({"pairs": [["LoRA-4", "LoRA-4"]]}, "pairs has 'LoRA-4' with itself"),
        ({"models": {"a": {"config": 5}}}, "models.a.config is 5"),
        ({"models": {"a": {"config": ["quickstart", {"data": 1}]}}}, "models.a.config[1] is {'data': 1}"),
        ({"methods": {"LoRA": {"config": 5}}}, "methods.LoRA.config is 5"),
        (
            {"methods": {"LoRA": {"adapter": "LoRA", "models": {"tiny": 1}}}},
            "methods.LoRA.models is {'tiny': 1}: give a text",
        ),
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
