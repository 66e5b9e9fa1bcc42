"""Captions, scales and prompts of the vision-language task, and its figures on pairs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import LoRA
from randlora_pl.data import ImageData
from randlora_pl.models import encode_prompts, load_clip
from randlora_pl.tasks import AdaptationModule, VisionLanguageTask, vision_language
from randlora_pl.tasks.vision_language import padded_captions
from tests.support.products import in_one_item

from .small import CLASSES, TEMPLATES, batch, built, images, in_run, make, write_pairs
from .test_retrieval import slow_recalls

Make = Callable[..., Any]


def task_of(**options: Any) -> VisionLanguageTask:
    task = built("vision-language", **options)
    assert isinstance(task, VisionLanguageTask)
    return task


def counted(task: VisionLanguageTask, method: str) -> list[int]:
    """Rows of every later call of ``encode_text`` or ``encode_image``."""
    rows: list[int] = []
    encode: Any = getattr(task.model, method)
    setattr(task.model, method, lambda inputs: rows.append(len(inputs)) or encode(inputs))  # type: ignore[func-returns-value]
    return rows


# Scale and captions


def test_scale_is_exponentiated_or_raw() -> None:
    exp, raw = task_of().eval(), task_of(logit_scale="raw").eval()
    kept = math.log(1 / 0.07)  # CLIP's start
    assert float(exp.scale()) == pytest.approx(1 / 0.07) and float(raw.scale()) == pytest.approx(kept)
    with torch.no_grad():
        torch.testing.assert_close(exp.class_logits(images(3)) * 0.07 * kept, raw.class_logits(images(3)))
        losses = [task.sample_losses(batch([0, 1, 1]))[0] for task in (exp, raw)]
    assert not torch.allclose(*losses)


@pytest.mark.parametrize("scale", [pytest.param("exp", marks=pytest.mark.full), "raw"])
def test_full_fine_tuning_trains_the_scale(scale: str) -> None:
    task = task_of(method="full", logit_scale=scale)
    task.sample_losses(batch([0, 1, 1]))[0].sum().backward()
    assert task.model.logit_scale.grad.abs() > 0  # type: ignore[union-attr, operator]


def prompts(templates: list[str]) -> Tensor:
    clip = load_clip("tiny", "random", seed=0)
    return encode_prompts(clip.model, clip.tokenizer, CLASSES, templates, "cpu")


def test_evaluation_prompts_are_the_caption_or_the_ensemble() -> None:
    one, many = task_of().class_features(), task_of(eval_prompts="ensemble").class_features()
    torch.testing.assert_close(one, prompts(["An image of {}"]))
    torch.testing.assert_close(many, prompts(TEMPLATES))
    assert not torch.allclose(one, many, atol=1e-3)


# When the text tower runs


def test_class_prompts_are_encoded_once_in_an_evaluation(trainer: Make, digits: Make) -> None:
    task, data = make("vision-language"), digits(eval_batch_size=20)
    assert isinstance(task, VisionLanguageTask)
    own = trainer(limit_test_batches=3, limit_val_batches=3)
    own.test(AdaptationModule(task), data, verbose=False)
    texts, pictures = counted(task, "encode_text"), counted(task, "encode_image")
    for verb in (own.test, own.validate):
        verb(AdaptationModule(task), data, verbose=False)
        assert texts == [10] and pictures == [20, 20, 20]
        texts.clear(), pictures.clear()


def test_a_caption_that_occurs_often_is_encoded_once() -> None:
    task = task_of()
    rows = counted(task, "encode_text")
    task.sample_losses(batch([3, 1, 3, 3, 1]))
    assert rows == [2]


@in_one_item("loss_batch", ["joint", "local"])
def test_compiled_towers_see_few_shapes_and_losses_and_gradients_stay(loss_batch: Any) -> None:
    found: list[Any] = []
    for compiles in (False, True):
        task = task_of(loss_batch=loss_batch)
        task.torch_compile = compiles  # the blocks are not
        rows, part = counted(task, "encode_text"), batch([3, 1, 3, 3, 1])
        losses, right = task.sample_losses(part)
        (losses - task.loss_floor(part)).sum().backward()
        found.append((losses.detach(), right, {n: p.grad for n, p in task.named_parameters() if p.grad is not None}))
        assert rows == [4 if compiles else 2]
    torch.testing.assert_close(found[1], found[0])


def test_captions_are_padded_to_multiples_of_16_or_all_classes() -> None:
    classes, counts = torch.tensor([2, 5, 7]), torch.tensor([1, 3, 2])
    for count, most, rows in ((3, 100, 16), (3, 5, 5), (3, 3, 3), (1, 1000, 16)):
        padded = padded_captions(classes[:count], counts[:count], most)
        assert [len(each) for each in padded] == [rows, rows]
        assert torch.equal(padded[0], padded[0].sort().values) and padded[1].sum() == counts[:count].sum()
    assert len(padded_captions(torch.arange(16), torch.ones(16), 40)[0]) == 16


@pytest.mark.parametrize("loss_batch", ["joint", "local"])
def test_logged_loss_leaves_out_what_equal_captions_cause(
    loss_batch: str, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimized loss keeps it; the images have different weights, as with `--data.balance weights`."""
    task, logged = task_of(loss_batch=loss_batch), {}
    module = in_run(task, trainer())
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    calls: list[int] = []
    count = vision_language.counted_classes
    monkeypatch.setattr(vision_language, "counted_classes", lambda *given: calls.append(1) or count(*given))  # type: ignore[func-returns-value]
    whole = {"step_classes": torch.tensor([0, 2]), "step_counts": torch.tensor([1, 4])}
    part = batch([2, 0, 2], [0.5, 0.125, 0.375]) | whole
    loss = float(module.training_step(part, 0).detach())
    module.log_step()
    assert len(calls) == (loss_batch == "local"), "each call waits for the GPU"
    losses = task.sample_losses(part)[0].detach()
    assert loss == float((losses * part["weight"]).sum())
    assert loss - logged["train/loss"] == pytest.approx(0.875 * math.log(4 if loss_batch == "joint" else 2), abs=1e-5)
    assert "minimum" in task.loss_note


