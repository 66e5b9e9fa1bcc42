"""``analyze ...``: properties of adapters beyond accuracy."""

from randlora_pl.cli.common.dispatch import dispatch
from randlora_pl.cli.help.analyze import PAGE

VERBS = {
    "spectrum": "analyze.spectrum:spectrum_verb",
    "represent": "analyze.represent:represent_verb",
    "cka": "analyze.cka:cka_verb",
    "landscape": "analyze.landscape:landscape_verb",
    "forgetting": "analyze.forgetting:forgetting_verb",
}
"""Path of each command's function, in the module with its PAGE; imported when the command is typed."""


def analyze_verb(args: list[str]) -> int:
    """Run one of the commands, or print its help."""
    return dispatch("analyze", VERBS, PAGE, args)
