import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from randlora_pl.data import ImageData
from randlora_pl.data.image_batches import CachedImages
from randlora_pl.data.loader import Batch
from randlora_pl.data.module import ImageData as Module
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.support.products import in_one_item

from .conftest import Tree, make_idx, save_image

SPEC = ImageSpec(10, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")


class Task(LightningModule):
    """A linear model on pixels that records the batches it gets."""

    image_spec = SPEC

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3 * SPEC.size**2, 10)
        self.seen: list[Batch] = []
        self.late: set[str] = set()
        self.counted = torch.zeros(2)

    def training_step(self, batch: Batch, number: int) -> torch.Tensor:
        self.seen.append(batch)
        self.late.add(self.trainer.train_dataloader.batches.late)
        logits = self.layer(batch["image"].flatten(1))
        losses = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        return (batch["weight"] * losses).sum()

    def validation_step(self, batch: Batch, number: int) -> None:
        self.counted[0] += batch["weight"].sum()

    def test_step(self, batch: Batch, number: int) -> None:
        self.counted[1] += batch["weight"].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"max_epochs": 1, "use_distributed_sampler": False, "default_root_dir": tmp_path}
    return Trainer(**(quiet | {"enable_checkpointing": False} | options))


def test_plain_use_needs_no_trainer() -> None:
    data = ImageData(dataset="digits", shots=2, image_size=16)
    data.setup()
    assert data.classnames[3] == "three" and data.num_classes == 10 and data.frame == ImageSpec(16)
    assert data.plan is not None and data.plan.steps == 102  # protocol: 2 shots of 10 classes
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert [len(loader) for loader in loaders] == [102, 1, 2]
    batch = next(iter(loaders[0]))
    assert batch["image"].shape == (128, 3, 16, 16) and set(batch["index"].tolist()) <= set(range(20))
    assert data.summary() == {
        "dataset": "digits", "classes": 10, "seed": 0, "train": 20, "val": 143, "test": 360, "shots": 2,
        "fraction": None, "train_split": "train", "steps": 102, "draws": 13_000, "window": 128,
        "sampling": "with_replacement", "skipped": 0,
    }  # fmt: skip
    json.dumps(data.summary())


def test_nothing_works_before_setup() -> None:
    data = ImageData()
    with pytest.raises(UserError, match="setup"):
        data.train_dataloader()
    with pytest.raises(UserError, match="setup"):
        data.samples("train")


def test_the_models_image_spec_is_taken_unless_overridden(tmp_path: Path) -> None:
    task, data = Task(), ImageData(shots=1, steps=1)
    trainer(tmp_path).fit(task, data)
    assert data.frame == SPEC and task.seen[0]["image"].shape[2:] == (10, 10)
    data = ImageData(shots=1, steps=1, background="black")
    trainer(tmp_path).fit(task, data)
    assert data.frame == replace(SPEC, background="black")
    with pytest.raises(UserError, match="image_size"):
        trainer(tmp_path).fit(task, ImageData(shots=1, steps=1, image_size=12))


@in_one_item(
    ("options", "steps", "drawn"),
    [
        ({}, 102, 1294 * 10),
        ({"train_split": "full"}, 113, 1437 * 10),
        ({"fraction": 0.5}, 51, 647 * 10),
        ({"fraction": 0.5, "epochs": 3}, 16, 647 * 3),
        ({"shots": 1}, 101, 10 * 129 * 10),
        ({"shots": 1, "epochs": 2}, 21, 10 * 129 * 2),
        ({"shots": 4, "min_batches_per_epoch": 0}, 4, 400),
        ({"shots": 16}, 113, 160 * 9 * 10),
        ({"steps": 7}, 7, 7 * 128),
    ],
)
def test_length_of_the_run(options: dict[str, Any], steps: int, drawn: int) -> None:
    data = ImageData(**options)
    data.setup("fit")
    assert data.plan is not None and (data.plan.steps, data.plan.samples_drawn) == (steps, drawn)


def test_plan_in_a_checkpoint_keeps_its_keys() -> None:
    data = ImageData(shots=1, steps=7, sampling="epochs")
    data.setup("fit")
    plan = {"num_samples": 10, "total_draws": 7 * 128, "window": 128, "seed": 0, "sampling": "epochs"}
    assert data.state_dict() == plan | {"balance": None, "images": data.state_dict()["images"]}


