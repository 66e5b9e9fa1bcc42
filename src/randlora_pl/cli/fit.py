"""``fit``, ``validate`` and ``test``: from a command to a run folder with results."""

from contextlib import ExitStack

from randlora_pl.engine.run_folder import check_run
from randlora_pl.engine.run_lock import locked
from randlora_pl.engine.session import _folders, _resume_by_itself, adapter_of, guarded, prepare, start


def fit_verb(args: list[str]) -> int:
    """``fit``: zero-shot test, training, test, results."""
    args = _resume_by_itself(args)
    folder = _folders(args, ("resume",)).get("resume")
    with ExitStack() as held:
        if folder is not None:  # before anything of it is read, which another process may be writing
            check_run(folder)
            lock = held.enter_context(locked(folder))
        app = start(prepare("fit", args), folder)
        if folder is None:
            lock = held.enter_context(locked(app.folder))
        from randlora_pl.engine.stages import fit

        with guarded(app):
            fit(app, lock)
    return 0


def evaluate_verb(args: list[str]) -> int:
    """``validate`` and ``test``: figures of an adapter, or of the untrained model."""
    verb, *rest = args
    command = prepare(verb, rest)
    app = start(command, None)
    from randlora_pl.engine.stages import evaluate

    with guarded(app):
        evaluate(app, adapter_of(command))
    return 0
