"""Adapter folders: what is written comes back, and whatever does not fit is named before a model is touched."""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from randlora_pl.adapters import (
    BitFit,
    DoRA,
    LoRA,
    RandLoRA,
    VeRA,
    disabled,
    inject,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
    save_load,
    trainable_parameters,
    unmerge,
)
from randlora_pl.adapters.operations import use_bases
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.save_load import DTYPES, copy_adapter, save_tensors
from randlora_pl.adapters.trained import update_buffers
from randlora_pl.models import meta_clip
from randlora_pl.utils.errors import UserError
from tests.adapters import zoo
from tests.adapters.cases import (
    METHODS,
    One,
    assert_close,
    base_and_adapted,
    bases_of,
    edit,
    edit_tensors,
    inputs,
    randomise,
    trained,
)
from tests.support.products import covered, in_one_item

Config = dict[str, Any]


def base() -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(5)
    return zoo.small_vit()


def adapted(adapter: Any = None) -> nn.Module:
    model = base()
    inject(model, RandLoRA(rank=4, seed=3) if adapter is None else adapter)
    randomise(model)
    return model


def adapted_from(folder: Path) -> nn.Module:
    model = base()
    load_adapter(model, folder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter folder of `adapted`."""
    return save_adapter(adapted(), tmp_path / "adapter", base_model={"library": "timm", "name": "small"})


def assert_refused(folder: Path, message: str, model: nn.Module | None = None) -> None:
    """Loading says why not, in one or two lines, and leaves the model as it was."""
    model = base() if model is None else model
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(model, folder)
    assert len(str(caught.value)) < 900
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Round trips


@covered(
    ("kind", "method"), ["linear-in>out", "mha-qkvo", "mha-split", "mha-only-v", "timm-split"], METHODS, strength=1
)
def test_a_saved_adapter_comes_back(method: str, kind: str, tmp_path: Path) -> None:
    fresh, model = trained(method, kind)
    report: Any = model.adapter_report
    x = inputs(model)
    folder = save_adapter(model, tmp_path / "adapter")
    file = load_adapter(fresh, folder)
    assert torch.equal(fresh(x), model(x))
    assert file.adapter.describe() == report.adapter.describe()
    assert file.targets == report.targets
    assert trainable_parameters(fresh).keys() == trainable_parameters(model).keys()
    assert file.tensors.keys() == {*trainable_parameters(model), *update_buffers(model)}
    assert fresh.adapter_report.fingerprint == report.fingerprint  # type: ignore[union-attr]
    # Only what trains is stored.
    tensors = load_file(folder / save_load.TENSORS)
    kept = {name: tensors.pop(name) for name in update_buffers(model)}
    assert {tensor.dtype for tensor in kept.values()} <= {torch.int32, torch.bool, torch.float32}
    assert sum(tensor.numel() for tensor in tensors.values()) == report.trainable
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    # Saving again writes the same bytes.
    again = save_adapter(fresh, tmp_path / "again")
    for name in (save_load.TENSORS, save_load.CONFIG):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_what_a_folder_says(folder: Path) -> None:
    config = json.loads((folder / save_load.CONFIG).read_text())
    bases = bases_of(adapted())[0]
    assert sorted(path.name for path in folder.iterdir()) == sorted([save_load.CONFIG, save_load.TENSORS])
    assert config["format_version"] == 4
    assert config["method"] == "RandLoRA"
    assert config["options"] == RandLoRA(rank=4, seed=3).options()
    assert (config["generator"], config["seed"]) == ("philox4x32-10/1", 3)
    assert config["fingerprint"] == bases.fingerprint
    assert config["targets"] is None
    assert config["layers"]["blocks.1.mlp.fc2"] == [24, 96]
    assert len(config["layers"]) == 6
    assert (config["base_model"]["library"], config["base_model"]["name"]) == ("timm", "small")
    assert len(config["base_model"]["weights_sha256_sampled"]) == 64
    tensors = load_file(folder / save_load.TENSORS)
    assert tensors.keys() == trainable_parameters(adapted()).keys()
    assert sum(tensor.numel() for tensor in tensors.values()) == 6 * 6 * (4 + 24)  # no bases, no frozen weights


def test_a_head_and_metadata_travel_along(tmp_path: Path) -> None:
    head, metadata = torch.randn(3, 24), {"classnames": ["a", "b"]}
    for name in ("deep/er/adapter", "adapter.safetensors"):
        saved = save_adapter(adapted(), tmp_path / name, extra={"head.weight": head}, metadata=metadata)
        file = read_adapter(saved)
        assert torch.equal(file.extra["head.weight"], head)
        assert "head.weight" not in file.tensors
        assert file.config["metadata"] == file.metadata == metadata
        assert load_adapter(base(), saved).extra.keys() == {"head.weight"}


def test_merged_models_save_and_load(tmp_path: Path) -> None:
    model = adapted()
    x = zoo.images()
    expected = model(x)
    merge(model)
    saved = save_adapter(model, tmp_path / "adapter")
    fresh = base()
    load_adapter(fresh, saved)
    assert torch.equal(fresh(x), expected)
    # Loading into a merged model changes what is merged.
    other = adapted()
    randomise(other)
    merge(other)
    assert (other(x) - expected).abs().max() > 1e-2
    load_adapter(other, saved)
    assert not other(x).requires_grad  # still merged
    assert_close(other(x), expected)
    with disabled(other):
        assert_close(other(x), base()(x))
    unmerge(other)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_base_may_have_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = base().bfloat16().float()  # values that both can hold
    inject(model, RandLoRA(rank=4))
    randomise(model)
    saved = save_adapter(model, tmp_path / "adapter")
    other = base().bfloat16().to(dtype)
    load_adapter(other, saved)
    x = zoo.images()
    assert_close(other(x.to(dtype)).float(), model(x), 0.05 if dtype == torch.bfloat16 else 1e-5)


def test_a_file_from_before_an_option_loads_with_its_default(folder: Path) -> None:
    edit(folder, lambda config: config["options"].pop("memory"))
    model = base()
    assert load_adapter(model, folder).adapter.options() == RandLoRA(rank=4, seed=3).options()
    assert torch.equal(model(x := zoo.images()), adapted_from(folder)(x))


@in_one_item("a_basis", ["same", "signs"])
@in_one_item("basis", ["hadamard", "ternary"])
def test_bases_that_are_not_stored_as_numbers_are_checked_too(basis: Any, a_basis: Any, tmp_path: Path) -> None:
    options = {"basis": basis, "a_basis": a_basis}
    model = adapted(RandLoRA(rank=5, seed=3, memory="low", **options))
    saved = save_adapter(model, tmp_path / "adapter")
    config = json.loads((saved / save_load.CONFIG).read_text())
    assert config["options"]["basis"] == options["basis"]
    assert config["fingerprint"] == bases_of(model)[0].fingerprint
    assert torch.equal(adapted_from(saved)(x := zoo.images()), model(x))
    edit(saved, lambda config: config["options"].update(seed=4))
    assert_refused(saved, "its random bases are .* seed 4 gives .* here")
    other = {"same": "signs", "signs": "uniform"}[a_basis]
    edit(saved, lambda config: config["options"].update(seed=3, a_basis=other))
    assert_refused(saved, "its random bases are .* seed 3 gives .* here")


# Writing


def test_models_without_an_adapter_empty_folders_and_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="the model has no adapter"):
        save_adapter(base(), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert save_adapter(adapted(), "empty") == tmp_path / "empty"
    assert read_adapter("empty").adapter.method() == "RandLoRA"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_saved_nor_read(bad: float, tmp_path: Path) -> None:
    _, model = base_and_adapted("lora", "linear-square")
    folder = save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        model.fc.delta.A[0, 0] = bad  # type: ignore[union-attr,operator,index]
    with pytest.raises(UserError, match=r"not written, because fc\.delta\.A is not finite"):
        save_adapter(model, folder)
    assert read_adapter(folder).tensors["fc.delta.A"].isfinite().all()  # the older one stays
    contents = save_load._read_contents(folder)
    contents.tensors["fc.delta.A"][0, 0] = bad
    save_load._write_contents(folder, contents)
    with pytest.raises(UserError, match=r"fc\.delta\.A is not finite"):
        read_adapter(folder)
    contents.tensors["fc.delta.A"][0, 0] = 1e5
    save_load._write_contents(folder, contents)
    with pytest.raises(UserError, match=r"too large for torch\.float16"):
        copy_adapter(folder, tmp_path / "half", torch.float16)


# Folders that cannot be read


@pytest.mark.parametrize("missing", [save_load.CONFIG, save_load.TENSORS, None])
def test_a_folder_without_an_adapter(folder: Path, missing: str | None) -> None:
    (folder / missing).unlink() if missing else shutil.rmtree(folder)
    assert_refused(folder, r"adapter is not an adapter folder: it needs adapter_config.json and adapter.safetensors")


@in_one_item("share", [0.0, 0.01, 0.3, 0.99])
def test_truncated_tensors(folder: Path, tmp_path: Path, share: float) -> None:
    folder = shutil.copytree(folder, tmp_path / "adapter")
    path = folder / save_load.TENSORS
    os.truncate(path, int(path.stat().st_size * share))
    assert_refused(folder, r"adapter.safetensors cannot be read .*truncated or damaged. Copy it again")


@in_one_item(
    "text", ["", "{", "[]", "null", '{"format_version": 4}', '{"format_version": 4, "method": "LoRA"}', "\xff\x00"]
)
def test_a_config_that_cannot_be_read(folder: Path, text: str) -> None:  # written anew by each case
    (folder / save_load.CONFIG).write_text(text, encoding="latin-1")
    assert_refused(folder, r"adapter_config.json cannot be read .*Save it again|was changed: \w+ is missing. Copy it")


CONFIGS: dict[str, tuple[Callable[[Config], Any], str]] = {
    "a later format": (lambda c: c.update(format_version=5), "has format 5, this version reads format 4. Install"),
    "an earlier format": (lambda c: c.update(format_version=3, sha256="f" * 64), "has format 3, .* reads format 4"),
    "no number of a format": (lambda c: c.update(format_version="new"), "format_version is 'new'. Copy it again"),
    "an unknown method": (lambda c: c.update(method="QLoRA"), "method 'QLoRA' is unknown..*RandLoRA"),
    "an unknown option": (lambda c: c["options"].update(depth=3), "RandLoRA does not accept these options .*'depth'"),
    "an impossible option": (
        lambda c: c["options"].update(basis="round"),
        "basis is 'round'; it was written by another version",
    ),
    "options that are none": (lambda c: c.update(options=7), "options is 7. Copy it again"),
    "no inner method": (lambda c: c.update(method="DoRA", options={"inner": {}}), "{} describes nothing that this"),
    "another seed": (lambda c: c["options"].update(seed=4), "its random bases are .* seed 4 gives .* here"),
    "another fingerprint": (lambda c: c.update(fingerprint="0" * 64), "its random bases are 000000000000 by philox"),
    "another generator": (lambda c: c.update(generator="mt19937"), "by mt19937, seed 3 gives .* by philox4x32"),
    "another base": (
        lambda c: c["base_model"].update(weights_sha256_sampled="f" * 64),
        r"it was trained on different weights \(timm small ffffffffffff, model: \w{12}\)",
    ),
    "other sizes": (
        lambda c: c["layers"].update({"blocks.1.mlp.fc1": [48, 24]}),
        r"layer blocks.1.mlp.fc1 is \[48, 24\] in the file and \[96, 24\] here",
    ),
    "other targets": (lambda c: c.update(targets=["blocks.9"]), "target 'blocks.9' matches no layer"),
    "another rank": (lambda c: c["options"].update(rank=6), "its random bases|has shape"),
    "many layers": (
        lambda c: c["layers"].update({f"blocks.{n}.mlp.fc1": [9, 9] for n in range(20, 30)}),
        "layer blocks.25.mlp.fc1 .*; and 4 more",
    ),
}


@in_one_item("case", CONFIGS)
def test_a_config_that_does_not_fit(folder: Path, tmp_path: Path, case: str) -> None:
    change, message = CONFIGS[case]
    folder = shutil.copytree(folder, tmp_path / "adapter")
    edit(folder, change)
    assert_refused(folder, message)


LAMBDAS = "blocks.0.attn.qkv.delta.lambdas"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(LAMBDAS), rf"1 missing tensors \({LAMBDAS}\)"),
    "unexpected": (lambda t: t.update(more=torch.zeros(1)), r"1 unexpected tensors \(more\)"),
    "another shape": (
        lambda t: t.update({LAMBDAS: torch.zeros(6, 5)}),
        rf"{LAMBDAS} has shape \(6, 5\) in the file and \(6, 4\) here",
    ),
    "eight bits": (
        lambda t: t.update({LAMBDAS: t[LAMBDAS].to(torch.float8_e5m2)}),
        f"{LAMBDAS} is torch.float8_e5m2. Copy it again",
    ),
    "several": (lambda t: [t.pop(name) for name in list(t)[:5]], r"5 missing tensors \(.*, .*, .* \.\.\.\)"),
}


@in_one_item(("case", "already"), itertools.product(TENSORS, (False, True)))
def test_tensors_that_do_not_fit(folder: Path, tmp_path: Path, case: str, already: bool) -> None:
    change, message = TENSORS[case]
    folder = shutil.copytree(folder, tmp_path / "adapter")
    edit_tensors(folder, change)
    assert_refused(folder, message, adapted() if already else None)


@pytest.mark.parametrize("method", ["bitfit", "full"])
@pytest.mark.parametrize("case", ["missing", "unexpected"])
def test_tensors_of_the_model_itself_that_do_not_fit(method: str, case: str, tmp_path: Path) -> None:
    saved = save_adapter(adapted(METHODS[method](1, "packed")), tmp_path / "adapter")
    change = {"missing": lambda t: t.pop("norm.bias"), "unexpected": lambda t: t.update(more=torch.zeros(1))}[case]
    edit_tensors(saved, change)
    assert_refused(saved, f"1 {case} tensors")


# Models that do not fit


def test_another_base_model_and_every_problem_at_once(folder: Path) -> None:
    assert_refused(folder, "it was trained on different weights", zoo.small_vit())
    message = "it was trained on different weights .*; layer blocks.0.attn.qkv is .* in the file and None here"
    assert_refused(folder, message, One(24, 24))
    edit(folder, lambda config: config.update(fingerprint="0" * 64))
    edit(folder, lambda config: config["base_model"].update(weights_sha256_sampled="f" * 64))
    edit_tensors(folder, lambda tensors: tensors.pop(LAMBDAS))
    assert_refused(folder, "different weights.*; its random bases.*; 1 missing tensors")


@in_one_item("adapter", [RandLoRA(rank=4, seed=4), RandLoRA(rank=4), LoRA(rank=4), BitFit()])
def test_another_adapter_in_place(folder: Path, adapter: Any) -> None:
    message = r"contains .*'RandLoRA'.*, the model has .* Call merge_and_unload\(model\) first"
    assert_refused(folder, message, adapted(adapter))


def test_the_same_adapter_in_place_on_other_weights_targets_or_bases(folder: Path) -> None:
    models = zoo.small_vit(), base()
    for model, targets, message in zip(
        models, (None, ["mlp"]), ("it was trained on different weights", "unexpected tensors"), strict=True
    ):
        inject(model, RandLoRA(rank=4, seed=3), targets)
        assert_refused(folder, message, model)
    edit(folder, lambda config: config.update(fingerprint="0" * 64))
    assert_refused(folder, "its random bases are 000000000000", adapted())


# One file, other dtypes, stored bases


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors"])
def test_half_precision_files(dtype: str, name: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "half" / name
    size = copy_adapter(folder, path, DTYPES[dtype])
    assert size == sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    whole, half = read_adapter(folder), read_adapter(path)
    for key, tensor in whole.tensors.items():
        assert half.tensors[key].dtype == DTYPES[dtype]
        assert torch.equal(half.tensors[key], tensor.to(DTYPES[dtype]))
    model = adapted_from(path)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    x = torch.randn(2, 3, 16, 16)
    assert_close(model(x), adapted()(x), 0.1)
    again = read_adapter(save_adapter(adapted(), tmp_path / "saved", dtype=DTYPES[dtype]))
    assert all(torch.equal(again.tensors[key], half.tensors[key]) for key in half.tensors)


def test_bytes_of_the_papers_vit_b32(tmp_path: Path) -> None:
    """RandLoRA-6 of both towers: 5,170,320 parameters, at most 1.02 times their bytes, half of that in bfloat16."""
    model = meta_clip("ViT-B-32")
    report = inject(model, RandLoRA(rank=6))
    model.to_empty(device="cpu")
    for parameter in trainable_parameters(model).values():
        parameter.data.zero_()
    report.fingerprint = "0" * 64
    folder = save_adapter(model, tmp_path / "adapter", metadata={"classnames": [f"class {n}" for n in range(100)]})
    whole = sum(file.stat().st_size for file in folder.iterdir())
    assert report.trainable == 5_170_320
    assert 4 * 5_170_320 < whole <= 1.02 * 4 * 5_170_320
    half = save_adapter(model, tmp_path / "half.safetensors", dtype=torch.bfloat16)
    assert 2 * 5_170_320 < half.stat().st_size <= 1.02 * 2 * 5_170_320


def with_stored_bases(adapter: Any = None) -> nn.Module:
    model = adapted(adapter)
    drawn = bases_of(model)[0]
    (_, rank, small), (large, count, _) = drawn.A.shape, drawn.B.shape
    a, b = torch.randn(1, rank, small).bfloat16().float(), torch.randn(count, large, rank)
    use_bases(model, Bases(0, a, b, stored=True))
    return model


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors"])
@pytest.mark.parametrize("adapter", [RandLoRA(rank=4, seed=3), VeRA(rank=5, seed=3), DoRA(RandLoRA(rank=4, seed=3))])
def test_bases_that_no_seed_gives_come_along(adapter: Any, name: str, tmp_path: Path) -> None:
    model = with_stored_bases(adapter)
    path = save_adapter(model, tmp_path / name)
    file = read_adapter(path)
    assert file.bases is not None and file.config["generator"] == "stored"
    x = torch.randn(2, 3, 16, 16)
    fresh = adapted_from(path)
    assert torch.equal(fresh(x), model(x))
    assert len({id(found) for found in bases_of(fresh)}) == 1
    same = adapted(adapter)  # with the drawn bases, in place
    load_adapter(same, path)
    assert torch.equal(same(x), model(x))
    again = save_adapter(fresh, tmp_path / "again.safetensors")
    assert read_adapter(again).config == file.config
    assert (
        len(save_load._read_contents(path).bases) == 2
        and save_load._read_contents(path).bases["A"].dtype == torch.bfloat16
    )


def test_stored_bases_that_are_missing_damaged_or_too_small(tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = save_adapter(with_stored_bases(), tmp_path / "adapter")
    bases = load_file(path / save_load.BASES)
    changed = {"A": bases["A"].clone(), "B": bases["B"]}
    changed["A"][0, 0, 0] += 1
    save_file(changed, path / save_load.BASES)
    assert_refused(path, r"is damaged or was changed after it was saved \(bases.A\)")
    edit(path)
    assert_refused(path, "its stored bases are .*, it was trained with .*Copy it again")
    (path / save_load.BASES).unlink()
    assert_refused(path, "needs the bases A and B in bases.safetensors, which no seed generates")
    narrow = Bases(0, bases["A"].float()[..., 1:].contiguous(), bases["B"], stored=True)
    save_file({"A": narrow.A, "B": bases["B"]}, path / save_load.BASES)
    edit(path, lambda config: config.update(fingerprint=narrow.fingerprint))
    assert_refused(path, r"its bases A \(1, 4, 23\) .* are too small")
    assert_refused(path, r"its bases A \(1, 4, 23\) .* are too small", adapted())


def test_the_error_of_a_file_that_cannot_be_written_is_that_of_the_system(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "adapter.safetensors"
    with pytest.raises(FileNotFoundError) as told:
        save_tensors({"a": torch.zeros(1)}, file)
    assert told.value.filename == str(file)
