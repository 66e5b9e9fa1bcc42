"""``bench``: how fast the input pipeline and training steps are on this machine."""

from randlora_pl.cli.pages import page
from randlora_pl.errors import UserError, near


def bench_verb(args: list[str]) -> int:
    """``bench data | train | adapters | captions | answers``.

    Raises:
        UserError: There is no such verb, or an option is wrong.
    """
    if not args:
        print(page("bench"), end="")
        return 0
    from randlora_pl.cli import bench_answers, bench_data, bench_steps, bench_sweeps

    verbs = {
        "data": bench_data.data_verb,
        "train": bench_steps.train_verb,
        "captions": bench_steps.captions_verb,
        "answers": bench_answers.answers_verb,
        "adapters": bench_sweeps.adapters_verb,
    }
    if args[0] not in verbs:
        raise UserError(f"There is no verb bench {args[0]}.{near(args[0], verbs)} See: randlora-pl bench -h")
    return verbs[args[0]](args[1:])
