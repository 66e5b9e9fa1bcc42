"""Tables of accuracies: every cell with the paper's value, averages of each budget, new classes, other datasets.

Forgetting is the change on other datasets by the training. Printed numbers are of RandLoRA's paper and of others, with
the footnotes that they need.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, filterfalse
from statistics import fmean, harmonic_mean

from pandas import DataFrame, isna

from randlora_pl.data.catalog import CATALOG
from randlora_pl.lab.paper import AVERAGE, Note, PaperCell, averaged, cells, column_of, notes, numbers, plain
from randlora_pl.lab.paper import datasets as table_7
from randlora_pl.lab.report import (
    Estimate,
    Printed,
    Table,
    TableCell,
    formatted,
    many,
    mean_cell,
    missing_cell,
    percent,
    row,
)
from randlora_pl.lab.report.cells import FINISHED, LABELS, MOST, SIDE, Key, ReportPlan, Sweep
from randlora_pl.sweep import ZERO_SHOT, is_zero_shot

RELATIVE = "10"
"""The table of times and memory."""


class Beside:
    """Printed numbers by our labels, and the footnotes that the shown ones need.

    Args:
        plan: The sweep's plan; its ``paper`` names the tables.

    Attributes:
        tables: The tables that are here.
        problems: A sentence for each table that is named and not there.
    """

    def __init__(self, plan: ReportPlan) -> None:
        self.plan = plan
        self.tables = [number for number in plan.tables if number in numbers()]
        known = f"is not here. Known: {', '.join(numbers())}."
        self.problems = [f"Table {number} {known}" for number in plan.tables if number not in self.tables]
        self._notes: dict[tuple[str, str], int] = {}
        self._rows = cache(self._found_rows)

    def _of_model(self, number: str, model: str) -> list[PaperCell]:
        """Return the cells of a table for one of our models, whose name is equal up to punctuation."""
        name = plain(self.plan.paper_name(model))
        return [cell for cell in cells(number) if plain(cell.model) == name]

    def _found_rows(self, number: str, model: str, method: str) -> list[PaperCell]:
        """Return the cells of a table for one of our methods.

        A method that the paper calls by several names may be labelled with one and have another as its ``paper_name``.
        """
        here = self._of_model(number, model)
        named = [cell for cell in here if plain(cell.method) == plain(self.plan.paper_name(method, model))]
        return named or [cell for cell in here if plain(cell.method) == plain(method) and of_data_sets(number)]

    def cell(self, key: Key) -> Printed | None:
        """Return the printed number of a cell."""
        column = column_of(self.plan.paper_name(key.dataset))
        for number in self.tables if column else ():
            for cell in self._rows(number, key.model, key.method):
                if cell.column == column and plain(cell.budget) == plain(key.budget):
                    return _alone(cell)
        return None

    def average(self, model: str, budget: str, method: str, datasets: Sequence[str]) -> Printed | None:
        """Return the mean of the printed numbers of the same datasets, None where the paper lacks one of them.

        Where a table or a row has averages over all datasets, or all tests, only: that, None for any others.
        """
        papers = [printed.cells[0] for name in datasets if (printed := self.cell(Key(model, name, budget, method)))]
        columns = [column_of(self.plan.paper_name(dataset)) for dataset in datasets]
        if papers and len(papers) == len(datasets):
            first, whole = papers[0], {*columns} == averaged(papers[0].table)
            same = [cell for cell in self._rows(first.table, model, method) if cell.budget == first.budget]
            printed_mean = next((cell for cell in same if whole and cell.column == AVERAGE), None)
            return Printed(fmean(cell.value for cell in papers), tuple(papers), printed_mean)
        # Tables 2, 3 and 6 average over all datasets of Table 7, or over all tests of Table 15
        every = any(sorted(map(str, columns)) == sorted(names) for names in (table_7(), averaged(15)))
        for number in self.tables:
            rows: list[PaperCell] = []
            if of_data_sets(number):
                if not papers and averaged(number) == {*columns}:
                    of_method = self._rows(number, model, method)
                    rows = [cell for cell in of_method if (cell.budget, cell.column) == (budget, AVERAGE)]
            elif every:
                # ``RandLoRA ternary`` names a method with its column, and Table 6 prints the size of the adapter with
                # the data: ``efficient 15k``
                name = plain(self.plan.paper_name(method, model))
                for cell in self._of_model(number, model):
                    size, _, data = cell.budget.rpartition(" ")
                    if data == budget and name in (plain(f"{cell.method} {more}") for more in ("", cell.column, size)):
                        rows.append(cell)
            if len(rows) == 1:  # a method with several columns must be named with one of them
                return _alone(rows[0])
        return None

    def parameters(self, model: str, method: str) -> str:
        """Return the printed parameters of a method, such as ``1.18 %`` or ``0.7M``; empty if no table has them."""
        printed = (cell.params for number in self.tables for cell in self._rows(number, model, method) if cell.params)
        count = next(printed, "")
        return count if count.endswith("M") or not count else f"{count} %"

    def cost(self, model: str, method: str) -> tuple[Printed | None, Printed | None]:
        """Time and memory of Table 10, percent of full fine-tuning; only where the sweep names the paper at all."""
        if not self.plan.tables:
            return None, None
        rows = self._rows(RELATIVE, model, method)
        # whose RandLoRA is the one that Table 10 names without its rank
        ranked = [cell for number in ("11", "12", "13") for cell in self._rows(number, model, method)]
        if any(cell.method.startswith("RandLoRA") for cell in ranked):
            rows = [cell for cell in self._of_model(RELATIVE, model) if cell.method == "RandLoRA"]
        printed = {cell.column: _alone(cell) for cell in rows}
        return printed.get("training time (% of reference)"), printed.get("memory (% of reference)")

    def measured(self, model: str, method: str) -> dict[str, Printed]:
        """Seconds and gigabytes of appendix B.3 by its columns; only where the sweep names Table 5."""
        rows = self._rows("B.3", model, method) if "5" in self.plan.tables else []
        return {cell.column: _alone(cell) for cell in rows}

    @property
    def footnotes(self) -> list[tuple[int, str, str]]:
        """Return number, text and source of every note, in the order in which they were first needed."""
        return [(number, *content) for content, number in self._notes.items()]

    def annotate(self, table: Table) -> None:
        """Add the numbers of the notes to the printed numbers of a table.

        The caption has the notes about a whole table of the paper, the first cell of a row those about its method and
        its source, and the title of a column those about its dataset.
        """
        shown = [[cell.paper.cells if cell.paper else () for cell in line] for line in table.rows]
        table.notes = self._notes_of(chain(*chain(*shown)), lambda note: not note.method and not note.column)
        for line, papers in zip(table.rows, shown, strict=True):
            sources = {self._number(f"Published accuracies of {cell.method}.", cell.source)
                       for cell in chain(*papers) if cell.source}  # fmt: skip
            about = self._notes_of(chain(*papers), lambda note: bool(note.method) and not note.column)
            line[0].notes = tuple(sorted({*about, *sources}))
            for cell in line:
                printed = cell.paper and cell.paper.printed
                if cell.paper and printed and abs(printed.value - cell.paper.value) > 0.05 + 1e-9:  # not by rounding
                    text = f"Printed average of {printed.method}, {printed.budget}: {printed.value:g}; the mean of its "
                    text += f"printed cells is {cell.paper.value:.2f}, which is used here."
                    cell.notes = (self._number(text, f"Table {printed.table}, recomputed"),)
        for number, title in enumerate(table.header):
            title.notes = self._notes_of(chain(*(papers[number] for papers in shown)), lambda note: bool(note.column))

    def _notes_of(self, cells: Iterable[PaperCell], where: Callable[[Note], bool]) -> tuple[int, ...]:
        papers = list(dict.fromkeys(cells))
        touched = [note for note in notes() if where(note) and any(map(note.touches, papers))]
        return tuple(sorted(self._number(note.text, note.source) for note in touched))

    def _number(self, text: str, source: str) -> int:
        return self._notes.setdefault((text, source), len(self._notes) + 1)


def _alone(cell: PaperCell) -> Printed:
    return Printed(cell.value, (cell,))


@cache
def of_data_sets(number: str) -> bool:
    """Return True if a table has a column for each dataset."""
    return any(map(column_of, averaged(number)))


IDLE = "no change shown"
"""Mark of a cell whose interval contains the accuracy of the pretrained model."""
PLAIN = (
    "Classifiers of raw pixels or words see the training samples of the methods, but no pretrained model. Images of "
    f"several sizes, or of more than {SIDE} × {SIDE} pixels, are resized to that. If all training images have more "
    f"than {MOST:,} values, as many as fit are drawn. Options are the defaults of scikit-learn, and nothing is tuned. "
    "No test of pairs has them."
)


def accuracy_table(sweep: Sweep, beside: Beside, model: str) -> Table:
    """Return the layout of Tables 11 to 14: budgets and methods down, datasets across."""
    plan = sweep.plan
    there = {key.dataset for key in sweep.runs if key.model == model}
    datasets = [dataset for dataset in plan.datasets if dataset in there]
    rows: list[list[TableCell]] = []
    groups, below = [], []
    for budget in sweep.budgets(model):
        shared, left_out = sweep.common(model, budget)
        groups.append(len(rows))
        data = TableCell(budget, sort=plan.budgets.index(budget))
        for method in plan.methods:
            keys = [Key(model, dataset, budget, method) for dataset in datasets]
            if any(key in sweep.runs for key in keys):
                cells = [accuracy_cell(sweep, beside, key) for key in keys]
                average = average_cell(sweep, beside, model, budget, method, shared)
                rows.append(row(method, data, sweep.parameters(model, method), *cells, average))
        rows += _plain(sweep, data, datasets, shared)
        below += left_out_line(budget, left_out)
    titles = [TableCell(dataset, sweep.metrics.get(dataset, "")) for dataset in datasets]
    header = row("Method", "Data", "Trained parameters", *titles, "Average")
    below += [PLAIN] if sweep.baselines else []
    caption = f"{model}: test {sweep.measured} in percent, mean ± half the 95 % confidence interval over seeds"
    return Table(f"accuracy-{identifier(model)}", caption, header, rows, below, groups, left=2)


def average_table(sweep: Sweep, beside: Beside, model: str) -> Table:
    """Return a table of methods by budgets: the averages over the datasets that every compared method has."""
    common = {budget: sweep.common(model, budget) for budget in sweep.budgets(model)}
    rows = []
    for method in sweep.plan.methods:
        if any(key.model == model and key.method == method for key in sweep.runs):
            cells = [TableCell("") for _ in common]
            for n, (budget, (shared, _)) in enumerate(common.items()):
                if (budget == ZERO_SHOT) == is_zero_shot(method):
                    cells[n] = average_cell(sweep, beside, model, budget, method, shared)
            rows.append(row(method, sweep.parameters(model, method), *cells))
    titles = [TableCell(budget, many(len(shared), "dataset")) for budget, (shared, _) in common.items()]
    below = [line for budget, (_, left_out) in common.items() for line in left_out_line(budget, left_out)]
    caption = f"{model}: {sweep.measured} averaged over the datasets that every compared method has"
    return Table(f"averages-{identifier(model)}", caption, row("Method", "Trained parameters", *titles), rows, below)


def accuracy_cell(sweep: Sweep, beside: Beside, key: Key) -> TableCell:
    """Return a cell with its interval, each seed's value in its tooltip, and the paper's value below."""
    paper, runs = beside.cell(key), sweep.runs.get(key)
    if runs is None:
        return missing_cell("", paper=paper)
    estimate, title = sweep.estimate(key), " ".join(key)
    for seed, value, status in runs[["seed", "accuracy", "status"]].itertuples(index=False):
        title += f"; seed {'?' if isna(seed) else seed}: {status if isna(value) else f'{value:.2f}'}"
    if estimate is None:
        return missing_cell(_cut(sweep.why_missing(key)), title, paper)
    cell = mean_cell(estimate, title + "; one seed: no interval" * (estimate.half is None), paper=paper)
    partly = f"{len(estimate.values)} of {len(runs)} seeds" if (runs["state"] != FINISHED).any() else ""
    cell.below = joined(IDLE if sweep.idle(key) else "", partly, cell.below)
    return cell


def average_cell(
    sweep: Sweep, beside: Beside, model: str, budget: str, method: str, datasets: Sequence[str]
) -> TableCell:
    """Return an average, the paper's below it, in its tooltip what was averaged; or why there is none."""
    paper = beside.average(model, budget, method, datasets)
    average = sweep.average(model, budget, method, datasets)
    if average is None:
        keys = [key for name in sweep.plan.datasets if (key := Key(model, name, budget, method)) in sweep.runs]
        why = " / ".join(dict.fromkeys(map(sweep.why_missing, keys))) or "not run"
        why = "no dataset in common" if any(key in sweep.accuracies for key in keys) else why
        return missing_cell(_cut(why), why, paper)
    title, partly = f"over {', '.join(datasets)}; ", ""
    if average.estimate.half is None:
        title += "fewer than two seeds on all of them, so no interval"
    else:
        title += of_seeds(dict(zip(average.seeds, average.estimate.values, strict=True)))
        if unused := [str(seed) for seed in average.all_seeds if seed not in average.seeds]:
            title += f"; seeds that not every dataset has are left out: {', '.join(unused)}"
            partly = f"{len(average.seeds)} of {len(average.all_seeds)} seeds"
    cell = mean_cell(average.estimate, title, paper=paper)
    cell.below = joined(partly, cell.below)
    return cell