def test_validation_and_test_are_the_same_for_every_seed_and_subset() -> None:
    def keys(split: str, **options: Any) -> list[str]:
        data = ImageData(**options)
        data.setup()
        return list(data.samples(split).keys)

    for split in ("val", "test"):
        assert keys(split) == keys(split, seed=3, shots=2) == keys(split, fraction=0.3)
    assert keys("train", shots=2) != keys("train", shots=2, seed=1)
    assert set(keys("train", shots=2)) < set(keys("train", shots=4)) < set(keys("train"))
    parts = [set(keys(split)) for split in ("train", "val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1797
    assert set(keys("train", train_split="full")) == parts[0] | parts[1]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_whole_run_gives_every_draw_and_splits_once(tmp_path: Path, accumulate: int) -> None:
    task, data = Task(), ImageData(shots=3, epochs=1, min_batches_per_epoch=3, batch_size=8, image_size=10)
    run = trainer(tmp_path, accumulate_grad_batches=accumulate, num_sanity_val_steps=0)
    run.fit(task, data)
    assert data.plan is not None and run.global_step == data.plan.steps and data.plan.global_batch == 8 * accumulate
    positions = torch.cat([batch["position"][batch["weight"] > 0] for batch in task.seen])
    assert positions.tolist() == list(range(data.plan.samples_drawn))
    run.test(task, data)
    assert task.counted.tolist() == [143, 360]


def test_last_short_step_is_an_exact_mean(tmp_path: Path) -> None:
    """Accumulated steps, the last one shorter, give the weights of the undivided run."""

    def final(batch_size: int, accumulate: int) -> torch.Tensor:
        task, data = Task(), ImageData(shots=7, epochs=1, min_batches_per_epoch=0, batch_size=batch_size)
        trainer(tmp_path, accumulate_grad_batches=accumulate).fit(task, data)  # 70 samples: steps of 32, 32 and 6
        return task.layer.weight.detach()

    torch.testing.assert_close(final(8, 4), final(32, 1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("num_workers", "accumulate"), [(0, 1), pytest.param(2, 1, marks=pytest.mark.full), (0, 3)])
def test_resume_is_bit_identical(tmp_path: Path, num_workers: int, accumulate: int) -> None:
    def data() -> Module:
        return ImageData(shots=2, epochs=1, min_batches_per_epoch=5, batch_size=16, num_workers=num_workers)

    class Crash(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, number: int) -> None:
            if trainer.global_step == 4 and batch["micro_batch"] == 0:
                raise RuntimeError("crash")

    saving = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_train_steps=3, save_on_train_epoch_end=False)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "num_sanity_val_steps": 0}
    whole, broken, resumed = Task(), Task(), Task()
    trainer(tmp_path, **options).fit(whole, data())
    with pytest.raises(RuntimeError, match="crash"):
        trainer(tmp_path, callbacks=[saving, Crash()], enable_checkpointing=True, **options).fit(broken, data())
    (checkpoint,) = (tmp_path / "saved").glob("*step=3*")
    run = trainer(tmp_path, **options)
    run.fit(resumed, data(), ckpt_path=checkpoint)
    rest = whole.seen[3 * accumulate :]
    assert len(rest) == len(resumed.seen) > 2
    for expected, found in zip(rest, resumed.seen, strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(torch.as_tensor(expected[key]), torch.as_tensor(found[key])) for key in expected)
    assert torch.equal(whole.layer.weight, resumed.layer.weight) and run.global_step > 3


def test_resume_within_a_step_is_refused_and_other_plans_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.epoch_loop.batch_progress.current.ready}.ckpt")

    def data(**options: Any) -> Module:
        return ImageData(**({"shots": 2, "steps": 3, "batch_size": 16} | options))

    trainer(tmp_path, accumulate_grad_batches=2, callbacks=[Save()]).fit(Task(), data())
    with pytest.raises(UserError, match="micro-batches"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(Task(), data(), ckpt_path=tmp_path / "3.ckpt")
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(Task(), data(), ckpt_path=tmp_path / "4.ckpt")
        assert "a different sample order" not in caplog.text
        trainer(tmp_path, accumulate_grad_batches=2).fit(Task(), data(seed=1), ckpt_path=tmp_path / "4.ckpt")
    assert "the resumed run has a different sample order than its checkpoint: seed 0 -> 1" in caplog.text


def test_finished_run_has_nothing_left(tmp_path: Path) -> None:
    data = ImageData(shots=1, steps=2)
    run = trainer(tmp_path)
    run.fit(Task(), data)
    loader = data.train_dataloader()
    assert len(loader) == 2 and list(loader) == []


@pytest.mark.parametrize("epochs", [2, -1, None])
def test_more_than_one_lightning_epoch_is_refused(tmp_path: Path, epochs: int | None) -> None:
    with pytest.raises(UserError, match=r"--data.epochs"):
        trainer(tmp_path, max_epochs=epochs, max_steps=2 if epochs == -1 else -1).fit(Task(), ImageData(shots=1))


def test_fast_dev_run(tmp_path: Path) -> None:
    task = Task()
    trainer(tmp_path, fast_dev_run=True).fit(task, ImageData())
    assert len(task.seen) == 1


def test_workers_hand_over_bytes_and_change_nothing(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tree(cat=12, dog=12))

    def seen(late: str) -> list[Batch]:
        task = Task()
        data = ImageData(dataset="folder", root=root, steps=2, batch_size=4, flip=True, num_workers=1)
        own = trainer(tmp_path)
        own.fit(task, data)
        own.test(task, data, verbose=False)
        assert task.late == {late}
        assert next(iter(data.test_dataloader()))["image"].is_floating_point(), "by hand"
        return task.seen

    late = seen("colors")
    monkeypatch.setattr(Module, "_late", lambda *_: "nothing")
    plain = seen("nothing")
    assert len(plain) == len(late) > 0
    for one, two in zip(plain, late, strict=True):
        assert one.keys() == two.keys() and torch.equal(one["image"], two["image"])


def test_small_images_are_cropped_on_a_gpu(tmp_path: Path) -> None:
    data = ImageData()
    data.trainer = MagicMock(world_size=1, global_rank=0)
    data.trainer.strategy.root_device.type = "cuda"
    data.trainer.state.status = "running"
    data.trainer.lightning_module.objective.image_spec = SPEC
    data.setup("test")
    assert data._late(data.samples("test")) == "crops"


def test_ranks_share_a_step() -> None:
    def batches(world: int, rank: int, batch_size: int) -> tuple[list[Batch], list[Batch]]:
        data = ImageData(shots=1, epochs=1, min_batches_per_epoch=2, batch_size=batch_size, eval_batch_size=50)
        fake = {"world_size": world, "global_rank": rank, "accumulate_grad_batches": 1, "max_epochs": 1}
        data.trainer = MagicMock(**fake, global_step=0, num_devices=1)
        data.trainer.lightning_module.objective.image_spec = SPEC
        data.trainer.fit_loop.epoch_loop.batch_progress.current.ready = 0
        data.setup()
        return list(data.train_dataloader()), list(data.test_dataloader())

    alone, ranks = batches(1, 0, 12), [batches(3, rank, 4) for rank in range(3)]
    for number, batch in enumerate(alone[0]):
        together = [rank[0][number] for rank in ranks]
        real = torch.cat([part["weight"] for part in together]) > 0
        for key in ("position", "index", "label", "image"):
            assert torch.equal(torch.cat([part[key] for part in together])[real], batch[key])
        assert all(torch.equal(part["step_classes"], batch["step_classes"]) for part in together)
    tested = torch.cat([part["index"][part["weight"] > 0] for rank in ranks for part in rank[1]])
    assert sorted(tested.tolist()) == list(range(360))
    assert len({len(rank[1]) for rank in ranks}) == 1


def test_shots_file_is_written_once_and_then_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "shots.json"

    def keys(**options: Any) -> list[str]:
        data = ImageData(**({"shots": 2, "shots_file": str(path)} | options))
        data.setup("fit")
        return list(data.samples("train").keys)

    first = keys()
    content = json.loads(path.read_text())
    assert sorted(name for names in content["classes"].values() for name in names) == sorted(first)
    content["classes"]["zero"] = content["classes"]["zero"][:1]
    path.write_text(json.dumps(content))
    assert len(keys()) == 19  # the file is what counts
    with pytest.raises(UserError, match="another"):
        keys(shots=3)


def test_write_index(tmp_path: Path) -> None:
    data = ImageData(fraction=0.1, seed=4)
    data.setup("fit")
    path = data.write_index(tmp_path / "run")
    assert path == tmp_path / "run" / "shots.json"
    content = json.loads(path.read_text())
    assert content["key"]["fraction"] == 0.1 and content["key"]["seed"] == 4
    assert sum(map(len, content["classes"].values())) == 129
    whole = ImageData()
    whole.setup("fit")
    assert whole.write_index(tmp_path) is None


def test_own_folder_end_to_end(tree: Tree, tmp_path: Path) -> None:
    root = tree(great_cat=20, dog=20, suffix=".JPG")
    data = ImageData(dataset="folder", root=str(root), batch_size=8, image_size=10)
    data.setup()
    assert data.classnames == ["dog", "great cat"] and data.templates == ["a photo of a {}."]
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [29, 3, 8]
    assert data.plan is not None and data.plan.samples_drawn == 29 * (10 * 8 // 29 + 1) * 10  # short, so extended
    assert isinstance(data.samples("train").images, CachedImages)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 10, 10)
    (tmp_path / "names.csv").write_text("dog,hound\ngreat_cat,lynx\n")
    data = ImageData(
        dataset="folder", root=str(root), classnames=str(tmp_path / "names.csv"), templates=["{}!"], cache_images=False
    )
    data.setup("test")
    assert data.classnames == ["hound", "lynx"] and data.templates == ["{}!"]
    assert not isinstance(data.samples("test").images, CachedImages)


def test_two_classes_of_one_name_are_refused(tree: Tree) -> None:
    data = ImageData(dataset="folder", root=str(tree(big_cat=2, **{"big cat": 2})))
    with pytest.raises(UserError, match="classes"):
        data.setup()


def test_skipped_images_are_counted_in_the_summary(tree: Tree, tmp_path: Path) -> None:
    root = tree(cat=10, dog=10)
    bad = root / "cat" / "000.png"
    bad.write_bytes(bad.read_bytes()[:100])
    task = Task()
    data = ImageData(dataset="folder", root=str(root), on_error="skip", batch_size=4, epochs=3)
    trainer(tmp_path, num_sanity_val_steps=0).fit(task, data)
    trainer(tmp_path).test(task, data)
    assert data.summary()["skipped"] == 1 and list(data.skipped) == [str(bad)]
    assert task.layer.weight.isfinite().all()


def test_images_of_too_many_pixels_are_unreadable(tree: Tree) -> None:
    data = ImageData(dataset="folder", root=str(tree(cat=6, dog=6)), steps=1, max_pixels=5)
    data.setup("fit")
    with pytest.raises(UserError, match=r"the limit is 5.*--data.max_pixels N"):
        next(iter(data.train_dataloader()))


def test_pairs_end_to_end(tmp_path: Path) -> None:
    lines = [f"{save_image(tmp_path / f'{number}.png', number).name},caption {number // 2}" for number in range(20)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *lines]))
    data = ImageData(dataset="pairs", root=str(tmp_path / "pairs.csv"), image_size=10, fraction=0.5)
    data.setup()
    assert data.classnames == sorted(f"caption {number}" for number in range(10)) and data.templates == ["{}"]
    assert not data.flip and [len(data.samples(split)) for split in ("train", "val", "test")] == [7, 1, 4]
    samples = data.samples("test")
    for row, label in zip(samples.rows.tolist(), samples.labels.tolist(), strict=True):
        number = int(Path(samples.images.name(row)).stem)
        assert data.classnames[label] == f"caption {number // 2}"
    assert next(iter(data.test_dataloader()))["image"].shape == (4, 3, 10, 10)


