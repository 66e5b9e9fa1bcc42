"""``data``: check, show and get."""

from typing import TYPE_CHECKING

from randlora_pl.cli.help.pages import page
from randlora_pl.utils.errors import UserError, near

if TYPE_CHECKING:
    pass
from randlora_pl.cli.data.check import check_verb, show_verb


def data_verb(args: list[str]) -> int:
    """Run ``data get ...``, ``data check ...`` or ``data show ...``."""
    if not args:
        print(page("data"), end="")
        return 0
    from randlora_pl.cli.data.get import get_verb

    verbs = {"get": get_verb, "check": check_verb, "show": show_verb}
    if args[0] not in verbs:
        hint = near(args[0], verbs)
        raise UserError(
            f"Unknown command data {args[0]}.{hint} Use data get, data check or data show; see: randlora-pl data -h"
        )
    return verbs[args[0]](args[1:])
