"""Tip-Adapter: its keys, its logits, its search, and its files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.optim import AdamW

from randlora_pl.adapters import LoRA, read_adapter
from randlora_pl.data.loader import DrawPlan, TrainSchedule
from randlora_pl.interop.base_model import load_base
from randlora_pl.interop.merge import merged
from randlora_pl.interop.onnx import load_program
from randlora_pl.interop.peft_export import export_peft
from randlora_pl.prompts import CoOp
from randlora_pl.tasks import PromptTask, TipAdapter, load_task, load_tasks
from randlora_pl.tasks.prompt import parts
from randlora_pl.utils.errors import UserError
from tests.tasks.small import batch, images

from .learners import make_prompts

FREE = TipAdapter(rate_factor=0)
DATA = {"steps": 1, "shots": 3, "batch_size": 8, "eval_batch_size": 32}


class Start(L.Callback):
    """The keys and the logits of three images before the first step, and the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            with torch.no_grad():
                task = pl_module.objective
                self.keys, self.logits = task.decoupled.keys.clone(), task.class_logits(images(3))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def logits(task: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = task.eval().class_logits(inputs)
    return found


def slow(task: Any, inputs: Tensor, alpha: float, beta: float) -> Tensor:
    """The equation, image by image and key by key."""
    with torch.no_grad():
        own, texts = task.model.encode_image(inputs), task.model.encode_text(task.tokenizer(names(task)))
        rows = []
        for f in F.normalize(own, dim=-1):
            row = 100 * F.normalize(texts, dim=-1) @ f * task.scale() / 100
            for key, label in zip(task.decoupled.keys, task.decoupled.labels.tolist(), strict=True):
                row[int(label)] += alpha * torch.exp(-beta * (1 - f @ key))
            rows.append(row)
    return torch.stack(rows)


def names(task: Any) -> list[str]:
    return [f"a {name}." for name in task.classnames]


def test_logits_are_the_equations_and_the_first_step_is_free_of_training(fit: Any, digits: Any) -> None:
    task = make_prompts("tip", head=FREE.replace(search=False))
    own = fit(task, DATA)
    cache: Any = task.decoupled
    data = own.datamodule
    samples = data.samples("train")
    assert len(cache.keys) == len(samples) == 30 and cache.labels.tolist() == samples.labels.tolist()
    views = data.batches(TrainSchedule(DrawPlan(30, 300, 15, data.seed, "epochs", stream="cache"), 15))
    sums = torch.zeros_like(cache.keys)
    with torch.no_grad():
        for number in range(20):
            view = views[number]
            sums[view["index"]] += F.normalize(task.model.encode_image(view["image"]), dim=-1)
    torch.testing.assert_close(cache.keys.detach(), F.normalize(sums / 10, dim=-1), rtol=0, atol=1e-5)

    torch.testing.assert_close(logits(task, images(3)), slow(task, images(3), 1, 5.5), rtol=1e-5, atol=1e-4)
    plain = task._logits(task._images(images(3)), task._texts(task.model))
    cache.factors[0] = 0
    torch.testing.assert_close(logits(task, images(3)), plain, rtol=0, atol=1e-4)  # zero-shot
    cache.factors.copy_(torch.tensor([1.0, 1e6]))  # the nearest key
    keys = torch.arange(0, 30, 4)
    with torch.no_grad():
        at_keys = cache.mixed(torch.zeros(len(keys), 10), cache.keys[keys])
    assert at_keys.argmax(1).tolist() == cache.labels[keys].tolist()

    trains = make_prompts("tip", head=TipAdapter(search=False), prompt_learning_rate=0.01)
    fit(trains, DATA | {"steps": 4}, callbacks=[start := Start()])
    assert torch.equal(start.keys, cache.keys)
    cache.factors.copy_(torch.tensor([1, 5.5]))
    torch.testing.assert_close(start.logits, logits(task, images(3)), rtol=0, atol=1e-5)
    assert (trains.decoupled.keys - start.keys).abs().max() > 1e-3  # type: ignore[union-attr]
    assert [group["eps"] for group in trains.optimizer_groups()] == [1e-4]


def test_the_config_has_the_decay_of_the_released_code(fit: Any) -> None:
    """It names no decay, so it has the default of PyTorch's AdamW."""
    model = yaml.safe_load(Path("configs/prompts/tip_adapter.yaml").read_text())["model"]["init_args"]
    task = make_prompts("tip", prompt_weight_decay=model.get("prompt_weight_decay", 0.0))
    own = fit(task, DATA).optimizers[0].param_groups
    assert [group["weight_decay"] for group in own] == [AdamW([torch.zeros(1)]).defaults["weight_decay"]]


def test_gradients_are_of_the_mixed_logits_and_training_lowers_the_loss(fit: Any) -> None:
    task = make_prompts("tip", prompt_learning_rate=0.01)
    fit(task, DATA | {"steps": 20, "batch_size": 30, "sampling": "epochs"}, callbacks=[seen := Start()])  # all images
    assert sum(seen.losses[-3:]) < 0.9 * sum(seen.losses[:3])
    data = batch([0, 1, 2, 3])
    cache: Any = task.decoupled
    cache.keys.grad = None
    losses, right = task.sample_losses(data)
    losses.sum().backward()
    f, texts = F.normalize(task._images(data["image"]), dim=-1), F.normalize(task._texts(task.model), dim=-1)
    own = cache.keys.detach().clone().requires_grad_()
    alpha, beta = cache.factors.tolist()
    found = (
        task.scale() * f @ texts.T + alpha * torch.exp(-beta * (1 - f @ own.T)) @ F.one_hot(cache.labels.long()).float()
    )
    F.cross_entropy(found, data["label"], reduction="sum").backward()
    torch.testing.assert_close(cache.keys.grad, own.grad, rtol=1e-4, atol=1e-6)
    assert own.grad is not None and own.grad.any() and right.tolist() == (found.argmax(1) == data["label"]).tolist()


def test_a_search_is_right_more_often_on_validation_images(fit: Any, trainer: Any, digits: Any) -> None:
    found = {}
    for search in (False, True):
        task = make_prompts("tip", head=FREE.replace(search=search))
        own = fit(task, DATA)
        cache: Any = task.decoupled
        with torch.no_grad():
            parts = [(each["label"], logits(task, each["image"])) for each in own.datamodule.val_dataloader()]
        found[search] = sum(int((scores.argmax(1) == labels).sum()) for labels, scores in parts)
        assert (cache.factors.tolist() == [1, 5.5]) != search
    assert found[True] > found[False]
    task = make_prompts("tip", head=FREE)
    fit(task, DATA | {"train_split": "full"})  # no validation images
    assert task.facts()["cache_alpha"] == 1 and task.facts()["cache_beta"] == 5.5
    keys = task.decoupled.keys.numel()  # type: ignore[union-attr]
    for head, count in ((FREE, 0), (TipAdapter(), keys)):
        task.head = head
        assert task.facts()["trainable_parameters"] == sum(task.parameter_parts().values()) == count


def test_files_programs_and_other_classes(fit: Any, tmp_path: Path) -> None:
    task = make_prompts("tip")
    fit(task, DATA | {"steps": 2})
    folder = task.save(tmp_path / "adapter")
    again = load_task(folder)
    assert isinstance(again, PromptTask)
    expected = logits(task, images(3))
    torch.testing.assert_close(logits(again, images(3)), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(logits(load_tasks({"tip": folder})["tip"], images(3)), logits(again, images(3)))
    program = load_program(folder)
    pixels = program.examples(2, 0)
    mean, std = (torch.tensor(program.facts[each]).view(3, 1, 1) for each in ("mean", "std"))
    torch.testing.assert_close(program.module(pixels)[0], logits(again, (pixels - mean) / std), rtol=1e-5, atol=1e-4)
    exported = torch.export.export(program.module, (pixels,)).module()
    torch.testing.assert_close(exported(pixels)[0], program.module(pixels)[0], rtol=1e-5, atol=1e-4)
    again.set_classes(["cat", "dog"], [])
    torch.testing.assert_close(
        logits(again, images(3)), again._logits(again._images(images(3)), again._texts(again.model)).detach()
    )
    file = read_adapter(folder)
    with pytest.raises(UserError, match="cannot be merged: TipAdapter compares an image with training images"):
        merged(load_base(file), file)
    with pytest.raises(UserError, match=r"\(TipAdapter\): PEFT has no place"):
        export_peft(folder, tmp_path / "peft")
    for labels in (torch.zeros(3, 1), torch.tensor([10.0]), torch.tensor([0.5])):
        file.extra["decoupled.labels"] = labels
        with pytest.raises(UserError, match="lacks the classes of the images that TipAdapter keeps"):
            TipAdapter().build(SimpleNamespace(saved=file, own_classes=range(10)), 4)  # type: ignore[arg-type]


def test_what_does_not_fit_is_one_line(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"prompts": CoOp(length=2, words=None)}, {"adapter": LoRA(rank=2)}, {"schedule": "epochs"}):
        with pytest.raises(UserError, match="TipAdapter keeps features of the pretrained model: it needs"):
            make_prompts("tip", **options)
    with pytest.raises(UserError, match=r"rate_factor is 0\): give --data.steps 1"):
        fit(make_prompts("tip", head=FREE), DATA | {"steps": 2})
    task = make_prompts("tip")
    task.set_classes(["cat", "dog"], [])
    with pytest.raises(UserError, match="it needs a run with ImageData"):
        task.adapt()
    monkeypatch.setattr(parts, "MOST_IMAGES", 20)
    with pytest.raises(UserError, match="30 are too many, at most 20"):
        fit(make_prompts("tip"), DATA)
    for option in ({"alpha": -1.0}, {"beta": -1.0}, {"rate_factor": -1.0}):
        with pytest.raises(UserError, match=f"TipAdapter: {next(iter(option))} is -1"):
            TipAdapter(**option)
