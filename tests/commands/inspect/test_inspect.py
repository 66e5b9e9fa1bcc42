import json
import sys
import urllib.request
from pathlib import Path

import pytest

from randlora_pl.commands import inspect
from randlora_pl.commands.data import datasets
from randlora_pl.commands.inspect import cached
from randlora_pl.run.options.shipped import config_folder, config_names, find_config, headline
from randlora_pl.utils.errors import UserError
from tests.support.cli import Refused, Run


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDLORA_PL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_every_section_is_printed(run: Run) -> None:
    out = run("doctor", "--all").out
    for word in [
        "Versions",
        "Devices",
        "Data sets",
        "Network",
        "Weights",
        "Folders",
        "torch",
        "cpu",
        "digits",
        "OFFLINE",
    ]:
        assert word in out
    assert "randlora-pl data get mnist" in out and "randlora-pl data get cars (prints the steps)" in out


def test_the_verdict_comes_first_and_what_is_absent_is_counted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run("doctor").out
    assert out.startswith("READY: runs use ") and "data get mnist" not in out
    assert len(out.splitlines()) < 60 < len(run("doctor", "--all").out.splitlines())
    absent = sum(text.startswith("missing: ") for text in datasets().values())
    assert f"{absent} not downloaded " in out and "digits " in out
    assert json.loads(run("doctor", "--json").out)["Data sets"]["digits"] == "built in"
    monkeypatch.setitem(inspect.OPTIONAL, "no-such-extra", ("--data.dataset hf", "hf"))
    how = inspect.versions()["no-such-extra"]
    assert how.startswith("not installed; for --data.dataset hf: ") and how.endswith(" pip install 'randlora-pl[hf]'")
    monkeypatch.setattr(inspect, "PACKAGES", ("no-such-package",))
    assert run("doctor").out.startswith("NOT READY: no-such-package MISSING: pip install no-such-package\n")


def test_cached_weights_are_found(tmp_path: Path) -> None:
    assert not cached("timm", "vit_tiny_patch16_224", "augreg_in21k")
    snapshot = tmp_path / "hub" / "models--timm--vit_tiny_patch16_224.augreg_in21k" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_text("")
    assert cached("timm", "vit_tiny_patch16_224", "augreg_in21k")
    assert not cached("open_clip", "ViT-B-32", "openai")


def test_data_sets_are_found_or_lead_to_what_tells_where_they_are_from(tmp_path: Path) -> None:
    assert "missing" in datasets()["mnist"]
    (tmp_path / "data" / "MNIST").mkdir(parents=True)
    assert "found" in datasets()["mnist"]
    lead = "missing: randlora-pl datasets e2e (prints the steps)"
    assert datasets()["e2e"] == lead
    root = tmp_path / "data"
    for name in ("train", "valid", "test"):
        assert datasets()["e2e"] == lead, "a part is not all"
        (root / f"{name}.txt").write_text("")
    assert datasets()["e2e"] == f"found under {root}"
    assert {"commonsense_15k", "commonsense_170k", "sst2", "stsb"} <= datasets().keys()
    assert not {"jsonl", "csv"} & datasets().keys()


def test_language_models_are_found_where_all_of_their_weights_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qwen, llama = "Qwen/Qwen2-0.5B-Instruct", "meta-llama/Meta-Llama-3-8B"
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it would fail
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = inspect.weights()
    assert found[qwen] == "not cached"
    assert f"gated: accept its license at https://huggingface.co/{llama}" in found[llama]
    assert "pip install 'randlora-pl[language]'" in found["language models"]
    for name in (qwen, llama):
        (tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "abc").mkdir(parents=True)
    one, many = sorted((tmp_path / "hub").glob("*/snapshots/abc"))
    (one / "config.json").write_text("{}")
    (many / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (many / "1.safetensors").write_text("")
    found = inspect.weights()
    assert found[qwen] == "not cached" and found[llama].startswith("not cached"), "a part is not all"
    (one / "model.safetensors").write_text("")
    (many / "2.safetensors").write_text("")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    found = inspect.weights()
    assert found[qwen] == found[llama] == "cached" and "language models" not in found


def test_network_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    (text,) = inspect.network().values()
    assert "OFFLINE" in text and "--model.pretrained FILE" in text

    def reachable(*args: object, **kwargs: object) -> object:
        return open(__file__)  # noqa: PTH123 - any context manager

    monkeypatch.setattr(urllib.request, "urlopen", reachable)
    assert inspect.network() == {"http://127.0.0.1:1": "reachable"}


@pytest.mark.parametrize("library", ["torch", "open_clip", "huggingface_hub"])
def test_broken_libraries_are_told(run: Run, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    for name in [name for name in sys.modules if name == library or name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    result = run("doctor")
    assert result.code == 0
    assert "BROKEN" in result.out and library in result.out
    assert "Data sets" in result.out and "digits" in result.out and "Folders" in result.out


def test_names_paths_and_short_names_find_the_same_file(tmp_path: Path) -> None:
    file = config_folder() / "adapters" / "lora.yaml"
    for name in ("lora", "adapters/lora", "adapters/lora.yaml", "configs/adapters/lora.yaml", str(file)):
        assert find_config(name).read_text() == file.read_text()
    own = tmp_path / "lora"
    own.write_text("data: {}")
    assert find_config(str(own)) == own
    for wrong, meant in (("quikstart", "'quickstart'"), ("randlra", "'adapters/randlora'")):
        with pytest.raises(UserError, match=meant):
            find_config(wrong)


def test_every_config_opens_with_what_it_is_and_its_command() -> None:
    for name, file in config_names().items():
        text = file.read_text()
        assert text.startswith("# ") and headline(file), name
        head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        assert "randlora-pl " in head, name
        if "/" not in name:
            assert "Cost" in head or "minutes" in head, name


def test_list_cat_and_cp(run: Run, refused: Refused, tmp_path: Path) -> None:
    listed = run("config", "list").out
    assert all(name in listed for name in config_names())
    assert run("config", "cat", "lora").out == find_config("lora").read_text()
    assert run("config", "cp", "lora").code == 0
    assert (tmp_path / "lora.yaml").read_text() == find_config("lora").read_text()
    assert "overwritten" in refused("config", "cp", "lora")
    assert "exist" in refused("config", "cp", "lora", "nowhere/lora.yaml")
    assert run("config", "cp", "lora", "mine.yaml").code == 0
    assert "'list'" in refused("config", "lst")
