"""The task of learned prompts: gradients, heads and classes, and what it refuses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from randlora_pl.adapters import FullFineTuning, LinearProbe, LoRA, RandLoRA, inject
from randlora_pl.models.clip import meta_clip
from randlora_pl.prompts import CoCoOp, CoOp, DeepPrompts, Fixed, MaPLe, PromptLearner
from randlora_pl.tasks import DePT, PromptTask, SelfRegulation, TextHeadTask, VisionLanguageTask
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.tasks.small import CLASSES, TEMPLATES, batch, images, shake

UPDATE = LoRA(rank=2, alpha=8)


def task_of(prompts: PromptLearner, classes: Sequence[str] = CLASSES, **options: Any) -> PromptTask:
    task = PromptTask("tiny", "random", prompts=prompts, **options)
    task.set_classes(list(classes), TEMPLATES)
    task.adapt()
    return task


def gradients(task: Any, data: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of all that trains, of the mean loss of a batch."""
    task.zero_grad()
    task.step_features = None
    (task.sample_losses(data)[0] * data["weight"]).sum().backward()
    return {name: value.grad.clone() for name, value in task.named_parameters() if value.grad is not None}


def kept(task: Any, data: dict[str, Any]) -> int:
    """Numbers that the backward pass of a batch's losses waits for."""
    counts: list[int] = []

    def pack(kept: Tensor) -> Tensor:
        counts.append(kept.numel())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        task.sample_losses(data)
    return sum(counts)


@in_one_item(
    ("learner", "options"),
    [
        (CoOp(), {"head": DePT()}),
        (CoOp(class_specific=True), {"adapter": RandLoRA(rank=8)}),
        (CoCoOp(), {}),
        (DeepPrompts(depth=2), {"regulation": SelfRegulation(templates=2), "adapter": UPDATE}),
        (DeepPrompts(length=0, depth=2), {"head": DePT()}),
        (MaPLe(depth=2), {"head": DePT(), "adapter": UPDATE, "targets": ["visual:mlp"]}),
        (MaPLe(depth=2, coupling="low_rank", rank=2), {"gradient_checkpointing": True}),
        (MaPLe(depth=2), {"text_chunk_tokens": 1, "head": DePT(), "regulation": SelfRegulation(templates=1)}),
        (Fixed(), {"adapter": UPDATE}),
    ],
)
def test_all_that_trains_gets_a_gradient_and_nothing_else(learner: PromptLearner, options: dict[str, Any]) -> None:
    task = task_of(learner, **options)
    shake(task, 0.02)
    found = gradients(task, batch([0, 1, 2, 3, 1]))
    trained = {name for name, value in task.named_parameters() if value.requires_grad}
    assert found.keys() == trained
    assert sum(task.parameter_parts().values()) == sum(value.numel() for value in found.values())
    assert {name for name, value in found.items() if not value.abs().max() > 0} == set()
    own = [value for name, value in task.named_parameters() if name.startswith("learned.") and value.requires_grad]
    grouped = [each for group in task.optimizer_groups() for each in group["params"]]
    assert {id(each) for each in own} <= {id(each) for each in grouped} and len(grouped) == len(trained)


def test_chunks_and_computing_again_change_no_gradient() -> None:
    expected: dict[str, Tensor] = {}
    for options in ({}, {"text_chunk_tokens": 1}, {"gradient_checkpointing": True, "text_chunk_tokens": 1}):
        task = task_of(MaPLe(depth=2), adapter=UPDATE, **options)
        shake(task, 0.02)
        assert task.learned.classes is not None and len(task.learned.classes.chunks) == (4 if options else 1)
        found = gradients(task, batch([0, 1, 2, 3, 1]))
        for name, value in (expected or found).items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        expected = found


def test_words_score_as_the_zero_shot_model_does() -> None:
    plain = VisionLanguageTask("tiny", "random", caption="a photo of a {}.")
    plain.set_classes(CLASSES, TEMPLATES)
    plain.adapt()
    with torch.no_grad():
        expected = plain.eval().class_logits(images(6))
        for learner in (Fixed(), CoOp(), CoOp(class_specific=True)):
            task = task_of(learner, adapter=UPDATE).eval()
            assert task.zero_shot
            found = task.class_logits(images(6))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            assert torch.equal(found.argmax(1), expected.argmax(1))
    assert not task_of(MaPLe(depth=2)).zero_shot and not task_of(CoOp(), head=DePT()).zero_shot


