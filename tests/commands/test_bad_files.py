"""Adapters and configs that are no sane input: a line or two, code 2, before anything large is made of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from randlora_pl.adapters import LoRA, NoLA, RandLoRA, inject, save_load
from randlora_pl.interop import peft_import as peft_files
from randlora_pl.utils.errors import UserError
from tests.adapters.zoo import mlp
from tests.support.cli import Refused
from tests.support.products import in_one_item
from tests.utils.test_files import BOMB

DEEP = '{"a":' + "[" * 100_000


@pytest.fixture
def adapter(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "adapter", tmp_path / "adapter"))


def change(adapter: Path, edit: Callable[[Any], object]) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["sha256"]
    edit(config)
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def replace_tensors(adapter: Path, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: edit(value) for name, value in load_file(adapter / save_load.TENSORS).items()}
    save_file(tensors, adapter / save_load.TENSORS)
    change(adapter, lambda config: None)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda config: config["options"].update(alpha=10**400), "a number of 401 digits"),
        (lambda config: config["options"].update(num_bases=10**9), "num_bases"),
        (lambda config: config["options"].update(num_bases=10**18), "num_bases"),
        (
            lambda config: config["layers"].update({next(iter(config["layers"])): [128, 10**12]}),
            "is [128, 1000000000000]",
        ),
        (lambda config: config["metadata"].update(classnames=["a", "\ud800"]), "classnames"),
        (lambda config: config["metadata"].update(classnames=[str(n) for n in range(100_000)]), "classes"),
    ],
)
def test_nonsense_in_a_description(
    refused: Refused, adapter: Path, tmp_path: Path, edit: Callable[[Any], object], word: str
) -> None:
    change(adapter, edit)
    (tmp_path / "0.png").touch()  # images are found before the adapter is read
    assert word in refused("predict", "--adapter", "adapter", "--images", "0.png", "--output", "-")


@pytest.mark.parametrize("side", [10**12, 0])
def test_weights_of_no_size(refused: Refused, adapter: Path, side: int) -> None:
    change(adapter, lambda config: config["layers"].update({next(iter(config["layers"])): [192, side]}))
    assert f"[192, {side}]" in refused("adapter", "info", "adapter")


def test_deeply_nested_descriptions(refused: Refused, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(DEEP)
    for words in (("predict", "--images", "."), ("test",), ("serve",)):
        assert "nested" in refused(words[0], "--adapter", "adapter", *words[1:])
    assert "nested" in refused("adapter", "info", "adapter")
    with pytest.raises(UserError, match="nested"):
        save_load._read_contents(adapter)
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="nested"):
        peft_files.read_peft(adapter)


@pytest.mark.parametrize(
    "value", [1e38, pytest.param(1e10, marks=pytest.mark.slow)]
)  # of the weights, and of what comes out of finite ones
def test_weights_that_overflow_give_no_figures(refused: Refused, adapter: Path, tmp_path: Path, value: float) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    replace_tensors(adapter, lambda tensor: torch.full_like(tensor, value))
    message = refused("predict", "--adapter", "adapter", "--images", "x.png", "--output", "p.csv")
    assert "not finite" in message and "Remove it" not in message
    for verb in ("test", "validate"):
        limit = f"--trainer.limit_{verb.removesuffix('idate')}_batches"
        assert "not finite" in refused(verb, "--adapter", "adapter", "--data.dataset", "digits", limit, "1")
    assert "finite" in refused("adapter", "merge", "adapter", "--output", "m.safetensors")
    assert "finite" in refused("adapter", "export", "adapter", "--to", "torch", "--output", "m.pt2")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_weights_are_real_numbers(refused: Refused, adapter: Path, dtype: torch.dtype) -> None:
    replace_tensors(adapter, lambda tensor: tensor.to(dtype))
    assert str(dtype) in refused("adapter", "info", "adapter")


@pytest.mark.parametrize("name", [save_load.CONFIG, save_load.TENSORS])
def test_an_adapter_that_may_not_be_read_is_named_and_not_the_output(
    refused: Refused, adapter: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain = Path.open

    def locked(file: Path, *args: Any, **options: Any) -> Any:
        if file.name == name:
            raise PermissionError(13, "Permission denied", str(file))
        return plain(file, *args, **options)

    monkeypatch.setattr(Path, "open", locked)
    message = refused("adapter", "export", "adapter", "--to", "adapter", "--output", "copy")
    assert f"{name}: Permission denied" in message and "copy" not in message


def test_adapters_are_not_much_larger_than_their_model() -> None:
    for method in (RandLoRA(rank=4, num_bases=10**9), NoLA(num_bases=10**9), RandLoRA(variant="a", num_bases=10**9)):
        with pytest.raises(UserError, match="num_bases"):
            inject(mlp(), method, ["enter"])
    inject(mlp(), LoRA(rank=2), ["enter"])


LONG = "x" * 10_000


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("init_args: 3\n", "Unknown key"),
        ("1: 2\n", "the key 1"),
        ("model: {adapter: {null: 2}}\n", "the key None"),
        ("model: {adapter: collections.OrderedDict}\n", "subclass of Adapter"),
        ("data: {classnames: !!set {a, b}}\n", "constructor"),
        ("data:\n  root: a\x07b\n", "line 2"),
        ("methods: {a: {}}\nmodels: {b: {}}\n", "sweep c.yaml"),
        ("help: 3\n", "Unknown key"),
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
    ],
)
def test_a_bad_config_is_refused(refused: Refused, tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    message = refused("fit", "--model.name", "tiny", "--config", "c.yaml")
    assert word in message and len(message) < 1600


@in_one_item(
    "words",
    [
        ("--seed_everything", "1" * 5000),
        ("--model.targets", "[" * 600 + "]" * 600),
        ("--trainer.accumulate_grad_batches", "0"),
        ("--trainer.accumulate_grad_batches", str(2**62)),
        ("--data.batch_size", str(2**63)),
        ("--trainer.precision", "64-true"),
        ("--trainer.devices", "5000"),
        ("--model.adapter", LONG),
        (f"--{LONG}", "1"),
        ("--data.dataset", LONG),
        ("--config", LONG),
        ("--data.classnames", LONG),
        ("--data.root", f"/dev/null/{LONG}", "--data.dataset", "folder"),
        ("--data.root", LONG, "--data.dataset", "table"),
        ("--data.root", LONG),
        ("--model", "CausalLMTask", "--model.num_beams", "1000000", "--data.dataset", "e2e"),
    ],
)
def test_bad_options_are_refused(refused: Refused, words: tuple[str, ...]) -> None:
    assert len(refused("fit", "--config", "quickstart", *words)) < 1600
