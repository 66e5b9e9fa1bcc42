"""``fit``, ``validate`` and ``test``."""


def fit_verb(args: list[str]) -> int:
    """Train and test; see `randlora_pl.engine.session.run_fit`."""
    from randlora_pl.engine.session import run_fit

    run_fit(args)
    return 0


def evaluate_verb(args: list[str]) -> int:
    """Evaluate an adapter, or the pretrained model; the first word is ``validate`` or ``test``."""
    from randlora_pl.engine.session import run_evaluation

    verb, *words = args
    run_evaluation(verb, words)
    return 0
