"""``tune``: learning rates (and alphas) for the methods of a sweep, chosen on validation images."""

import io
import shlex
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.cli.inspect.config import config_names
from randlora_pl.cli.sweep.job import (
    Job,
    begin,
    check_typed,
    choose,
    parser_of,
    place_of,
    summary,
    told_by,
    words_of,
)
from randlora_pl.cli.sweep.run import dry_run, spawn, work
from randlora_pl.experiments.sweep.cell_runner import composer
from randlora_pl.experiments.sweep.description import Description
from randlora_pl.experiments.sweep.folder import SweepFolder
from randlora_pl.experiments.sweep.plan import Cell
from randlora_pl.experiments.sweep.provenance import FILE
from randlora_pl.experiments.sweep.texts import is_text
from randlora_pl.language.catalog import LABELLED
from randlora_pl.language.dataset_sizes import OWN_TEXTS
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.files.cache_folder import write_whole

if TYPE_CHECKING:
    from randlora_pl.experiments.sweep.tuning import Search

PAGE = """\
Search the learning rate (and alpha) of every method of a sweep on validation samples; the test is not read.
Each candidate is tried with one seed, the two best with all seeds of the search; the best mean is taken. The same
command goes on where it stopped. Writes what was tried (tuning.md and .json) and a config with the best (tuned.yaml).

  randlora-pl tune offline --dry-run
  randlora-pl tune offline --jobs 2
  randlora-pl sweep runs/tune/offline/tuned.yaml         or both at once: randlora-pl sweep offline --tune
  randlora-pl tune --config quickstart --data.shots 16   the rate of a single run, with the options of fit

The config's part `tune` says what is tried:
  tune: {learning_rates: [1e-3, 1e-2], alphas: [1, 10], seeds: [0, 4], datasets: [digits], budgets: [16], set: {...}}
`monitor: val/loss` takes the lowest loss instead of the best val/acc (of GLUE's tasks also val/score).
With `climb: true` a method begins at its own rate and the two beside it, and goes on while the best is outermost.
seeds must be others than the sweep's; without datasets and budgets all of the sweep's are taken, without alphas none.

  CONFIG                What to tune: a shipped config of a sweep or a file
  --output DIR          Where to put it (default runs/tune/NAME)
  --dry-run             Only list the cells of the first round, with the time and memory that they are expected to take
  --only KEY=VALUE ...  Some of it: model or dataset, or methods by their labels in the config (method=LoRA-16)
  --retry-failed        Run candidates again that failed before (a diverged one fails again)
  --max-hours H         Begin no run that is not expected to end within this time
  --skip-missing        Leave out data sets that are not on this machine
  --data.root DIR       Folder that holds the data sets, or the place of your own (folder, table ...), if the config
                        gives none
  --jobs N              Processes that share the work (default 1)
"""


def tune_verb(args: list[str]) -> int:
    """Search, and write what was found.

    Returns:
        0, or 1 where a method has no candidate that worked.

    Raises:
        UserError: An option, or something in the config, is wrong; a data set is missing; the disk is full.
        KeyboardInterrupt: With what is done and how to go on.
    """
    if {"-c", "--config"} & {word.partition("=")[0] for word in args}:
        from randlora_pl.cli.sweep.tune_run import tune_run

        return tune_run(args)
    typed = parser_of("tune").parse_args(args)
    check_typed(typed)
    file, description = told_by(typed.config)
    for word in typed.only:
        if word.partition("=")[0] not in ("model", "dataset", "method"):
            raise UserError(f"--only {word}: a search is restricted by model, dataset or method.")
    path = Path("runs") / "tune" / file.stem if typed.output is None else typed.output
    found = search_of(typed, file, description, path, f"randlora-pl tune {shlex.join(args)}")
    if typed.dry_run:
        return dry_run(found.job)
    tuned = found.run(typed, words_of("tune", args, found.job), comments(file))
    if found.stopped:
        return 0
    print(f"Next: randlora-pl sweep {shlex.quote(str(tuned))}")
    return 1 if found.without() else 0


