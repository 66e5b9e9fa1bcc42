"""``bench``: speed of the input pipeline and of training steps on this machine."""

from randlora_pl.cli.help.pages import page
from randlora_pl.utils.errors import UserError, near


def bench_verb(args: list[str]) -> int:
    """Run ``bench data | train | adapters | captions | answers``.

    Raises:
        UserError: The command is unknown, or an option is wrong.
    """
    if not args:
        print(page("bench"), end="")
        return 0
    from randlora_pl.cli.bench import answers as bench_answers
    from randlora_pl.cli.bench import data as bench_data
    from randlora_pl.cli.bench import steps as bench_steps
    from randlora_pl.cli.bench import sweeps as bench_sweeps

    verbs = {
        "data": bench_data.data_verb,
        "train": bench_steps.train_verb,
        "captions": bench_steps.captions_verb,
        "answers": bench_answers.answers_verb,
        "adapters": bench_sweeps.adapters_verb,
    }
    if args[0] not in verbs:
        raise UserError(f"Unknown command bench {args[0]}.{near(args[0], verbs)} See: randlora-pl bench -h")
    return verbs[args[0]](args[1:])
