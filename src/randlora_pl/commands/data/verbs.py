"""``data``: check, show and get."""

from randlora_pl.commands.common.dispatch import dispatch
from randlora_pl.commands.help.texts import TEXTS

VERBS = {"get": "data.get:get_verb", "check": "data.check:check_verb", "show": "data.check:show_verb"}


def data_verb(args: list[str]) -> int:
    """Run ``data get ...``, ``data check ...`` or ``data show ...``."""
    return dispatch("data", VERBS, TEXTS["data"], args)
