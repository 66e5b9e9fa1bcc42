"""Search of learning rates from the command line."""

import io
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.commands.sweep.job import Job, begin, check_root_is_read, choose, place_of, summary
from randlora_pl.commands.sweep.run import spawn, work
from randlora_pl.language.catalog import LABELLED, OWN_TEXTS
from randlora_pl.run.options.shipped import config_names
from randlora_pl.sweep.description import SweepConfig
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.plan import Trial
from randlora_pl.sweep.provenance import FILE
from randlora_pl.sweep.steps import is_text
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.text.console import silence_library_warnings

if TYPE_CHECKING:
    from randlora_pl.sweep.tuning import Search


@dataclass
class Tuning:
    """Search of learning rates.

    Attributes:
        job: Its cells.
        search: The search that selects them.
        stopped: Reason of an early stop; empty without one.
    """

    job: Job
    search: "Search"
    stopped: str = ""

    def rounds(self) -> list[Trial]:
        """Return the cells of both rounds that are known so far."""
        return self.search.first(self.job.folder) + self.search.second(self.job.folder)

    def without(self) -> list[str]:
        """Methods without a candidate that worked."""
        return [method for method in self.search.names if method not in self.search.chosen(self.job.folder)]

    def run(self, typed: Any, words: list[str], head: str | None) -> Path:
        """Search, and write and print the result.

        Args:
            typed: ``jobs``, ``retry_failed`` and ``max_hours``.
            words: The command of each of several processes.
            head: Comments of the config to write with the best candidates; None for no config.

        Returns:
            The config with the best candidates, or the table if no config is written.
        """
        job, search, folder = self.job, self.search, self.job.folder
        _check_validation(job.chosen)
        begin(job)
        if typed.jobs > 1:
            self.stopped = spawn(job, words, typed.jobs, self.rounds)
        else:
            self.stopped = work(job, typed.retry_failed, typed.max_hours, self.rounds, test=False).stopped
        from randlora_pl.sweep.tuning_files import as_json, config_text, markdown
        from randlora_pl.utils.run_results import environment

        made = {name: value for name, value in environment().items() if name in ("version", "git_commit")}
        report = search.report(folder, {"command": job.same} | made)
        files = {FILE: as_json(report), "tuning.md": markdown(report)}
        if head is not None:
            files["tuned.yaml"] = config_text(search.tuned(folder), head)
        for name, text in files.items():
            write_text(folder.path / name, text)
        print(f"\n{markdown(report)}")
        if edges := search.edges(folder):
            print(f"Best at the edge of the searched range, so a better rate may lie beyond it: {', '.join(edges)}")
        if flat := search.flat(folder):
            print(f"All rates are equally good, so none can be selected: {', '.join(flat)}. Train for more steps.")
        first, *others = reversed(files)
        print(f"Written: {folder.path / first}, {' and '.join(others)} in the same folder; {summary(job)}")
        if self.stopped:
            print(f"Stopped, because {self.stopped}. Resume with: {job.same}")
        elif without := self.without():
            kept = "" if head is None else "; the config keeps their rates"
            print(f"No candidate worked for: {', '.join(without)}{kept}. See {place_of(job)}/cells")
        return folder.path / first


def search_of(typed: Any, file: Path, description: SweepConfig, path: Path, same: str) -> Tuning:
    """Return the search of the options without running it.

    Args:
        typed: ``only``, ``root``, ``skip_missing`` and ``dry_run``.
        file: The config, for messages.
        description: The parsed config.
        path: The folder of the search.
        same: The typed command, for resuming.
    """
    _check_rates(file, description)
    silence_library_warnings()
    from randlora_pl.sweep.tuning import Search

    with errors_in(file):
        search = Search.of(replace(description, root=typed.root))
        check_root_is_read(search.all_cells(), typed.root)
        search.restrict([word for word in typed.only if word.startswith("method=")])
    folder = SweepFolder(path, "tune.yaml")
    job = Job(description, search.all_cells(), search.first(folder), folder, same)
    others = [word for word in typed.only if not word.startswith("method=")]
    choose(job, others, None, typed.skip_missing, typed.dry_run)
    search.keep({(cell.labels.model, cell.labels.dataset) for cell in job.chosen})
    job.chosen = search.first(folder)
    job.folder.check(job.cells)
    return Tuning(job, search)


def comments(file: Path) -> str:
    """Return the lines of comments in a config."""
    return "".join(line for line in file.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))


def _check_rates(file: Path, description: SweepConfig) -> None:
    """Refuse a bundled sweep without learning rates to try, as most of them have none."""
    name = next((name for name, known in config_names().items() if known == file), None)
    if description.tune.get("learning_rates") or name is None:
        return
    texts = any(facts.get("dataset") in LABELLED for facts in description.datasets.values())
    held = ", set: {data.validation: 200}, monitor: val/score" if texts else ""  # GLUE's scripts hold nothing out
    raise UserError(
        f"{name} has no learning rates to search. Copy it: randlora-pl config cp {name} mine.yaml\n"
        f"and add a line such as: tune: {{learning_rates: [1e-4, 1e-3, 1e-2]{held}}}; then: randlora-pl tune mine.yaml"
    )


def _check_validation(cells: list[Trial]) -> None:
    """Check that every dataset has validation samples."""
    from randlora_pl.sweep.expand import data_of

    for label, cell in {cell.labels.dataset: cell for cell in cells}.items():
        data = data_of(cell.tree)
        if is_text(cell.tree):  # texts need a tokenizer to be read
            if data.validation == 0 and data.dataset not in OWN_TEXTS:
                raise UserError(f"datasets.{label}: nothing is held out. Add data.validation: N to tune.set.")
            continue
        with redirect_stderr(io.StringIO()):  # its remarks are errors here
            data.setup("validate")
            loader = data.val_dataloader()
        if isinstance(loader, list) or not len(data.samples("val")):  # a list: the data have no loader
            raise UserError(f"datasets.{label}: tuning needs validation images, and none are held out.")