@pytest.mark.parametrize("targets", [["visual:mlp"], None])
def test_steps_of_a_scaled_loss_carry_the_right_gradient(targets: list[str] | None, trainer: Make) -> None:
    """As with 16-mixed, whose scaler multiplies the loss of every micro-batch."""

    found = []
    parts = [batch([0, 1], micro_batch=0, micro_batches=2), batch([2, 1], micro_batch=1, micro_batches=2)]
    whole = {"step_classes": torch.tensor([0, 1, 2]), "step_counts": torch.tensor([1, 2, 1])}
    for scaled in (False, True):
        task = task_of(adapter=LoRA(rank=2, alpha=8), targets=targets)
        own = trainer(accumulate_grad_batches=2)
        in_run(task, own)
        own.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
        factor = (1024.0 if scaled else 1.0) / 2  # Lightning divides by the accumulation
        for part in parts:
            losses, _ = task.sample_losses(part | whole)
            carried = task.accumulated_loss(part)
            ((losses.sum() + (0 if carried is None else carried)) * factor).backward()
        assert task.step_features is None
        found.append({n: p.grad / factor for n, p in task.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1])
    assert all(value.abs().sum() > 0 for name, value in found[0].items() if name.endswith(".B"))


# Pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[..., ImageData]:
    path = write_pairs(tmp_path, images=9, captions=3)
    return lambda **options: ImageData(dataset="pairs", root=str(path), eval_batch_size=4, **options)


@torch.no_grad()
def slow_pairs(task: VisionLanguageTask, data: ImageData) -> dict[str, float]:
    """Every image and every caption of the test split once, then query by query."""
    model: Any = task.model
    samples = data.samples("test")
    batches = list(data.test_dataloader())
    pixels = torch.cat([part["image"] for part in batches])
    numbers, labels = samples.rows.tolist(), samples.labels.tolist()
    image_ids, caption_ids = sorted(set(numbers)), sorted(set(labels))
    unit = nn.functional.normalize
    pictures = torch.cat([unit(model.encode_image(pixels[numbers.index(n)][None])) for n in image_ids])
    texts = torch.cat([unit(model.encode_text(task.tokenizer([data.classnames[c]]))) for c in caption_ids])
    own = [(image_ids.index(n), caption_ids.index(c)) for n, c in zip(numbers, labels, strict=True)]
    return slow_recalls(pictures, texts, own)


def test_recall_of_pairs_equals_a_slow_loop(pairs: Callable[..., ImageData], trainer: Make) -> None:
    task, data, own = make("vision-language"), pairs(steps=3, batch_size=8), trainer()
    assert isinstance(task, VisionLanguageTask)
    own.fit(AdaptationModule(task), data)
    (found,) = own.test(AdaptationModule(task), data, verbose=False)
    expected = slow_pairs(task.eval(), data)
    assert found.pop("test/acc") == found["test/recall@1"]
    assert {key.removeprefix("test/"): value for key, value in found.items()} == pytest.approx(expected)
    assert len(data.samples("test")) == 27 and len(set(data.samples("test").labels)) < 27
    assert 0 < expected["recall@10"] <= 1 and expected["recall@1"] < expected["recall@10"]


def test_captions_of_pairs_are_taken_as_they_are(pairs: Callable[..., ImageData], trainer: Make) -> None:
    task, data = make("vision-language", caption="never: {}", eval_prompts="caption"), pairs(steps=1, batch_size=8)
    assert isinstance(task, VisionLanguageTask)
    trainer(limit_val_batches=1.0).fit(AdaptationModule(task), data)
    assert torch.equal(task.tokens[:, 0], load_clip("tiny", "random").tokenizer(data.classnames))  # type: ignore[index]
