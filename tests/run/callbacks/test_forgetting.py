import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from randlora_pl.adapters import Adapter, BitFit, DoRA, Frozen, FullFineTuning, LoRA, RandLoRA, delta_weights, merge
from randlora_pl.data import ImageData
from randlora_pl.prompts import CoOp
from randlora_pl.run.callbacks import RunCheckpoint, evaluation, forgetting
from randlora_pl.run.callbacks.forgetting import Scaled, best_scale, check_options, kept_data
from randlora_pl.tasks import (
    AdaptationModule,
    LinearHeadTask,
    Objective,
    PromptTask,
    VisionLanguageTask,
    load_task,
    make_trainer,
)
from randlora_pl.utils.errors import UserError
from tests.run.test_stages import BEST, only_run
from tests.support.cli import SMALL, Refused, Run
from tests.tasks.small import built, shake, trained

GUARD = ("--data.keep", "mnist_5k", "--checkpoint.scale", "auto")


@pytest.mark.parametrize("adapter", [RandLoRA(rank=8), LoRA(rank=2)])
def test_an_update_is_scaled_as_its_definition_says(adapter: Adapter) -> None:
    task = built("vision-language", adapter=adapter)
    shake(task)
    before, updates, scaled = trained(task), delta_weights(task.model), Scaled(task)  # type: ignore[arg-type]
    scaled.use(0.3)
    for name, update in delta_weights(task.model).items():
        torch.testing.assert_close(update, 0.3 * updates[name], rtol=1e-5, atol=1e-7)
    scaled.use(0)
    assert not any(update.any() for update in delta_weights(task.model).values())
    scaled.use(1)
    assert all(torch.equal(value, before[name]) for name, value in trained(task).items())


@pytest.mark.parametrize("adapter", [FullFineTuning(), BitFit()])
def test_tensors_of_the_model_lie_between_the_base_and_the_trained_ones(adapter: Adapter) -> None:
    task = built("vision-language", adapter=adapter)
    base = trained(task)
    shake(task)
    after, scaled = trained(task), Scaled(task)  # type: ignore[arg-type]
    for scale in (0.3, 0.0, 1.0):
        scaled.use(scale)
        for name, value in trained(task).items():
            expected = base[name].double() + scale * (after[name].double() - base[name].double())
            assert torch.equal(value, expected.float()), (name, scale)


def test_the_best_scale_has_the_largest_mean_and_changes_least() -> None:
    assert best_scale({0.0: (0.2, 0.9), 0.5: (0.6, 0.6), 1.0: (0.9, 0.1)}) == 0.5
    assert best_scale({1.0: (0.9, 0.1), 0.1: (0.4, 0.6), 0.0: (0.1, 0.1)}) == 0.1
    assert best_scale({0.7: (0.1 + 0.2, 0.0), 0.2: (0.3, 0.0)}) == 0.2  # equal but for rounding


