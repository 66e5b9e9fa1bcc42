"""Merged weights in bare open_clip and timm: same tensors as by hand, same features, same class logits."""

import json
import os
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from randlora_pl.adapters import LinearProbe, LoRA, RandLoRA, inject, merge, read_adapter, save_adapter
from randlora_pl.data.sources import decode
from randlora_pl.data.transforms import eval_batch
from randlora_pl.interop import merge as module
from randlora_pl.interop.base_model import TOLERANCE, difference, load_base, updates, weighted_sum
from randlora_pl.interop.merge import LibraryModel, added, check_output, merged, write
from randlora_pl.models import load_vit
from randlora_pl.models.catalog import check_config
from randlora_pl.tasks import Objective, load_task
from randlora_pl.utils import weights_files
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.weights_files import base_arguments, register_weights
from tests.adapters.cases import randomise
from tests.interop.adapters import MORE, rounded, saved
from tests.models.folders.make import clip_folder, vit_folder
from tests.support.cli import Run
from tests.support.products import marked
from tests.tasks.small import CLASSES, NAMING, TEMPLATES, built, images


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    """What tests register does not stay."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
            patch.setattr(open_clip.factory, name, copy(getattr(open_clip.factory, name)))
        yield


def made(path: Path, scale: float = 1.0, **options: Any) -> module.Merged:
    file = read_adapter(path)
    return merged(load_base(file), file, scale, **options)


def written(path: Path, output: Path, scale: float = 1.0, **options: Any) -> module.Written:
    return write(output, made(path, scale, **options))


def bare_tiny(output: Path) -> Any:
    """As the printed lines say; the name is the file's, unique to the test's folder."""
    open_clip.add_model_config(output.with_suffix(".json"))
    return open_clip.create_model(output.stem, pretrained=str(output)).eval()


@torch.no_grad()
def bare_logits(model: Any, output: Path, batch: Tensor) -> Tensor:
    head = load_file(output.with_suffix(".head.safetensors"))["head"]
    return F.normalize(model.encode_image(batch), dim=-1) @ head.T


@torch.no_grad()
def logits_of(task: Objective, size: int | None = None) -> Tensor:
    task.prepare_evaluation()
    return task.class_logits(images(3, task.image_spec.size))


LOGITS: list[tuple[str, str, dict[str, Any]]] = [
    *(("text head", method, {}) for method in MORE),
    *((kind, "full", {}) for kind in NAMING if kind != "text head"),
    ("vision-language", "randlora", {"logit_scale": "raw"}),
    ("vision-language", "randlora", {"eval_prompts": "ensemble"}),
    ("vision-language", "randlora", {"caption": "{}!"}),
]


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    marked(
        LOGITS,
        lambda row: row[1] in ("randlora", "full", "split", "oft") and row[2].keys() <= {"logit_scale"},
    ),
)
def test_bare_open_clip_gives_the_same_logits(kind: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    task = saved(tmp_path / "a", kind, method, **options)
    output = tmp_path / f"{kind.replace(' ', '-')}-{method}-{'-'.join(options)}.safetensors"
    result = written(tmp_path / "a", output)
    assert set(result.sizes) == {output, output.with_suffix(".json"), output.with_suffix(".head.safetensors")}
    assert all(file.stat().st_size == size for file, size in result.sizes.items())
    found = bare_logits(bare_tiny(output), output, images(3))
    torch.testing.assert_close(found, logits_of(task), rtol=1e-4, atol=1e-4)
    merge(task.model)
    state = load_file(output)
    for name, value in task.model.state_dict().items():
        if name in state:
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    ("method", "suffix"),
    marked(
        [("randlora", ".pt"), ("dora", ".safetensors"), ("full", ".pt"), ("bitfit", ".safetensors")],
        lambda row: row[0] == "randlora",
    ),
)
def test_scale_interpolates_every_tuned_tensor(method: str, suffix: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", "vision-language", method)
    base = load_base(read_adapter(tmp_path / "a")).model.state_dict()
    states = {}
    for scale in (0.0, 0.3, 1.0):
        output = tmp_path / f"s{int(10 * scale)}{suffix}"
        written(tmp_path / "a", output, scale)
        states[scale] = load_file(output) if suffix == ".safetensors" else torch.load(output, weights_only=True)
        assert states[scale].keys() == base.keys()
    changed = 0
    for name, plain in base.items():
        tuned = states[1.0][name]
        assert torch.equal(states[0.0][name], plain)
        by_hand = plain.double() + 0.3 * (tuned.double() - plain.double())
        torch.testing.assert_close(states[0.3][name].double(), by_hand, rtol=0, atol=1e-7)
        changed += not torch.equal(tuned, plain)
    assert changed == len(updates(load_base(read_adapter(tmp_path / "a")), read_adapter(tmp_path / "a")))


@pytest.mark.parametrize(
    ("name", "size"),
    marked(
        [
            *(("vit_small_patch14_dinov2.lvd142m", 28), ("test_vit", 48), ("test_vit2", 160), ("test_vit3", 160)),
            ("test_convnext", 160),
        ],
        lambda row: row[0] == "test_vit",
    ),
)
def test_lines_that_are_printed_load_it(name: str, size: int, tmp_path: Path) -> None:
    """CLS token at another image size than timm's, pooling by mean with a norm, by attention, a deep head."""
    adapter = RandLoRA(rank=8) if name == "test_vit" else LinearProbe()
    task = saved(tmp_path / "a", "linear head", adapter=adapter, name=name, pretrained="random", img_size=size)
    result = written(tmp_path / "a", tmp_path / "m.safetensors")
    assert list(result.sizes) == [tmp_path / "m.safetensors"]
    place: dict[str, Any] = {}
    exec("\n".join(result.load), place)
    with torch.no_grad():
        found = place["model"].eval()(images(3, size))
    torch.testing.assert_close(found, logits_of(task), rtol=1e-4, atol=1e-4)
    if name == "test_vit":
        written(tmp_path / "a", tmp_path / "features.pt", with_head=False)
        path = str(tmp_path / "features.pt")
        model = timm.create_model(name, num_classes=0, img_size=size, checkpoint_path=path).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images(3, size)), task.model(images(3, size)))


