"""Data module for all image datasets of the catalog, with few-shot subsets, sample order and batches."""

import hashlib
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerStatus

from randlora_pl.data import catalog, locations, splits, validate
from randlora_pl.data.base import BatchSize, Length, PlannedData, image_parts
from randlora_pl.data.image_batches import CachedImages, EvalBatches, Late, TrainBatches, default_workers, meeting
from randlora_pl.data.loader import Batch, Loader, TrainSchedule
from randlora_pl.data.readers import Samples, read
from randlora_pl.data.sources import ArrayImages, EncodedImages
from randlora_pl.data.transforms import PLAIN, Augment, finish
from randlora_pl.utils.errors import UserError, log
from randlora_pl.utils.files import parse_json
from randlora_pl.utils.image_spec import ImageSpec, read_resize
from randlora_pl.utils.options import Positive, Share, between
from randlora_pl.utils.reuse import cached


class ImageData(PlannedData):
    """Images with labels (or captions): training subset, sample order and preprocessing.

    Training is one long loop over a numbered sample order, which Lightning runs as a single epoch. The order of images
    and every augmentation depend only on the seed and the position in it.

    Attributes:
        root: Folder that holds the data (for `table` and `pairs` the file, for `webdataset` also a pattern or a list of
            shards). Default: the user's data folder.
        templates: Prompts with {} for the class name, or a file of them. Default: the task's caption, or the dataset's.
            A list after `setup`; `typed_templates` is True if they were given.
        classnames: File with class names: one per line, or CSV folder,name. After `setup`, the class name of each
            label.
        shots: Images per class; also of a published draw, once it was read.
        found: Complete splits with all classes, after `setup`.
        held: Requested samples by split.
        spec: Model's own preprocessing of images, after `setup`; None without a model.
        frame: Preprocessing of images, after `setup`.
    """

    unit = "images"

    dataset: str = "digits"
    """Name of the dataset; `randlora-pl datasets` lists them. Your own images: `folder`, `table` (CSV, TSV or Parquet),
    `hf` (Hugging Face datasets), `webdataset` (tar shards) and `pairs` (with captions)."""
    if TYPE_CHECKING:  # they become a path and lists; docstring_parser reads no texts below an `if`
        root: Any = None
        classnames: Any = None
        templates: Any = None
    else:
        root: str | Path | None = None
        templates: list[str] | str | None = None
        classnames: str | None = None
    shots: Length | None = None
    """Few-shot training: this many images of each class."""
    fraction: Annotated[float, Share] | None = None
    """Train on this fraction of the images, between 0 and 1, stratified."""
    split: Literal["default", "coop"] = "default"
    """`coop` uses split, class names and prompt of CoOp, for its eleven datasets; split files are next to
    the images. Default: the dataset's usual split."""
    classes: Literal["all", "base", "new"] = "all"
    """`base` is the first half of the classes, `new` is the other half."""
    keep: str | None = None
    """What training must not forget, for `--checkpoint.scale auto`: the name of another dataset, or `new`, the
    classes that `--data.classes base` leaves out. Only its validation images choose the scale."""
    train_split: Literal["train", "full"] = "train"
    """`train` keeps the validation images out of training; `full` trains on them too, as the official code does."""
    batch_size: BatchSize = 128
    """Micro-batch size per device."""
    eval_batch_size: BatchSize = 256
    """Evaluation batch size per device."""
    min_batches_per_epoch: Annotated[int, between(0, 10**9)] = 10
    """Few-shot sets and your own small sets are repeated until an epoch has at least this many optimizer steps."""
    sampling: Literal["epochs", "with_replacement"] = "with_replacement"
    """`with_replacement` (the paper: independent draws) or `epochs` (each image once per epoch)."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Minimum and maximum area fraction of a random crop in training."""
    flip: bool | None = None
    """Mirror half of the training images. Default: by dataset (not for digits)."""
    randaugment: Annotated[int, between(0, 30)] | None = None
    """Apply two random operations (RandAugment) of this strength to each training image, 0 to 30; 9 is usual. Default:
    off."""
    mixup: Annotated[float, Positive] | None = None
    """Blend each training image, and its label, with another of its micro-batch; fractions are drawn from Beta(mixup,
    mixup), 0.2 is usual. Default: off."""
    cutmix: Annotated[float, Positive] | None = None
    """Paste a rectangle of another image into each training image; 1 is usual. With `mixup`, each micro-batch uses one
    of the two. Both need LinearHeadTask or TextHeadTask. Default: off."""
    cache_images: bool | None = None
    """Keep decoded images in memory shared by all processes of a machine, per split up to 8 GiB and a quarter of the
    free memory. Default: for few-shot and small sets."""
    resize: str = "model"
    """`model` (as its library does), `shortest` (resize the shorter side, crop the center, as in the paper), `longest`
    (resize the longer side, pad, also in training) or `squash` (resize both). `squash:0.9` sets timm's crop_pct."""
    image_size: Length | None = None
    """Height and width in pixels. Default: the model's."""
    background: Literal["white", "black", "mean"] | None = None
    """Color behind transparent pixels: `white` (the default), `black` or `mean`, the mean of all images."""
    shots_file: str | None = None
    """JSON file of the chosen images: read if it exists, else written. A published draw (`.jsonl`, with path and label
    in each line) is only read."""
    on_error: Literal["raise", "skip"] = "raise"
    """For unreadable images: `raise`, or `skip` (weight 0, and counted)."""
    max_pixels: Length = 178_956_970
    """Maximum width x height of an image; larger ones are unreadable."""

    def __post_init__(self) -> None:
        super().__post_init__()
        row = catalog.find(self.dataset)
        self._check_options(row)
        self.row = catalog.with_split(row, self.split)
        self.augment = Augment(self.randaugment, self.mixup, self.cutmix)
        templates = validate.read_templates(self.templates)
        validate.check_templates(templates, self.row.captions)
        self.root = catalog.default_root() if self.root is None else locations.root_of(str(self.root))
        self.crop_scale = (float(self.crop_scale[0]), float(self.crop_scale[1]))
        self.flip = self.row.flip if self.flip is None else self.flip
        self.overrides = {"size": self.image_size, "resize": self.resize, "background": self.background}
        self.classnames_file = self.classnames
        self.skip = self.on_error == "skip"
        self.templates = list(self.row.templates if templates is None else templates)
        self.typed_templates = templates is not None
        self.classnames = list(self.row.classnames)
        self.frame = ImageSpec()
        self.spec: ImageSpec | None = None
        self.found: splits.Splits | None = None
        self.held: dict[str, Samples] = {}
        self._meeting: Path | None = None  # folder of the memory shared by the processes of a machine
        if self.epochs is self.steps is None:
            self.epochs = 10 if self.few else self.row.epochs

    def _check_options(self, row: catalog.DatasetSpec) -> None:
        """Check the options, except prompts and task.

        Raises:
            UserError: An option is invalid; the message has the first.
        """
        shots, fraction = self.shots, self.fraction
        if shots is not None and fraction is not None:
            raise UserError(
                f"--data.shots {shots} and --data.fraction {fraction} cannot be combined. Set only one of them"
            )
        if fraction is not None and validate.is_draw(self.shots_file):
            raise UserError(f"--data.fraction {fraction} and a published draw cannot be combined. Set only one of them")
        if row.captions:
            if shots is not None:
                raise UserError("--data.shots needs classes, but captions have none. Use --data.fraction")
            if self.classes != "all":
                raise UserError(f"--data.classes {self.classes} needs classes, but captions have none. Remove it")
            for name in ("mixup", "cutmix"):
                if getattr(self, name) is not None:
                    raise UserError(f"--data.{name} blends class labels, but captions have none. Remove it")
        if self.keep is not None:
            validate.check_keep(self.keep, row, self.classes)
        catalog.with_split(row, self.split)
        self._check_run("captions" if row.captions else "")
        crop = self.crop_scale
        if not 0 < crop[0] <= crop[1] <= 1:
            how = "must be two fractions with 0 < minimum <= maximum <= 1"
            raise UserError(f"--data.crop_scale is {list(crop)}, but {how}")
        read_resize(self.resize)
        if self.root is None and row.own:
            raise UserError(f"The dataset {row.name!r} needs --data.root: {row.source} ({row.layout})")

    def prepare_data(self) -> None:
        """Index tar shards; Lightning calls it in one process only, and the others load the stored index."""
        if self.row.patterns:
            from randlora_pl.data.readers import tar_shards

            paths = tar_shards.find(self.root)
            for split in paths.by_split:
                tar_shards.index(paths, split)

    def setup(self, stage: str | None = None) -> None:
        """Read labels and class names, choose the subset, and plan the sample order; without a stage, of all splits.

        Raises:
            UserError: The dataset is missing or damaged, a half of its classes has fewer than two, or a split that is
                needed is empty.
        """
        task = self.learner
        if self.row.trains_on and stage != "test" and stage != "predict":
            validate.check_trains(self.row)
        if task is not None:
            name, blended = type(task).__name__, getattr(task, "blended_labels", False)
            validate.check_softmax(self.augment.mixup, self.augment.cutmix, name, blended)
        self.spec = getattr(task, "image_spec", self.spec)
        self.frame = ImageSpec.choose(self.spec, self.overrides)
        with meeting(self._job) as self._meeting:
            if self.found is None:
                if self.several:
                    mix, draw = {"mixup": self.mixup, "cutmix": self.cutmix}, validate.is_draw(self.shots_file)
                    half = self.classes != "all"
                    validate.check_several(mix | {"balance": self.balance, "classes": half, "shots_file": draw})
                row, parts = self.row, self._splits
                self.found = parts
                own_test = stage in ("test", "predict") and parts.has("test")
                first = parts.test if own_test else parts.full
                names = validate.class_names(row, first.classes, self.classnames_file)
                kept = splits.labels_of(len(names), self.classes)
                if self.classes != "all" and len(kept) < 2:
                    raise UserError(
                        f"--data.classes {self.classes} is {len(kept)} of {len(names)} classes; a classifier needs "
                        "two. Leave it out, or add classes"
                    )
                self.classnames = names[kept.start : kept.stop]
                if not self.typed_templates and first.templates:
                    self.templates = list(first.templates)
            if stage in ("fit", None):
                train = self.samples("train")
                least = self.min_batches_per_epoch if self.few or self.row.own else 0
                self._plan(len(train), torch.from_numpy(train.labels), least, train.numbers, train.groups)
            if stage in ("fit", "validate", None):
                self.samples("val")
            if stage in ("test", "predict", None):
                self.samples("test")
            if stage in ("validate", "test", "predict") or (stage == "fit" and self.row.own):
                split = "val" if stage == "validate" else "test"
                if not len(self.samples(split)):
                    raise UserError(
                        f"{self.row.title}: no {split} images found; {len(self.samples('train'))} training images are "
                        "too few to hold some out. Add images"
                        + (f", or a folder {split}" if self.row.name == "folder" else "")
                    )
            if stage == "fit" and self.row.own and not self.row.captions:
                self._remark({split: held.pairs[1] for split, held in self.held.items()}, self.classnames)
            self._compare(lambda: image_parts(self.held, self.classnames, self.templates))
        self._meeting = None

    def train_dataloader(self) -> Loader:
        """Return the training batches of this rank, from the trainer's optimizer step on (see `TrainBatches`)."""
        schedule = self._schedule()
        return Loader(self.batches(schedule), self._start(len(schedule)), self.processes("train"), self.skipped)

    def batches(self, schedule: TrainSchedule, search: bool = False) -> TrainBatches:
        """Return the numbered training batches of a schedule; batches for a search are not blended."""
        samples, augment = self.samples("train"), PLAIN if search else self.augment
        weights = self._class_weights(torch.from_numpy(samples.labels), self.num_classes)
        how = (self.frame, self.crop_scale, bool(self.flip), self.skip, self._late(samples))
        return TrainBatches(samples, schedule, *how, weights, augment, self.num_classes)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return the validation batches of this rank (see `EvalBatches`), or [] if the images are trained on.

        Raises:
            UserError: `validate` was called, but the model may have been trained on the validation images.
        """
        if self.trains_on_val:
            why = "with --data.train_split full the validation images are trained on"
            if self.trainer is not None and self.trainer.state.fn == "validate":
                raise UserError(f"{why}, so validation is impossible. Run: randlora-pl test")
            log.info("%s: no validation, no best adapter", why)
            return []
        return self._eval("val")

    def test_dataloader(self) -> Loader:
        """Return the test batches of this rank (see `EvalBatches`)."""
        return self._eval("test")

    predict_dataloader = test_dataloader  # in order, so that `Trainer.predict` returns one row per image

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Finish on the device what the workers left."""
        return finish(batch, self.frame)

    def state_dict(self) -> dict[str, Any]:
        """Return the plan and a hash of the images, so that a resumed run detects a changed plan."""
        if self.plan is None:
            return {}
        images = hashlib.sha256(self.samples("train").numbers.tobytes()).hexdigest()[:12]
        return super().state_dict() | {"images": images}

    @property
    def num_classes(self) -> int:
        """Number of classes (for pairs: of captions), after `setup`."""
        return len(self.classnames)

    @cached_property
    def _splits(self) -> splits.Splits:
        row, root = self.row, self.root  # the closure must not keep this object
        make = lambda: splits.Splits(lambda split: read(row, root, split))  # noqa: E731
        return cached("splits", (row.name, self.split, root), make)

    @property
    def several(self) -> bool:
        """True if an image may have several classes; the files of the user decide it, and are read."""
        return self.row.several and self._splits.full.sets is not None

    def samples(self, split: str) -> Samples:
        """Return the samples of ``train`` (the chosen subset), ``val`` or ``test``, after `setup`.

        Raises:
            UserError: `setup` was not called, or the file of chosen images does not fit.
        """
        if self.found is None:
            raise UserError("Call setup() before asking for samples")
        if split in self.held:
            return self.held[split]
        whole: Samples = getattr(self.found, split)
        samples = self._chosen(self.found) if split == "train" else splits.of_half(whole, self.classes)
        if split == "val" and self.split == "coop" and self.few:
            self.samples("train")  # a published draw sets the shots
            assert self.shots is not None
            few = min(self.shots, 4)  # as in CoOp
            samples = samples.subset(splits.few_shot(samples.labels, samples.numbers, few, self.seed))
        # a draw may have these images
        if split == "val" and validate.is_draw(self.shots_file) and not self.found.has("val"):
            drawn = set(self.samples("train").keys)
            samples = samples.subset(np.flatnonzero([key not in drawn for key in samples.keys]))
        expected = self.row.counts.get(split)
        if expected not in (None, len(whole)):
            option = f" --split {self.split}" if self.split != "default" else ""
            log.warning(
                "%s has %s %s images here, expected %s. For details, run: randlora-pl data check %s --root %s%s",
                self.row.name, f"{len(whole):,}", split, f"{expected:,}", self.row.name, self.root, option,
            )  # fmt: skip
        if isinstance(samples.images, EncodedImages):
            images = replace(samples.images, most_pixels=self.max_pixels, background=self.frame.behind)
            samples = replace(samples, images=images)
        small = len(samples) <= 5_000 or (split == "train" and self.few)
        if not isinstance(samples.images, ArrayImages) and (small if self.cache_images is None else self.cache_images):
            path = None if self._meeting is None else self._meeting / str(len(self.held))
            samples = replace(samples, images=CachedImages(samples.images, samples.rows, path=path))
        self.held[split] = samples
        return samples

    def _chosen(self, parts: splits.Splits) -> Samples:
        """Return the training samples: drawn, listed in a file, or a new choice that is written to it."""
        samples = parts.full if self.train_split == "full" else parts.train
        path = None if self.shots_file is None else Path(self.shots_file).expanduser()
        if path is not None and validate.is_draw(path):
            listed = splits.read_draw(path, samples if parts.has("val") else parts.full)
            chosen = splits.of_half(listed, self.classes)
            counts = np.bincount(chosen.labels, minlength=len(chosen.classes))
            most = int(counts.max(initial=0))
            if self.shots not in (None, most):
                raise UserError(
                    f"The shots file {path} has {most} images of a class, not --data.shots {self.shots}. "
                    "Remove the option"
                )
            self.shots = most
            lacking = np.flatnonzero(counts == 0)
            if len(lacking):
                names = (len(lacking), len(counts), chosen.classes[lacking[0]])
                log.warning("the shots file %s has no images of %d of %d classes, the first: %r", path, *names)
            return chosen
        samples = splits.of_half(samples, self.classes)
        if path is not None and path.exists():
            return splits.read_index(path, self._key, samples)
        chosen = splits.subset(samples, self.shots, self.fraction, self.seed, self.classnames)
        if path is not None and self._rank == 0:
            splits.write_index(path, self._key, chosen, self.classnames)
        return chosen

    @property
    def few(self) -> bool:
        """True for few-shot training, also by a published draw."""
        return self.shots is not None or validate.is_draw(self.shots_file)

    @property
    def trains_on_val(self) -> bool:
        """True if validation images are trained on."""
        return self.train_split == "full" and self.found is not None and not self.found.has("val")

    @property
    def _key(self) -> dict[str, Any]:
        """Options that determine the subset; stored with it."""
        key = {"dataset": self.row.name, "shots": self.shots, "fraction": self.fraction}
        key |= {"train_split": self.train_split, "seed": self.seed, "version": 1}
        key |= {"split": self.split} if self.split != "default" else {}
        return key | ({"classes": self.classes} if self.classes != "all" else {})

    @property
    def held_out(self) -> int:
        """Number of validation images; 0 if they are trained on."""
        return 0 if self.trains_on_val else super().held_out

    def summary(self) -> dict[str, Any]:
        """Return flat, JSON-ready facts about the data and the run; splits that were not read are omitted."""
        facts: dict[str, Any] = {"dataset": self.row.name, "classes": self.num_classes, "seed": self.seed}
        facts |= {"split": self.split} if self.split != "default" else {}
        facts |= {"class_half": self.classes} if self.classes != "all" else {}
        facts |= {"several_labels": True} if self.several else {}
        facts |= {split: len(held) for split, held in self.held.items()}
        facts |= {"shots": self.shots, "fraction": self.fraction, "train_split": self.train_split}
        if self.plan is not None:
            facts |= self.run_facts()
            facts |= {name: value for name, value in asdict(self.augment).items() if value is not None}
        return facts | {"skipped": len(self.skipped)}

    def summary_lines(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the start summary's lines about the data."""
        parts = ", ".join(f"{facts[split]:,} {split}" for split in ("train", "val", "test") if split in facts)
        shots = f", {facts['shots']} shots" if facts.get("shots") else ""
        half = f"{facts['class_half']} " if "class_half" in facts else ""
        name = facts["dataset"] + (f" ({facts['split']} split)" if "split" in facts else "")
        several = " (any number for an image)" if "several_labels" in facts else ""
        about = f"{name}: {facts['classes']} {half}classes{several}, {parts} images{shots}{self.notes}"
        more = ", ".join(self.augment.enabled())
        own = "" if self.spec is None or self.frame == self.spec else " (not the model's own preprocessing)"
        usual = self.frame.resize == "shortest" and self.frame.crop_pct == 1
        images = {} if usual and not own else {"images": f"{self.frame.steps()}{own}"}
        return {"data": about} | images | ({"augmentation": more} if more else {})

    def write_index(self, folder: Path) -> Path | None:
        """Write the chosen training images as ``shots.json`` into a folder; return None if all are used."""
        if not self.few and self.fraction is None:
            return None
        path = Path(folder) / "shots.json"
        splits.write_index(path, self._key, self.samples("train"), self.classnames)
        return path

    def reuse_index(self, folder: Path) -> None:
        """Use the training images of an interrupted run if it chose them with the same options."""
        path = Path(folder) / "shots.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            if self.shots_file is None and parse_json(path.read_text(encoding="utf-8"))["key"] == self._key:
                self.shots_file = str(path)

    def _late(self, samples: Samples) -> Late:
        running = TrainerStatus.RUNNING  # outside a Trainer, return float images
        if self.trainer is None or self.trainer.state.status != running:
            return "nothing"
        device = self.trainer.strategy.root_device.type
        train = samples is self.held.get("train")
        changed = train and self.augment.randaugment is not None  # on the CPU, after crops
        return "crops" if device == "cuda" and isinstance(samples.images, ArrayImages) and not changed else "colors"

    def processes(self, split: str) -> int:
        """Return the worker processes that load a split."""
        if self.num_workers is not None:
            return self.num_workers
        in_memory = isinstance(self.samples(split).images, ArrayImages | CachedImages)
        in_memory &= split != "train" or self.augment.randaugment is None  # RandAugment takes longer than a small crop
        return default_workers(in_memory, self.frame, 1 if self.trainer is None else self.trainer.num_devices)

    def _eval(self, split: str) -> Loader:
        samples = self.samples(split)
        batches = EvalBatches(samples, self._eval_schedule(len(samples)), self.frame, self.skip, self._late(samples))
        return Loader(batches, 0, self.processes(split), self.skipped)
