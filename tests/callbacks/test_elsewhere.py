"""Zero-shot accuracy on other datasets, beside a test."""

import pytest

from randlora_pl.adapters import LoRA, merge
from randlora_pl.callbacks import Elsewhere
from randlora_pl.data import ImageData
from randlora_pl.data.loading.chosen_images import batches, random_samples
from randlora_pl.models import encode_prompts
from randlora_pl.models.zero_shot import zero_shot_accuracy
from randlora_pl.tasks import LinearHeadTask, VisionLanguageTask, make_trainer
from randlora_pl.utils.errors import UserError


def test_a_test_measures_other_datasets_with_the_trained_weights() -> None:
    trainer = make_trainer(callbacks=[Elsewhere(["digits", "mnist_5k"], 60)])
    task = VisionLanguageTask("tiny", "random", adapter=LoRA(4, alpha=64), learning_rate=0.05)
    data = ImageData(dataset="digits", steps=3, batch_size=32)
    trainer.fit(task, data)
    (found,) = trainer.test(task, data, verbose=False)
    names = [name for name in found if "elsewhere" in name]
    assert names == ["test/elsewhere/mnist_5k"]  # not the training's own
    merge(task.model)
    other = ImageData(dataset="mnist_5k", image_size=task.image_spec.size)
    other.setup("test")
    classes = encode_prompts(task.model, task.tokenizer, other.classnames, [task.caption], "cpu")
    images = batches(other, random_samples(other.samples("test"), 60, 0), 60)
    (percent,), count = zero_shot_accuracy(task.model.eval(), classes[None], images)
    assert count == 60 and found[names[0]] == pytest.approx(percent / 100)


def test_a_task_without_a_text_tower_is_refused() -> None:
    trainer = make_trainer(callbacks=[Elsewhere(["digits"])])
    with pytest.raises(UserError, match="LinearHeadTask cannot name the classes"):
        trainer.test(LinearHeadTask("test_vit", "random"), ImageData(dataset="digits"), verbose=False)
