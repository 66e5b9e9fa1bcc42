"""``fit``, ``validate`` and ``test``."""

from randlora_pl.commands.help.pages import class_page


def fit_verb(args: list[str]) -> int:
    """Train and test; see `randlora_pl.run.session.run_fit`."""
    if page := class_page("fit", args):
        print(page)
        return 0
    from randlora_pl.run.session import run_fit

    run_fit(args)
    return 0


def evaluate_verb(args: list[str]) -> int:
    """Evaluate an adapter, or the pretrained model; the first word is ``validate`` or ``test``."""
    verb, *words = args
    if page := class_page(verb, words):
        print(page)
        return 0
    from randlora_pl.run.session import run_evaluation

    run_evaluation(verb, words)
    return 0
