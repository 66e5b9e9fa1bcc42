"""Push and pull against a fake of the Hub on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from randlora_pl.adapters import RandLoRA, inject, load_adapter, read_adapter, save_adapter
from randlora_pl.adapters.operations import use_bases
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.interop.hub import check_repo, pull_adapter, push_folder, stage
from randlora_pl.utils.errors import UserError
from tests.fake_hub import TOKEN, FakeHub, ask, fake_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as server:
        yield server


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6))


def trained(own_bases: bool = False) -> nn.Module:
    model = network(0)
    inject(model, RandLoRA(rank=2), ["0", "1"])
    if own_bases:
        drawn = next(module.bases for module in model.modules() if isinstance(getattr(module, "bases", None), Bases))
        tensors = drawn.tensors()
        use_bases(model, Bases(0, tensors["A"].float() + 0.5, tensors["B"].float(), stored=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    return model


def staged(model: nn.Module, folder: Path, name: str = "adapter", base: str = "random") -> Path:
    identity = {"library": "timm", "name": "x", "pretrained": base}
    adapter = save_adapter(model, folder / name, base_model=identity, metadata={"arguments": {"pretrained": base}})
    stage(adapter, folder / "sent", "---\ntags: []\n---\n# Card\n")
    return folder / "sent"


@pytest.mark.parametrize("name", ["adapter", pytest.param("adapter.safetensors", marks=pytest.mark.full)])
def test_what_is_pulled_is_what_was_pushed(hub: FakeHub, tmp_path: Path, name: str) -> None:
    model = trained()
    sent = staged(model, tmp_path, name)
    address = push_folder(sent, "ann/one", message="First")
    repo = hub.repos["ann/one"]
    assert address == f"{hub.url}/ann/one/commit/{repo.sha('main')}"
    assert repo.messages == ["First"] and not repo.private
    assert repo.branches["main"].keys() == {
        "README.md", ".gitattributes", "adapter.safetensors", "adapter_config.json"
    }  # fmt: skip
    assert any(request.startswith("PUT /large/") for request in hub.requests)
    _, commit, size = pull_adapter("ann/one", tmp_path / "deep" / "here")
    assert {file.name for file in (tmp_path / "deep" / "here").iterdir()} == {file.name for file in sent.iterdir()}
    assert commit == repo.sha("main")
    assert size == sum(file.stat().st_size for file in sent.iterdir())
    fresh, x = network(0), torch.randn(5, 12)
    load_adapter(fresh, tmp_path / "deep" / "here")
    torch.testing.assert_close(fresh(x), model(x))
    assert not F.mse_loss(network(0)(x), model(x)) < 1e-3
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["here"]


def test_branches_and_commits(hub: FakeHub, tmp_path: Path) -> None:
    sent = staged(trained(), tmp_path)
    push_folder(sent, "ann/one", revision="second try")
    repo = hub.repos["ann/one"]
    assert repo.branches["main"].keys() == {".gitattributes"}
    with pytest.raises(UserError, match="ann/one"):
        pull_adapter("ann/one", tmp_path / "a")
    for number, revision in enumerate(("second try", repo.sha("second try"))):
        assert pull_adapter("ann/one", tmp_path / f"b{number}", revision)[1] == repo.sha("second try")
    with pytest.raises(UserError, match="'third'"):
        pull_adapter("ann/one", tmp_path / "c", "third")


def test_bases_of_an_older_adapter_go(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    push_folder(staged(trained(own_bases=True), tmp_path), "ann/one")
    assert pull_adapter("ann/one", tmp_path / "a")[0].bases is not None
    push_folder(staged(trained(), tmp_path / "new"), "ann/one")
    assert pull_adapter("ann/one", tmp_path / "b")[0].bases is None
    assert "bases.safetensors" not in hub.repos["ann/one"].branches["main"]


def test_private(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = staged(trained(), tmp_path)
    push_folder(sent, "ann/secret", private=True)
    assert hub.repos["ann/secret"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="ann/secret"):
        pull_adapter("ann/secret", tmp_path / "a")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_folder(sent, "ann/public")
    before = dict(hub.repos["ann/public"].branches["main"])
    (sent / "README.md").write_text("---\ntags: []\n---\nother\n")
    with pytest.raises(UserError, match="nothing"):
        push_folder(sent, "ann/public", private=True)
    assert hub.repos["ann/public"].branches["main"] == before


def test_refusals(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, target = staged(trained(), tmp_path), tmp_path / "target" / "adapter"
    with pytest.raises(UserError, match="ann/none"):
        pull_adapter("ann/none", target)
    with pytest.raises(UserError, match="bob/one"):
        push_folder(sent, "bob/one")
    (sent / "README.md").write_text("---\nlicense: no such thing\n---\n")
    with pytest.raises(UserError, match=r"README.md"):
        push_folder(sent, "ann/one")
    (sent / "README.md").write_text("---\ntags: []\n---\n")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for action in (lambda: pull_adapter("ann/one", target), lambda: push_folder(sent, "ann/one")):
        with pytest.raises(UserError, match=r"\(401\)"):
            action()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"\(401\)"):
        push_folder(sent, "ann/one")
    hub.broken = 418
    with pytest.raises(UserError, match=r"\(418\)"):
        pull_adapter("ann/one", target)
    ask(monkeypatch, "http://127.0.0.1:9")
    for action in (lambda: pull_adapter("ann/one", target), lambda: push_folder(sent, "ann/one")):
        with pytest.raises(UserError, match=r"http://127.0.0.1:9"):
            action()
    assert not target.parent.exists()


def test_offline_is_said(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        pull_adapter("ann/one", tmp_path / "a")
    assert not hub.requests


def test_what_is_damaged_or_of_others_stays_away(hub: FakeHub, tmp_path: Path) -> None:
    push_folder(staged(trained(), tmp_path), "ann/one")
    files = hub.repos["ann/one"].branches["main"]
    files["evil.pkl"] = files["pytorch_model.bin"] = b"code"
    pull_adapter("ann/one", tmp_path / "good")
    assert not any("evil" in request or "pytorch" in request for request in hub.requests)
    config = json.loads(files["adapter_config.json"])
    files["adapter_config.json"] = json.dumps(config | {"targets": ["0"]}).encode()
    with pytest.raises(UserError, match="ann/one"):
        pull_adapter("ann/one", tmp_path / "bad")
    older = (tmp_path / "good" / "adapter_config.json").read_bytes()
    with pytest.raises(UserError, match="damaged"):
        pull_adapter("ann/one", tmp_path / "good")
    assert (tmp_path / "good" / "adapter_config.json").read_bytes() == older  # the one that was there stays
    files["adapter_model.safetensors"] = files.pop("adapter.safetensors")
    with pytest.raises(UserError, match="adapter pull ann/one"):
        pull_adapter("ann/one", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_paths_of_this_machine_are_not_sent(tmp_path: Path) -> None:
    sent = staged(trained(), tmp_path, base="/home/ann/secret/weights.safetensors")
    assert "/home/ann" not in (sent / "adapter_config.json").read_text()
    file = read_adapter(sent)  # checksums fit
    assert file.config["base_model"]["pretrained"] == "weights.safetensors"
    assert file.metadata["arguments"]["pretrained"] == "weights.safetensors"


def test_names_of_repositories() -> None:
    for name in ("ann/one", "a-b/c.d_e", "ann/1"):
        assert check_repo(name) == name
    for name in ("one", "ann/", "/one", "a/b/c", "ann/on e", "", "a/" + "b" * 100, "../x", "./x"):
        with pytest.raises(UserError, match="Use USER/NAME"):
            check_repo(name)
    with pytest.raises(UserError, match="ann/one"):
        check_repo("https://huggingface.co/ann/one")
