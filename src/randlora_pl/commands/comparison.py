"""Comparison of methods on own images: its plan in a given time, the search of the rates, the tests and the page."""

import json
import shlex
import shutil
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from randlora_pl.commands import sweep_job as jobs
from randlora_pl.commands.sweep import TuneOptions, run_search, search_job
from randlora_pl.commands.sweep_job import Job, WorkOptions
from randlora_pl.run.options.classes import classes, options_of, task_of
from randlora_pl.run.options.compose import flatten
from randlora_pl.sweep import RATES, SweepConfig, Tree, is_zero_shot, timing
from randlora_pl.sweep.climb import TRIALS
from randlora_pl.sweep.expand import counts
from randlora_pl.sweep.folder import FAILED, OPEN, TUNE, SweepFolder
from randlora_pl.sweep.loop import Loop, Runner
from randlora_pl.sweep.plan import Cell, plan
from randlora_pl.sweep.search import VALIDATED
from randlora_pl.sweep.timing import Budget, Cost, Sizes, Tier, spent, time_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import write_text
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.reuse import caching
from randlora_pl.utils.text import duration, table

TIMING, COMPARISON = "timing", "comparison.yaml"
"""Folder of the runs that measure the time, and what is compared, in the folder of a comparison."""


@dataclass
class Comparison:
    """Comparison of methods on one set of images.

    Attributes:
        description: The methods, with the base model and the data of the user.
        typed: Words of `fit` that describe the base model and the data.
        base: Config of these words.
        same: The typed command, for resuming.
        options: Its options.
        folder: Folder of all of it.
        seconds: Time for all of it; None without a limit.
        margin: Points of accuracy that a larger method must gain.
    """

    description: SweepConfig
    typed: list[str]
    base: Tree
    same: str
    options: WorkOptions
    folder: Path
    seconds: float | None
    margin: float

    @cached_property
    def trained(self) -> SweepConfig:
        """The methods without the pretrained model."""
        methods = {label: facts for label, facts in self.description.methods.items() if not is_zero_shot(label)}
        return replace(self.description, methods=methods)

    def run(self) -> int:
        """Plan, search the rates, train and test, and write the page; return 1 if runs have failed, else 0.

        Raises:
            UserError: The folder or the data do not fit, a method cannot be trained, or the time is too short.
        """
        job, own, file = self.search(None, timing.TIERS[0].tries), self.description, self.folder / COMPARISON
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if there - {TIMING} and COMPARISON not in there:
            raise UserError(f"{self.folder} is not empty and has no comparison. Choose another folder with --output.")
        jobs.check(job)
        SweepFolder(self.folder).check(plan(own), [f"model.{rate}" for rate in RATES])
        sizes, (place,) = Sizes.of(plan(self.trained)[0]), own.datasets
        if sizes.classes < 2:
            raise UserError(f"{place} has one class, and a comparison needs two. Add images of another class.")
        if not sizes.val:
            raise UserError(f"{place} has no validation images, which the search needs. Add images.")
        split = f"train {sizes.train:,}, val {sizes.val:,}, test {sizes.test:,}"
        print(f"{place}: {sizes.classes} classes; {split} images; {sizes.steps:,} steps a run", flush=True)
        budget = None if self.seconds is None else self.measure(self.seconds, sizes)
        tier = self.plan(job, sizes.test, budget)
        if self.options.dry_run:
            return 0
        job = self.search(tier.trials if budget and tier.trials else None, tier.tries)
        write_text(file, f"# {self.same}\n{job.description.text()}")
        runs = {label: list[float]() for label in self.trained.methods}
        if tier.trials:
            run_search(job, [TUNE, str(file)], file)
            if job.outcome.stopped:
                return 0
            own = jobs.find_sweep(str(job.folder.path / "tuned.yaml"))[1]
            for results, cell in ((job.folder.results(cell), cell) for cell in job.chosen):
                runs[cell.facts["tunes"]] += [spent([results])] if results else []
        if budget is None:
            return self.test(own)
        used = budget.spent + sum(map(sum, runs.values()))
        seeds = own.seeds[: budget.seeds(budget.seconds - used, runs, len(own.seeds))]
        rest = duration(max(budget.seconds - used, 0))
        print(f"\n{rest} are left: tests with {len(seeds)} of {len(own.seeds)} seeds.", flush=True)
        return self.test(replace(own, seeds=seeds), used)

    def search(self, trials: int | None, tries: int) -> Job:
        """Return the search of the rates without running it; None leaves it the usual number of trials."""
        own = self.description.seeds
        seeds = [seed for seed in range(tries + len(own)) if seed not in own][:tries]
        how = {name: getattr(self.options, name) for name in ("dry_run", "retry_failed", "jobs")}
        typed = TuneOptions(**how, output=self.folder / TUNE, trials=trials)
        tuned = replace(self.description, tune={"seeds": seeds})
        return search_job(typed, Path("compare-methods"), tuned, self.same)  # the name is in errors

    def plan(self, job: Job, tested: int, budget: Budget | None) -> Tier:
        """Print the plan, the largest that fits into the time, and return it."""
        from randlora_pl.lab.report import many
        from randlora_pl.lab.report.comparisons import SAMPLES, SEEDS

        assert job.search is not None
        rates = max(len({*names} & {*RATES}) for names in job.search.names.values())
        most = Tier(TRIALS[rates], timing.TIERS[0].tries, len(self.description.seeds))
        tier = budget.fitting(most) if budget else most
        header, rows = ["method", "trained", "rates tried", "seeds"], []
        for cell in plan(replace(self.trained, seeds=self.trained.seeds[:1])):
            count = counts(cell.tree)
            trained = "?" if count is None else f"{count.trainable:,}" if count.trainable else "head"
            rows.append([cell.labels.method, trained, tier.trials, tier.seeds])
            if budget:
                cost = budget.costs[cell.labels.method]
                rows[-1] += [duration(cost.final), duration(tier.seconds([cost]))]
        print(f"\n{table([*header, *(['one run', 'all runs'] if budget else [])], rows)}")
        few = [f"{many(tier.seeds, 'seed')}, {SEEDS} are needed"] if tier.seeds < SEEDS else []
        few += [f"{many(tested, 'test image')}, {SAMPLES} are needed"] if tested < SAMPLES else []
        if few:
            print(f"This plan cannot give a verdict: {'; '.join(few)}.")
        if budget:
            enough = [larger for larger in timing.tiers(most) if larger.seeds >= min(SEEDS, most.seeds)][-1]
            more = budget.spent + enough.seconds(budget.costs.values()) / timing.SPARE
            print(f"Expected: {duration(budget.expected(tier))} of {duration(budget.seconds)}.", flush=True)
            if enough.seeds > tier.seeds:
                print(f"For {enough.seeds} seeds: --budget {time_of(more)}")
        elif self.seconds is not None:
            print("The times are not measured yet, so the plan may get smaller.")
        return tier

    def measure(self, seconds: float, sizes: Sizes) -> Budget | None:
        """Run each method for a few steps without a test; in a dry run return None if this was not done before.

        Raises:
            UserError: A method cannot be trained, or these runs alone take longer than the budget.
        """
        folder, one = SweepFolder(self.folder / TIMING, "timing.yaml"), replace(self.trained, seeds=[1])
        cells = plan(one, {"data": {"steps": timing.STEPS}, "trainer": VALIDATED})
        elsewhere = 0
        if not self.options.dry_run and not all(map(folder.results, cells)):
            from randlora_pl.run import lightning_cli, stages  # noqa: F401 (the first run does not count their import)

            print(f"The time of {timing.STEPS} steps of each method:", flush=True)
            folder.replace(one, cells)
            for cell in cells:
                if folder.state(cell) == OPEN and not folder.worker(cell):  # the time of a resumed run says nothing
                    shutil.rmtree(folder.cell_path(cell), ignore_errors=True)
            deadline = time.monotonic() + seconds
            loop = Loop(folder, cells, Runner(test=False), self.options.retry_failed, deadline, keep_adapters=False)
            try:
                with loop.watch.shown(), caching():
                    elsewhere = loop.work().elsewhere
            except KeyboardInterrupt as stop:
                raise type(stop)(f"resume with: {self.same}") from None
        for cell in cells:
            if folder.state(cell) == FAILED:
                method, reason = cell.labels.method, str(folder.failure(cell).get("reason")).rstrip(".")
                others = shlex.join(label for label in one.methods if label != method)
                hint = f"Leave it out: --methods {others}. Or fix it, and add --retry-failed."
                raise UserError(f"{method} cannot be trained: {reason}.", hint)
        done = {cell.labels.method: results for cell in cells if (results := folder.results(cell))}
        whole = spent(done.values())
        if len(done) == len(cells):
            costs = {method: Cost.of(results, sizes) for method, results in done.items()}
            return Budget(seconds, whole, costs, sizes.steps)
        if self.options.dry_run:
            return None
        if elsewhere:
            raise UserError(
                f"Another process runs this comparison in {self.folder}. Run the command when it has ended."
            )
        times = ", ".join(f"{method} {duration(spent([results]))}" for method, results in done.items())
        what = f"The budget is too small to measure {timing.STEPS} steps of each of the {len(cells)} methods ({times})."
        raise UserError(what, f"Set at least --budget {time_of(4 * whole / max(len(done), 1) * len(cells))}")

    def test(self, description: SweepConfig, used: float = 0.0) -> int:
        """Train and test with the chosen rates, and write the page; return 1 if runs have failed, else 0.

        Args:
            description: The methods with these rates.
            used: Seconds of all runs before.
        """
        job = Job(description, plan(description), SweepFolder(self.folder), self.options, self.same)
        jobs.choose(job)
        job.folder.replace(description, job.cells)  # runs of a former plan with other rates
        jobs.run(job, ["sweep", str(self.folder / TUNE / "tuned.yaml")])
        following = self.same
        if any(job.folder.results(cell) for cell in job.chosen if not cell.untrained):
            from randlora_pl.lab.report import advice
            from randlora_pl.lab.report.collect import read_sweep

            sweep = read_sweep(job.folder.path, {cell.hash for cell in job.cells})
            commands = {cell.labels.method: self.command(cell) for cell in job.chosen if not cell.untrained}
            advised = advice.recommend(sweep, self.margin)
            page = advice.write(sweep, self.folder, self.margin, commands)
            print("", advised.sentence, *advised.details, f"The page with all of it: {page}", sep="\n")
            following = commands[advised.winner]
        if self.seconds is not None:
            used += spent(filter(None, map(job.folder.results, job.chosen)))
            print(f"All runs took {duration(used)} of {duration(self.seconds)}.")
        return jobs.end(job, following)

    def command(self, cell: Cell) -> str:
        """Return the command that trains a method with its rates on training and validation images."""
        flat, base = flatten(cell.tree), flatten(self.base)
        changed = {name: value for name, value in flat.items() if value != base.get(name)}
        kinds: dict[str, type | None] = {"model": task_of(flat["model"])}
        if "model.adapter" not in changed:  # else it begins with the defaults of its class
            kinds["model.adapter"] = classes("model.adapter").get(flat["model.adapter"])
        for name in base.keys() - flat.keys():  # rates and options of the base config that the method does without
            group, _, option = name.rpartition(".")
            if (kind := kinds.get(group)) and option in options_of(kind):
                changed[name] = options_of(kind)[option].default
        words = [word for name, value in changed.items() if name.startswith(("model", "data"))
                 for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))]  # fmt: skip
        return shlex.join(["randlora-pl", "fit", *self.typed, *words, "--data.train_split", "full"]) + import_words()
