"""Validation and test: on merged weights that are restored, every sample once, training undisturbed."""

import copy
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from randlora_pl.adapters import adapted_layers, disabled, merge_and_unload
from randlora_pl.data import ImageData, open_images
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, Objective, TextHeadTask, VisionLanguageTask
from tests.support.products import marked

from .small import KINDS, METHODS, NAMING, batch, built, frozen, make, shake, trained

Make = Callable[..., Any]


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def plain(task: Objective) -> Any:
    """A copy of the model without adapter, its update merged."""
    return merge_and_unload(copy.deepcopy(task.model)).eval()


def slow_logits(task: Objective, model: Any, image: Tensor) -> list[float]:
    """Logits of one image, class by class, from a plain model with merged weights."""
    if isinstance(task, LinearHeadTask):
        return [float(row @ unit(model(image[None])[0])) for row in task.head.weight]
    if isinstance(task, TextHeadTask):
        return [float(row @ unit(model(image[None])[0])) for row in task.head]
    assert isinstance(task, VisionLanguageTask)
    captions = [unit(model.encode_text(task.tokenizer([f"An image of {name}"]))[0]) for name in task.classnames]
    own = unit(model.encode_image(image[None])[0])
    return [math.exp(float(model.logit_scale)) * float(own @ caption) for caption in captions]


@torch.no_grad()
def slow_figures(task: Objective, images: Tensor, labels: list[int]) -> tuple[float, float]:
    """(mean cross-entropy, accuracy), sample by sample."""
    losses, right, model = [], [], plain(task)
    for image, label in zip(images, labels, strict=True):
        logits = slow_logits(task, model, image)
        highest = max(logits)
        losses.append(math.log(sum(math.exp(z - highest) for z in logits)) + highest - logits[label])
        right.append(logits.index(highest) == label)
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize(("kind",), marked(zip(NAMING), lambda row: row[0] in ("vision-language",)))
def test_test_figures_equal_a_slow_loop(kind: str, trainer: Make, digits: Make) -> None:
    task, own, data = make(kind), trainer(limit_test_batches=2), digits(eval_batch_size=7)
    own.fit(AdaptationModule(task), data)
    shake(task, 0.02)
    (found,) = own.test(AdaptationModule(task), data, verbose=False)
    batches = [part for part, _ in zip(data.test_dataloader(), range(2), strict=False)]
    images, labels = (torch.cat([part[key] for part in batches]) for key in ("image", "label"))
    loss, accuracy = slow_figures(task, images, labels.tolist())
    assert found["test/loss"] == pytest.approx(loss, rel=1e-4)
    assert found["test/acc"] == pytest.approx(accuracy)


def padded(part: dict[str, Any], count: int) -> dict[str, Any]:
    """The batch with weight-0 samples of wrong labels behind it."""
    more = {key: torch.cat([part[key], part[key][:count]]) for key in ("image", "label", "index", "weight")}
    more["label"][-count:] = (more["label"][-count:] + 1) % 4
    more["weight"][-count:] = 0
    return more


@pytest.mark.parametrize(("kind",), marked(zip(KINDS), lambda row: row[0] != "text head"))
def test_padding_is_not_counted(kind: str, trainer: Make) -> None:
    task = built(kind)
    part = batch([0, 1, 2, 3, 0, 1, 2])
    nothing = padded(part, 3) | {"weight": torch.zeros(10)}
    runs = [DataLoader(parts, batch_size=None) for parts in ([part], [padded(part, 3), nothing])]
    figures = [trainer().test(AdaptationModule(task), loader, verbose=False)[0] for loader in runs]
    assert figures[0].keys() == {f"test/{measure.name}" for measure in task.measures}
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


class Look(L.Callback):
    """Whether every adapted layer is merged, before, in and after an evaluation."""

    def __init__(self) -> None:
        self.merged: list[bool] = []

    def look(self, task: Objective) -> None:
        layers = [layer for layer in adapted_layers(task.model).values() if layer.delta is not None]
        self.merged.append(all(layer.merged for layer in layers))

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.look(pl_module.objective)

    on_test_start = on_validation_start
    on_validation_end = on_validation_start
    on_test_end = on_validation_start

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.look(pl_module.objective)

    on_test_batch_end = on_validation_batch_end


@pytest.mark.parametrize(
    ("verb", "method"),
    marked(
        product(["validate", "test"], [method for method in METHODS if method not in ("full", "bitfit")]),
        lambda row: row in (("validate", "dora"), ("test", "randlora")),
    ),
)
def test_evaluation_runs_on_merged_weights_and_restores_them_bit_by_bit(
    method: str, verb: str, trainer: Make, digits: Make
) -> None:
    task, data = make("vision-language", method), digits(eval_batch_size=20)
    own = trainer(limit_test_batches=2, limit_val_batches=2, callbacks=[look := Look()])
    getattr(own, verb)(AdaptationModule(task), data, verbose=False)
    shake(task)
    before, adapter = frozen(task), trained(task)
    getattr(own, verb)(AdaptationModule(task), data, verbose=False)
    assert look.merged == [False, True, True, False] * 2
    assert frozen(task).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in frozen(task).items())
    assert all(torch.equal(value, adapter[name]) for name, value in trained(task).items())


