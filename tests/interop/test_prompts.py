from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from randlora_pl.adapters import Frozen, LoRA, RandLoRA, read_adapter
from randlora_pl.interop.base_model import load_base
from randlora_pl.interop.merge import merged, write
from randlora_pl.interop.onnx import export_onnx, load_program
from randlora_pl.interop.peft_export import export_peft
from randlora_pl.prompts import CoCoOp, CoOp, DeepPrompts, Fixed, MaPLe
from randlora_pl.tasks import DePT, PromptTask, load_task, load_tasks, weighted_task
from randlora_pl.tasks.restore import plain_task
from randlora_pl.tasks.task_set import TaskSet
from randlora_pl.utils.errors import UserError
from tests.support.cli import Refused
from tests.support.products import in_one_item, in_two_items, marked

NAMES = ["cat", "dog", "tree"]
OPTIONS: dict[str, dict[str, Any]] = {
    "CoOp": {"prompts": CoOp(length=2, words=None)},
    "CoOp+RandLoRA": {"prompts": CoOp(length=2, words=None), "adapter": RandLoRA(rank=6)},
    "Fixed+LoRA": {"prompts": Fixed(template="a {}."), "adapter": LoRA(rank=2)},
    "two stages": {"prompts": Fixed(template="a {}."), "adapter": LoRA(rank=2), "classifier_steps": 0.4},
    "text": {"prompts": DeepPrompts(length=2, vision_length=0, depth=2)},
    "MaPLe": {"prompts": MaPLe(depth=1), "adapter": LoRA(rank=2)},
    "MaPLe+DePT": {"prompts": MaPLe(depth=2), "head": DePT()},
    "CoOp+DePT": {"prompts": CoOp(length=2, words=None), "head": DePT()},
    "CoCoOp": {"prompts": CoCoOp(length=2, words=None)},
}


