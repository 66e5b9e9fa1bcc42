from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.run.options.compose import (
    compose,
    flatten,
    merge,
    normalize,
    parse_value,
    read_config,
    short_name,
)
from randlora_pl.run.options.mistakes import check_names
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

DEFAULTS = {"model": {"class_path": "VisionLanguageTask", "init_args": {"adapter": "RandLoRA"}}}
leaves = st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
trees = st.recursive(leaves, lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), max_leaves=8)


@given(trees, trees)
def test_what_comes_later_wins(old: Any, new: Any) -> None:
    merged = merge(old, new)
    if isinstance(old, dict) and isinstance(new, dict):
        assert set(merged) == set(old) | set(new)
        for name in merged:
            assert merged[name] == (merge(old.get(name), new[name]) if name in new else old[name])
    else:
        assert merged == new


def test_another_adapter_starts_from_its_own_defaults() -> None:
    old = normalize(
        {"model": {"init_args": {"name": "x", "adapter": {"class_path": "RandLoRA", "init_args": {"rank": 6}}}}}
    )
    new = normalize({"model": {"init_args": {"adapter": "LoRA"}}})
    assert merge(old, new)["model"]["init_args"] == {"name": "x", "adapter": {"class_path": "LoRA"}}
    same = normalize({"model": {"init_args": {"adapter": {"class_path": "a.b.RandLoRA", "init_args": {"alpha": 1}}}}})
    assert merge(old, same)["model"]["init_args"]["adapter"]["init_args"] == {"rank": 6, "alpha": 1}


def test_another_task_keeps_the_model_and_the_adapter() -> None:
    old = normalize({"model": {"class_path": "A", "init_args": {"name": "x"}}})
    assert merge(old, {"model": {"class_path": "B"}})["model"] == {"class_path": "B", "init_args": {"name": "x"}}


def test_typed_adapter_drops_the_options_of_the_old_one() -> None:
    before = str(DEFAULTS)
    command = compose("fit", ["--config", "quickstart", "--model.adapter", "LoRA"], DEFAULTS)
    assert command.config["model"]["init_args"]["adapter"] == {"class_path": "LoRA"}
    assert "model.adapter.rank" not in command.flat()
    typed = compose("fit", ["--model.adapter.rank", "3", "--model.adapter=LoRA", "--config=quickstart"], DEFAULTS)
    assert typed.flat()["model.adapter.rank"] == 3
    assert typed.flat()["model.adapter"] == "LoRA" and str(DEFAULTS) == before


def adapter_of(*words: str) -> Any:
    """The adapter of a config after one of RandLoRA of rank 6."""
    return compose("fit", ["--config", "quickstart", *words], DEFAULTS).config["model"]["init_args"]["adapter"]


@in_one_item(
    ("text", "expected"),
    [
        ("model: {adapter: LoRA}", {"class_path": "LoRA"}),
        ("model: {adapter: {class_path: LoRA, rank: 4}}", {"class_path": "LoRA", "init_args": {"rank": 4}}),
        ("model: {init_args: {adapter: {rank: 4}}}", {"class_path": "RandLoRA", "init_args": {"rank": 4}}),
        ("model:", {"class_path": "RandLoRA", "init_args": {"rank": 6}}),
        (
            "model: {adapter: {class_path: DoRA, inner: LoRA}}",
            {"class_path": "DoRA", "init_args": {"inner": {"class_path": "LoRA"}}},
        ),
    ],
)
def test_classes_are_written_as_on_the_command_line(tmp_path: Path, text: str, expected: Any) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert adapter_of("--config", str(tmp_path / "c.yaml")) == expected


def test_typed_mappings_and_classes() -> None:
    typed = "{class_path: LoRA, init_args: {rank: 4}}"
    assert adapter_of("--model.adapter", typed) == {"class_path": "LoRA", "init_args": {"rank": 4}}
    assert adapter_of("--model.adapter={rank: 4}") == {"class_path": "RandLoRA", "init_args": {"rank": 4}}
    assert adapter_of("--model.adapter", "randlora")["init_args"] == {"rank": 6}, "the same class, spelled otherwise"
    assert compose("fit", ["--model.adapter", typed], DEFAULTS).typed == []