@pytest.mark.parametrize(
    ("interval", "method"), marked(product([1, 2, 3], ["lora", "randlora"]), lambda row: row == (1, "randlora"))
)
def test_validations_leave_no_trace_in_the_training(method: str, interval: int, fit: Make) -> None:
    """Also between two micro-batches of a step, whose text features wait for their backward pass."""
    plain, watched = (make("vision-language", method, targets=["all"]) for _ in range(2))
    data, options = {"steps": 2, "batch_size": 6}, {"accumulate_grad_batches": 3}
    fit(plain, data, **options)
    trainer = fit(watched, data, **options, val_check_interval=interval, limit_val_batches=1)
    assert "val/acc" in trainer.callback_metrics
    assert all(torch.equal(value, trained(plain)[name]) for name, value in trained(watched).items())


def test_validation_within_a_step_gives_the_same_figures(fit: Make) -> None:
    """It runs on unmerged weights there."""
    figures = []
    for options in ({"batch_size": 12}, {"batch_size": 4}):
        task = make("vision-language", "lora", adapter=METHODS["lora"](), learning_rate=1e-9)
        accumulate = 12 // options["batch_size"]
        trainer = fit(
            task, {"steps": 2} | options, accumulate_grad_batches=accumulate, val_check_interval=1, limit_val_batches=1
        )
        figures.append({key: float(value) for key, value in trainer.callback_metrics.items() if "val" in key})
    assert figures[0].keys() == {"val/loss", "val/acc"}
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_name_of_the_figures_and_a_switched_off_adapter(trainer: Make, digits: Make) -> None:
    """What the zero-shot test before a training does."""
    task, data, own = make("vision-language"), digits(), trainer(limit_test_batches=1)
    own.test(AdaptationModule(task), data, verbose=False)
    base = own.callback_metrics["test/loss"].item()
    shake(task)
    (changed,) = own.test(AdaptationModule(task), data, verbose=False)
    module = AdaptationModule(task)
    module.test_name = "zeroshot"
    with disabled(task.model):
        (found,) = own.test(module, data, verbose=False)
    assert changed["test/loss"] != pytest.approx(base, rel=1e-3)
    assert found == {"zeroshot/loss": pytest.approx(base), "zeroshot/acc": pytest.approx(found["zeroshot/acc"])}


@pytest.mark.parametrize(("kind",), marked(zip(NAMING), lambda row: row[0] in ("vision-language",)))
def test_logits_after_training_are_those_of_the_trained_weights(kind: str, trainer: Make, digits: Make) -> None:
    """Nothing that an earlier evaluation encoded is left over."""
    task, data = make(kind), digits()
    own = trainer(val_check_interval=1, limit_val_batches=1, limit_test_batches=1)
    own.test(AdaptationModule(task), data, verbose=False)
    own.fit(AdaptationModule(task), data)
    shake(task)
    image = next(iter(data.test_dataloader()))["image"][:2]
    task.eval()
    with torch.no_grad():
        found = task.class_logits(image)
        slow = torch.tensor([slow_logits(task, plain(task), one) for one in image])
    torch.testing.assert_close(found, slow, rtol=1e-3, atol=1e-3)


def test_outputs_of_a_test_step_name_the_samples(trainer: Make, digits: Make) -> None:
    class Outputs(L.Callback):
        def on_test_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            assert torch.equal(outputs["index"], batch["index"])
            assert outputs["logits"].shape == (len(batch["label"]), 10)
            seen.extend(outputs["index"].tolist())

    seen: list[int] = []
    data: ImageData = digits(eval_batch_size=50)
    trainer(callbacks=[Outputs()]).test(AdaptationModule(make("text head")), data, verbose=False)
    assert seen == list(range(len(data.samples("test"))))


@pytest.mark.parametrize(("kind",), marked(zip(NAMING), lambda row: row[0] in ("vision-language",)))
def test_predictions_are_in_the_order_of_the_test_images(kind: str, trainer: Make, digits: Make) -> None:
    task, own, data = make(kind), trainer(), digits(eval_batch_size=100)
    own.fit(AdaptationModule(task), data)
    shake(task, 0.02)
    (found,) = own.test(AdaptationModule(task), data, verbose=False)
    shares = torch.cat(own.predict(AdaptationModule(task), data))
    samples = data.samples("test")
    labels = torch.from_numpy(samples.labels)
    assert shares.shape == (len(samples), 10) and shares.dtype == torch.float32
    assert shares.sum(1) == pytest.approx(torch.ones(len(samples)), abs=1e-5)
    assert float((shares.argmax(1) == labels).float().mean()) == pytest.approx(found["test/acc"])
    wanted = shares[torch.arange(len(labels)), labels].double().log().neg().mean()
    assert float(wanted) == pytest.approx(found["test/loss"], rel=1e-4)
    assert not any(layer.merged for layer in adapted_layers(task.model).values())


def test_predictions_of_files_leave_unreadable_ones_out(tmp_path: Path, trainer: Make) -> None:
    for number in range(3):
        pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    task = built("vision-language")
    shake(task, 0.02)
    loader, files = open_images([tmp_path], task.image_spec, skip=True)
    (shares,) = trainer().predict(AdaptationModule(task), loader)
    assert [file.name for file in files] == ["0.png", "1.png", "2.png"]
    assert shares.isnan().all(1).tolist() == [False, True, False]
    (image,) = (batch["image"][2:] for batch in loader)
    expected = torch.stack([torch.tensor(slow_logits(task, plain(task), one)).softmax(0) for one in image])
    torch.testing.assert_close(shares[2:], expected, atol=1e-4, rtol=1e-4)


def test_padding_has_no_prediction() -> None:
    task = built("linear head")
    part = padded(batch([0, 1, 2]), 2)
    assert task.predict(part).isnan().any(1).tolist() == [False, False, False, True, True]
