"""Configs and options that are no sane input: a line or two, code 2, at once, and no long echo."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.products import in_one_item
from tests.utils.test_files import BOMB

LONG = "x" * 10_000


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("init_args: 3\n", "Unknown key"),
        ("class_path: x.Y\n", "Unknown key"),
        ("class_path: {a: 1}\n", "Unknown key"),
        ("1: 2\n", "the key 1"),
        ("model: {adapter: {null: 2}}\n", "the key None"),
        ("model: {adapter: collections.OrderedDict}\n", "subclass of Adapter"),
        ("data: {classnames: !!set {a, b}}\n", "constructor"),
        ("data:\n  root: a\x07b\n", "line 2"),
        ("methods: {a: {}}\nmodels: {b: {}}\n", "sweep c.yaml"),
        ("methods: {a: {}}\nseeds: [1]\n", "sweep c.yaml"),
        ("help: 3\n", "Unknown key"),
        ("config: {}\n", "Unknown key"),
        ("print_config: true\n", "Unknown key"),
        ("model: {help: x}\n", "Unknown key"),
        ("seed_everything: {a: 1}\n", "Unknown key"),
        ("seed_everything: " + "1" * 5000, "digits"),
        ("data: {shots: {init_args: 3}}\n", "shots"),
        ("model: ../../../../etc\n", "Unknown task"),
        ("model: {adapter: ..x}\n", "Unknown adapter"),
        (BOMB, "aliases"),
        ("a: &a [*a]\n", "itself"),
        ("data: " + "[" * 600 + "]" * 600, "nested"),
        ("trainer: {plugins: ['[']}\n", "name of a class, or {class_path: NAME, init_args: {...}}, not ["),
        (f"run: {{root: {LONG}}}\n", "File name too long. Use another folder"),
        (f"model: {LONG}\n", "Unknown task"),
        (f"data: {LONG}\n", "expected"),
        (f"data: {{dataset: {LONG}}}\n", "dataset"),
        (f"? {LONG}\n: 1\n", "Unknown key"),
        (f"run: {{logger: {LONG}}}\n", "run.logger"),
        (f"trainer: {{max_steps: {LONG}}}\n", "max_steps"),
        (f"model: {{learning_rate: {LONG}}}\n", "learning_rate"),
    ],
)
def test_a_bad_config_is_refused(refused: Callable[..., str], tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    message = refused("fit", "--model.name", "tiny", "--config", "c.yaml")
    assert word in message and len(message) < 1600


@in_one_item(
    "words",
    [
        ("--seed_everything", "1" * 5000),
        ("--data.steps", "1" * 5000),
        ("--model.targets", "[" * 600 + "]" * 600),
        ("--model", "../../etc"),
        ("--trainer.accumulate_grad_batches", "0"),
        ("--trainer.accumulate_grad_batches", "-1"),
        ("--trainer.accumulate_grad_batches", str(2**62)),
        ("--data.batch_size", str(2**63)),
        ("--data.steps", str(2**62)),
        ("--trainer.precision", "64"),
        ("--trainer.precision", "64-true"),
        ("--trainer.devices", "5000"),
        ("--model.adapter", LONG),
        (f"--{LONG}", "1"),
        (LONG, "1"),
        ("--data.dataset", LONG),
        ("--config", LONG),
        ("--data.classnames", LONG),
        ("--data.root", f"/dev/null/{LONG}", "--data.dataset", "folder"),
        ("--data.root", LONG, "--data.dataset", "table"),
        ("--data.root", LONG),
        ("--model", "CausalLMTask", "--model.num_beams", "1000000", "--data.dataset", "e2e"),
    ],
)
def test_bad_options_are_refused(refused: Callable[..., str], words: tuple[str, ...]) -> None:
    assert len(refused("fit", "--config", "quickstart", *words)) < 1600