def test_missing_data_stop_at_setup(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--root"):
        ImageData(dataset="mnist", root=str(tmp_path)).setup("fit")
    make_idx(tmp_path, "MNIST")
    data = ImageData(dataset="mnist", root=str(tmp_path))
    data.setup()
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [54, 6, 20]


@pytest.mark.parametrize(
    ("cuda", "size", "cached", "expected"),
    [(False, 224, True, 0), (False, 224, False, "cpus"), (True, 32, True, 0), (True, 224, True, 5)],
)
def test_default_workers(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, cuda: bool, size: int, cached: bool, expected: int | str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    data = ImageData(dataset="folder", root=str(tree(cat=4, dog=4)), cache_images=cached, image_size=size)
    data.setup("fit")
    assert data.processes("train") == (6 if expected == "cpus" else expected)
    data.num_workers = 3
    assert data.processes("train") == 3


def test_too_few_images_for_a_test_are_refused_before_training(tree: Tree, tmp_path: Path) -> None:
    root = str(tree(cat=1, dog=1))
    for stage in ("fit", "test", "validate"):
        split = "val" if stage == "validate" else "test"
        with pytest.raises(UserError, match=f"no {split} images found; 2 training images are too few"):
            ImageData(dataset="folder", root=root).setup(stage)


def test_trained_images_do_not_validate(tmp_path: Path) -> None:
    task, data = Task(), ImageData(shots=1, steps=1, train_split="full")
    run = trainer(tmp_path)
    run.fit(task, data)
    assert not any(key.startswith("val/") for key in run.callback_metrics)
    with pytest.raises(UserError, match="validation is impossible"):
        run.validate(task, data)


def test_an_interrupted_run_goes_on_with_its_images(tree: Tree, tmp_path: Path) -> None:
    def keys(data: ImageData) -> list[str]:
        data.setup("fit")
        return list(data.samples("train").keys)

    root = tree(cat=30, dog=30)
    first = ImageData(dataset="folder", root=str(root), shots=3)
    chosen = keys(first)
    first.write_index(tmp_path)
    for number in range(100, 160):
        save_image(root / "cat" / f"{number}.png", number)
    grown = ImageData(dataset="folder", root=str(root), shots=3)
    assert keys(grown) != chosen
    assert grown.state_dict()["images"] != first.state_dict()["images"]
    again = ImageData(dataset="folder", root=str(root), shots=3)
    again.reuse_index(tmp_path)
    assert keys(again) == chosen
    other = ImageData(dataset="folder", root=str(root), shots=2)
    other.reuse_index(tmp_path)  # what is typed now counts
    assert len(keys(other)) == 4
