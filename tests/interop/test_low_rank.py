"""Updates as LoRA adapters: exact where the rank suffices, otherwise with the error that is reported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from randlora_pl.adapters import LoRA, delta_weights, merge, read_adapter
from randlora_pl.adapters.methods import lora
from randlora_pl.interop import base_model
from randlora_pl.interop.base_model import layer_updates, load_base, updates, weighted_sum
from randlora_pl.interop.low_rank import Converted, label, write_lora
from randlora_pl.tasks import load_task
from randlora_pl.utils.errors import UserError
from tests.interop.adapters import MORE, saved
from tests.support.products import covering, marked
from tests.tasks.small import CLASSES, images


def converted(path: Path, output: Path, **wish: Any) -> Converted:
    file = read_adapter(path)
    base = load_base(file)
    return write_lora(output, base, updates(base, file), [file], file, **wish)


def logits_of(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_task(path).class_logits(images(3))


@pytest.mark.parametrize(
    ("kind", "method"),
    marked(
        [*(("text head", method) for method in MORE if method not in ("full", "bitfit")), ("linear head", "randlora")],
        lambda row: row == ("text head", "randlora"),
    ),
)
def test_full_rank_changes_nothing(kind: str, method: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", kind, method)
    made = converted(tmp_path / "a", tmp_path / "lora", error=0.0)
    assert made.error < 1e-6 and made.relative < 1e-5
    torch.testing.assert_close(logits_of(tmp_path / "lora"), logits_of(tmp_path / "a"), rtol=1e-4, atol=1e-3)
    one, two = (layer_updates(read_adapter(tmp_path / name)) for name in ("a", "lora"))
    assert one.keys() == two.keys()
    for layer, delta in one.items():
        torch.testing.assert_close(two[layer], delta, rtol=1e-5, atol=1e-6)
    assert isinstance(read_adapter(tmp_path / "lora").adapter, LoRA)


@pytest.mark.parametrize(
    ("output", "wish"), covering(["lora", "lora.safetensors"], [{"rank": 5}, {"error": 0.3}], strength=1)
)
def test_rank_and_error_of_each_layer(output: str, wish: dict[str, Any], tmp_path: Path) -> None:
    """Reported errors are the tails of the singular values, and those between the updates of the two files."""
    saved(tmp_path / "a")
    one = layer_updates(read_adapter(tmp_path / "a"))
    made = converted(tmp_path / "a", tmp_path / output, **wish)
    two = layer_updates(read_adapter(tmp_path / output))
    assert [row.layer for row in made.layers] == list(one)
    for row in made.layers:
        delta = one[row.layer].double()
        values = np.linalg.svd(delta.numpy(), compute_uv=False)
        tails = [float(np.sqrt(sum(values[k:] ** 2) / sum(values**2))) for k in range(len(values) + 1)]
        smallest = next(k for k, tail in enumerate(tails) if tail <= wish.get("error", 0))
        assert row.rank == wish.get("rank", smallest)
        assert row.error == pytest.approx(tails[row.rank], rel=1e-6)
        assert float((two[row.layer] - delta).norm() / delta.norm()) == pytest.approx(row.error, abs=1e-6)
        assert tuple(delta.shape) == row.shape and float(delta.norm()) == pytest.approx(row.norm)
    gap = sum(float((two[layer] - delta).norm() ** 2) for layer, delta in one.items())
    whole = sum(float(delta.norm() ** 2) for delta in one.values())
    assert made.error == pytest.approx((gap / whole) ** 0.5, rel=1e-4)
    assert made.parameters == sum(row.rank * sum(row.shape) for row in made.layers)
    assert made.parameters == sum(tensor.numel() for tensor in read_adapter(tmp_path / output).tensors.values())
    path = tmp_path / output
    files = [path] if path.is_file() else [path / name for name in ("adapter.safetensors", "adapter_config.json")]
    assert made.size == sum(file.stat().st_size for file in files)


def test_a_rank_above_the_smaller_side_is_that_side(tmp_path: Path) -> None:
    saved(tmp_path / "a", "vision-language", targets=["fc1"])
    made = converted(tmp_path / "a", tmp_path / "lora", rank=10_000)
    assert {row.rank for row in made.layers} == {192, 128}  # of the image and the text tower
    assert made.error < 1e-6


def test_what_goes_with_it(tmp_path: Path) -> None:
    saved(tmp_path / "a", "vision-language", "split", caption="{}!", targets=["visual:mlp", "q", "v"])
    converted(tmp_path / "a", tmp_path / "lora", rank=2)
    one, two = (load_task(tmp_path / name) for name in ("a", "lora"))
    assert type(one) is type(two)
    assert two.classnames == CLASSES and two.constructor() == one.constructor()
    assert read_adapter(tmp_path / "lora").config["base_model"] == read_adapter(tmp_path / "a").config["base_model"]
    assert read_adapter(tmp_path / "lora").metadata["training"] == {}  # its figures belong to the other one


@pytest.mark.parametrize(
    "others",
    [["lora", "dora"], *(pytest.param(names, marks=pytest.mark.full) for names in (["split", "vera"], ["split"]))],
)
def test_sums_of_other_methods_ranks_and_seeds(others: list[str], tmp_path: Path) -> None:
    """The packed and the split q/k/v weight, and layers of only one of them, against a sum by hand."""
    saved(tmp_path / "0", method="randlora" if len(others) > 1 else "split", targets=["qkv", "fc1"])
    for number, method in enumerate(others, 1):
        saved(tmp_path / str(number), method=method, targets=["qkv", "fc2"])
    files = [read_adapter(tmp_path / str(number)) for number in range(len(others) + 1)]
    weights = [0.5, -1.0, 2.0][: len(files)]
    base = load_base(files[0])
    total = weighted_sum([updates(base, file) for file in files], weights)
    write_lora(tmp_path / "sum", base, total, files, files[0], error=0.0)
    restored = load_task(tmp_path / "sum")
    merge(restored.model)
    state = restored.model.state_dict()
    tuned = []
    for number in range(len(files)):
        task = load_task(tmp_path / str(number))
        merge(task.model)
        tuned.append(task.model.state_dict())
    for name, plain in base.part.state_dict().items():
        by_hand = plain.double()
        for each, weight in zip(tuned, weights, strict=True):
            by_hand = by_hand + weight * (each[name].double() - plain.double())
        torch.testing.assert_close(state[name].double(), by_hand, rtol=1e-5, atol=1e-5)
    split = any(layer.endswith(".attn.q") for layer in read_adapter(tmp_path / "sum").layers)
    assert split == (others == ["split"])


def test_head_of_another_adapter(tmp_path: Path) -> None:
    saved(tmp_path / "a", "linear head", "lora")
    saved(tmp_path / "b", "text head", "lora")
    files = [read_adapter(tmp_path / name) for name in "ab"]
    base = load_base(files[0])
    total = weighted_sum([updates(base, file) for file in files], [1, 1])
    for first in files:
        write_lora(tmp_path / "sum", base, total, files, first, rank=4)
        found = load_task(tmp_path / "sum")
        assert type(found).__name__ == first.metadata["task"]
        assert torch.equal(read_adapter(tmp_path / "sum").extra["head"], first.extra["head"])


def test_layers_whose_names_end_alike_keep_their_ranks() -> None:
    """A pattern for ``fc`` must not fit ``deep.fc``."""
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(6, 6))
    model.add_module("deep", nn.Sequential())
    model.get_submodule("deep").add_module("fc", nn.Linear(6, 6))
    from randlora_pl.adapters import inject
    from randlora_pl.adapters.derived import truncate
    from randlora_pl.adapters.sites import find_sites

    low = {site: truncate(torch.randn(6, 6), rank=rank) for site, rank in zip(find_sites(model), (2, 5), strict=True)}
    ranks = {site.shape.layer: factors.rank for site, factors in low.items()}
    report = inject(model, lora.with_ranks(ranks, {}), ["^fc", "^deep.fc"])
    assert {row.layer: row.trainable for row in report.rows} == {"fc": 2 * 12, "deep.fc": 5 * 12}
    assert all(layer.delta.scaling == 1 for layer in (model.fc, model.deep.fc))
    assert delta_weights(model).keys() == {"fc", "deep.fc"}


# What is refused


@pytest.mark.parametrize(("method", "named"), [("full", "bias"), ("bitfit", "bias")])
def test_tensors_without_a_place_are_named(method: str, named: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", method=method)
    with pytest.raises(UserError, match=rf"have no place in a LoRA adapter .*{named}.*merged"):
        converted(tmp_path / "a", tmp_path / "lora", rank=2)
    assert not (tmp_path / "lora").exists()


def test_towers_and_nothing_at_all(tmp_path: Path) -> None:
    saved(tmp_path / "a", "vision-language", "lora")
    saved(tmp_path / "b", "text head", "lora")
    files = [read_adapter(tmp_path / name) for name in "ab"]
    base = load_base(files[0])
    total = updates(base, files[0])
    with pytest.raises(UserError, match="--head"):
        write_lora(tmp_path / "lora", base, total, files, files[1], rank=2)
    from randlora_pl.adapters import LinearProbe

    saved(tmp_path / "c", "linear head", adapter=LinearProbe())
    with pytest.raises(UserError, match="changes"):
        converted(tmp_path / "c", tmp_path / "lora", rank=2)


def test_another_outcome_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    file = read_adapter(tmp_path / "a")
    base = load_base(file)
    total = updates(base, file)

    def convert(output: str, **wish: Any) -> None:
        write_lora(tmp_path / output, base, total, [file], file, **wish)

    monkeypatch.setattr(base_model, "TOLERANCE", -1.0)
    for output in ("lora", "lora.safetensors"):
        with pytest.raises(UserError, match="nothing"):
            convert(output, rank=2)
    monkeypatch.undo()
    with pytest.raises(UserError, match="either --rank"):
        convert("lora")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError):
        convert("file/lora", rank=2)
    (tmp_path / "file").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_label_says_no_place(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    saved(tmp_path / "two", method="lora")
    labels = [label(read_adapter(tmp_path / name)) for name in ("one", "two")]
    assert [text.split(" (SHA-256 ")[0] for text in labels] == ["one", "two"] and labels[0][4:] != labels[1][4:]
    assert str(tmp_path) not in "".join(labels)