@dataclass
class Tuning:
    """A search that was asked for.

    Attributes:
        job: Its cells.
        search: Which of them there are.
        stopped: Why it stopped before the end, empty where it did not.
    """

    job: Job
    search: "Search"
    stopped: str = ""

    def rounds(self) -> list[Cell]:
        """The cells of both rounds, as far as is known by now."""
        return self.search.first(self.job.folder) + self.search.second(self.job.folder)

    def without(self) -> list[str]:
        """Methods that have no candidate that worked."""
        return [method for method in self.search.names if method not in self.search.chosen(self.job.folder)]

    def run(self, typed: Any, words: list[str], head: str | None) -> Path:
        """Searches, and writes and prints what was found.

        Args:
            typed: ``jobs``, ``retry_failed`` and ``max_hours``.
            words: The command of each of several processes.
            head: The comments of a config with the best that is to be written; None for no config.

        Returns:
            The config with the best, or the table where there is none.

        Raises:
            UserError: A data set keeps no validation samples, or the folder holds another search.
        """
        job, search, folder = self.job, self.search, self.job.folder
        _check_validation(job.chosen)
        begin(job)
        if typed.jobs > 1:
            self.stopped = spawn(job, words, typed.jobs, self.rounds)
        else:
            self.stopped = work(job, typed.retry_failed, typed.max_hours, self.rounds, test=False).stopped
        from randlora_pl.experiments.sweep.tuning_files import as_json, config_text, markdown
        from randlora_pl.utils.run_results import environment

        made = {name: value for name, value in environment().items() if name in ("version", "git_commit")}
        report = search.report(folder, {"command": job.same} | made)
        files = {FILE: as_json(report), "tuning.md": markdown(report)}
        if head is not None:
            files["tuned.yaml"] = config_text(search.tuned(folder), head)
        for name, text in files.items():
            write_whole(folder.path / name, lambda stream, text=text: stream.write(text.encode("utf-8")))  # type: ignore[misc]
            (folder.path / name).chmod(0o644)
        print(f"\n{markdown(report)}")
        if edges := search.edges(folder):
            print(f"Best at the end of what was tried, so that a better rate may lie beyond: {', '.join(edges)}")
        if flat := search.flat(folder):
            print(f"All rates did equally well, which says nothing: {', '.join(flat)}. Train for more steps.")
        first, *others = reversed(files)
        print(f"Written: {folder.path / first}, {' and '.join(others)} beside it; {summary(job)}")
        if self.stopped:
            print(f"Stopped, because {self.stopped}. Go on with: {job.same}")
        elif without := self.without():
            kept = "" if head is None else "; the config keeps what it had"
            print(f"No candidate worked for: {', '.join(without)}{kept}. See {place_of(job)}/cells")
        return folder.path / first


def search_of(typed: Any, file: Path, description: Description, path: Path, same: str) -> Tuning:
    """The search that the options ask for; nothing is run.

    Args:
        typed: ``only``, ``root``, ``skip_missing`` and ``dry_run``.
        file: The config, for messages.
        description: What it says.
        path: The folder of the search.
        same: The command that was typed, to go on with.

    Raises:
        UserError: There is nothing to try, something in it is wrong, or a data set is missing.
    """
    _check_rates(file, description)
    from randlora_pl.cli.fit import quieten

    quieten()
    from randlora_pl.experiments.sweep.tuning import Search

    with errors_in(file):
        search = Search.of(description, composer(typed.root))
        search.restrict([word for word in typed.only if word.startswith("method=")])
    folder = SweepFolder(path, "tune.yaml")
    job = Job(description, search.all_cells(), search.first(folder), folder, same)
    choose(
        job, [word for word in typed.only if not word.startswith("method=")], None, typed.skip_missing, typed.dry_run
    )
    search.keep({(cell.labels.model, cell.labels.dataset) for cell in job.chosen})
    job.chosen = search.first(folder)
    job.folder.check(job.cells)
    return Tuning(job, search)


def comments(file: Path) -> str:
    """The lines of comments in a config."""
    return "".join(line for line in file.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))


def _check_rates(file: Path, description: Description) -> None:
    """Whether there is anything to try, as most shipped sweeps, which nobody edits in place, say nothing of it.

    Raises:
        UserError: There is not; of a shipped sweep with what to copy and what to add.
    """
    name = next((name for name, known in config_names().items() if known == file), None)
    if description.tune.get("learning_rates") or name is None:
        return
    texts = any(facts.get("dataset") in LABELLED for facts in description.datasets.values())
    held = ", set: {data.validation: 200}, monitor: val/score" if texts else ""  # GLUE's scripts hold nothing out
    raise UserError(
        f"{name} gives no learning rates to try. Copy it: randlora-pl config cp {name} mine.yaml\n"
        f"and add a line such as: tune: {{learning_rates: [1e-4, 1e-3, 1e-2]{held}}}; then: randlora-pl tune mine.yaml"
    )


def _check_validation(cells: list[Cell]) -> None:
    """Whether every data set keeps samples to validate with.

    Raises:
        UserError: One does not.
    """
    from randlora_pl.experiments.sweep.expand import data_of

    for label, cell in {cell.labels.dataset: cell for cell in cells}.items():
        data = data_of(cell.tree)
        if is_text(cell.tree):  # which need a tokenizer to be read
            if data.validation == 0 and data.dataset not in OWN_TEXTS:
                raise UserError(f"datasets.{label}: nothing is held out; put data.validation: N into tune.set.")
            continue
        with redirect_stderr(io.StringIO()):  # what it remarks is an error here
            data.setup("validate")
            loader = data.val_dataloader()
        if isinstance(loader, list) or not len(data.samples("val")):  # a list: no loader at all
            raise UserError(f"datasets.{label}: no validation images are kept out of training, and tuning needs them.")