def _plain(sweep: Sweep, data: TableCell, datasets: Sequence[str], shared: Sequence[str]) -> list[list[TableCell]]:
    """Return a row for each plain classifier of a budget; its average is over the datasets of the others."""
    rows = []
    here = [one for one in sweep.baselines if one.budget == data.text and one.dataset in datasets]
    for name in dict.fromkeys(one.name for one in here):
        cells = dict.fromkeys(datasets, TableCell(""))
        for dataset in datasets:
            if some := [one for one in here if (one.name, one.dataset) == (name, dataset)]:
                cells[dataset] = mean_cell(Estimate(tuple(100 * one.score for one in some)))
                if some[0].train < some[0].of:
                    cells[dataset].below = f"{some[0].train:,} of {some[0].of:,} samples"
        means = [mean for dataset in shared if (mean := cells[dataset].sort) is not None]
        average = mean_cell(Estimate((fmean(means),))) if means and len(means) == len(shared) else TableCell("")
        rows.append(row(name, data, None, *cells.values(), average))
    return rows


def joined(*marks: str) -> str:
    """Return the second line of a cell: what it has of marks, such as how many seeds, and a printed value."""
    return " · ".join(filter(None, marks))


def left_out_line(budget: str, left_out: dict[str, list[str]]) -> list[str]:
    """Return lines that name the datasets left out of a budget's averages, and the methods without a run there."""
    if not left_out:
        return []
    text = "; ".join(f"{dataset} (no finished run of {', '.join(methods)})" for dataset, methods in left_out.items())
    return [f"{budget}: the averages leave out {text}."]


