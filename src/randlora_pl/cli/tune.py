"""``tune``: learning rates (and alphas) for the methods of a sweep, chosen on validation images."""

import io
import shlex
from contextlib import redirect_stderr
from pathlib import Path

from randlora_pl.cache import write_whole
from randlora_pl.cli.cells import composer
from randlora_pl.cli.configs import config_names
from randlora_pl.cli.sweep import words_of
from randlora_pl.cli.sweep_job import Job, begin, check_typed, choose, parser_of, place_of, summary, told_by
from randlora_pl.cli.sweep_work import dry_run, spawn, work
from randlora_pl.errors import UserError
from randlora_pl.experiments.sweep.description import Description
from randlora_pl.experiments.sweep.folder import SweepFolder
from randlora_pl.experiments.sweep.plan import Cell
from randlora_pl.experiments.sweep.texts import is_text
from randlora_pl.language.known import LABELLED
from randlora_pl.language.sizes import OWN_TEXTS

PAGE = """\
Search the learning rate (and alpha) of every method of a sweep on validation samples; the test is not read.
Each candidate is tried with one seed, the two best with all seeds of the search; the best mean is taken. The same
command goes on where it stopped. Writes what was tried (tuning.md and .json) and a config with the best (tuned.yaml).

  randlora-pl tune offline --dry-run
  randlora-pl tune offline --jobs 2
  randlora-pl sweep runs/tune/offline/tuned.yaml

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
  --data.root DIR       Folder of the data sets
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
    typed = parser_of("tune").parse_args(args)
    check_typed(typed)
    file, description = told_by(typed.config)
    _check_rates(file, description)
    from randlora_pl.cli.train import quieten

    quieten()
    from randlora_pl.experiments.sweep.tuning import Search
    from randlora_pl.experiments.sweep.tuning_files import as_json, config_text, markdown

    methods = [word for word in typed.only if word.startswith("method=")]
    others = [word for word in typed.only if not word.startswith("method=")]
    for word in others:
        if word.partition("=")[0] not in ("model", "dataset"):
            raise UserError(f"--only {word}: a search is restricted by model, dataset or method.")
    try:
        search = Search.of(description, composer(typed.root))
        search.restrict(methods)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    path = Path("runs") / "tune" / file.stem if typed.output is None else typed.output
    folder = SweepFolder(path, "tune.yaml")
    job = Job(description, search.all_cells(), search.first(folder), folder, f"randlora-pl tune {shlex.join(args)}")
    choose(job, others, None, typed.skip_missing, typed.dry_run)
    search.keep({(cell.labels.model, cell.labels.dataset) for cell in job.chosen})
    job.chosen = search.first(folder)

    def rounds() -> list[Cell]:
        return search.first(folder) + search.second(folder)

    if typed.dry_run:
        job.folder.check(job.cells)
        return dry_run(job)
    _check_validation(job.chosen)
    begin(job)
    if typed.jobs > 1:
        stopped = spawn(job, words_of("tune", args, job), typed.jobs, rounds)
    else:
        stopped = work(job, typed.retry_failed, typed.max_hours, rounds, test=False).stopped
    report, tuned = search.report(folder), path / "tuned.yaml"
    head = "".join(line for line in file.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    for name, text in (
        ("tuning.json", as_json(report)),
        ("tuning.md", markdown(report)),
        ("tuned.yaml", config_text(search.tuned(folder), head)),
    ):
        write_whole(path / name, lambda stream, text=text: stream.write(text.encode("utf-8")))  # type: ignore[misc]
        (path / name).chmod(0o644)
    print(f"\n{markdown(report)}")
    if edges := search.edges(folder):
        print(f"Best at the end of what was tried, so that a better rate may lie beyond: {', '.join(edges)}")
    print(f"Written: {tuned}, tuning.md and tuning.json beside it; {summary(job)}")
    if stopped:
        print(f"Stopped, because {stopped}. Go on with: {job.same}")
        return 0
    without = [method for method in search.names if method not in search.chosen(folder)]
    if without:
        print(f"No candidate worked for: {', '.join(without)}; the config keeps what it had. See {place_of(job)}/cells")
    print(f"Next: randlora-pl sweep {shlex.quote(str(tuned))}")
    return 1 if without else 0


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
    from randlora_pl.experiments.sweep.build import data_of

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
