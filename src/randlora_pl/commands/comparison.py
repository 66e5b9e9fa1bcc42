"""Comparison of methods on own images: its plan in a given time, the search of the rates, the tests and the page."""

import json
import shlex
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import yaml

from randlora_pl.commands import sweep_job as jobs
from randlora_pl.commands.sweep import TuneOptions, run_search, search_job
from randlora_pl.commands.sweep_job import Job, SweepOptions
from randlora_pl.run.options.classes import classes, options_of, task_of
from randlora_pl.run.options.compose import flatten
from randlora_pl.sweep import RATES, SweepConfig, Tree, is_zero_shot
from randlora_pl.sweep.climb import TRIALS
from randlora_pl.sweep.expand import counts
from randlora_pl.sweep.folder import COMPARISON, FAILED, TIMING, TUNE, SweepFolder
from randlora_pl.sweep.plan import Cell, plan
from randlora_pl.sweep.timing import (
    SPARE,
    STEPS,
    TIERS,
    Cost,
    Measurement,
    Sizes,
    Tier,
    measure,
    seconds_for,
    spent,
    tiers,
    time_of,
    timed_cells,
)
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import write_text
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.text import duration, table


@dataclass
class Comparison:
    """Comparison of methods on one set of images.

    Attributes:
        description: The methods, with the base model and the data of the user.
        typed: Words of `fit` that describe the base model and the data.
        base: Config of these words.
        same: The typed command, for resuming.
        options: Its options, with the folder.
        seconds: Time for all of it; None without a limit.
        margin: Points of accuracy that a larger method must gain.
    """

    description: SweepConfig
    typed: list[str]
    base: Tree
    same: str
    options: SweepOptions
    seconds: float | None
    margin: float

    @property
    def folder(self) -> Path:
        """Folder of all of it."""
        assert self.options.output is not None
        return self.options.output

    @cached_property
    def trained(self) -> SweepConfig:
        """The methods without the pretrained model."""
        methods = {label: facts for label, facts in self.description.methods.items() if not is_zero_shot(label)}
        return replace(self.description, methods=methods)

    @cached_property
    def sizes(self) -> Sizes:
        """Samples of the data, whose labels are read.

        Raises:
            UserError: There is a single class, or no validation image.
        """
        sizes = Sizes.of(plan(self.trained)[0])
        (place,) = self.description.datasets
        if sizes.classes < 2:
            raise UserError(f"{place} has one class, and a comparison needs two. Add images of another class.")
        if not sizes.val:
            raise UserError(f"{place} has no validation images, which the search needs. Add images.")
        return sizes

    def run(self) -> int:
        """Plan, search the rates, train and test, and write the page; return 1 if runs have failed, else 0."""
        job, own = self.search(None, TIERS[0].tries), self.description
        jobs.check(job)
        SweepFolder(self.folder).check(plan(own), [f"model.{rate}" for rate in RATES])
        sizes, (place,) = self.sizes, own.datasets
        split = f"train {sizes.train:,}, val {sizes.val:,}, test {sizes.test:,}"
        print(f"{place}: {sizes.classes} classes; {split} images; {sizes.steps:,} steps a run", flush=True)
        times = None if self.seconds is None else self.times(self.seconds)
        tier = self.plan(job, times)
        if self.options.dry_run:
            return 0
        file = self.folder / COMPARISON
        job = self.search(None if times is None or not tier.trials else tier.trials, tier.tries)
        text = yaml.safe_dump(job.description.content(), sort_keys=False, allow_unicode=True, width=120)
        write_text(file, f"# {self.same}\n{text}")
        runs = {label: list[float]() for label in self.trained.methods}
        if tier.trials:
            run_search(job, [TUNE, str(file)], file)
            if job.outcome.stopped:
                return 0
            own = jobs.find_sweep(str(job.folder.path / "tuned.yaml"))[1]
            for results, cell in ((job.folder.results(cell), cell) for cell in job.chosen):
                runs[cell.facts["tunes"]] += [spent([results])] if results else []
        seeds = own.seeds
        if times is not None and self.seconds is not None:
            left = self.seconds - times.spent - sum(map(sum, runs.values()))
            seeds = own.seeds[: times.seeds(left, runs, len(own.seeds))]
            print(f"\n{duration(max(left, 0))} are left: tests with {len(seeds)} of {len(own.seeds)} seeds.")
        return self.test(replace(own, seeds=seeds))

    def search(self, trials: int | None, tries: int) -> Job:
        """Return the search of the rates without running it; None leaves it the usual number of trials."""
        own = self.description.seeds
        seeds = [seed for seed in range(tries + len(own)) if seed not in own][:tries]
        how = {name: getattr(self.options, name) for name in ("dry_run", "retry_failed", "jobs")}
        typed = TuneOptions(**how, output=self.folder / TUNE, trials=trials)
        return search_job(typed, self.folder / COMPARISON, replace(self.description, tune={"seeds": seeds}), self.same)

    def plan(self, job: Job, times: Measurement | None) -> Tier:
        """Print the plan, the largest that fits into the time, and return it.

        Raises:
            UserError: One run of each method does not fit.
        """
        from randlora_pl.lab.report import many
        from randlora_pl.lab.report.comparisons import SAMPLES, SEEDS

        assert job.search is not None
        rates = max(len({*names} & {*RATES}) for names in job.search.names.values())
        most = Tier(TRIALS[rates], TIERS[0].tries, len(self.description.seeds))
        tier = most if times is None or self.seconds is None else times.fitting(self.seconds, most)
        header, rows = ["method", "trained", "rates tried", "seeds"], []
        for cell in plan(replace(self.trained, seeds=self.trained.seeds[:1])):
            count = counts(cell.tree)
            trained = "?" if count is None else f"{count.trainable:,}" if count.trainable else "head"
            rows.append([cell.labels.method, trained, tier.trials, tier.seeds])
            if times is not None:
                cost = times.costs[cell.labels.method]
                rows[-1] += [duration(cost.final), duration(seconds_for(tier, [cost]))]
        print(f"\n{table([*header, *(['one run', 'all runs'] if times else [])], rows)}")
        few = [f"{many(tier.seeds, 'seed')}, {SEEDS} are needed"] if tier.seeds < SEEDS else []
        few += [f"{many(self.sizes.test, 'test image')}, {SAMPLES} are needed"] if self.sizes.test < SAMPLES else []
        if few:
            print(f"This plan can give no verdict: {'; '.join(few)}.")
        if times is not None and self.seconds is not None:
            enough = [each for each in tiers(most) if each.seeds >= min(SEEDS, most.seeds)][-1]
            more = times.spent + seconds_for(enough, times.costs.values()) / SPARE
            print(f"Expected: {duration(times.seconds(tier))} of {duration(self.seconds)}.", flush=True)
            if enough.seeds > tier.seeds:
                print(f"For {enough.seeds} seeds: --budget {time_of(more)}")
        elif self.seconds is not None:
            print("The times are not measured yet, so the plan may get smaller.")
        return tier

    def times(self, seconds: float) -> Measurement | None:
        """Return the measured times of all methods; in a dry run None if they were not measured before.

        Raises:
            UserError: A method cannot be trained, or the measurement alone takes longer than the budget.
        """
        folder, options, labels = SweepFolder(self.folder / TIMING, "timing.yaml"), self.options, self.trained.methods
        cells = timed_cells(self.trained)
        if not options.dry_run:
            if not all(map(folder.results, cells)):
                print(f"The time of {STEPS} steps of each method:", flush=True)
            try:
                measure(folder, self.trained, cells, time.monotonic() + seconds, options.retry_failed)
            except KeyboardInterrupt as stop:
                raise type(stop)(f"resume with: {self.same}") from None
        for cell in cells:
            if folder.state(cell) == FAILED:
                method, reason = cell.labels.method, str(folder.failure(cell).get("reason")).rstrip(".")
                others = shlex.join(label for label in labels if label != method)
                hint = f"Leave it out: --methods {others}. Or mend it, and add --retry-failed."
                raise UserError(f"{method} cannot be trained: {reason}.", hint)
        done = {cell.labels.method: results for cell in cells if (results := folder.results(cell))}
        whole = spent(done.values())
        if len(done) == len(cells):
            return Measurement({method: Cost.of(each, self.sizes) for method, each in done.items()}, self.sizes, whole)
        if options.dry_run:
            return None
        each = ", ".join(f"{method} {duration(spent([results]))}" for method, results in done.items())
        what = f"The budget is too small to measure {STEPS} steps of each of the {len(cells)} methods ({each})."
        raise UserError(what, f"Set at least --budget {time_of(4 * whole / max(len(done), 1) * len(cells))}")

    def test(self, description: SweepConfig) -> int:
        """Train and test with the chosen rates, and write the page; return 1 if runs have failed, else 0."""
        typed = replace(self.options, seeds=description.seeds)
        job = Job(description, plan(description), SweepFolder(self.folder), typed, self.same)
        jobs.choose(job)
        job.folder.replace(job.cells)  # runs of a former plan with other rates
        jobs.begin(job)
        jobs.run(job, ["sweep", str(self.folder / TUNE / "tuned.yaml")])
        following = self.same
        if any(job.folder.results(cell) for cell in job.chosen if not cell.untrained):
            from randlora_pl.lab.report import advice
            from randlora_pl.lab.report.collect import read_sweep

            sweep = read_sweep(job.folder.path)
            commands = {cell.labels.method: self.command(cell) for cell in job.chosen if not cell.untrained}
            advised = advice.recommend(sweep, self.margin)
            page = advice.write(sweep, self.folder, self.margin, commands)
            print("", advised.sentence, *advised.details, f"The page with all of it: {page}", sep="\n")
            following = commands.get(advised.winner, following)
        return jobs.end(job, following)

    def command(self, cell: Cell) -> str:
        """Return the command that trains a method with its rates on training and validation images."""
        flat, base = flatten(cell.tree), flatten(self.base)
        changed = {name: value for name, value in flat.items() if value != base.get(name)}
        kinds: dict[str, type | None] = {"model": task_of(flat["model"])}
        if not {"model.adapter"} & changed.keys():  # else it begins with the defaults of its class
            kinds["model.adapter"] = classes("model.adapter").get(flat["model.adapter"])
        for name in base.keys() - flat.keys():  # rates and options of the base config that the method does without
            group, _, option = name.rpartition(".")
            if (kind := kinds.get(group)) and option in options_of(kind):
                changed[name] = options_of(kind)[option].default
        words = [word for name, value in changed.items() if name.startswith(("model", "data"))
                 for word in (f"--{name}", value if isinstance(value, str) else json.dumps(value))]  # fmt: skip
        return shlex.join(["randlora-pl", "fit", *self.typed, *words, "--data.train_split", "full"]) + import_words()
