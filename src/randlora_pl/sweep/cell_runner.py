"""A cell of a sweep as a run of ``fit`` or ``test``: its config, and how it is run in this process."""

import copy
import gc
import io
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from randlora_pl.run.options.classes import Tree, normalize
from randlora_pl.run.options.compose import Command, merge, read_config
from randlora_pl.run.options.mistakes import check_names
from randlora_pl.run.run_lock import FILE, locked
from randlora_pl.sweep.folder import FIRST, FIRST_SECONDS
from randlora_pl.sweep.plan import Trial
from randlora_pl.utils.errors import Terminated, UserError
from randlora_pl.utils.files.run_files import CONFIG

if TYPE_CHECKING:
    from lightning.pytorch import Callback

_PLACE = (("data", "root"), ("trainer", "accelerator"))
"""Options that may differ when a cell is resumed."""


class Runner:
    """Runs cells in this process, one after the other.

    Args:
        test: Whether cells are tested; a search leaves the test images alone.
        logger: Logger for the curves of a cell, unless the sweep sets ``run.logger``.
        watcher: Returns a callback that may end a cell early, or None.
    """

    def __init__(
        self, test: bool = True, logger: str = "csv", watcher: "Callable[[Trial], Callback | None]" = lambda cell: None
    ) -> None:
        self.test, self.logger, self.watcher = test, logger, watcher

    def __call__(self, cell: Trial, folder: Path) -> bool:
        """Run a cell from its checkpoint, or from its beginning; content that cannot be resumed is removed.

        Returns:
            True if SIGTERM came during the test, where Lightning takes note of it and goes on.

        Raises:
            UserError: As `fit`; so are all others.
        """
        start = time.perf_counter()
        with suppress(OSError):  # Linux counts the peak of the resident set anew
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        output = io.StringIO()  # the run's log has it, too
        try:
            with redirect_stdout(output), redirect_stderr(output):
                return copy_context().run(
                    self._run, cell, folder, start
                )  # jsonargparse keeps the last parser in a variable
        finally:
            gc.collect()  # Lightning's objects refer to each other, and each holds a model

    def _run(self, cell: Trial, folder: Path, start: float) -> bool:
        from randlora_pl.run.fit_results import callbacks_of
        from randlora_pl.run.lightning_cli import App
        from randlora_pl.run.session import handle_run_errors
        from randlora_pl.run.stages import evaluate, fit
        from randlora_pl.utils.run_results import read_results, write_results

        with locked(folder) as lock:
            again = self._resumable(cell, folder)
            if cell.first and not again:
                self._train_first(cell, folder / FIRST)
            app = App(self.command(cell, folder, again), folder if again else None, folder)
            with handle_run_errors(app):
                if cell.untrained:
                    evaluate(app, None)
                    none = {"trainable_parameters": 0, "adapter_parameters": 0}  # though all of the model could train
                    write_results(folder, none | {"finished": True, "device": str(app.model.device.type)})
                else:
                    if callback := self.watcher(cell):
                        callbacks_of(app.trainer).append(callback)
                    fit(app, lock, zero_shot=False, test=self.test)
                own = {"cell_seconds": round(time.perf_counter() - start, 3)} if not again else {}
                first = read_results(folder / FIRST).get("fit_seconds") if cell.first else None
                write_results(folder, own | ({} if first is None else {FIRST_SECONDS: first}))
            return app.trainer.received_sigterm

    def _train_first(self, cell: Trial, folder: Path) -> None:
        """Train the LoRA that a cell starts from, unless that was done before a kill."""
        from randlora_pl.utils.run_results import read_results

        stage = replace(cell, tree=cell.stages[".first"], first={})
        if not read_results(folder).get("finished"):
            folder.mkdir(exist_ok=True)
            if Runner(test=False, logger=self.logger)._run(stage, folder, time.perf_counter()):
                raise Terminated

    def command(self, cell: Trial, folder: Path = Path(), again: bool = False) -> Command:
        """Return the command that a cell is, in its folder."""
        if cell.first and again:  # its method depends on the LoRA, and is in the config that the run wrote
            typed = [(group, name) for group, name in _PLACE if name in cell.tree.get(group, {})]
            place = {group: {name: cell.tree[group][name]} for group, name in typed}
            tree = merge(normalize(read_config(folder / CONFIG)), place)
        else:
            how: Tree = {"trainer": {"devices": 1, "enable_progress_bar": False}, "run": {"logger": self.logger}}
            tree = merge(how, cell.tree) | {"trainer": merge(cell.tree.get("trainer", {}), how["trainer"])}
            if cell.first:
                tree |= {"from_adapter": str(folder / FIRST), "from_form": cell.first["from_form"]}
        command = Command("test" if cell.untrained else "fit", config=copy.deepcopy(tree))
        check_names(command)
        return command

    @staticmethod
    def _resumable(cell: Trial, folder: Path) -> bool:
        """Return True if a broken-off cell has a checkpoint to go on from; else its folder is emptied."""
        from randlora_pl.run.callbacks.checkpoint import check_checkpoint
        from randlora_pl.run.run_folder import check_run
        from randlora_pl.utils.files.run_files import LAST

        with suppress(UserError):
            if not cell.untrained and (folder / LAST).is_file():
                check_run(folder)
                check_checkpoint(folder / LAST)
                return True
        for path in folder.iterdir():
            if path.name in ("cell.json", "failed.json", FILE, FIRST):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False
