"""Zero-shot accuracy of a model on other classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import read_adapter
from randlora_pl.commands.analyze import Images
from randlora_pl.commands.analyze.models import forgetting
from randlora_pl.data.unlabelled import batches, framed, random_samples
from randlora_pl.lab.analysis.forgetting import check_task, prompts_of
from randlora_pl.models.text import zero_shot_accuracy
from randlora_pl.prompts import CoOp
from randlora_pl.tasks import DePT, PromptTask
from randlora_pl.utils.errors import UserError
from tests.tasks.small import built, shake, two_blocks


class Eye(nn.Module):
    """Images are their own embeddings."""

    def encode_image(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_accuracy_is_the_share_of_images_nearest_to_their_class() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(5, 12, generator=generator), dim=1)
    images, labels = torch.randn(40, 3, 2, 2, generator=generator), torch.randint(5, (40,), generator=generator)
    right = 0
    for image, label in zip(images, labels.tolist(), strict=True):
        cosines = [float(F.cosine_similarity(image.flatten(), one, dim=0)) for one in classes]
        right += cosines.index(max(cosines)) == label
    told: list[int] = []
    batches = zip(images.split(16), labels.split(16), strict=True)
    assert zero_shot_accuracy(Eye(), classes[None], batches, told.append) == ([pytest.approx(100 * right / 40)], 40)
    assert told == [16, 16, 8] and 0 < right < 40


def saved(kind: str, folder: Path, **options: Any) -> Any:
    with two_blocks():
        return read_adapter(built(kind, **options).save(folder))


def test_prompts_are_those_of_the_task(tmp_path: Path) -> None:
    templates = ["a {}", "the {}"]
    assert prompts_of(saved("text head", tmp_path / "a"), templates) == templates
    captioned = saved("vision-language", tmp_path / "b", caption="A photo of {}")
    assert prompts_of(captioned, templates) == ["A photo of {}"]
    assert prompts_of(saved("vision-language", tmp_path / "c", eval_prompts="ensemble"), templates) == templates
    task = built("text head")
    task.typed_templates = True
    assert prompts_of(read_adapter(task.save(tmp_path / "d")), ["other {}"]) == task.templates


def test_known_classes_are_predicted_with_the_second_head(tmp_path: Path) -> None:
    task = PromptTask("tiny", prompts=CoOp(length=2, words=None), head=DePT())
    data = framed({"dataset": "digits"}, task.image_spec, 40)
    data.setup("test")
    task.set_classes(data.classnames, [])
    task.adapt()
    shake(task)
    task.eval().save(tmp_path / "run")
    (images,) = batches(data, random_samples(data.samples("test"), 40, 0), 40)
    tested = Images(images=40, device="cpu")
    assert forgetting([tmp_path / "run"], datasets=["digits"], tested=tested, output=str(tmp_path / "out")) == 0
    (row,) = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert (row["after"], row["images"]) == task.percent_among(data.classnames, [images])
    task.decoupled = None
    assert row["after"] != task.percent_among(data.classnames, [images])[0]


def test_only_text_heads_name_other_classes(tmp_path: Path) -> None:
    check_task(saved("text head", tmp_path / "a"))
    with pytest.raises(UserError, match="LinearHeadTask"):
        check_task(saved("linear head", tmp_path / "b"))
