"""Optuna's part of a search: the next candidate, and the end of runs that are worse than the others were."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna import distributions, pruners
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from randlora_pl.run.run_folder import acquire, lease_on
from randlora_pl.sweep.folder import PRUNED
from randlora_pl.utils.errors import UserError

FILE = "study.log"
"""Optuna's journal in the folder of a search; any of its tools can read it."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Study:
    """The study of one method, which several processes share.

    A trial is running until the runs of its candidate are over, whichever process they belong to: after a kill the
    trials go on.

    Args:
        folder: Folder of the search.
        name: Name of the method and the search.
        space: By option: a list of values, or ``low``, ``high`` and ``log``.
        count: Number of trials.
        loss: Whether the lowest score is the best.
        seed: Seed of the sampler. The n-th trial depends on it and the trials before.
        pruner: ``median``, ``halving``, or empty.
    """

    def __init__(
        self, folder: Path, name: str, space: Mapping[str, Any], count: int, loss: bool, seed: int, pruner: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.space: dict[str, distributions.BaseDistribution] = {}
        for option, values in space.items():
            if isinstance(values, list):
                self.space[option] = distributions.CategoricalDistribution(values)
            elif isinstance(values["low"], int) and isinstance(values["high"], int):
                self.space[option] = distributions.IntDistribution(**values)
            else:
                self.space[option] = distributions.FloatDistribution(**values)
        self.count, self.seed = count, seed
        self.lease = lease_on(folder / f"{FILE}.lease")
        self.storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / FILE)))
        self.loss, self.direction = loss, StudyDirection.MINIMIZE if loss else StudyDirection.MAXIMIZE
        known = {"": pruners.NopPruner, "median": pruners.MedianPruner, "halving": pruners.SuccessiveHalvingPruner}
        self.pruner: pruners.BasePruner = known[pruner]()
        self.study = optuna.create_study(
            storage=self.storage, study_name=name, direction=self.direction, load_if_exists=True
        )

    def candidates(self) -> list[tuple[Any, ...]]:
        """Return the values of every trial so far."""
        return [self._values(trial) for trial in self.study.get_trials(deepcopy=False)]

    def ask(self, first: tuple[Any, ...] | None = None) -> None:
        """Begin a trial, unless there are enough or another process is just doing so; with values, the first one."""
        if not acquire(self.lease):
            return
        try:
            trials = self.study.get_trials(deepcopy=False)
            params: dict[str, Any] | None = None  # it may be empty: nothing of the method is searched
            if first is not None and not trials:
                params = dict(zip(self.space, first, strict=True))
            elif first is None and len(trials) < self.count:
                sampler = optuna.samplers.TPESampler(seed=self.seed + len(trials), constant_liar=True)
                copy = optuna.create_study(sampler=sampler, direction=self.direction)
                copy.add_trials(trials)
                params = copy.ask(self.space).params
            if params is not None:  # with its values at once, so that a kill leaves no trial without
                self.study.add_trial(
                    optuna.trial.create_trial(state=TrialState.RUNNING, params=params, distributions=self.space)
                )
        finally:
            self.lease.release()

    def settle(self, score: Callable[[tuple[Any, ...]], float | None]) -> None:
        """End the trials whose scores are known: minus infinity for a failed one, None for one that is not over."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            value = score(self._values(trial))
            if value == float("-inf"):
                self.study.tell(trial.number, state=TrialState.PRUNED, skip_if_finished=True)
            elif value is not None:
                self.study.tell(trial.number, -value if self.loss else value, skip_if_finished=True)

    def full(self) -> bool:
        """Return True if no trial is left to begin."""
        return len(self.study.get_trials(deepcopy=False)) >= self.count

    def watcher(self, values: tuple[Any, ...], cell: int, monitor: str) -> "Pruning | None":
        """Return the callback that ends a run of a candidate early; ``cell`` is its index among the runs of it."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._values(trial) == values:
                study = self.storage.get_study_id_from_name(self.study.study_name)
                number = self.storage.get_trial_id_from_study_id_trial_number(study, trial.number)
                return Pruning(self, number, cell, monitor)
        return None

    def _values(self, trial: FrozenTrial) -> tuple[Any, ...]:
        """Return its values, numbers with 4 digits, as they are shown and run."""
        sampled = [trial.params[option] for option in self.space]
        return tuple(float(f"{value:.4g}") if isinstance(value, float) else value for value in sampled)


class Pruning(Callback):
    """Callback that reports each validation, and ends a run whose candidate should be pruned.

    Validations are compared at equal shares of the training, of equal runs of the candidates.
    """

    def __init__(self, study: Study, trial: int, cell: int, monitor: str) -> None:
        self.study, self.trial, self.cell, self.monitor = study, trial, cell, monitor

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric.

        Raises:
            UserError: The run is pruned.
        """
        value = trainer.callback_metrics.get(self.monitor)
        share = round(100 * trainer.global_step / max(1, int(trainer.estimated_stepping_batches)))
        if trainer.sanity_checking or value is None or share >= 100:
            return
        storage = self.study.storage
        storage.set_trial_intermediate_value(self.trial, 100 * self.cell + share, float(value))
        if self.study.pruner.prune(self.study.study, storage.get_trial(self.trial)):
            raise UserError(f"{PRUNED} after {share} % of the steps, with {self.monitor} {float(value):.4g}")
