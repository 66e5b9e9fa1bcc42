"""The LightningCLI of `fit`, `validate` and `test`: one task, one data module, one trainer, one run folder."""

import json
import os
import re
from functools import partial
from importlib import import_module
from inspect import Parameter
from itertools import count
from pathlib import Path
from typing import Any, NoReturn, Union, cast, get_args

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, LambdaCallback
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.adapters.described import Described
from randlora_pl.adapters.methods.refine import Form, Start
from randlora_pl.data.base import PlannedData
from randlora_pl.data.validate import NEW
from randlora_pl.run.callbacks import (
    Elsewhere,
    Figures,
    Gates,
    NewClasses,
    NonFiniteLoss,
    Patience,
    PeakMemory,
    PerClass,
    ProgressBar,
    ProgressLines,
    RunCheckpoint,
    StartSummary,
    StepNumbers,
    Termination,
    Throughput,
    ValidationSchedule,
    WrittenAnswers,
)
from randlora_pl.run.options.classes import RunOptions, callback_classes, classes, data_class, options_of, task_of
from randlora_pl.run.options.compose import CLASSES, Command, planned_name
from randlora_pl.run.options.mistakes import check_loggers
from randlora_pl.run.parallel.strategy import SHARDED, with_devices, with_strategy
from randlora_pl.run.run_folder import find_lora, missing_folders, new_folder, remove_folder
from randlora_pl.tasks import AdaptationModule, Objective
from randlora_pl.tasks.module import SETTINGS
from randlora_pl.utils.errors import UserError, build_error, cause, parse_message
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.run_files import LAST, follow_latest, link_latest
from randlora_pl.utils.text import filter_library_warnings

set_parsing_settings(subclasses_enabled=[Described])  # chosen by name


# Lightning's Timer has a member of a str enumeration as default, which PyYAML refuses to write.
yaml.SafeDumper.add_multi_representer(str, yaml.SafeDumper.represent_str)


