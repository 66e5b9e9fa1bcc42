"""The last share of the steps trains a classifier alone, from the class features."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import AdaLoRA
from randlora_pl.prompts import CoCoOp
from randlora_pl.tasks import DePT, PromptTask
from randlora_pl.tasks.images import normalize
from randlora_pl.tasks.restore import load_task
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.tasks.small import images, trained

from .learners import make_prompts

OPTIONS = {"learning_rate": 0.01, "prompt_learning_rate": 0.01, "weight_decay": 0.1}


class EachStep(L.Callback):
    """Values after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.seen.append(trained(pl_module.objective))


def test_stages_train_one_after_the_other(fit: Any, tmp_path: Path) -> None:
    """Steps 0 to 2 are a run of their own; steps 3 and 4 train the classifier by a new AdamW and cosine."""
    data = {"batch_size": 8}
    plain, task = make_prompts("two stages", **OPTIONS, classifier_steps=0), make_prompts("two stages", **OPTIONS)
    fit(plain, data | {"steps": 3})
    fit(task, data | {"steps": 5}, callbacks=[each := EachStep()])
    first = {name: value for name, value in each.seen[2].items() if name != "classifier"}
    assert first.keys() == trained(plain).keys()
    for name, value in first.items():
        assert torch.equal(value, trained(plain)[name]) and torch.equal(value, trained(task)[name]), name
    assert not any(values["classifier"].any() for values in each.seen[:3])
    plain.eval()
    with torch.no_grad():
        texts = normalize(plain._texts(plain.model))
        moved = each.seen[3]["classifier"] - texts * (
            1 - 0.01 * 0.1
        )  # the first step of AdamW has the size of the rate
        assert moved.abs().median() == pytest.approx(0.01, rel=1e-3) and moved.abs().max() < 0.0101
        assert 0 < (each.seen[4]["classifier"] - each.seen[3]["classifier"]).abs().max() < 0.0075  # half way down

        task.eval()
        found, own = task.class_logits(images(3)), task._images(images(3))
        weight = each.seen[4]["classifier"]
        torch.testing.assert_close(found, task.scale() * normalize(own) @ normalize(weight).T)
        again = load_task(task.save(tmp_path / "adapter"))
        assert isinstance(again, PromptTask)
        torch.testing.assert_close(again.class_logits(images(3)), found)
        torch.testing.assert_close(again.head_tensors()["head"], task.scale() * normalize(weight))
        for each_task in (task, again):  # new classes, by the text tower
            each_task.set_classes(["cat", "dog"], ["{}"])
        others = task.scale() * normalize(own) @ normalize(task._texts(task.model)).T
        torch.testing.assert_close(task.class_logits(images(3)), others)
        torch.testing.assert_close(again.class_logits(images(3)), others)


@in_one_item("options", [{"head": DePT()}, {"prompts": CoCoOp(length=2, words=None)}, {"schedule": "epochs"}])
def test_options_without_class_features_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="classifier_steps needs"):
        make_prompts("two stages", **options)


def test_a_procedure_and_a_whole_run_are_refused(fit: Any) -> None:
    with pytest.raises(UserError, match="classifier_steps is 1"):
        make_prompts("two stages", classifier_steps=1.0)
    with pytest.raises(UserError, match="AdaLoRA's procedure"):
        fit(make_prompts("two stages", adapter=AdaLoRA(rank=2)))