@pytest.mark.parametrize(("name", "said"), marked([("ViT-S-32-alt", False), ("tiny", True)], lambda row: row[1]))
def test_open_clip_is_told_of_images_that_are_not_as_usual(name: str, said: bool, tmp_path: Path) -> None:
    task = saved(tmp_path / "a", name=name)
    result = written(tmp_path / "a", tmp_path / f"told-{name}.safetensors", with_head=False)
    place: dict[str, Any] = {}
    exec("\n".join(result.load), place)
    told = place["model"].visual.preprocess_cfg
    assert ("force_preprocess_cfg" in "".join(result.load)) == said
    for key in ("mean", "std", "interpolation"):
        assert told[key] == getattr(task.image_spec, key)


@pytest.mark.parametrize(("kind", "name"), [("text head", "tiny"), ("linear head", "test_vit")])
def test_the_transform_that_is_printed_gives_our_pixels(kind: str, name: str, tmp_path: Path) -> None:
    """In every mode; without a transform of the library, a note says so, and open_clip gets no mode either."""
    task = saved(tmp_path / "a", kind, name=name)
    output, library = tmp_path / f"pixels-{name}.safetensors", "open_clip" if name == "tiny" else "timm"
    usual = ImageSpec(task.image_spec.size, (0.2, 0.4, 0.6), (0.5, 0.4, 0.3), "bilinear")
    shrunk = replace(usual, resize="squash", crop_pct=0.9)
    whole = replace(usual, resize="longest").filled_with_mean()
    colored = replace(whole, fill=(7, 7, 7))
    without = shrunk if library == "open_clip" else colored
    task.save(tmp_path / "a", {"frame": asdict(without)})
    assert f"{library} has no " in str(written(tmp_path / "a", output, with_head=False).notes)
    plain = LibraryModel.make(read_adapter(tmp_path / "a").config["base_model"])
    assert "resize_mode" not in str(replace(plain, image=without).lines(output))
    pixels = np.random.default_rng(0).integers(0, 256, (57, 101, 4), dtype=np.uint8)
    black = replace(usual, background="black")
    for frame in (usual, black, replace(usual, resize="squash"), whole, colored, shrunk):
        model = replace(plain, image=frame)
        assert bool(model.transform()) == (frame != without)
        if model.transform():
            place: dict[str, Any] = {}
            exec("\n".join([*model.lines(output), *model.transform()]), place)
            for channels in (3, 4):  # with 4 the picture is transparent
                Image.fromarray(picture := pixels[..., :channels]).save(file := tmp_path / "picture.png")
                decoded = torch.from_numpy(decode(file, background=frame.behind))
                found, ours = place["preprocess"](Image.fromarray(picture)), eval_batch([decoded], frame)[0]
                torch.testing.assert_close(found, ours, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_zero_shot_in_bare_open_clip(tmp_path: Path) -> None:
    """The library's own tokenizer, prompts and scale of the metadata: our logits, without our head."""
    task = saved(tmp_path / "a", name="ViT-S-32-alt")
    output = tmp_path / "clip.safetensors"
    result = written(tmp_path / "a", output)
    assert output.with_suffix(".json") not in result.sizes
    with safe_open(output, framework="pt") as file:
        known = file.metadata()
    assert json.loads(known["classnames"]) == CLASSES and json.loads(known["templates"]) == TEMPLATES
    place: dict[str, Any] = {}
    exec("\n".join(result.load), place)
    model, tokenizer = place["model"].eval(), open_clip.get_tokenizer("ViT-S-32-alt")
    rows = []
    with torch.no_grad():
        for name in json.loads(known["classnames"]):
            prompts = tokenizer([template.format(name) for template in json.loads(known["templates"])])
            rows.append(F.normalize(F.normalize(model.encode_text(prompts), dim=-1).mean(0), dim=-1))
        batch = images(3, json.loads(known["image"])["size"])
        found = float(known["logit_scale"]) * F.normalize(model.encode_image(batch), dim=-1) @ torch.stack(rows).T
    torch.testing.assert_close(found, logits_of(task), rtol=1e-4, atol=1e-3)


def test_one_file_in_bfloat16(tmp_path: Path) -> None:
    saved(tmp_path / "a", "linear head")
    rounded(tmp_path / "a", tmp_path / "half.safetensors")
    fine, coarse = tmp_path / "fine.safetensors", tmp_path / "coarse.safetensors"
    written(tmp_path / "a", fine)
    written(tmp_path / "half.safetensors", coarse)
    states = load_file(fine), load_file(coarse)
    assert all(torch.allclose(states[0][name], states[1][name], atol=0.05) for name in states[0])
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(value.dtype == torch.float32 for value in load_file(coarse.with_suffix(".head.safetensors")).values())


def test_sum_is_rounded_once(tmp_path: Path) -> None:
    methods = {"randlora": 0.5, "dora": -1.0, "full": 0.25}
    for method in methods:
        saved(tmp_path / method, "vision-language", method)
    files = [read_adapter(tmp_path / method) for method in methods]
    base = load_base(files[0])
    parts = [updates(base, file) for file in files]
    output = tmp_path / "sum.safetensors"
    write(output, added(base, files[0], weighted_sum(parts, list(methods.values()))))
    state = load_file(output)
    for name, plain in base.model.state_dict().items():
        by_hand = plain.double()
        for part, weight in zip(parts, methods.values(), strict=True):
            if name in part:
                by_hand = by_hand + weight * part[name].double()
        torch.testing.assert_close(state[name], by_hand.to(plain.dtype), rtol=1e-6, atol=0)


# What is refused, and what is left then


def test_outputs_that_differ_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a")
    before = sorted(tmp_path.rglob("*"))
    some = made(tmp_path / "a")
    some.expected[0][0, 0] += 1
    with pytest.raises(UserError, match="nothing"):
        write(tmp_path / "m.safetensors", some)
    some.expected[0][0, 0] -= 1
    monkeypatch.setattr(module, "move", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="device"):
        write(tmp_path / "m.safetensors", some)
    monkeypatch.undo()
    with pytest.raises(UserError, match="written"):
        write(tmp_path / "a" / "adapter.safetensors" / "m.safetensors", some)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Finite factors whose product is not; `read_adapter` refuses others."""
    task = saved(tmp_path / "a", method="lora")
    with torch.no_grad():
        for each in (p for p in task.parameters() if p.requires_grad):
            each.fill_(1e38)
    task.save(tmp_path / "a")
    with pytest.raises(UserError, match="is not finite"):
        made(tmp_path / "a")


def test_other_files_stay(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    one = rounded(tmp_path / "a", tmp_path / "one.safetensors").path
    some = made(tmp_path / "a")
    (tmp_path / "m.json").write_text("mine")
    with pytest.raises(UserError, match=r"m\.json exists"):
        write(tmp_path / "m.safetensors", some)
    assert (tmp_path / "m.json").read_text() == "mine" and not (tmp_path / "m.safetensors").exists()
    write(tmp_path / "m.safetensors", some, overwrite=True)
    for output, message in (
        ("m.safetensors", "exists"),
        ("m.bin", "ends in"),
        ("one.safetensors", "would replace"),
        ("a/x.pt", "would replace"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(tmp_path / output, [one, tmp_path / "a"], overwrite=output != "m.safetensors")


def test_the_head_and_the_config_of_older_weights_go_with_them(tmp_path: Path) -> None:
    """Weights that were written without a head must not lie beside the head of others."""
    saved(tmp_path / "a")
    output, head, config = (tmp_path / f"m.{suffix}" for suffix in ("safetensors", "head.safetensors", "json"))
    written(tmp_path / "a", output)
    output.unlink()
    config.unlink()
    headless = made(tmp_path / "a", with_head=False)
    with pytest.raises(UserError, match=r"m\.head\.safetensors exists"):
        write(output, headless)
    assert head.is_file() and not output.exists()
    write(output, headless, overwrite=True)
    assert output.is_file() and config.is_file() and not head.exists()
    written(tmp_path / "a", tmp_path / "n.safetensors")
    saved(tmp_path / "vit", "linear head", name="test_vit")
    vit = made(tmp_path / "vit")
    write(tmp_path / "n.safetensors", vit, overwrite=True)
    assert [file.name for file in tmp_path.glob("n.*")] == ["n.safetensors"]
    save_file({"head": torch.ones(2)}, head)  # no files of ours
    config.write_text("{}")
    write(output, vit, overwrite=True)
    assert head.is_file() and config.is_file()


def test_differences_of_outputs() -> None:
    one, two = [torch.tensor([1.0, 4.0])], [torch.tensor([1.5, 5.0])]
    assert difference(one, two) == (0.2, 1.0)
    assert difference([torch.tensor([float("nan")])], [torch.zeros(1)]) == (float("inf"), float("inf"))
    weight = nn.Linear(2, 2).weight.detach()
    content = module._bytes({"a": weight, "b": weight}, {})
    assert b'"a"' in content and b'"b"' in content, "tied tensors are written twice"


def test_an_update_that_is_lost_is_refused(tmp_path: Path) -> None:
    """As a part of the outputs a small update is nothing: the base model's weights would pass for the tuned ones."""
    saved(tmp_path / "a")
    some = made(tmp_path / "a")
    small = [base + 5e-5 * (tuned - base) for tuned, base in zip(some.expected, some.plain, strict=True)]
    some.model.load_state_dict(load_base(read_adapter(tmp_path / "a")).model.state_dict())
    assert difference(some.plain, small)[0] < TOLERANCE
    with pytest.raises(UserError, match="100%"):
        write(tmp_path / "m.safetensors", replace(some, expected=small))
    assert not list(tmp_path.glob("m.*"))


def test_an_adapter_that_changes_nothing_says_so(tmp_path: Path) -> None:
    built("text head").save(tmp_path / "a")
    notes = written(tmp_path / "a", tmp_path / "m.safetensors").notes
    assert [note for note in notes if "no loss of it would show" in note] == [notes[1]]
    saved(tmp_path / "b")
    assert "no loss of it" not in str(written(tmp_path / "b", tmp_path / "n.safetensors").notes)


def test_merged_weights_of_a_timm_model_with_its_head(tmp_path: Path, run: Run) -> None:
    """Of a head that trained whole, which belongs to the first adapter."""
    heads = {}
    for seed, adapter in enumerate((RandLoRA(rank=4), LoRA(rank=2))):
        model: Any = timm.create_model("test_vit.r160_in1k", pretrained=False, num_classes=3).eval()
        model.load_state_dict(load_vit("test_vit.r160_in1k", "random").model.state_dict(), strict=False)
        inject(model, adapter, None, ["head"])
        torch.manual_seed(seed)
        randomise(model, 0.1)
        base = {"library": "timm", "name": "test_vit.r160_in1k", "pretrained": "random", "seed": 0}
        save_adapter(model, tmp_path / str(seed), base_model=base)
        heads[seed] = model.head.weight
    for verb in ("merge 0", "merge 0 --scale 0.5", "add 0 1"):
        done = run("adapter", *verb.split(), "--output", f"{verb}.safetensors")
        assert done.code == 0, done.err
        weights = load_file(f"{verb}.safetensors")
        assert weights.keys() == {name for name in model.state_dict() if ".delta." not in name}
        assert torch.equal(weights["head.weight"], heads[0]) and not torch.equal(heads[0], heads[1])
    assert "trained whole" in run("adapter", "info", "0").out and read_adapter("1").trained == ["head"]


CONFIGS = {"clip": "open_clip_config.json", "vit": "config.json"}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_a_folder_is_loaded_and_merged_wherever_the_folder_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    private = tmp_path / "private"
    private.mkdir()
    folder = {"clip": clip_folder, "vit": vit_folder}[kind](private / kind)
    task = saved(tmp_path / "a", "linear head", name=f"local-dir:{folder}", pretrained=None)
    assert all(b"private" not in file.read_bytes() for file in (tmp_path / "a").iterdir())
    file = read_adapter(tmp_path / "a")
    images = torch.randn(2, 3, task.image_spec.size, task.image_spec.size)
    task.prepare_evaluation()
    expected = task.class_logits(images)
    torch.testing.assert_close(load_task(tmp_path / "a").class_logits(images), expected)
    write(tmp_path / "m.safetensors", merged(load_base(file), file))
    assert LibraryModel.make(file.config["base_model"]).image.mean == (0.1, 0.2, 0.3)

    moved = tmp_path / "moved"
    folder.rename(moved)
    monkeypatch.setattr(weights_files, "_here", {})
    with pytest.raises(UserError, match="--pretrained"):
        load_task(tmp_path / "a")
    register_weights([moved])
    torch.testing.assert_close(load_task(tmp_path / "a").class_logits(images), expected)
    config = moved / CONFIGS[kind]
    config.write_text(config.read_text() + " ")
    monkeypatch.setattr(weights_files, "_here", {})
    with pytest.raises(UserError, match="configuration"):
        load_task(tmp_path / "a")


def test_a_repository_whose_configuration_changed_is_refused() -> None:
    base = {"name": "hf-hub:ann/clip", "pretrained": "w.safetensors", "sha256": "a" * 64, "config_sha256": "b" * 64}
    assert base_arguments(base, "a") == {"pretrained": "own"}
    check_config(json.loads(json.dumps(base)), "b" * 64, "a")
    with pytest.raises(UserError, match="another one now"):
        check_config(base, "c" * 64, "a")