def test_a_task_has_its_own_default_classes_and_nulls_inside_a_class_are_none() -> None:
    def model(*words: str) -> Any:
        return compose("fit", ["--model", *words], {"model": {"class_path": "VisionLanguageTask"}}).config["model"]

    assert model("TextHeadTask")["init_args"] == {"adapter": {"class_path": "RandLoRA"}}
    found = model("PromptTask", "--model.prompts.words", "null", "--model.head.weight=0.5")["init_args"]
    assert found == {
        "adapter": {"class_path": "Frozen"},
        "prompts": {"class_path": "CoOp", "init_args": {"words": None}},
        "head": {"class_path": "DePT"},
    }
    assert model("PromptTask", "--model.prompts", "maple")["init_args"]["prompts"] == {"class_path": "maple"}
    assert "head" not in model("PromptTask")["init_args"]
    one = normalize({"model": {"init_args": {"head": "DePT", "prompts": "CoOp"}}})
    assert merge(one, normalize({"model": {"head": None}}))["model"]["init_args"]["head"] is None


def test_empty_sections_wipe_nothing_and_dates_are_names(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {steps: 200}\n")
    (tmp_path / "b.yaml").write_text("data:\nrun: {name: 2026-05-01}\n")
    words = [word for name in "ab" for word in ("--config", str(tmp_path / f"{name}.yaml"))]
    flat = compose("fit", words, DEFAULTS).flat()
    assert flat["data.steps"] == 200
    assert flat["run.name"] == "2026-05-01"


@in_one_item(
    "text", ["model: 5", "model: {init_args: foo}", "model: {class_path: 5}", "model: {adapter: [1]}", "run: 5", "5: 3"]
)
def test_sections_of_another_kind_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml: .*(is|expected)"):
        compose("fit", ["--config", str(tmp_path / "c.yaml")], DEFAULTS)
    if text.startswith("model: {adapter"):
        with pytest.raises(UserError, match=r"model\.adapter"):
            adapter_of("--model.adapter", "8")


def test_words_are_sorted() -> None:
    words = [
        "--data.shots",
        "-3",
        "--trainer.callbacks",
        "EarlyStopping",
        "--print_config",
        "--resume",
        "r",
        "-c",
        "lora",
    ]
    command = compose("fit", words, DEFAULTS)
    assert command.typed == ["--data.shots", "-3", "--trainer.callbacks+", "EarlyStopping", "--print_config"]
    assert command.folders == {"resume": Path("r")}
    assert command.flat()["data.shots"] == -3
    assert command.flat()["model.adapter.rank"] == 32
    assert [Path(name).name for name in command.named] == ["lora.yaml"]


def test_options_are_spelled_with_either_sign() -> None:
    words = ["--data.batch-size", "4", "--model.adapter.num-bases=floor+1", "--seed-everything", "1", "--help-all"]
    command = compose("fit", [*words, "--run.name", "a-b"], DEFAULTS)
    expected = ["--data.batch_size", "4", "--model.adapter.num_bases", "floor+1", "--seed_everything", "1"]
    assert command.typed == [*expected, "--help-all", "--run.name", "a-b"]
    command = compose("fit", ["--print-config=skip_default", "--data.shots", "2"], DEFAULTS)
    assert command.typed == ["--print_config=skip_default", "--data.shots", "2"]


def test_flat_names_leave_patterns_whole() -> None:
    tree = {
        "model": {"class_path": "T", "init_args": {"adapter": {"class_path": "R", "init_args": {"rank": {"a.*": 4}}}}}
    }
    assert flatten(tree) == {"model": "T", "model.adapter": "R", "model.adapter.rank": {"a.*": 4}}
    assert short_name("--model.init_args.adapter.init_args.rank") == "model.adapter.rank"


@in_one_item(("text", "value"), [("1e-3", 1e-3), ("8", 8), ("[a, 1.5]", ["a", 1.5]), ("a: [", "a: ["), ("null", None)])
def test_typed_values_are_read_as_yaml(text: str, value: Any) -> None:
    assert parse_value(text) == value


@in_one_item(
    ("text", "message"),
    [
        ("a: [", "line 1|line 2"),
        ("- 1", "is not a config"),
        ("a: \x00", "cannot be read|not valid YAML"),
        ("methods:\n  LoRA: {rank: 1}\n  LoRA: {rank: 2}", "line 3 is not valid YAML: duplicate key 'LoRA'"),
        ("? [a]\n: 1", "line 1 is not valid YAML: found unhashable key"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_config(file)
    assert "broken.yaml" in str(caught.value)


def test_stray_words_and_missing_values() -> None:
    with pytest.raises(UserError, match="--config"):
        compose("fit", ["quickstart"], DEFAULTS)
    with pytest.raises(UserError, match="--config"):
        compose("fit", ["--config"], DEFAULTS)
    with pytest.raises(UserError, match="--resume"):
        compose("fit", ["--resume", "--data.shots", "3"], DEFAULTS)


def test_what_is_set_last_is_the_length(tmp_path: Path) -> None:
    """A resolved config always has a length, and can be used with another one."""
    for name, text in (("epochs", "{epochs: 3, steps: null}"), ("steps", "{steps: 7}")):
        (tmp_path / f"{name}.yaml").write_text(f"data: {text}\n")
    epochs, steps = (["--config", str(tmp_path / f"{name}.yaml")] for name in ("epochs", "steps"))
    for words, length in (
        ([*epochs, *steps], (None, 7)),
        ([*steps, *epochs], (3, None)),
        ([*epochs, "--data.steps", "9"], (None, 9)),
        ([*epochs, "--data.steps", "null"], (3, None)),
        ([*epochs, "--data.steps=9", "--data.epochs", "2"], (2, 9)),
    ):
        flat = compose("fit", words, {}).flat()
        assert (flat.get("data.epochs"), flat.get("data.steps")) == length, words


@in_one_item(
    ("words", "length"),
    [
        ("--trainer.max_epochs 3", {"data.epochs": 3}),
        ("--trainer.max_steps 5 --trainer.max_steps=9", {"data.steps": 9}),
        ("--config steps.yaml --trainer.max_epochs 1", {"data.epochs": 1}),
        ("--config steps.yaml --config lightning.yaml", {"data.epochs": 4}),
        ("--config run.yaml", {"data.epochs": 6, "trainer.max_epochs": 1}),
        ("--config run.yaml --trainer.max_steps 5", {"data.steps": 5, "trainer.max_epochs": 1}),
        ("--data.epochs 3 --trainer.max_steps 5", {"data.epochs": 3, "trainer.max_steps": 5}),  # the shorter
        ("--trainer.max_epochs 3 --trainer.max_steps 5", {"data.epochs": 3, "trainer.max_steps": 5}),
        ("--trainer.max_epochs -1", {"trainer.max_epochs": -1}),
    ],
)
def test_lightnings_length_is_ours_where_both_mean_the_same(
    words: str, length: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"steps": "data: {steps: 7}", "lightning": "trainer: {max_epochs: 4}"}
    files["run"] = "data: {epochs: 6, steps: null}\ntrainer: {max_epochs: 1, max_steps: null}"
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)
    flat = compose("fit", words.split(), {}).flat()
    assert {key: value for key, value in flat.items() if value and key != "model.adapter"} == length


@pytest.mark.parametrize("words", ["--trainer.max_steps 0", "--data.epochs 3 --trainer.max_steps 0"])
def test_a_run_without_steps_is_refused(words: str) -> None:
    with pytest.raises(UserError, match=r"--data.steps: expected a whole number from 1"):
        check_names(compose("fit", words.split(), DEFAULTS))