class RunParser(LightningArgumentParser):
    """Parser with one-line errors, for an objective instead of a module."""

    def add_lightning_class_args(self, lightning_class: Any, nested_key: str, *args: Any, **options: Any) -> list[str]:
        """Add the options of a class of Lightning, or of any objective."""
        if lightning_class is Objective:
            names: list[str] = self.add_subclass_arguments(Objective, nested_key, fail_untyped=False, required=True)
            return names
        return super().add_lightning_class_args(lightning_class, nested_key, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError` instead of printing the usage; parsers of classes inside report to the outer one."""
        if not self.exit_on_error:
            super().error(message, ex)
        inner = None if ex is None else cause(ex)
        raise (inner if isinstance(inner, UserError) else UserError(parse_message(message))) from ex


def _write_defaults(node: Any, option: str) -> None:
    """Write every option of a class into its part of the config.

    Missing ones would otherwise come from the task's default object, even for another class.
    """
    if not isinstance(node, dict):
        return
    module, _, name = node["class_path"].rpartition(".")
    try:
        kind = getattr(import_module(module), name) if module else classes(option)[name]
    except (ImportError, AttributeError, KeyError):
        return  # the parser reports the error
    if not (isinstance(kind, type) and issubclass(kind, Described)):
        return
    options = {each.name: each.default for each in options_of(kind).values() if each.default is not Parameter.empty}
    node["init_args"] = options = options | (node.get("init_args") or {})
    if "inner" in options:  # DoRA's inner method is LoRA by default, so that its options can be typed without its name
        options["inner"] = {"class_path": "randlora_pl.adapters.LoRA"} | (options["inner"] or {})
    for name in kind.nested_options():
        for each in options[name] if isinstance(options.get(name), list) else [options.get(name)]:
            _write_defaults(each, option)


def _whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Parse ``--trainer.limit_test_batches 1`` as one batch, independently of earlier imports.

    ``typing`` remembers ``Optional[Union[float, int]]`` of any other package and hands it out for Lightning's
    ``Optional[Union[int, float]]``; the parser uses the first type that fits, and 1.0 means all batches.
    """
    for action in parser._actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if float in kinds and int in kinds:
            action._typehint = Union[(int, *(kind for kind in kinds if kind is not int))]  # type: ignore[attr-defined]


class _Latest(Callback):
    """Callback that lets the link ``latest`` point to a new run.

    By then all processes of the run have read their options, in which the link means the run before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.is_global_zero and self.folder:
            link_latest(self.folder)
        self.folder = None  # a run has several stages


class App(LightningCLI):
    """Builder of task, data, trainer and callbacks from one command.

    Args:
        command: The command, with its names checked.
        folder: The folder of a run to resume; None makes a new one.
        path: Path of the new folder, instead of ``--run.root``, ``--run.name`` and the time.
        dry: If True, training ends after the start page; no folder and no logger is made.

    Attributes:
        task: The objective of the module.
        folder: The run folder.
        created: True if this process made it.
    """

    datamodule: PlannedData

    def __init__(
        self, command: Command, folder: Path | None = None, path: Path | None = None, dry: bool = False
    ) -> None:
        filter_library_warnings()  # now that Lightning is imported, which sets its own log level then
        self.command, self.created, self._path, self.dry = command, folder is None and not dry, path, dry
        self.folder = folder or Path()
        self._made: list[Path] = []
        # The text below each option; reading it takes most of a second.
        set_parsing_settings(docstring_parse_attribute_docstrings="--help" in command.typed)
        for option in (option for option in CLASSES if option.count(".") == 1):
            _write_defaults(command.config["model"].get("init_args", {}).get(option.partition(".")[2]), option)
        text = json.dumps(command.config, ensure_ascii=False)  # its own escapes are two halves beyond 16 bits
        text = re.sub("[^ -~]", lambda letter: f"\\U{ord(letter[0]):08x}", text)
        super().__init__(
            Objective,  # type: ignore[arg-type]  # see `RunParser`
            data_class(task_of(str(command.flat()["model"]))),
            save_config_callback=None,  # the run folder gets the resolved config
            trainer_defaults=SETTINGS,
            seed_everything_default=0,
            parser_class=RunParser,
            parser_kwargs={"prog": f"randlora-pl {command.verb}", "description": ""},
            subclass_mode_model=True,
            args=["--config", text, *command.typed],
            run=False,
            auto_configure_optimizers=False,  # the task makes its own, over the trainable parameters
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the application's own options, and one seed for all."""
        parser.add_class_arguments(RunOptions, "run")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to start training from.")
        parser.add_argument("--from_adapter", type=str | None, default=None, help="LoRA whose outputs to start with.")
        parser.add_argument("--from_form", type=Form, default="beside", help="Place of this LoRA: beside or absorbed.")
        for group, kind in callback_classes().items():
            parser.add_lightning_class_args(kind, group)
        task = task_of(str(self.command.flat()["model"])) or Objective
        monitor = str(self.command.flat().get("checkpoint.monitor") or f"val/{task.measure().name}")
        mode = task.measure(monitor.removeprefix("val/")).mode
        parser.set_defaults({"checkpoint.monitor": monitor, "checkpoint.mode": mode})
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.seed")
        _whole_numbers_first(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given words instead of the command line of the process."""
        self.config = parser.parse_args(args)
        if start := self.config.ckpt_path:  # before this run becomes the latest
            self.config.ckpt_path = str(follow_latest(Path(start)))
        if (start := self.config.from_adapter) and self.folder == Path():  # new: a resumed run may need it no more
            self.config.from_adapter = str(find_lora(start))

    def instantiate_classes(self) -> None:
        """Instantiate all classes; report any error in one line."""
        begun = self.folder != Path() and (self.folder / LAST).is_file()  # a new run has no folder yet
        start = None if begun or self.config.from_adapter is None else read_adapter(self.config.from_adapter)
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except Exception as error:
            raise build_error(error) from error
        if start is not None:
            self.task.start = Start(start, self.config.from_form)
            self.trainer.callbacks.append(LambdaCallback(setup=partial(check_frame, start)))  # type: ignore[attr-defined]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the run folder and a trainer that keeps everything in it."""
        run, self.task = self.config.run, cast(Objective, self.model)
        self.model = AdaptationModule(self.task)
        self.task.check_loads_again()  # before the training, not at its end
        if self.created and self._path is not None:
            self.folder = self._path
        elif self.created:
            name = run.name or planned_name(self.command.flat())
            name += "" if self.command.verb == "fit" else f"-{self.command.verb}"
            self._made = missing_folders(Path(run.root) / name)
            self.folder = new_folder(Path(run.root), name)
        try:
            given = False if self.dry else self.config_init.trainer.logger
            logger = make_loggers(run.logger, self.folder, Path(run.root)) if given is None or given is True else given
            return super().instantiate_trainer(default_root_dir=str(self.folder), logger=logger, **kwargs)
        except BaseException:
            self.discard()
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        own: list[Callback] = [PerClass(), Figures(), Gates(), WrittenAnswers()]
        if self.command.verb == "fit":
            if config["val_check_interval"] is None and config["check_val_every_n_epoch"] == 1:
                own.append(ValidationSchedule())
            kept = next(callback for callback in callbacks if isinstance(callback, RunCheckpoint))
            several = getattr(self.datamodule, "several", False)
            if several and kept.monitor == f"val/{self.task.measure().name}":  # the default, before data were known
                self.config.checkpoint.monitor = kept.monitor = f"val/{self.task.measure(several=True).name}"
            if (keep := getattr(self.datamodule, "keep", None)) or kept.scale:
                from randlora_pl.run.callbacks.forgetting import check_options

                check_options(kept.scale, self.task, self.datamodule, config["strategy"] == SHARDED)
                own.append(NewClasses() if keep == NEW else Elsewhere([str(keep)]))
            if kept.patience is not None:
                own.append(Patience(kept.monitor, kept.mode or "max", kept.patience))
            own += [StartSummary(self.dry), PeakMemory(), Throughput()]
            own += [NonFiniteLoss(), Termination(), StepNumbers()]
        else:
            callbacks = []  # checkpoint, spectrum and the like belong to a training
        users = config.get("callbacks") or []
        saving = next((type(callback).__name__ for callback in users if isinstance(callback, Checkpoint)), "")
        if saving and not config["enable_checkpointing"]:
            what = f"{saving} needs --trainer.enable_checkpointing true. "
            raise UserError(what + "Remove it where the adapters suffice: --checkpoint.monitor chooses the best.")
        replaced = any(isinstance(callback, AnyProgressBar) for callback in users)
        if config["enable_progress_bar"] is not False and not replaced:
            own += [ProgressBar(), ProgressLines()]
        if self.created and self._path is None:
            own.append(_Latest(self.folder))
        config = with_strategy(with_devices(config), self.config_init.run.timeout)
        return super()._instantiate_trainer(config, [*own, *callbacks])

    def discard(self) -> None:
        """Remove a folder that this process made if it holds nothing worth keeping yet; only on rank 0.

        Once training has begun, the folder stays: the run can be resumed, from its beginning without a checkpoint. The
        folder of a cell stays, too: it may hold the LoRA of a first stage, and the sweep empties it before a retry.
        """
        trainer = getattr(self, "trainer", None)
        if trainer is not None and trainer.global_step > 0:
            return
        made_here = self.created and self._path is None and self.folder != Path()
        if made_here and getattr(rank_zero_only, "rank", 0) == 0:
            remove_folder(self.folder, self._made)


def check_frame(file: AdapterFile, trainer: Trainer, *_: object, **__: object) -> None:
    """Refuse images that the model prepares in another way than an adapter was trained with."""
    frame = getattr(trainer.datamodule, "frame", None)  # type: ignore[attr-defined]
    trained_on = file.metadata.get("training", {}).get("frame")
    # the other options of images come with the adapter
    for name in ("mean", "std", "interpolation") if frame and trained_on else ():
        before, now = getattr(ImageSpec.of_values(trained_on), name), getattr(frame, name)
        if before != now:
            what = f"{file.path} was trained on images with {name} {before}, and the model has {now}."
            raise UserError(what, "Use the data module of its training, from Python.")


def make_loggers(names: str | list[str], folder: Path, root: Path) -> list[Logger]:
    """Return the loggers of a run.

    Args:
        names: Name of a logger, or of several.
        folder: Run folder.
        root: Folder of all runs. MLflow keeps them together, in ``mlflow.db`` there, unless MLFLOW_TRACKING_URI is set.

    Raises:
        UserError: The package of a logger is not installed.
    """
    check_loggers(names)
    made: list[Logger] = []
    project = "randlora-pl"
    for name in [names] if isinstance(names, str) else names:
        if name == "tensorboard":
            made.append(TensorBoardLogger(folder, name="", version="tensorboard"))
        elif name == "csv":
            numbered = ("csv" if number == 1 else f"csv_{number}" for number in count(1))
            free = next(one for one in numbered if not (folder / one).exists())  # it empties the run's own to resume
            made.append(CSVLogger(folder, name="", version=free))
        elif name == "wandb":
            made.append(WandbLogger(save_dir=folder, name=folder.name, project=project))
        elif name == "mlflow":
            uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
            if not uri:
                uri, artifacts = f"sqlite:///{root.resolve() / 'mlflow.db'}", str(root.resolve() / "mlruns")
            name = f"{folder.parent.name}/{folder.name}"
            made.append(MLFlowLogger(project, run_name=name, tracking_uri=uri, artifact_location=artifacts))
    return made
