"""Programs against the tasks that they are made from, exported files against the programs, and what cannot be one."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import BitFit, DoRA, LoRA, RandLoRA, inject, read_adapter, save_adapter
from randlora_pl.adapters.layers import AdaptedLayer
from randlora_pl.data.unlabelled import frame_of
from randlora_pl.interop import onnx as onnx
from randlora_pl.interop.onnx import FACTS, Program, export_onnx, export_torch, load_program, make_program
from randlora_pl.models import load_clip
from randlora_pl.run.options.saved_config import adapter_config
from randlora_pl.tasks import LinearHeadTask, Objective, TextHeadTask, VisionLanguageTask
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec

NAMES, PROMPTS = ["cat", "dog", "cow"], ["a photo of a {}.", "art of a {}."]
TASKS: dict[str, Any] = {
    "both towers": lambda **more: VisionLanguageTask(adapter=RandLoRA(rank=6), **more),
    "text head": lambda **more: TextHeadTask(adapter=DoRA(inner=LoRA(rank=2)), **more),
    "linear head, CLIP": lambda **more: LinearHeadTask(name="tiny", adapter=BitFit(), **more),
    "linear head, timm": lambda **more: LinearHeadTask(name="test_vit", img_size=32, adapter=LoRA(rank=2), **more),
}


def trained(kind: str, **options: Any) -> Objective:
    """A task whose adapter and head have some other values than at the start."""
    task: Objective = TASKS[kind](**({"pretrained": "random"} | options))
    task.set_classes(NAMES, PROMPTS)
    task.adapt()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return task.eval()


def normalised(pixels: Tensor, spec: Any) -> Tensor:
    return torch.stack([(pixels[:, c] - spec.mean[c]) / spec.std[c] for c in range(3)], 1)


@pytest.mark.parametrize("kind", TASKS)
def test_classifier_and_features_are_those_of_the_task(kind: str) -> None:
    task = trained(kind)
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        logits = task.class_logits(normalised(pixels, task.image_spec))
    head = task.head_tensors().get("head")
    program = make_program(task)
    got, shares = program.module(pixels)
    torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(shares, logits.softmax(1), atol=1e-5, rtol=0)
    assert program.outputs == ("logits", "probabilities") and program.facts["classnames"] == NAMES
    assert not any(isinstance(module, AdaptedLayer) for module in program.module.modules())
    assert not any(parameter.requires_grad for parameter in program.module.parameters())
    assert program.examples(2, 0).shape == (2, 3, 32, 32)
    features = make_program(trained(kind), "image").module(pixels)
    if kind != "linear head, timm":
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    if head is not None:
        torch.testing.assert_close(features @ head.T, logits, atol=1e-4, rtol=1e-5)


def test_probabilities_are_the_predictions_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "predictions", lambda self, outputs: outputs.sigmoid())
    logits, shares = make_program(trained("text head")).module(torch.rand(3, 3, 32, 32))
    torch.testing.assert_close(shares, logits.sigmoid())


def test_text_tower() -> None:
    """The trained one of both towers; behind a frozen head, the one that the head was made with."""
    task = trained("both towers")
    assert isinstance(task, VisionLanguageTask)
    tokens = task.tokenizer(["a photo of a cat.", "dog"])
    with torch.no_grad():
        expected = F.normalize(task.model.encode_text(tokens), dim=-1)  # type: ignore[operator]
        plain = F.normalize(load_clip("tiny", "random").model.eval().encode_text(tokens), dim=-1)  # type: ignore[operator]
    program = make_program(task, "text")
    torch.testing.assert_close(program.module(tokens), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(make_program(trained("text head"), "text").module(tokens), plain, atol=1e-6, rtol=0)
    assert program.input == "tokens" and program.examples(4, 1).shape == (4, 16)
    assert not any("visual" in name for name in program.module.state_dict())
    with pytest.raises(UserError, match="LinearHeadTask"):
        make_program(trained("linear head, timm"), "text")


def test_facts(tmp_path: Path) -> None:
    task = trained("both towers", eval_prompts="ensemble")
    frame = ImageSpec(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    task.save(tmp_path / "adapter", {"frame": frame.__dict__})
    program = load_program(tmp_path / "adapter")
    facts = json.loads(json.dumps(program.facts))
    assert facts["prompts"] == PROMPTS and facts["mean"] == [0.1, 0.2, 0.3] and facts["interpolation"] == "bilinear"
    assert facts["base_model"]["name"] == "tiny" and facts["adapter"]["method"] == "RandLoRA"
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():  # the mean of the training counts, not the backbone's own
        expected = task.class_logits(normalised(pixels, frame))
    torch.testing.assert_close(program.module(pixels)[0], expected, atol=1e-4, rtol=1e-5)
    assert make_program(trained("both towers")).facts["prompts"] == ["An image of {}"]
    assert make_program(trained("linear head, timm")).facts["prompts"] == []


def test_padding_travels_with_the_adapter(tmp_path: Path) -> None:
    task = trained("text head")
    frame = ImageSpec(32, interpolation="bilinear", resize="longest", crop_pct=0.9, fill=(9, 9, 0))
    task.save(tmp_path / "adapter", {"frame": frame.__dict__})
    facts = load_program(tmp_path / "adapter").facts
    assert (facts["resize"], facts["crop_pct"], facts["fill"]) == ("longest", 0.9, [9, 9, 0])
    assert facts["format_version"] == 2
    assert "longer side to 35" in facts["preprocessing"] and "the color 9, 9, 0" in facts["preprocessing"]
    file = read_adapter(tmp_path / "adapter")
    assert frame_of(file.metadata, task.image_spec) == frame
    saved = adapter_config(tmp_path / "adapter")["data"]
    assert saved["resize"] == "longest:0.9"  # what `test --adapter` takes


def test_places_of_weights_are_not_told(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(load_clip("tiny", "random").model.state_dict(), weights)
    facts = make_program(trained("text head", pretrained=str(weights))).facts
    assert facts["base_model"]["pretrained"] == "weights.pt" and str(tmp_path) not in json.dumps(facts)


def test_an_adapter_without_a_task(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    inject(model, LoRA(rank=2), ["0"])
    nothing = {"task": "TextHeadTask", "arguments": {}, "classnames": [], "templates": []}
    for number, (metadata, mend) in enumerate((({}, "merge_and_unload"), (nothing, "Use predict, test"))):
        folder = save_adapter(model, tmp_path / str(number), metadata=metadata)
        with pytest.raises(UserError, match=rf"no classes .*\. .*{mend}"):
            load_program(folder)
    trained("linear head, timm").save(tmp_path / "linear")
    with pytest.raises(UserError, match="no text tower"):
        load_program(tmp_path / "linear", "text")


Export = Callable[[Program, Path], onnx.Exported]
EXPORTS = pytest.mark.parametrize("export", [export_onnx, export_torch])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.inner(pixels.flatten(1)).softmax(1)


class Branching(Small):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels if pixels.sum() > 0 else -pixels


class Odd(Small):
    def forward(self, pixels: Tensor) -> Tensor:
        return torch.ops.randlora_pl_tests.odd(pixels)  # type: ignore[no-any-return]


@torch.library.custom_op("randlora_pl_tests::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    return x * 2 + 1


@odd.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def program_of(module: nn.Module) -> Program:
    def examples(count: int, seed: int) -> Tensor:
        return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))

    facts = {"classnames": ["ä", "b"], "part": "image", "image_size": 2}
    return Program(module.eval().requires_grad_(False), "pixels", ("features",), examples, facts)


def answers(file: Path, example: Tensor) -> list[Tensor]:
    """What a file of either kind gives, by nothing but its own library."""
    if file.suffix == ".pt2":
        found: Any = torch.export.load(file).module()(example)
        return list(found) if isinstance(found, tuple) else [found]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {session.get_inputs()[0].name: example.numpy()})]


@EXPORTS
def test_any_batch_facts_and_no_paths(tmp_path: Path, export: Export) -> None:
    program = program_of(Small())
    file = tmp_path / "deep" / ("model.onnx" if export is export_onnx else "model.pt2")
    written = export(program, file)
    assert written.files == (file,) and written.size == file.stat().st_size and written.difference < 1e-5
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    for batch in (1, 2, 5, 64):
        example = program.examples(batch, batch)
        torch.testing.assert_close(answers(file, example)[0], program.module(example))
    if export is export_onnx:
        session = onnxruntime.InferenceSession(str(file))
        told = session.get_modelmeta().custom_metadata_map
        facts = {name: value if name == "part" else json.loads(value) for name, value in told.items()}
        assert session.get_inputs()[0].shape == ["batch", 3, 2, 2]
    else:
        extra = {FACTS: ""}
        torch.export.load(file, extra_files=extra)
        facts = json.loads(extra[FACTS])
    assert facts == program.facts
    assert str(Path(__file__).parent).encode() not in file.read_bytes()  # traces of where the code lay


def test_large_weights_go_to_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "LARGEST_FILE", 100)
    program = program_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 3000)))  # small ones stay inside in any case
    file = tmp_path / "m.onnx"
    written = export_onnx(program, file)
    assert written.files == (file, tmp_path / "m.onnx.data") == tuple(sorted(tmp_path.iterdir()))
    assert written.files[1].stat().st_size >= 4 * 12 * 3000 and written.size == sum(
        f.stat().st_size for f in written.files
    )
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for part in written.files:
        part.rename(moved / part.name)
    example = program.examples(2, 3)
    torch.testing.assert_close(answers(moved / "m.onnx", example)[0], program.module(example))


@EXPORTS
def test_what_cannot_be_exported(tmp_path: Path, export: Export, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / ("m.onnx" if export is export_onnx else "m.pt2")
    with pytest.raises(UserError, match="PyTorch"):
        export(program_of(Branching()), file)
    assert not list(tmp_path.iterdir())
    if export is export_onnx:
        with pytest.raises(UserError, match="--to"):
            export(program_of(Odd()), file)
        assert not list(tmp_path.iterdir())
    else:
        assert export(program_of(Odd()), file).difference == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("export", [pytest.param(export_onnx, marks=pytest.mark.full), export_torch])
def test_other_numbers_are_refused(tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that computes something else never gets its name, and an older one stays."""
    suffix = "onnx" if export is export_onnx else "pt2"
    file, program = tmp_path / f"m.{suffix}", program_of(Small())
    file.write_bytes(b"older")
    monkeypatch.setattr(onnx, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="PyTorch"):
        export(program, file)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name] and file.read_bytes() == b"older"
    monkeypatch.setattr(onnx, "TOLERANCE", 1e-4)
    with torch.no_grad():
        program.module.inner.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(UserError, match="not finite"):
        export(program, file)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    with pytest.raises(UserError, match=r"\[onnx\]'"):
        export_onnx(program_of(Small()), tmp_path / "m.onnx")
    assert export_torch(program_of(Small()), tmp_path / "m.pt2").size > 0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="written"):
        export_torch(program_of(Small()), tmp_path / "file" / "m.pt2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_the_weights_beside_an_older_file_go_with_it(tmp_path: Path) -> None:
    data = tmp_path / "m.onnx.data"
    data.write_bytes(b"of another program")
    export_onnx(program_of(nn.Flatten()), tmp_path / "m.onnx")
    assert data.exists(), "nothing was replaced"
    export_onnx(program_of(nn.Flatten()), tmp_path / "m.onnx")
    assert not data.exists()
