from pathlib import Path
from typing import Any

import pytest

from randlora_pl.run.options.compose import DEFAULTS, compose, without_other_length
from randlora_pl.run.options.mistakes import check_names
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item


@pytest.mark.parametrize(
    ("later", "left"),
    [
        ({"steps": 5}, {"shots": 2}),
        ({"steps": "null"}, {"shots": 2, "epochs": 3}),
        ({"steps": None, "shots": 4}, {"shots": 2, "epochs": 3}),
        ({"steps": 5, "epochs": 2}, {"shots": 2, "epochs": 3}),  # a mistake, which the data module refuses
        ({"steps": 5, "epochs": None}, {"shots": 2}),
    ],
)
def test_steps_replace_epochs(later: dict[str, Any], left: dict[str, Any]) -> None:
    assert without_other_length({"shots": 2, "epochs": 3}, later) == left


def test_what_is_set_last_is_the_length(tmp_path: Path) -> None:
    """A resolved config always has a length, and can be used with another one."""
    for name, text in (("epochs", "{epochs: 3, steps: null}"), ("steps", "{steps: 7}")):
        (tmp_path / f"{name}.yaml").write_text(f"data: {text}\n")
    epochs, steps = (["--config", str(tmp_path / f"{name}.yaml")] for name in ("epochs", "steps"))
    for words, length in (
        ([*epochs, *steps], (None, 7)),
        ([*steps, *epochs], (3, None)),
        ([*epochs, "--data.steps", "9"], (None, 9)),
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
