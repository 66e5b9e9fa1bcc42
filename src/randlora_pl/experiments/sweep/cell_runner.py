"""A cell of a sweep as a run of ``fit`` or ``test``: its config, and how it is run in this process."""

import copy
import gc
import io
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from contextvars import copy_context
from pathlib import Path
from typing import Any

from randlora_pl.config.compose import DEFAULTS, Command, Tree, flatten, merge, normalise, read_config
from randlora_pl.config.shipped import find_config
from randlora_pl.config.validate import check_names, on_texts
from randlora_pl.engine.run_lock import FILE, locked
from randlora_pl.experiments.sweep.description import METHOD
from randlora_pl.experiments.sweep.plan import Cell, Composer
from randlora_pl.utils.errors import UserError

UNTRAINED = {"model": {"init_args": {"adapter": {"class_path": "FullFineTuning"}}}}
"""The adapter of a model that is only tested: it adds nothing to the layers."""
UNTRAINED_TEXT = {"model": {"init_args": {"adapter": {"class_path": "LoRA", "init_args": {"rank": 1}}}}}
"""That of a language model, whose frozen weights may be in half precision: an update that is zero."""
HEADS = ("LinearHeadTask", "TextClassificationTask")
"""Tasks whose head begins with random or zero weights."""


def composer(root: str | None = None) -> Composer:
    """Puts the configs of cells together as `fit` does.

    Args:
        root: Folder of the data sets, instead of the configs'.
    """

    def pair(model: Tree, method: Tree, options: Tree, untrained: bool) -> Tree:
        place = {} if root is None else {"data": {"root": root}}
        layers = [
            *_configs(model["config"]),
            nested(options),
            nested(model.get("set", {})),
            *method_layers(method),
            place,
        ]
        tree = normalise(copy.deepcopy(DEFAULTS))
        for layer in layers:
            tree = merge(tree, normalise(layer))
        tree = check(tree)
        if not untrained:
            return tree
        task = tree["model"]["class_path"].rpartition(".")[2]
        if task in HEADS:
            raise UserError("a linear head that nobody has trained says nothing: leave out zero-shot for this model.")
        return check(merge(tree, UNTRAINED_TEXT if on_texts(task) else UNTRAINED))

    return Composer(pair, lambda tree, more: merge(tree, normalise(more)), check, flatten)


def check(tree: Tree) -> Tree:
    """The config with every class spelled right.

    Raises:
        UserError: An unknown name.
    """
    command = Command("fit", config=copy.deepcopy(tree))
    check_names(command)
    return command.config


def nested(options: Tree) -> Tree:
    """Options such as ``{data.steps: 5}`` as ``{data: {steps: 5}}``; both may be mixed."""
    tree: Tree = {}
    for key, value in options.items():
        node: Any = nested(value) if isinstance(value, dict) else value
        for name in reversed(str(key).split(".")):
            node = {name: node}
        tree = merge(tree, node)
    return tree


def _configs(names: str | list[str]) -> list[Tree]:
    return [read_config(find_config(name)) for name in ([names] if isinstance(names, str) else names)]


def method_layers(facts: Tree) -> list[Tree]:
    """What a method lays over a model's config."""
    model: Tree = {key: facts[key] for key in ("learning_rate", "head_learning_rate") if key in facts}
    if "task" in facts:
        model["class_path"] = facts["task"]
    options = {key: value for key, value in facts.items() if key not in METHOD}
    adapter = ({"class_path": facts["adapter"]} if "adapter" in facts else {}) | options
    if isinstance(options.get("inner"), dict) and "adapter" in options["inner"]:
        inner = dict(options["inner"])
        adapter["inner"] = {"class_path": inner.pop("adapter")} | inner
    model |= {"adapter": adapter} if adapter else {}
    return [*_configs(facts.get("config") or []), {"model": model} if model else {}, nested(facts.get("set", {}))]


class Runner:
    """Runs cells in this process, one after the other.

    Args:
        test: Whether cells are tested; a search of learning rates leaves the test images alone.
        logger: Where the curves of a cell go, unless the sweep sets ``run.logger``.
    """

    def __init__(self, test: bool = True, logger: str = "csv") -> None:
        self.test, self.logger = test, logger

    def __call__(self, cell: Cell, folder: Path) -> None:
        """Runs a cell from its checkpoint, or from its beginning.

        Args:
            cell: The cell.
            folder: Its run folder; what is in it and cannot be gone on with is removed.

        Raises:
            UserError: As `fit`; so are all others.
        """
        start = time.perf_counter()
        with suppress(OSError):  # Linux counts the peak of the resident set anew
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        said = io.StringIO()  # the run's log has it, too
        try:
            with redirect_stdout(said), redirect_stderr(said):
                copy_context().run(self._run, cell, folder, start)  # jsonargparse keeps the last parser in a variable
        finally:
            gc.collect()  # Lightning's objects refer to each other, and each holds a model

    def _run(self, cell: Cell, folder: Path, start: float) -> None:
        from randlora_pl.engine.lightning_cli import App
        from randlora_pl.engine.session import guarded
        from randlora_pl.engine.stages import evaluate, fit
        from randlora_pl.utils.run_results import write_results

        with locked(folder) as lock:
            again = self._resumable(cell, folder)
            app = App(self.command(cell), folder if again else None, folder)
            with guarded(app):
                if cell.untrained:
                    evaluate(app, None)
                    none = {"trainable_parameters": 0, "adapter_parameters": 0}  # though all of the model could train
                    write_results(folder, none | {"finished": True, "device": str(app.model.device.type)})
                else:
                    fit(app, lock, zero_shot=False, test=self.test)
                write_results(folder, {"cell_seconds": round(time.perf_counter() - start, 3)} if not again else {})

    def command(self, cell: Cell) -> Command:
        """The command that a cell is."""
        how = {"trainer": {"devices": 1, "enable_progress_bar": False}, "run": {"logger": self.logger}}
        tree = merge(how, cell.tree) | {"trainer": merge(cell.tree.get("trainer", {}), how["trainer"])}
        command = Command("test" if cell.untrained else "fit", config=copy.deepcopy(tree))
        check_names(command)
        return command

    @staticmethod
    def _resumable(cell: Cell, folder: Path) -> bool:
        """Whether a broken-off cell has a checkpoint to go on from; else its folder is emptied."""
        from randlora_pl.callbacks.checkpoint_file import check_checkpoint
        from randlora_pl.engine.run_folder import check_run
        from randlora_pl.utils.files.run_files import LAST

        with suppress(UserError):
            if not cell.untrained and (folder / LAST).is_file():
                check_run(folder)
                check_checkpoint(folder / LAST)
                return True
        for path in folder.iterdir():
            if path.name in ("cell.json", "failed.json", FILE):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False