def identifier(label: str) -> str:
    """Return a label as part of a name of files, of 60 letters, and anchors; `build` appends numbers to equal ones."""
    return re.sub(r"[\W_]+", "-", label.lower()).strip("-")[:60] or "unnamed"


def of_seeds(values: Mapping[int, float], form: str = ".2f") -> str:
    """Return a tooltip with the value of each seed."""
    return "; ".join(f"seed {seed}: {formatted(value, form)}" for seed, value in values.items())


def _cut(text: str) -> str:
    """Return what fits into a cell of a reason; the tooltip and the list of missing runs have all of it."""
    return text if len(text) <= 32 else text[:31].rstrip() + "…"


BEFORE, AFTER = "zeroshot/elsewhere/", "test/elsewhere/"


def elsewhere_table(sweep: Sweep, model: str) -> Table | None:
    """Return the change of each method in points, over datasets and seeds; None if no run measured it."""
    runs, names = _elsewhere(sweep, model)
    before: dict[str, float] = {}
    for name in sorted(names):
        # a cell of the pretrained model's own logs it as a test
        tested = runs[AFTER + name].where(runs["method"].map(is_zero_shot).astype(bool))
        if len(known := runs.get(BEFORE + name, tested).fillna(tested).dropna()):
            before[name] = fmean(known)
    rows = []
    for method in filterfalse(is_zero_shot, sweep.plan.methods):
        trained = runs[(runs["method"] == method) & (runs["budget"] != ZERO_SHOT)]
        cells = []
        for name, value in before.items():  # of a change each seed's is averaged over the cells that all seeds have
            known = trained.dropna(subset=AFTER + name)
            changes = known.pivot(index="seed", columns=["dataset", "budget"], values=AFTER + name).sort_index() - value
            means = {seed: fmean(row) for seed, row in changes.dropna().iterrows()}
            values = list(means.values())
            if len(known) and not values:
                values = [fmean(fmean(cell.dropna()) for _, cell in changes.items())]
            estimate = Estimate(tuple(values)) if values else None
            cells.append(mean_cell(estimate, of_seeds(means, "+.2f"), "+.2f"))
        if any(not cell.missing for cell in cells):
            rows.append(row(method, *cells))
    if not rows:
        return None
    pretrained = ", ".join(f"{name} {value:.1f} %" for name, value in before.items())
    below = (
        f"Forgetting is negative. The pretrained model has {pretrained}. Each value is averaged over the datasets "
        "and amounts of data of the training. The interval is over seeds."
    )
    caption = f"{model}: change of the zero-shot accuracy on other datasets, points"
    return Table(f"elsewhere-{identifier(model)}", caption, row("Method", *before), rows, [below])


