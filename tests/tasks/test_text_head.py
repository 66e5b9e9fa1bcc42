"""The frozen text head: what it holds, that it is made once and before any adapter, and that no text tower stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from randlora_pl.adapters import NoLA
from randlora_pl.models import encode_prompts, load_clip
from randlora_pl.tasks import TextHeadTask
from randlora_pl.utils import reuse
from randlora_pl.utils.errors import UserError

from .small import CLASSES, TEMPLATES, batch, built


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for every test of this file, and none in memory."""
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path))
    monkeypatch.setattr(reuse, "_kept", None)
    return tmp_path


def task_of(**options: Any) -> TextHeadTask:
    task = built("text head", **options)
    assert isinstance(task, TextHeadTask)
    return task


def expected_head() -> torch.Tensor:
    clip = load_clip("tiny", "random", seed=0)
    rows = encode_prompts(clip.model, clip.tokenizer, CLASSES, TEMPLATES, "cpu")
    return rows * float(clip.model.logit_scale.detach().exp())  # type: ignore[operator]


def test_head_is_the_scaled_average_of_the_prompts() -> None:
    torch.testing.assert_close(task_of().head, expected_head())


def test_head_is_made_before_the_adapter() -> None:
    """The official start of NoLA is not a zero update; a head that was made with it would differ."""
    nola = task_of(adapter=NoLA(num_bases=16, init="official"))
    assert torch.equal(nola.head, task_of().head)


def test_head_is_made_once_and_then_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = task_of().head
    assert len(list(cache.rglob("*.safetensors"))) == 1

    def no_more(*_: Any, **__: Any) -> None:
        raise AssertionError("the text tower ran again")

    monkeypatch.setattr("randlora_pl.models.text.encode_prompts", no_more)
    assert torch.equal(task_of().head, first)
    with pytest.raises(AssertionError, match="ran again"):
        task_of(seed=1)  # other weights, another head


def test_only_the_image_tower_stays() -> None:
    task = task_of()
    assert {name.split(".")[1] for name, _ in task.named_parameters()} == {"visual"}
    assert {name.split(".")[0] for name, _ in task.named_parameters()} == {"backbone"}
    assert task.report.total - task.report.trainable == sum(
        p.numel()
        for p in load_clip("tiny", "random").model.visual.parameters()  # type: ignore[union-attr]
    )
    with pytest.raises(UserError, match="text"):
        task_of(targets=["text:mlp"])


def test_losses_are_cross_entropies_over_all_classes() -> None:
    task, part = task_of(), batch([3, 0, 0])
    with torch.no_grad():
        losses, right = task.sample_losses(part)
        features = F.normalize(task.model(part["image"]), dim=1)
        logits = features @ expected_head().T
    torch.testing.assert_close(losses, F.cross_entropy(logits, part["label"], reduction="none"))
    assert right.tolist() == (logits.argmax(1) == part["label"]).tolist()
    torch.testing.assert_close(task.class_logits(part["image"]), logits)


def test_a_saved_head_is_taken_back() -> None:
    task, other = task_of(), task_of(seed=1)
    assert not torch.equal(task.head, other.head)
    other.load_head(task.head_tensors())
    assert torch.equal(task.head, other.head)
    with pytest.raises(UserError, match="128"):
        other.load_head({"head": task.head[:3]})
    with pytest.raises(UserError, match=r"missing \['head'\]"):
        other.load_head({})
