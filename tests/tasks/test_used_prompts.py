"""The prompts that a run uses: in training, in evaluation, and in what is read from its file."""

import json
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from randlora_pl.adapters import Adapter, LoRA, read_adapter
from randlora_pl.interop.base_model import load_base
from randlora_pl.interop.merge import merged
from randlora_pl.interop.onnx import load_program
from randlora_pl.interop.summary import facts
from randlora_pl.models import encode_prompts, load_clip
from randlora_pl.prompts import CoOp, Fixed
from randlora_pl.run.options.saved_config import adapter_config
from randlora_pl.run.stages import loading
from randlora_pl.tasks import AdaptationModule, PromptTask, VisionLanguageTask, load_task
from randlora_pl.tasks.images import UsedPrompts
from randlora_pl.tasks.restore import prompts_of, register
from randlora_pl.tasks.run import Run
from randlora_pl.utils.errors import UserError

from .small import TEMPLATES, built, images, make

TYPED = ["a stamp of a {}", "clip art: {}"]
CAPTION = ["An image of {}"]
RANK_2 = LoRA(rank=2)


@pytest.fixture
def typed(fit: Any) -> VisionLanguageTask:
    """A task after three steps with prompts of one's own."""
    task = make("vision-language")
    assert isinstance(task, VisionLanguageTask)
    fit(task, {"templates": TYPED})
    return task


def test_typed_prompts_count_in_training_and_evaluation(typed: VisionLanguageTask) -> None:
    names = typed.classnames
    texts = {text: typed.tokenizer([text.replace("{}", name) for name in names]) for text in TYPED}
    classes = torch.arange(len(names))
    drawn = set()
    for step in range(8):
        typed.run = Run(step=lambda step=step: step)
        tokens = typed.caption_tokens(classes)
        assert torch.equal(tokens[[2, 5]], typed.caption_tokens(classes[[2, 5]]))  # in any batch, on any device
        places = [next(n for n, t in enumerate(TYPED) if torch.equal(texts[t][c], tokens[c])) for c in classes]
        drawn.add(tuple(places))
        assert 0 < sum(places) < len(names)
    assert len(drawn) == 8
    typed.prepare_evaluation()
    expected = encode_prompts(typed.model, typed.tokenizer, names, TYPED, "cpu")
    torch.testing.assert_close(typed.class_features(), expected)


def test_all_that_reads_a_file_answers_as_the_run_does(typed: VisionLanguageTask, tmp_path: Path) -> None:
    expected = UsedPrompts(TYPED, TYPED, drawn=True)
    assert typed.used_prompts() == expected
    file = read_adapter(typed.save(tmp_path / "adapter"))
    assert prompts_of(file) == expected and facts(file)["prompts"] == expected.summary()
    assert list(merged(load_base(file), file).templates) == load_program(file.path).facts["prompts"] == TYPED
    restored = load_task(file.path)
    typed.prepare_evaluation()
    with torch.no_grad():
        torch.testing.assert_close(restored.class_logits(images(2)), typed.eval().class_logits(images(2)))


@pytest.mark.parametrize(
    ("task", "expected", "summary"),
    [
        (lambda: built("vision-language"), UsedPrompts(CAPTION, CAPTION, drawn=True), '"An image of {}"'),
        (
            lambda: built("vision-language", eval_prompts="ensemble"),
            UsedPrompts(CAPTION, TEMPLATES, drawn=True),
            '"An image of {}" in training; in evaluation the mean of 2: "a {}", "the digit {}"',
        ),
        (lambda: built("text head"), UsedPrompts(TEMPLATES, TEMPLATES), 'the mean of 2: "a {}", "the digit {}"'),
        (lambda: built("linear head"), UsedPrompts(), ""),
        (lambda: prompted(prompts=Fixed(template="a {}.")), UsedPrompts(["a {}."], ["a {}."]), '"a {}."'),
        (lambda: prompted(prompts=CoOp()), UsedPrompts(learned="CoOp"), "learned by CoOp"),
    ],
    ids=["caption", "ensemble", "text head", "linear head", "fixed", "learned"],
)
def test_each_task_names_its_prompts(task: Any, expected: UsedPrompts, summary: str, tmp_path: Path) -> None:
    found = task()
    assert found.used_prompts() == expected and expected.summary() == summary
    if found.backbone is not None:
        assert prompts_of(read_adapter(found.save(tmp_path / "adapter"))) == expected


