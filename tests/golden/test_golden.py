"""Results that do not depend on the machine are as committed: resolved configs, cells, counts, adapters as read.

After a change that is meant, rewrite them with `python -m tests.golden.test_golden`. Tensors: `scripts/golden.py`.
"""

import copy
import hashlib
import importlib
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from randlora_pl import adapters
from tests.support.products import in_one_item, marked

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
MODELS = {
    "vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224", depth=2),
    "ViT-B-32": lambda: open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")),
    "qwen2": lambda: AutoModelForCausalLM.from_config(Qwen2Config(num_hidden_layers=2)),
}
INNER = {"DoRA": "DoRA(inner=LoRA())", "Together": "Together(parts=[LoRA(), RandLoRA()])"}
FEW = ("quickstart", "adapters/dora", "prompts/maple_dept", "dinov2_vitb14", "commonsense_qwen2", "glue_roberta_base")
"""A config of each task, which run by default."""

sys.path.append(str(ROOT / "scripts"))
golden = importlib.import_module("golden")


def committed(name: str) -> dict[str, Any]:
    """Read a file of this folder."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def checksum(text: str) -> str:
    """Return the first digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cells(name: str) -> str:
    """Return a checksum of the cells of a sweep with their labels, without state, time and memory on this machine."""
    header, *lines = golden.cli("sweep", name, "--dry-run").split("\n\n")[0].splitlines()
    return checksum("\n".join(line[: header.index("state")].rstrip() for line in lines))


def counts(model: str) -> dict[str, int]:
    """Count the trained parameters of each method with its defaults."""
    with torch.device("meta"):
        plain: nn.Module = MODELS[model]()
    rows = {name: INNER.get(name, f"{name}()") for name in golden.method_names()}
    return {
        name: adapters.inject(copy.deepcopy(plain), eval(row, golden.EXPORTS)).trainable for name, row in rows.items()
    }


def read_adapters() -> dict[str, str]:
    """Return a checksum of all tensors of each committed adapter, as it is read."""
    files = [path for path in ROOT.glob("tests/**/saved/**/*.safetensors") if path.name != "bases.safetensors"]
    found = {}
    for place in sorted(path.parent if path.name == "adapter.safetensors" else path for path in files):
        file = adapters.read_adapter(place)
        digest = hashlib.sha256()
        for name, tensor in sorted({**file.tensors, **file.extra}.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found[place.as_posix().split("/saved/")[1]] = digest.hexdigest()[:16]
    return found


def pack(trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Group configs by task, with the values that all configs of a task share only once."""
    packed: dict[str, dict[str, Any]] = {}
    for task in dict.fromkeys(tree["model"] for tree in trees.values()):
        group = {name: tree for name, tree in trees.items() if tree["model"] == task}
        first, *others = group.values()
        every = {key: first[key] for key in first if all(tree.get(key, "") == first[key] for tree in others)}
        own = {name: {key: tree[key] for key in tree if key not in every} for name, tree in group.items()}
        packed[task] = {"every": every, **own}
    return packed


CONFIGS = {name: trees["every"] | own for trees in committed("configs").values() for name, own in trees.items()}
del CONFIGS["every"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@in_one_item("name", FEW)
def test_a_config_of_each_task_resolves_as_before(name: str) -> None:
    assert golden.resolved(name) == CONFIGS[name]


@pytest.mark.full
@in_one_item("name", sorted(CONFIGS.keys() - set(FEW)))
def test_every_config_resolves_as_before(name: str) -> None:
    assert golden.resolved(name) == CONFIGS[name]


def test_configs_sweeps_and_adapters_are_as_committed() -> None:
    assert set(golden.config_names()) == CONFIGS.keys()
    assert {f"sweeps/{file.stem}" for file in ROOT.glob("configs/sweeps/*.yaml")} == committed("sweeps").keys()
    assert cells("sweeps/table2") == committed("sweeps")["sweeps/table2"]
    assert read_adapters() == committed("adapters")


@pytest.mark.full
@in_one_item("name", sorted(committed("sweeps")))
def test_every_sweep_has_the_same_cells(name: str) -> None:
    assert cells(name) == committed("sweeps")[name]


@pytest.mark.parametrize(("model",), marked(zip(MODELS), lambda row: row[0] == "vit_tiny_patch16_224"))
def test_methods_train_as_many_parameters(model: str) -> None:
    assert counts(model) == committed("counts")[model]


def test_a_difference_of_one_bit_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    old = {"same": torch.zeros(3), "sign": torch.zeros(3), "shape": torch.ones(1), "old": 1.0, "value": 1}
    new = old | {"sign": torch.tensor([0.0, -0.0, 0.0]), "shape": torch.ones(2), "value": 1.0, "new": None}
    assert golden.compare("all", old, old) == 0
    capsys.readouterr()
    assert golden.compare("all", old, {name: new[name] for name in new if name != "old"}) == 5
    assert capsys.readouterr().out.splitlines() == [
        "sign: the largest difference is 0",
        "shape: torch.float32 [1] became torch.float32 [2]",
        "old: 1.0 became '(absent)'",
        "value: 1 became 1.0",
        "new: '(absent)' became None",
        "all: 6 results, 5 differences",
    ]


@pytest.mark.parametrize(("case", "code"), [("", 0), ("AdaLoRA: loss", 1), ("AdaLoRA, resumed: loss", 1)])
def test_the_exit_code_is_1_if_anything_differs(case: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"AdaLoRA: loss": 1.0, "AdaLoRA, resumed: loss": 1.0, "TextHeadTask: loss": 2.0}
    monkeypatch.setattr("sys.argv", ["golden.py", "old", "new"])
    monkeypatch.setattr(golden, "probe", lambda place, group: same | ({case: 3.0} if case else {}))
    assert golden.main() == code, "a resumed run that differs from a whole one counts, even if both checkouts agree"


def rewrite() -> None:
    """Rewrite the files of this folder."""
    values = {
        "configs": pack({name: golden.resolved(name) for name in golden.config_names()}),
        "sweeps": {f"sweeps/{file.stem}": cells(f"sweeps/{file.stem}") for file in ROOT.glob("configs/sweeps/*.yaml")},
        "counts": {model: counts(model) for model in MODELS},
        "adapters": read_adapters(),
    }
    for name, value in values.items():
        text = yaml.safe_dump(value, sort_keys=name != "configs", width=1000)
        (FOLDER / f"{name}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
