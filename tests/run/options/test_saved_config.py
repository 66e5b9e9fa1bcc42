"""An adapter is data: no file of it, and no config beside it, makes the program import or build anything else."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from randlora_pl.adapters import LoRA
from randlora_pl.commands.analyze import open_run
from randlora_pl.run.options.saved_config import adapter_config, check_run_config, data_beside
from randlora_pl.run.session import prepare
from randlora_pl.utils.errors import UserError
from tests.support.cli import Refused, Run
from tests.tasks.small import two_blocks

CODE = """
from pathlib import Path
from lightning.pytorch import Callback
Path("RAN").touch()
class Evil(Callback):
    pass
"""


@pytest.fixture
def evil(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `evil` that can be imported; importing it makes the file returned."""
    (tmp_path / "evil.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "RAN"


def test_config_beside_an_adapter_runs_no_code(run: Run, finished: Path, evil: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "adapter", tmp_path / "run" / "adapter")
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "evil.Evil"}]
    config["model"] = {"class_path": "evil.Evil"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    limit = ("--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false")
    with two_blocks():
        result = run("test", "--adapter", "run/adapter", *limit, "--run.root", "runs")
    assert result.code == 0, result.err
    assert not evil.exists()


def test_config_beside_an_adapter_gives_plain_data_options_and_the_seed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    data = {"dataset": "digits", "shots": 2, "mean": [0.1, 0.2, 0.3], "templates": None}
    file.write_text(yaml.safe_dump({"data": data, "seed_everything": 5, "trainer": {"max_steps": 1}, "run": {}}))
    assert data_beside(file) == {"data": data, "seed_everything": 5}
    evils: list[Any] = [{"class_path": "x.Y"}, {"dataset": {"class_path": "x.Y"}}, {"root": [["x"]]}, {"a.b": 1}, "x"]
    for evil in evils:
        file.write_text(yaml.safe_dump({"data": evil}))
        with pytest.raises(UserError, match="plain"):
            data_beside(file)


def test_analyses_read_no_more_of_a_config(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "config.yaml").write_text("data: {dataset: digits, root: {class_path: x.Y}}")
    with pytest.raises(UserError, match="plain"):
        open_run(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["metadata"].update(task="evil.Evil"),
        lambda config: config.update(method="DoRA", options={"inner": {"class_path": "evil.Evil"}}),
        lambda config: config.update(method="DoRA", options={"inner": "evil.Evil"}),
        lambda config: config.update(method="Together", options={"parts": [LoRA().describe(), "evil.Evil"]}),
        lambda config: config["metadata"]["arguments"].update({"adapter.class_path": "evil.Evil"}),
        lambda config: config["metadata"]["arguments"].update(config_overrides="a: {class_path: evil.Evil}"),
        lambda config: config["metadata"]["arguments"].update(config_overrides={"a": "{class_path: evil.Evil}"}),
    ],
)
def test_adapter_names_no_class_of_another_program(
    refused: Refused, evil: Path, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    metadata = {"task": "TextHeadTask", "arguments": {"name": "tiny"}, "classnames": [], "templates": []}
    content = LoRA(rank=3).describe() | {"format_version": 4, "metadata": metadata}
    change(content)
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    assert "changed" in refused("test", "--adapter", ".", "--config", "quickstart")
    assert not evil.exists()


@pytest.mark.parametrize("module", ["evil", "os"])
def test_files_import_no_class_and_print_the_option_that_does(
    refused: Refused, evil: Path, tmp_path: Path, finished: Path, own: Callable[[], None], module: str
) -> None:
    path = f"{module}.Evil"
    changes: list[Callable[[Any], None]] = [
        lambda config: config["metadata"].update(task_class=path),
        lambda config: config.update(method=path),
        lambda config: config.update(method="DoRA", options={"inner": {"method": path, "options": {}}}),
    ]
    for change in changes:
        content = json.loads((finished / "adapter/adapter_config.json").read_text())
        change(content)
        (tmp_path / "adapter_config.json").write_text(json.dumps(content))
        for command in (["test", "--adapter", "."], ["serve", "--adapter", "."]):
            assert f"Add --import {module}" in refused(*command)
    shutil.copytree(finished, tmp_path / "run")
    places: list[Callable[[Any], None]] = [
        lambda config: config.update(model={"class_path": path}),
        lambda config: config["model"]["init_args"].update(adapter=path),
        lambda config: config["trainer"].update(callbacks=[{"class_path": path}]),
        lambda config: config["trainer"].update(callbacks=f"[{path}]"),
        lambda config: config["trainer"].update(
            callbacks={"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": path}}
        ),
    ]
    for place in places:
        config = yaml.safe_load((finished / "config.yaml").read_text())
        place(config)
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
        for words in (["test", "--run", "run"], ["fit", "--resume", "run"]):
            assert f"Add --import {module}" in refused(*words)
    assert not evil.exists()