def test_words_that_do_not_change_are_encoded_once_as_the_text_head_is() -> None:
    head = TextHeadTask("tiny", "random", adapter=UPDATE, targets=["visual:mlp"])
    head.set_classes(CLASSES, ["a photo of a {}."])
    head.adapt()
    task = task_of(Fixed(), adapter=UPDATE, targets=["visual:mlp"])
    shake(head), shake(task)
    calls: list[int] = []
    model: Any = task.model
    model.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    data = batch([0, 1, 2, 3, 1])
    for _ in range(2):
        torch.testing.assert_close(task.sample_losses(data)[0], head.sample_losses(data)[0], rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    own, other = gradients(task, data), gradients(head, data)
    assert own.keys() == other.keys() and len(own) == 8
    for name, value in own.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def test_the_joint_loss_is_that_of_images_and_captions() -> None:
    plain = VisionLanguageTask("tiny", "random", caption="a photo of a {}.", adapter=UPDATE)
    plain.set_classes(CLASSES, TEMPLATES)
    plain.adapt()
    task = task_of(Fixed(), adapter=UPDATE, loss_batch="joint")
    shake(plain), shake(task)
    data = batch([0, 1, 1, 3, 1], [0.2, 0.2, 0.2, 0.4, 0.0])  # no image of class 2, and a weight of 0
    data["label"][-1] = 2
    data |= {"step_classes": torch.tensor([0, 1, 3]), "step_counts": torch.tensor([1, 2, 1])}
    found, expected = task.sample_losses(data)[0], plain.sample_losses(data)[0]
    torch.testing.assert_close(found[:-1], expected[:-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(task.loss_floor(data)[:-1], plain.loss_floor(data)[:-1])  # type: ignore[index]
    assert found.isfinite().all()
    own, other = gradients(task, data), gradients(plain, data)
    assert own.keys() == other.keys()
    for name, value in own.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)
    both = task_of(CoOp(), head=DePT(weight=0.25), loss_batch="joint")
    alone = task_of(CoOp(), loss_batch="joint")
    probe = task_of(CoOp(), head=DePT(weight=1.0), loss_batch="joint")
    mixed = 0.75 * alone.sample_losses(data)[0] + 0.25 * probe.sample_losses(data)[0]
    torch.testing.assert_close(both.sample_losses(data)[0], mixed)
    torch.testing.assert_close(both.loss_floor(data), 0.75 * alone.loss_floor(data))


def test_each_image_shifts_its_own_texts() -> None:
    task, coop = task_of(CoCoOp()), task_of(CoOp())
    data = batch([0, 1, 2])
    whole = gradients(task, data)
    assert kept(task, data) < kept(task, batch([0]))  # the texts of several images are encoded again
    with torch.no_grad():
        logits = task.class_logits(data["image"])
        single = torch.cat([task.class_logits(image[None]) for image in data["image"]])
        torch.testing.assert_close(logits, single, rtol=0, atol=1e-5)
        assert not torch.allclose(logits, coop.class_logits(data["image"]), atol=1e-4)
    parts: dict[str, Tensor] = {}
    for number in range(3):
        one = batch([number], [1 / 3]) | {"image": data["image"][number : number + 1]}
        parts = {name: value + parts.get(name, 0) for name, value in gradients(task, one).items()}
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-4, atol=1e-6)
    network: Any = task.learned.network  # type: ignore[attr-defined]
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
        torch.testing.assert_close(
            task.class_logits(data["image"]), coop.class_logits(data["image"]), rtol=0, atol=1e-5
        )


def test_learned_prompts_name_other_classes_and_return() -> None:
    others = ["a horse", "plum", "seven"]
    task = task_of(CoOp(), head=DePT()).eval()
    shake(task)
    with torch.no_grad():
        mixed = task.class_logits(images(3))
        task.set_classes(others, TEMPLATES)
        found = task.class_logits(images(3))
        fresh = task_of(CoOp(), others).eval()
        fresh.learned.tokens.copy_(task.learned.tokens)  # type: ignore[attr-defined, arg-type]
        torch.testing.assert_close(found, fresh.class_logits(images(3)))
        task.set_classes(CLASSES, TEMPLATES)
        torch.testing.assert_close(task.class_logits(images(3)), mixed)
    name = "an exceedingly long and winding name of a class"
    with pytest.raises(UserError, match=name):
        task.set_classes(["cat", name], TEMPLATES)
    assert task.classnames == CLASSES
    specific = task_of(CoOp(class_specific=True))
    for names in (others, CLASSES[::-1]):
        with pytest.raises(UserError, match=r"class-specific prompts were learned for \['zero'.*class_specific false"):
            specific.set_classes(names, TEMPLATES)
    specific.set_classes(CLASSES, TEMPLATES)


@in_one_item(
    ("options", "message"),
    [
        (
            {"prompts": Fixed()},
            r"Frozen trains nothing in PromptTask\. Learn prompts \(--model\.prompts CoOp\), or add",
        ),
        ({"prompts": Fixed(), "adapter": LinearProbe()}, "LinearProbe trains nothing in PromptTask. Learn prompts"),
        (
            {"adapter": FullFineTuning(), "regulation": SelfRegulation()},
            "FullFineTuning trains the model that regulation",
        ),
        ({"prompts": CoCoOp(), "head": DePT()}, "CoCoOp has other class features for each image: leave head and"),
        ({"prompts": CoCoOp(), "regulation": SelfRegulation()}, "leave head and regulation out"),
        ({"prompts": UPDATE}, "prompts is .* Set an object of PromptLearner"),
        ({"optimizer": "adam"}, "adamw or sgd"),
        ({"schedule": "line"}, "cosine or epochs"),
        ({"text_chunk_tokens": 0}, "text_chunk_tokens"),
        ({"prompt_learning_rate": 0}, "prompt_learning_rate"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        task_of(**({"prompts": CoOp()} | options))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_compiled_blocks_run_rows_of_several_chunks() -> None:
    names = [f"{first} {second}" for first in ("old", "a very wet", "dry") for second in ("cat", "zebra", "dog")]
    data = batch([0, 1, 2, 3, 8])
    found = []
    for compiled in (False, "aot_eager", True):
        adapter = RandLoRA(rank=8)
        task = task_of(MaPLe(depth=2), names, adapter=adapter, text_chunk_tokens=20, torch_compile=compiled)
        shake(task, 0.02)
        assert task.learned.classes is not None and len({length for _, _, length in task.learned.classes.chunks}) > 2
        found.append(gradients(task, data))
        with torch.no_grad():
            found[-1]["logits"] = task.eval().class_logits(data["image"])
    for name, value in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


def test_clip_lora_starts_as_the_zero_shot_model() -> None:
    """The preset before its first step: dropout changes nothing, because B is 0; and its number of parameters."""
    options = yaml.safe_load((Path(__file__).parents[3] / "configs/adapters/clip_lora.yaml").read_text())["model"]
    own = options["init_args"]
    prompts, lora = Fixed(**own["prompts"]["init_args"]), LoRA(**own["adapter"]["init_args"])
    assert (options["class_path"], own["prompts"]["class_path"]) == ("PromptTask", "Fixed")
    for name in ("ViT-B-32", "ViT-B-16"):
        assert inject(meta_clip(name), lora, own["targets"]).trainable == 184_320
    task = task_of(prompts, adapter=lora, targets=own["targets"])
    head = TextHeadTask("tiny", "random", adapter=UPDATE)
    head.set_classes(CLASSES, ["a photo of a {}."])
    head.adapt()
    task.train()
    with torch.no_grad():
        found = task._logits(task._images(images(3)), task._texts(task.model))
        torch.testing.assert_close(found, head.eval().class_logits(images(3)), rtol=0, atol=1e-5)