def transfer_table(sweep: Sweep, beside: Beside, model: str) -> Table | None:
    """Return the accuracies on other datasets and their means, by training; None if no run measured several."""
    runs, names = _elsewhere(sweep, model)
    if len(names) < 2:
        return None
    shifted = [name for name in names if name in CATALOG and CATALOG[name].trains_on]
    others = [name for name in names if name not in shifted]
    groups = {name: [name] for name in names}
    groups |= {"Mean of other datasets": others} if len(others) > 1 else {}
    groups |= {"Mean of shifted test sets": shifted} if len(shifted) > 1 else {}
    rows = []
    for (_, dataset, budget, method), some in runs.groupby(LABELS, sort=False):
        own = mean_cell(Estimate(tuple(some["accuracy"])), paper=beside.average(model, budget, method, [dataset]))
        cells = []
        for group in groups.values():  # of the seeds that have all of them
            known = some.set_index("seed")[[AFTER + name for name in group]].dropna()
            means = {seed: fmean(row) for seed, row in known.iterrows()}
            paper = beside.average(model, budget, method, group)
            cells.append(mean_cell(Estimate(tuple(means.values())) if means else None, of_seeds(means), paper=paper))
        if any(not cell.missing for cell in cells):
            rows.append(row(method, dataset, budget, own, *cells))
    caption = f"{model}: accuracy in percent on the test images of other datasets"
    header = row("Method", "Trained on", "Data", "There", *groups)
    below = ["Each dataset is classified among its own classes, by their names alone. Intervals are over seeds."]
    return Table(f"transfer-{identifier(model)}", caption, header, rows, below, left=3)