def _filled(options: dict[str, Any], value: object) -> dict[str, Any]:
    """Return options with another value for each but the adapter."""
    return {name: each if name == "adapter" else value for name, each in options.items()}


@pytest.mark.parametrize("value", ["evil.Evil", ["evil.Evil"], {"a": "evil.Evil"}])
def test_no_option_of_a_file_is_imported(
    evil: Path, tmp_path: Path, finished: Path, own: Callable[[], None], value: object
) -> None:
    content = json.loads((finished / "adapter/adapter_config.json").read_text())
    content |= {"options": _filled(content["options"], value), "targets": ["evil.Evil"]}
    content["metadata"]["arguments"] = _filled(content["metadata"]["arguments"], value)
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    config = yaml.safe_load((finished / "config.yaml").read_text())
    for node in (config["model"], config["model"]["init_args"]["adapter"]):
        node["init_args"] = _filled(node["init_args"], value)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(json.dumps(config))
    for words in (["test", "--adapter", "."], ["fit", "--from-adapter", "."], ["test", "--run", "run"]):
        with suppress(UserError):
            prepare(words[0], words[1:])
    assert "evil" not in sys.modules
    assert not evil.exists()


@pytest.mark.parametrize("key", ["model.adapter", "model.init_args.adapter", "model.init_args.adapter.class_path"])
def test_dotted_keys_of_a_run_are_refused_alike(
    refused: Refused, evil: Path, tmp_path: Path, finished: Path, own: Callable[[], None], key: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((finished / "config.yaml").read_text())
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({**config, key: "evil.Evil"}))
    assert "Add --import evil" in refused("test", "--run", "run")
    assert not evil.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("pretrained", "evil.pt"), ("pretrained", "weights.pt"), ("caption", "json.x"), ("targets", [".*resblocks.3.*"])],
)
def test_names_of_files_and_patterns_are_not_classes(
    evil: Path, tmp_path: Path, finished: Path, own: Callable[[], None], option: str, value: Any
) -> None:
    (tmp_path / "weights").mkdir()
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["model"]["init_args"][option] = value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    assert check_run_config(Path("mine.yaml"))
    with suppress(UserError):
        prepare("fit", ["--config", "mine.yaml"])
    assert not evil.exists()


def test_whole_configs_are_trusted(evil: Path, tmp_path: Path, finished: Path, own: Callable[[], None]) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {callbacks: [{class_path: evil.Evil}]}")
    command = prepare("test", ["--adapter", str(finished / "adapter"), "--config", "mine.yaml"])
    assert command.config["trainer"]["callbacks"]


def test_adapter_folders_say_which_task_they_need(tmp_path: Path) -> None:
    metadata = {"task": "TextHeadTask", "arguments": {"name": "tiny", "seed": 4}, "classnames": [], "templates": []}
    content = LoRA(rank=3).describe() | {"format_version": 4, "metadata": metadata}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    model = adapter_config(tmp_path)["model"]
    assert model["class_path"] == "TextHeadTask"
    assert model["init_args"]["name"] == "tiny" and "seed" not in model["init_args"]
    assert model["init_args"]["adapter"]["init_args"]["rank"] == 3
    (tmp_path / "adapter_config.json").write_text(json.dumps(content), encoding="utf-16")
    assert adapter_config(tmp_path)["model"] == model
    for text, word in (("{}", "task"), ("[]", "task"), ("{", "cannot be read")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=word):
            adapter_config(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="adapter folder"):
        adapter_config(tmp_path / "empty")
    with pytest.raises(UserError, match="There is no adapter folder"):
        adapter_config(tmp_path / "nowhere")


def test_a_class_without_a_module_has_a_message_of_its_own(tmp_path: Path, finished: Path) -> None:
    content = json.loads((finished / "adapter/adapter_config.json").read_text())
    content["metadata"]["task_class"] = ""
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'' is not the import path of a task\. The file is damaged or was changed"):
        adapter_config(tmp_path)


def test_folders_of_peft_are_refused_with_the_command_that_imports_them(refused: Refused, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    for command in (("predict", "--adapter", ".", "--images", "."), ("adapter", "info", ".")):
        assert "adapter import . --from peft" in refused(*command)
