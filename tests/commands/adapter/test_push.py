"""Both ways to a fake of the Hub, as they are typed."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from randlora_pl.adapters import read_adapter
from randlora_pl.tasks import load_task
from randlora_pl.tasks.restore import plain_task
from tests.docs.pages import PAGES
from tests.fake_hub import FakeHub, ask, fake_hub
from tests.support.cli import Refused, Run


@pytest.fixture
def hub(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """After `run`, which has an environment of its own."""
    with fake_hub(monkeypatch) as server:
        yield server


@pytest.mark.slow
def test_there_and_back(
    run: Run, hub: FakeHub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = str(finished / "adapter")
    pushed = run("adapter", "push", adapter, "--repo", "ann/digits", "--license", "apache-2.0", "--message", "Mine")
    assert pushed.code == 0, pushed.err
    assert f"{hub.url}/ann/digits/commit/" in pushed.out and "3 files" in pushed.out
    assert "Next: randlora-pl adapter pull ann/digits --output digits" in pushed.out
    assert hub.repos["ann/digits"].messages == ["Mine"]
    pulled = run("adapter", "pull", "ann/digits", "--output", "digits")
    assert pulled.code == 0, pulled.err
    assert "digits: RandLoRA adapter of open_clip tiny random for 10 classes" in pulled.out
    assert "Next: randlora-pl predict --adapter digits --images PATH" in pulled.out
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "photo.jpg")
    same = [
        run("predict", "--adapter", place, "--images", "photo.jpg", "--output", "-") for place in (adapter, "digits")
    ]
    assert same[0].code == 0 and same[0].out == same[1].out
    card = (tmp_path / "digits" / "README.md").read_text()
    assert str(finished) not in card and str(tmp_path) not in card

    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)  # the code in the card runs
    assert snippet is not None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet[1], {})
    assert same[0].out.splitlines()[1].split(",")[1] in printed.getvalue()

    names = {"images": torch.rand(2, 3, 32, 32), "model": plain_task(read_adapter(adapter)).build()}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    page = PAGES["docs/adapter_files.md"].partition("## Hugging Face Hub")[2]
    block = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    exec(block.replace("USER/NAME", "ann/digits"), names)
    assert torch.equal(names["logits"], load_task(adapter).class_logits(names["images"]))

    config = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)  # and so does its command
    assert config is not None
    (tmp_path / "config.yaml").write_text(config[1])
    again = run("fit", "--config", "config.yaml", "--run.name", "again")
    assert again.code == 0, again.err
    here, there = read_adapter(next(tmp_path.glob("runs/again/2*/adapter"))), read_adapter(tmp_path / "digits")
    assert here.tensors.keys() == there.tensors.keys()
    assert all((here.tensors[name] == there.tensors[name]).all() for name in here.tensors)


def test_without_a_network(run: Run, hub: FakeHub, finished: Path, tmp_path: Path) -> None:
    """What would be sent, and the card, need no Hub."""
    base = ("adapter", "push", str(finished / "adapter"), "--repo", "ann/digits")
    dry = run(*base, "--dry-run")
    assert dry.code == 0 and "would be uploaded to ann/digits" in dry.out
    assert "adapter.safetensors" in dry.out and "library_name: randlora-pl" in dry.out
    assert not list(tmp_path.iterdir())
    written = run(*base, "--card", "card.md")
    assert "not uploaded yet" in written.out and "# digits" in (tmp_path / "card.md").read_text()
    assert not hub.requests
    (tmp_path / "card.md").write_text("---\ntags: [mine]\n---\nmy own words\n")
    assert run(*base, "--card", "card.md", "--revision", "v1", "--private").code == 0
    repo = hub.repos["ann/digits"]
    assert b"my own words" in repo.branches["v1"]["README.md"] and "README.md" not in repo.branches["main"]
    pulled = run("adapter", "pull", "ann/digits", "--revision", "v1", "--output", "here")
    assert pulled.code == 0, pulled.err
    assert run("adapter", "pull", "ann/digits", "--revision", "v1", "--output", "here", "--overwrite").code == 0


def test_bad_input(
    refused: Refused, hub: FakeHub, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ("adapter", "push", str(finished / "adapter"), "--repo")
    (tmp_path / "there").mkdir()
    (tmp_path / "card.md").write_bytes(b"\xff\xfe\x00")
    assert "USER/NAME" in refused(*push, "digits")
    assert "--message" in refused(*push, "ann/digits", "--message", " ")
    assert "cannot be read as text" in refused(*push, "ann/digits", "--card", "card.md")
    assert "RUN/adapter" in refused("adapter", "push", str(finished / "checkpoints"), "--repo", "ann/digits")
    assert "there exists" in refused("adapter", "pull", "ann/digits", "--output", "there")
    assert "give a folder" in refused("adapter", "pull", "ann/digits", "--output", "x.safetensors")
    assert not hub.requests
    assert "(404)" in refused("adapter", "pull", "ann/digits", "--output", "deep/digits")
    assert "(403)" in refused(*push, "bob/digits")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "accept" in refused(*push, "ann/digits")
    ask(monkeypatch, "http://127.0.0.1:9")
    for words in ((*push, "ann/digits"), ("adapter", "pull", "ann/digits", "--output", "digits")):
        assert "http://127.0.0.1:9" in refused(*words)