def _elsewhere(sweep: Sweep, model: str) -> tuple[DataFrame, list[str]]:
    """Return the finished runs of a model with their accuracies on other datasets in percent, and which were tested."""
    runs = sweep.select(model=model)
    runs = runs.assign(**{name: 100 * runs[name] for name in runs if name.startswith((BEFORE, AFTER))})
    return runs, [name.removeprefix(AFTER) for name in runs if name.startswith(AFTER) and runs[name].notna().any()]


NEW = "test/new/acc"
"""Accuracy on the new classes, as the callback `NewClasses` logs it."""


def new_classes_table(base: Sweep, beside: Beside, model: str) -> Table | None:
    """Return base, new and harmonic mean by dataset and on average; None if no run was tested on new classes."""
    if NEW not in base.cells or base.select(model=model)[NEW].isna().all():
        return None
    measured = (100 * base.cells[NEW]).round(4).where(base.cells["accuracy"].notna())  # as cells.csv has it
    new = replace(base, cells=base.cells.assign(accuracy=measured))
    rows: list[list[TableCell]] = []
    starts = []
    below = [
        "The model trains on the base classes, the first half. The images of each half are classified among the "
        "classes of this half. Base and New are averages over datasets, and H = 2bn / (b + n) is computed from "
        "these averages. Intervals are over seeds."
    ]
    datasets = [name for name in base.plan.datasets if len(new.select(model=model, dataset=name))]
    for budget in new.budgets(model):
        methods = new.methods(model, budget)
        shared, left_out = new.common(model, budget)
        if methods:
            starts.append(len(rows))
        for method in methods:
            halves = (budget, f"{budget} new")
            groups = [*([dataset] for dataset in datasets), shared]
            *printed, overall = ([beside.average(model, half, method, group) for half in halves] for group in groups)
            keys = [Key(model, dataset, budget, method) for dataset in datasets]
            cells = [_cell(base, new, key, both) for key, both in zip(keys, printed, strict=True)]
            first, second = (sweep.average(model, budget, method, shared) for sweep in (base, new))
            averages = [missing_cell("no dataset in common")] * 3
            if first and second:
                pairs = zip(first.estimate.values, second.estimate.values, strict=False)
                harmonic = [*map(harmonic_mean, pairs)] if first.seeds == second.seeds else []
                half = Estimate(tuple(harmonic)).half if harmonic else None
                mean, whole = harmonic_mean([first.estimate.mean, second.estimate.mean]), _harmonic(overall)
                text = f"{mean:.1f}" if half is None else f"{mean:.1f} ± {half:.1f}"
                averages = [mean_cell(e.estimate, paper=p) for e, p in zip((first, second), overall, strict=True)]
                averages.append(TableCell(text, whole.beside(mean) if whole else "", sort=mean, paper=whole))
            rows.append(row(method, budget, *cells, *averages))
        below += left_out_line(budget, left_out)
    header = row("Method", "Data", *datasets, "Base", "New", "H")
    caption = f"{model}: test accuracy in percent on base classes / new classes, and their harmonic mean H"
    return Table(f"new-classes-{identifier(model)}", caption, header, rows, below, starts, left=2)


def _harmonic(printed: Sequence[Printed | None]) -> Printed | None:
    """Return the harmonic mean of two printed numbers, None without both."""
    base, new = printed
    return Printed(harmonic_mean([base.value, new.value]), base.cells + new.cells) if base and new else None


def _cell(base: Sweep, new: Sweep, key: Key, printed: Sequence[Printed | None]) -> TableCell:
    """Return base / new of a dataset, with the harmonic mean and the printed numbers below."""
    first, second, whole = base.estimate(key), new.estimate(key), _harmonic(printed)
    mean = harmonic_mean([first.mean, second.mean]) if first and second else None
    there = " / ".join(percent(number.value) for number in printed if number)
    below = whole.beside(mean).replace(" ", f" {there}, H ", 1) if whole else ""
    if first is None or second is None or mean is None:
        return TableCell("not measured", below, missing=True, paper=whole)
    values = new.by_seed(key)
    title = "; ".join(f"seed {n}: {b:.2f} / {values[n]:.2f}" for n, b in base.by_seed(key).items() if n in values)
    text, below = f"{first.mean:.1f} / {second.mean:.1f}", joined(f"H {mean:.1f}", below)
    return TableCell(text, below, title, mean, paper=whole)