def saved(folder: Path, seed: int = 0, **options: Any) -> Path:
    """An adapter folder of a task whose trained tensors are random."""
    task = PromptTask("tiny", "random", **{"adapter": Frozen(), **options})
    task.set_classes(NAMES, [])
    task.adapt()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in task.parameters():
            if each.requires_grad:
                each.add_(0.1 * torch.randn(each.shape, generator=generator))
    return task.save(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    return {name: saved(folder / name, **options) for name, options in OPTIONS.items()}


def logits(folder: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return load_task(folder).class_logits(images)


OFTEN = ("CoOp+RandLoRA", "Fixed+LoRA", "two stages", "text", "MaPLe+DePT")
"""Programs by default."""


@in_two_items("name", marked(((name,) for name in OPTIONS if name != "CoCoOp"), lambda row: row[0] in OFTEN))
def test_programs_give_the_tasks_logits(adapters: Mapping[str, Path], name: str) -> None:
    program = load_program(adapters[name])
    pixels = program.examples(2, 0)
    mean, std = (torch.tensor(program.facts[each]).view(3, 1, 1) for each in ("mean", "std"))
    found, probabilities = program.module(pixels)
    torch.testing.assert_close(found, logits(adapters[name], (pixels - mean) / std), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(probabilities, found.softmax(1))
    assert program.facts["prompt_learner"]["method"] == type(OPTIONS[name]["prompts"]).__name__
    assert program.facts["prompts"] == (["a {}."] if name == "Fixed+LoRA" else [])


@pytest.mark.slow
@in_one_item("name", ["MaPLe+DePT", "CoOp"])
def test_programs_of_learned_prompts_become_files(adapters: Mapping[str, Path], name: str, tmp_path: Path) -> None:
    assert export_onnx(load_program(adapters[name]), tmp_path / "model.onnx").difference < 1e-4


@in_two_items("name", marked(zip([*OFTEN[:4], "CoOp"]), lambda row: row[0] not in ("Fixed+LoRA", "CoOp")))
def test_merged_weights_and_head_run_in_open_clip_alone(
    adapters: Mapping[str, Path], name: str, tmp_path: Path
) -> None:
    file = read_adapter(adapters[name])
    path = tmp_path / "model.safetensors"
    write(path, merged(load_base(file), file))
    assert file.config["base_model"]["name"] == "tiny"
    from randlora_pl.models import load_clip

    model = load_clip("tiny", str(path)).model.eval()  # the architecture, with these weights
    assert isinstance(model, open_clip.CLIP)
    images = torch.rand(2, 3, 32, 32)
    head = load_file(path.with_suffix(".head.safetensors"))["head"]
    with torch.no_grad():
        found = F.normalize(model.encode_image(images), dim=-1) @ head.T
    torch.testing.assert_close(found, logits(adapters[name], images), rtol=1e-5, atol=2e-4)


def merge(file: Path, scale: float = 1.0) -> None:
    read = read_adapter(file)
    merged(load_base(read), read, scale)


USES: dict[str, Callable[[Path], object]] = {
    "merge": merge,
    "scale": lambda file: merge(file, 0.5),
    "peft": lambda file: export_peft(file, file.parent / "peft"),
    "text": lambda file: load_program(file, "text"),
    "classifier": load_program,
}


@in_one_item(
    ("name", "use", "message"),
    [
        (
            "MaPLe",
            "merge",
            "visual prompts are inputs, no weight can hold them. Predict and serve accept the adapter",
        ),
        ("CoOp+DePT", "merge", "DePT adds the logits of two heads, which no library does."),
        ("CoCoOp", "merge", "CoCoOp has other class features for each image, so it has no head."),
        ("CoOp+RandLoRA", "scale", "--scale is 0.5"),
        ("two stages", "scale", "--scale is 0.5: the classifier of"),
        ("CoOp+RandLoRA", "peft", "(CoOp): PEFT has no place for them."),
        ("two stages", "peft", "(classifier_steps): PEFT has no place for them."),
        ("CoOp", "text", "the text tower alone is not what CoOp trained"),
        ("two stages", "text", "a trained classifier predicts the classes (classifier_steps), so the texts alone"),
        ("CoCoOp", "classifier", "CoCoOp encodes the classes again for each image"),
    ],
)
def test_what_other_programs_cannot_hold_is_refused_in_one_line(
    adapters: Mapping[str, Path], name: str, use: str, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        USES[use](adapters[name])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_parts_without_prompts_are_programs(adapters: Mapping[str, Path]) -> None:
    assert load_program(adapters["CoCoOp"], "image").outputs == ("features",)
    assert load_program(adapters["two stages"]).facts["prompts"] == []
    program = load_program(adapters["Fixed+LoRA"], "text")
    assert program.facts["prompts"] == ["a {}."]
    tokens = program.examples(3, 0)
    torch.testing.assert_close(
        program.module(tokens), load_task(adapters["Fixed+LoRA"]).class_features(), rtol=1e-5, atol=1e-5
    )


def test_a_batch_has_the_probabilities_of_each_alone(adapters: Mapping[str, Path]) -> None:
    files = {name: read_adapter(path) for name, path in adapters.items()}
    tasks = TaskSet(plain_task(files["CoOp"]))
    tasks.first.eval()
    for name, file in files.items():
        tasks.load(name, plain_task(file))
    pictures = torch.randn(len(files), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for row, name, picture in zip(tasks.probabilities(pictures, [*files]), files, pictures, strict=True):
        alone = load_task(adapters[name])
        with torch.inference_mode():
            torch.testing.assert_close(row, alone.predictions(alone.class_logits(picture[None]))[0], rtol=0, atol=1e-5)


def test_sums_need_equal_prompts(adapters: Mapping[str, Path], refused: Refused, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", seed=1, **OPTIONS["CoOp+RandLoRA"])
    two = load_tasks({"one": adapters["CoOp+RandLoRA"], "two": other})
    with pytest.raises(UserError, match="one and two have different prompts or second heads, so a sum has none"):
        weighted_task(two, {"one": 0.5, "two": 0.5})
    message = refused("adapter", "add", str(other), str(other), "--output", str(tmp_path / "sum.safetensors"))
    assert "they belong to one update, so sums have none. Predict with each of them." in message
    fixed = saved(tmp_path / "fixed", seed=1, **OPTIONS["Fixed+LoRA"])
    images = torch.rand(2, 3, 32, 32)
    both = weighted_task(load_tasks({"one": adapters["Fixed+LoRA"], "two": fixed}), {"one": 1.0, "two": 0.0})
    with torch.no_grad():
        torch.testing.assert_close(both.class_logits(images), logits(adapters["Fixed+LoRA"], images), atol=1e-3, rtol=0)
        half = weighted_task(load_tasks({"one": adapters["Fixed+LoRA"], "two": fixed}), {"one": 0.5, "two": 0.5})
        assert not torch.allclose(half.class_features(), both.class_features(), atol=1e-4)  # encoded by the sum