def test_a_run_ends_with_the_best_weights_at_the_chosen_scale(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter file, results, and an accuracy that is measured again from the file; the best adapter stays as it is."""
    monkeypatch.setattr(forgetting, "SCALES", (0.0, 0.3, 1.0))
    monkeypatch.setattr(forgetting, "MOST_IMAGES", 50)
    monkeypatch.setattr(forgetting, "best_scale", lambda accuracies: 0.3)
    monkeypatch.setattr(evaluation, "random_samples", lambda samples, *_: forgetting.random_samples(samples, 50, 0))
    run("fit", *SMALL, *GUARD, *BEST, "--model.learning_rate", "0.05")
    folder = only_run(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert results["scale"] == 0.3 and results["tested"] == "adapter" and results["scale/kept_images"] == 50
    assert {"test/elsewhere/mnist_5k", "zeroshot/elsewhere/mnist_5k"} < results.keys()
    best, own = (load_file(folder / name / "adapter.safetensors") for name in ("adapter-best", "adapter"))
    assert results["best/step"] < results["steps"]  # not the last weights
    for name, value in best.items():
        factor = 0.3 if name.endswith(".lambdas") else 1
        torch.testing.assert_close(own[name], factor * value, rtol=1e-6, atol=0)
    metadata = json.loads((folder / "adapter/adapter_config.json").read_text())["metadata"]
    assert metadata["training"]["scale"] == 0.3 and metadata["training"]["step"] == results["best/step"]
    task = load_task(folder / "adapter")
    data = ImageData(dataset="mnist_5k", keep=None, image_size=task.image_spec.size)
    data.spec = task.frame
    data.setup("validate")
    right = 0
    classes = task.features_of(data.classnames, data.templates)  # type: ignore[attr-defined]
    samples = forgetting.random_samples(data.samples("val"), 50, 0)
    for images, labels in forgetting.batches(data, samples, 50):
        features = torch.nn.functional.normalize(task.model.encode_image(images), dim=1)  # type: ignore[operator]
        right += int(((features @ classes.T).argmax(1) == labels).sum())
    assert results["scale/kept"] == pytest.approx(right / 50)


def guarded(
    tmp_path: Path, task: Objective, start: Path | None = None, test: Literal["last", "best"] = "last", **data: Any
) -> tuple[Trainer, RunCheckpoint]:
    kept = RunCheckpoint(scale="auto", test=test)
    trainer = make_trainer(callbacks=[kept], default_root_dir=tmp_path, limit_val_batches=1)
    options = {"dataset": "digits", "classes": "base", "keep": "new", "steps": 2, "batch_size": 8} | data
    trainer.fit(AdaptationModule(task), ImageData(**options), ckpt_path=start, weights_only=True)
    return trainer, kept


def test_the_classes_that_the_training_leaves_out_are_kept_by_their_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "SCALES", (0.0, 0.3, 1.0))
    task = VisionLanguageTask("tiny", "random", adapter=LoRA(rank=2, alpha=64), learning_rate=0.05)
    trainer, kept = guarded(tmp_path, task)
    data = kept._kept
    assert data is not None and data.classnames == ["five", "six", "seven", "eight", "nine"]
    assert {*data.held} == {"val"} and "test" not in trainer.datamodule.held  # type: ignore[attr-defined]
    own, there = (kept.scaled[f"scale/{name}"] for name in ("own", "kept"))
    for scale in (0, 1):
        assert own + there >= kept.scaled[f"scale/own_at_{scale}"] + kept.scaled[f"scale/kept_at_{scale}"]
    merge(task.model)
    assert task.percent_among(
        data.classnames, forgetting.batches(data, data.samples("val"), 64), templates=data.templates
    )[0] / 100 == pytest.approx(there)

    trainer.datamodule.keep = "mnist_5k"  # type: ignore[attr-defined]
    kept.setup(trainer, trainer.lightning_module, "fit")  # a callback may serve another run
    assert kept._kept is not None and kept._kept.row.name == "mnist_5k"


def test_a_run_that_ends_while_it_chooses_is_scaled_once_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(start: Path | None = None) -> dict[str, torch.Tensor]:
        task = VisionLanguageTask("tiny", "random", adapter=LoRA(rank=2), learning_rate=0.05)
        guarded(tmp_path, task, start)
        return load_file(tmp_path / "adapter/adapter.safetensors")

    def killed(accuracies: object) -> float:
        raise ConnectionError

    monkeypatch.setattr(forgetting, "SCALES", (0.0, 0.3, 1.0))
    monkeypatch.setattr(forgetting, "MOST_IMAGES", 20)
    monkeypatch.setattr(forgetting, "best_scale", killed)
    with pytest.raises(ConnectionError):
        fit()
    last = tmp_path / "checkpoints/last.ckpt"
    assert last.is_file() and not (tmp_path / "adapter").exists()
    monkeypatch.setattr(forgetting, "best_scale", lambda accuracies: 0.3)
    scaled, again = fit(last), fit(last)
    monkeypatch.setattr(forgetting, "best_scale", lambda accuracies: 1.0)
    for name, whole in fit(last).items():
        assert torch.equal(scaled[name], again[name])
        torch.testing.assert_close(scaled[name], whole * (0.3 if name.endswith(".B") else 1))


def test_learned_prompts_are_encoded_again_at_each_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the best adapter has class features, which are those of its own scale."""
    seen: list[torch.Tensor] = []

    def percent(task: PromptTask, *arguments: object, **options: object) -> tuple[float, int]:
        seen.append(task.class_features())
        return 50.0, 1

    monkeypatch.setattr(PromptTask, "percent_among", percent)
    _, kept = guarded(tmp_path, PromptTask("tiny", "random", adapter=LoRA(rank=2), learning_rate=0.05), test="best")
    assert kept.best is not None and len(seen) == 22
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[-1])


def test_what_does_not_fit_is_refused() -> None:
    def refusal(
        task: Objective, keep: str | None = "mnist_5k", scale: str | None = "auto", shards: bool = False
    ) -> str:
        with pytest.raises(UserError) as caught:
            check_options(scale, task, ImageData(dataset="digits", keep=keep), shards)
        return str(caught.value)

    def clip(adapter: Adapter) -> VisionLanguageTask:
        return VisionLanguageTask("tiny", "random", adapter=adapter)

    fits = clip(LoRA(rank=2))
    check_options("auto", fits, ImageData(dataset="digits", keep="mnist_5k"), False)
    assert "need each other" in refusal(fits, scale=None)
    assert "need each other" in refusal(fits, keep=None)
    assert "needs the whole model" in refusal(fits, shards=True)
    assert "no multiple of the update of DoRA is another DoRA" in refusal(clip(DoRA(LoRA(rank=2))))
    assert "no multiple of the update of Frozen" in refusal(PromptTask("tiny", "random", adapter=Frozen()))
    assert "LinearHeadTask cannot predict other classes" in refusal(LinearHeadTask("tiny", "random"))
    assert "class_specific=True) cannot predict" in refusal(
        PromptTask("tiny", "random", prompts=CoOp(class_specific=True))
    )
    data = ImageData(dataset="digits", keep="mnist_5k", train_split="full")
    data.setup("fit")
    with pytest.raises(UserError, match="this run has none"):
        kept_data(data)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("digits", "is not another dataset"),
        ("new", "new with --data.classes base"),
        ("mnist5k", "Did you mean 'mnist_5k'"),
        ("folder", "is not another dataset with classes"),
        ("imagenet_v2", "and training images"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ImageData(dataset="digits", keep=keep)


def test_refusals_leave_no_run(refused: Refused) -> None:
    assert "--checkpoint.scale auto and --data.keep" in refused("fit", *SMALL, *GUARD[2:])
    assert "no multiple of the update of DoRA" in refused("fit", *SMALL, *GUARD, "--model.adapter", "DoRA")
