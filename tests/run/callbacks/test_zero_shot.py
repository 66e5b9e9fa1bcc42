from pathlib import Path

import pytest
import torch

from randlora_pl.adapters import LoRA, merge
from randlora_pl.data import ImageData
from randlora_pl.data.unlabelled import batches, random_samples
from randlora_pl.models import encode_prompts
from randlora_pl.models.text import zero_shot_accuracy
from randlora_pl.prompts import CoCoOp, CoOp
from randlora_pl.run.callbacks import Elsewhere, NewClasses, ZeroShot
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, PromptTask, VisionLanguageTask, make_trainer
from randlora_pl.utils.errors import UserError
from tests.data.readers.test_coop import write_coop
from tests.run.callbacks.conftest import Fit
from tests.tasks.small import shake


def test_adapter_is_off_during_the_test_and_on_again_after(fit: Fit) -> None:
    trainer, task, data = fit()
    trained = trainer.test(AdaptationModule(task), data, verbose=False)[0]
    shake(task, 2.0)
    shaken = trainer.test(AdaptationModule(task), data, verbose=False)[0]
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer.callbacks.append(ZeroShot())  # type: ignore[attr-defined]
    plain = trainer.test(AdaptationModule(task), data, verbose=False)[0]
    trainer.callbacks.pop()  # type: ignore[attr-defined]
    assert plain != shaken and plain != trained
    assert trainer.test(AdaptationModule(task), data, verbose=False)[0] == shaken
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items() if "metrics" not in name)
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert trainer.test(AdaptationModule(task), data, verbose=False)[0]["test/loss"] == pytest.approx(
        plain["test/loss"], abs=1e-5
    )


def test_a_test_measures_other_datasets_with_the_trained_weights(tmp_path: Path) -> None:
    write_coop(tmp_path, "eurosat")
    trainer = make_trainer(callbacks=[Elsewhere(["eurosat", "digits"], images=60)])
    task = VisionLanguageTask("tiny", "random", adapter=LoRA(rank=4, alpha=64), learning_rate=0.05)
    options = {"dataset": "eurosat", "root": str(tmp_path), "split": "coop"}
    data = ImageData(**options, steps=3, batch_size=8, eval_batch_size=16, num_workers=0)
    trainer.fit(AdaptationModule(task), data)
    (found,) = trainer.test(AdaptationModule(task), data, verbose=False)
    names = [name for name in found if "elsewhere" in name]
    assert names == ["test/elsewhere/digits"]  # not the training's own
    merge(task.model)
    other = ImageData(dataset="digits", image_size=task.image_spec.size)
    other.setup("test")
    classes = encode_prompts(task.model, task.tokenizer, other.classnames, [task.caption], "cpu")
    images = batches(other, random_samples(other.samples("test"), 60, 0), 60)
    (percent,), count = zero_shot_accuracy(task.model.eval(), classes[None], images)
    assert count == 60 and found[names[0]] == pytest.approx(percent / 100)


def test_a_test_measures_the_classes_that_the_training_left_out() -> None:
    trainer = make_trainer(callbacks=[NewClasses()])
    task = VisionLanguageTask("tiny", "random", adapter=LoRA(rank=4, alpha=64), learning_rate=0.05)
    data = ImageData(dataset="digits", classes="base", steps=3, batch_size=32)
    trainer.fit(AdaptationModule(task), data)
    (found,) = trainer.test(AdaptationModule(task), data, verbose=False)
    assert set(found) == {"test/loss", "test/acc", "test/new/acc"}
    saved = VisionLanguageTask("tiny", "random", adapter=LoRA(rank=4, alpha=64))
    other = ImageData(dataset="digits", classes="new")
    saved.set_classes(["five", "six", "seven", "eight", "nine"], ["{}"])
    saved.adapt()
    saved.model.load_state_dict(task.model.state_dict())
    (alone,) = make_trainer(callbacks=[NewClasses()]).test(
        AdaptationModule(saved), other, verbose=False
    )  # nothing is left out there
    assert "test/new/acc" not in alone and alone["test/acc"] == pytest.approx(found["test/new/acc"])


def test_prompts_of_each_image_name_new_classes() -> None:
    """CoCoOp with a network of zeros is CoOp; also with frozen weights in half precision."""
    found = []
    for prompts in (CoCoOp(), CoOp()):
        task = PromptTask("tiny", "random", prompts=prompts, frozen_dtype="bfloat16")
        data = ImageData(dataset="digits", classes="base", steps=1, batch_size=4)
        task.set_classes(list(data.row.classnames[:5]), ["{}"])
        task.adapt()
        for name, value in task.learned.named_parameters():
            torch.nn.init.zeros_(value) if "network" in name else None
        trainer = make_trainer(callbacks=[NewClasses(images=24)], precision="bf16-mixed", limit_test_batches=1)
        found += trainer.test(AdaptationModule(task), data, verbose=False)
        assert torch.bfloat16 in {parameter.dtype for parameter in task.model.parameters()}
    assert found[0]["test/new/acc"] == pytest.approx(found[1]["test/new/acc"])


def test_new_classes_have_the_prompts_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    task = VisionLanguageTask("tiny", "random", adapter=LoRA(rank=4), caption=None)
    task.set_classes(list(ImageData(dataset="digits").row.classnames[:5]), ["a drawn {}"])
    features_of = task.features_of
    monkeypatch.setattr(task, "features_of", lambda names, texts: given.append(texts) or features_of(names, texts))
    trainer = make_trainer(callbacks=[NewClasses(images=8)], limit_test_batches=1)
    task.adapt()
    trainer.test(AdaptationModule(task), ImageData(dataset="digits", classes="base"), verbose=False)
    assert given == [["a drawn {}"]] * 2  # the known classes, and the new ones


def test_what_they_need_is_told() -> None:
    digits = ImageData(dataset="digits")
    with pytest.raises(UserError, match="LinearHeadTask cannot predict other classes"):
        make_trainer(callbacks=[Elsewhere(["digits"])]).test(
            AdaptationModule(LinearHeadTask("test_vit", "random")), digits, verbose=False
        )
    silent = type("Silent", (VisionLanguageTask,), {"compares_names": False})  # a trait decides, not the class
    with pytest.raises(UserError, match="Silent cannot predict other classes"):
        make_trainer(callbacks=[NewClasses()]).test(AdaptationModule(silent("tiny", "random")), digits, verbose=False)
    with pytest.raises(UserError, match=r"Set --data\.classes base, or remove it"):
        make_trainer(callbacks=[NewClasses()]).test(
            AdaptationModule(VisionLanguageTask("tiny", "random")), digits, verbose=False
        )
    with pytest.raises(UserError, match="images is -1"):
        NewClasses(images=-1)


def test_other_datasets_have_the_split_of_the_run(tmp_path: Path) -> None:
    """CoOp's where there is one, and the usual split otherwise."""
    write_coop(tmp_path, "eurosat")
    write_coop(tmp_path, "dtd")
    options = {"dataset": "eurosat", "root": str(tmp_path), "split": "coop", "classes": "base"}
    data = ImageData(**options, steps=1, batch_size=4, eval_batch_size=16, num_workers=0)
    task = VisionLanguageTask("tiny", "random", adapter=LoRA(rank=1))
    trainer = make_trainer(callbacks=[Elsewhere(["dtd", "digits"], images=20), NewClasses(images=4)])
    (found,) = trainer.test(AdaptationModule(task), data, verbose=False)
    assert {"test/elsewhere/dtd", "test/elsewhere/digits", "test/new/acc"} < set(found)
