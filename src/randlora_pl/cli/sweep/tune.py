"""``tune``: learning rates (and alphas) for the methods of a sweep, chosen on validation images."""

import shlex
from pathlib import Path

from randlora_pl.cli.sweep.job import check_typed, find_sweep, parser_of, words_of
from randlora_pl.cli.sweep.run import dry_run
from randlora_pl.cli.sweep.tuning import comments, search_of
from randlora_pl.utils.errors import UserError


def tune_verb(args: list[str]) -> int:
    """Search, and write the result.

    Returns:
        0, or 1 if a method has no candidate that worked.
    """
    if {"-c", "--config"} & {word.partition("=")[0] for word in args}:
        from randlora_pl.cli.sweep.tune_run import tune_run

        return tune_run(args)
    typed = parser_of("tune").parse_args(args)
    check_typed(typed)
    file, description = find_sweep(typed.config)
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
