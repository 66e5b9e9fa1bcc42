"""Push and pull against a fake of the Hub on loopback, and the card that goes with it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

from randlora_pl.adapters import DoRA, LoRA, RandLoRA, inject, load_adapter, read_adapter, save_adapter
from randlora_pl.adapters.operations import use_bases
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.interop.base_model import hub_id
from randlora_pl.interop.hub import (
    make_card,
    pull_adapter,
    push_folder,
    remove_local_paths,
    stage,
    without_local_paths,
)
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.hub import check_repo
from tests.fake_hub import TOKEN, FakeHub, ask, fake_hub
from tests.support.products import in_one_item


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


def test_what_is_pulled_is_what_was_pushed(hub: FakeHub, tmp_path: Path) -> None:
    model = trained()
    sent = staged(model, tmp_path, "adapter.safetensors")
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
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        asked = len(hub.requests)
        with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
            pull_adapter("ann/one", target)
        assert len(hub.requests) == asked
    ask(monkeypatch, "http://127.0.0.1:9")
    for action in (lambda: pull_adapter("ann/one", target), lambda: push_folder(sent, "ann/one")):
        with pytest.raises(UserError, match=r"http://127.0.0.1:9"):
            action()
    assert not target.parent.exists()


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


def test_a_model_takes_an_adapter_by_the_name_of_its_repository(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model, x = trained(), torch.randn(5, 12)
    push_folder(staged(model, tmp_path), "ann/one")
    files = hub.repos["ann/one"].branches["main"]
    files["evil.pkl"] = files["modeling.py"] = b"code"
    hub.requests.clear()
    file = load_adapter(fresh := network(0), "ann/one")
    assert torch.equal(fresh(x), model(x)) and file.adapter.method() == "RandLoRA"
    assert any("/large/" in request for request in hub.requests)
    assert not any(name in request for request in hub.requests for name in ("evil", "modeling", "README"))
    hub.requests.clear()
    load_adapter(network(0), "ann/one", revision=hub.repos["ann/one"].sha("main"))
    assert not any("/large/" in request for request in hub.requests)  # from the cache
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        load_adapter(network(0), "ann/one")
        for name, message in (
            ("ann/two", "ann/two does not exist here: .*HF_HUB_OFFLINE"),
            ("../one", "no adapter|not"),
        ):
            with pytest.raises((UserError, FileNotFoundError), match=message):
                load_adapter(network(0), name)
    with pytest.raises(UserError, match="it was trained on different weights"):
        load_adapter(network(1), "ann/one")
    with pytest.raises(UserError, match=r"ann/none does not exist here: .* has no model ann/none"):
        load_adapter(network(0), "ann/none")
    with pytest.raises(UserError, match="'third'"):
        load_adapter(network(0), "ann/one", revision="third")
    hub.repos["ann/one"].gated = True
    load_adapter(network(0), "ann/one")  # the client falls back on its cache
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
        with pytest.raises(UserError, match=r"is gated: ask for access at http.*/ann/one"):
            load_adapter(network(0), "ann/one")
        hub.repos["ann/one"].gated, hub.repos["ann/one"].private = False, True
        patched.delenv("HF_TOKEN")
        with pytest.raises(UserError, match=r"\(401\), or it is private.*hf auth login"):
            load_adapter(network(0), "ann/one")
    for name, message in (("adapter_model.bin", "pickle"), ("adapter_model.safetensors", "adapter pull ann/one")):
        files[name] = files.pop("adapter.safetensors", b"")
        with pytest.raises(UserError, match=message):
            load_adapter(network(0), "ann/one")
    save_adapter(model, tmp_path / "ann" / "one")  # a folder here comes first
    hub.requests.clear()
    load_adapter(network(0), "ann/one")
    assert not hub.requests
    with pytest.raises(UserError, match="not a repository"):
        load_adapter(network(0), "ann/one", revision="main")


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


NAMES = ["a `cat`", "dog | wolf", "cow\n# no heading"]


def saved(folder: Path, **metadata: Any) -> Path:
    """A run folder with a small adapter in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8))
    inject(model, DoRA(inner=LoRA(rank=2)), ["0"])
    model_words = {"name": "vit_tiny_patch16_224", "pretrained": "/home/ann/weights.pth"}
    base = {"library": "timm", "sha256": "ab" * 32} | model_words
    arguments = {"seed": 3, "weight_decay": 0.1} | model_words
    task = {"task": "LinearHeadTask", "arguments": arguments, "classnames": NAMES, "templates": []}
    frame: dict[str, Any] = {"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    frame |= {"resize": "squash", "crop_pct": 1.0, "fill": [0, 0, 0]}
    training = {"step": 20, "val/acc": 0.5, "frame": frame}
    return save_adapter(
        model, folder / "adapter", base_model=base, extra={"head": torch.zeros(3, 4)},
        metadata={key: each for key, each in {**task, "training": training, **metadata}.items() if each is not None},
    )  # fmt: skip


def run_of(folder: Path) -> None:
    config = {
        "seed_everything": 3,
        "trainer": {"max_steps": -1, "logger": None, "default_root_dir": "/home/ann/runs"},
        "model": {
            "class_path": "randlora_pl.tasks.LinearHeadTask",
            "init_args": {"pretrained": "/home/ann/weights.pth"},
        },
        "data": {"dataset": "folder", "root": "~/photos", "train": "https://ann:pw@host/x-{0..9}.tar", "shots": 4},
        "run": {"root": "/home/ann/runs"},
        "from_adapter": "/home/ann/runs/lora/adapter",
    }
    (folder / "config.yaml").write_text("# head\n" + yaml.safe_dump(config))
    (folder / "results.json").write_text(
        json.dumps({"test/acc": 0.875, "zeroshot/acc": 0.1, "steps": 1234, "peak_memory_bytes": 2**30, "device": "cpu"})
    )


def parts(card: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the config of a card."""
    header = yaml.safe_load(card.split("---\n")[1])
    config = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    return header, yaml.safe_load(config[1]) if config else {}


def test_card_of_a_run(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    run_of(tmp_path)
    card = make_card(read_adapter(adapter), "ann/pets", "mit")
    header, config = parts(card)
    assert header["library_name"] == "randlora-pl" and header["license"] == "mit"
    assert header["pipeline_tag"] == "image-classification" and "dora" in header["tags"]
    assert "base_model" not in header  # a file of the author's is on no hub
    for text in ("87.50 %", "10.00 %", "1,234", "1.1 GB", "`folder`", "64 x 64 pixels", "`mit`", "3 classes"):
        assert text in card, text
    assert config["data"] == {"dataset": "folder", "root": "PATH", "train": "https://host/x-{0..9}.tar", "shots": 4}
    assert config["model"]["class_path"] == "randlora_pl.tasks.LinearHeadTask"
    assert config["model"]["init_args"]["pretrained"] == "weights.pth"
    assert config["trainer"] == {"max_steps": -1, "default_root_dir": "PATH"} and config["seed_everything"] == 3
    assert "`PATH` stands for" in card and "add `--from-adapter LORA`" in card
    assert "/home" not in card and "pw@" not in card and str(tmp_path) not in card
    assert "timm vit_tiny_patch16_224 weights.pth" in card
    assert card.count("\n# ") == 1  # a class name makes no heading
    assert 'load_task("pets")' in card and "adapter pull ann/pets --output pets" in card


def test_card_without_a_run(tmp_path: Path) -> None:
    """The adapter's own figures, and the model's part of a config."""
    header, config = parts(make_card(read_adapter(saved(tmp_path)), "ann/pets"))
    assert "license" not in header
    assert config["seed_everything"] == 3 and config["model"]["class_path"] == "LinearHeadTask"
    arguments = config["model"]["init_args"]
    assert arguments["adapter"]["init_args"]["inner"]["class_path"] == "LoRA" and "seed" not in arguments
    assert arguments["pretrained"] == "weights.pth"


CAPTIONS = {"classnames": [f"caption {number}" for number in range(1000)], "captions": True, "prompts": {}}
TEXTS = "predict --adapter pets --texts FILE"


@in_one_item(
    ("metadata", "there", "absent"),
    [
        ({}, ["not named a license", "| validation accuracy | 50.00 % |"], ["test accuracy"]),
        (
            {"task": None, "classnames": None, "training": {}},
            ["adapter merge pets"],
            ["predict", "pipeline_tag", "How it was trained", "classes"],
        ),
        ({"task": "CausalLMTask"}, ["text-generation\n", "task.write([", TEXTS], ["--images", "timm or"]),
        (
            {"task": "TextClassificationTask"},
            ["text-classification\n", "task.classify([", TEXTS],
            ["--images", "timm or"],
        ),
        (
            CAPTIONS,
            ["zero-shot-image-classification\n", "1,000 captions", "and 800 more", "caption 199\n"],
            ["caption 200\n"],
        ),
    ],
)
def test_cards_of_other_adapters(metadata: dict[str, Any], there: list[str], absent: list[str], tmp_path: Path) -> None:
    card = make_card(read_adapter(saved(tmp_path, **metadata)), "ann/pets")
    assert all(text in card for text in there) and not any(text in card for text in absent)


def test_figures_are_those_of_the_adapter(tmp_path: Path) -> None:
    """The test of a run is of its last weights, not of the best by validation."""
    adapter = saved(tmp_path)
    run_of(tmp_path)
    best = adapter.rename(tmp_path / "adapter-best")
    card = make_card(read_adapter(best), "ann/pets")
    assert "87.50 %" not in card and "50.00 %" in card
    elsewhere = best.rename(tmp_path / "mine")
    assert "`folder`" not in make_card(read_adapter(elsewhere), "ann/pets")
    elsewhere.rename(adapter)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results.json"):
        make_card(read_adapter(adapter), "ann/pets")


def test_portable() -> None:
    given = {
        "a": ["/x/y", "x/y", ("C:\\x", "c:/x", "\\\\host\\x")], "b": "~ann/x", "c": "../../ann", "d": 3, "e": None,
        "f": "a photo of a {}.", "g": "s3://bucket/x", "h": "val/acc", "i": "",
    }  # fmt: skip
    assert remove_local_paths(given) == given | {"a": ["PATH", "x/y", ["PATH"] * 3], "b": "PATH", "c": "PATH"}


def test_without_places_changes_no_tags() -> None:
    for tag in ("random", "laion2b_s34b_b79k", None):
        config = {"base_model": {"pretrained": tag}, "metadata": {"arguments": {"pretrained": tag}}}
        assert without_local_paths(config) == config
    config = {"base_model": {"pretrained": "C:\\Users\\ann\\w.pt"}}
    assert without_local_paths(config) == {"base_model": {"pretrained": "w.pt"}}
    assert config["base_model"]["pretrained"].startswith("C:")  # the original stays


def test_names_of_base_models_on_the_hub() -> None:
    def found(library: str, name: str, pretrained: str) -> str | None:
        return hub_id({"library": library, "name": name, "pretrained": pretrained})

    assert found("open_clip", "ViT-B-32", "laion2b_s34b_b79k") == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert found("timm", "vit_base_patch14_dinov2.lvd142m", "lvd142m") == "timm/vit_base_patch14_dinov2.lvd142m"
    assert found("transformers", "gpt2", "gpt2") == "gpt2"
    for base in (
        ("open_clip", "tiny", "emoji-fashion"),
        ("timm", "vit_tiny_patch16_224", "random"),
        ("transformers", "gpt2", "random"),
    ):
        assert found(*base) is None
    assert found("timm", "vit_tiny_patch16_224", "/x/w.pth") is None and found("timm", "no_such_vit", "x") is None
    assert hub_id({}) is None
