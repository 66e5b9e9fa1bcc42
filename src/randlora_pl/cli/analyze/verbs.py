"""``analyze ...``: what adapters do, beyond their accuracy."""

from randlora_pl.cli.common.dispatch import dispatch
from randlora_pl.cli.help.analyze import PAGE

VERBS = {
    "spectrum": "analyze.spectrum:spectrum_verb",
    "represent": "analyze.represent:represent_verb",
    "cka": "analyze.cka:cka_verb",
    "landscape": "analyze.landscape:landscape_verb",
    "forgetting": "analyze.forgetting:forgetting_verb",
}
"""Where each verb's function is, beside its PAGE; imported when it is typed."""


def analyze_verb(args: list[str]) -> int:
    """Run one of the verbs, or explain it."""
    return dispatch("analyze", VERBS, PAGE, args)
