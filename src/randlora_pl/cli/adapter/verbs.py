"""``adapter ...``: commands that inspect and convert adapter files."""

from randlora_pl.cli.common.dispatch import dispatch
from randlora_pl.cli.help.adapter import PAGE

VERBS = {
    "info": "adapter.info:info_verb",
    "diff": "adapter.diff:diff_verb",
    "merge": "adapter.merge:merge_verb",
    "add": "adapter.add:add_verb",
    "export": "adapter.export:export_verb",
    "import": "adapter.import_:import_verb",
    "push": "adapter.push:push_verb",
    "pull": "adapter.pull:pull_verb",
}
"""Path of each command's function, in the module with its PAGE; imported when the command is typed."""


def adapter_verb(args: list[str]) -> int:
    """Run one of the commands, or print its help."""
    return dispatch("adapter", VERBS, PAGE, args)