@pytest.mark.parametrize(("given", "expected"), [(None, TYPED), (TEMPLATES, TEMPLATES)], ids=["the file's", "typed"])
def test_a_test_uses_typed_prompts_or_those_of_the_file(
    given: Any, expected: list[str], fit: Any, trainer: Any, digits: Any, tmp_path: Path
) -> None:
    task = make("text head")
    fit(task, {"templates": TYPED, "steps": 1})
    folder = task.save(tmp_path / "adapter")
    again = make("text head")
    again.saved = read_adapter(folder)
    trainer(callbacks=[loading(folder)], limit_test_batches=1).test(
        AdaptationModule(again), digits(templates=given), verbose=False
    )
    clip = load_clip("tiny", "random", seed=0)
    head = encode_prompts(clip.model, clip.tokenizer, task.classnames, expected, "cpu")
    torch.testing.assert_close(again.head_tensors()["head"], clip.model.logit_scale.exp().detach() * head)


def prompted(**options: Any) -> PromptTask:
    task = PromptTask("tiny", "random", **options)
    task.set_classes(["cat", "dog"], TEMPLATES)
    return task


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: make("linear head"), "--data.templates: LinearHeadTask reads no text"),
        (lambda: PromptTask("tiny", "random", prompts=CoOp()), "--data.templates: PromptTask .* --model.prompts.words"),
        (lambda: PromptTask("tiny", "random", prompts=Fixed()), "--model.prompts.template"),
        (lambda: make("vision-language", caption="{}!"), r"'\{\}!' and --data.templates .*model.caption null"),
    ],
    ids=["linear head", "learned", "fixed", "caption"],
)
def test_prompts_that_would_not_count_are_refused(task: Any, message: str, fit: Any) -> None:
    with pytest.raises(UserError, match=message):
        fit(task(), {"templates": TYPED})


@pytest.mark.parametrize(
    ("value", "message"),
    [(7, r"prompts.evaluation\[0\] is 7"), ("a photo", r"its prompt .* has no \{\} for the class")],
)
def test_a_damaged_prompt_of_a_file_is_one_line(value: Any, message: str, tmp_path: Path) -> None:
    file = built("vision-language").save(tmp_path / "adapter") / "adapter_config.json"
    content = json.loads(file.read_text())
    content["metadata"]["prompts"]["evaluation"] = [value]
    del content["sha256"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"is damaged or was changed: .*{message}"):
        facts(read_adapter(file.parent))


@register
class Postcards(VisionLanguageTask):
    """A task of one's own, with its own caption and evaluation."""

    pretrained: str | None = "random"
    adapter: Adapter = RANK_2
    caption: str | None = field(init=False, default="my {}")

    def used_prompts(self, templates: Any = None) -> UsedPrompts:
        found = super().used_prompts(templates)
        return replace(found, evaluation=[*found.evaluation, "a postcard of a {}"])


def test_a_task_of_ones_own_names_its_prompts_in_its_file(fit: Any, tmp_path: Path) -> None:
    task, expected = Postcards(), ["my {}", "a postcard of a {}"]
    fit(task, {"steps": 1})
    folder = task.save(tmp_path / "adapter")
    assert prompts_of(read_adapter(folder)) == load_task(folder).used_prompts() == task.used_prompts()
    assert task.used_prompts().evaluation == expected


def test_typed_prompts_of_a_file_count_for_other_classes(typed: Any, trainer: Any, digits: Any, tmp_path: Path) -> None:
    folder = typed.save(tmp_path / "run" / "adapter")
    assert adapter_config(folder)["data"]["templates"] == TYPED
    assert typed.used_prompts(["other {}"]).evaluation == TYPED
    again = make("vision-language", caption=None)
    again.saved = read_adapter(folder)
    trainer(limit_test_batches=1).test(AdaptationModule(again), digits(classes="new"), verbose=False)
    assert again.templates == TYPED and again.used_prompts(["other {}"]).evaluation == TYPED


def test_a_built_task_refuses_other_typed_prompts(typed: Any, trainer: Any, digits: Any) -> None:
    quick = trainer(limit_test_batches=1)
    quick.test(AdaptationModule(typed), digits(templates=TYPED), verbose=False)
    with pytest.raises(UserError, match="was built for other prompts"):
        quick.test(AdaptationModule(typed), digits(templates=TEMPLATES), verbose=False)


def test_a_task_has_the_preprocessing_of_its_file(typed: Any, tmp_path: Path) -> None:
    frame = replace(typed.run.data.frame, resize="squash")
    assert typed.frame == typed.run.data.frame
    restored = load_task(typed.save(tmp_path / "adapter", {"frame": asdict(frame)}))
    assert restored.frame == frame
