"""``analyze ...``: properties of adapters beyond accuracy."""

from randlora_pl.commands.common.dispatch import dispatch

PAGE = """\
Analyze adapters beyond their accuracy: tables, CSV and plots in a new folder. RUN is a run folder,
runs/NAME for its newest run, or an adapter.

  randlora-pl analyze spectrum RUN RUN ...            rank and singular values of each layer's update (Table 2)
  randlora-pl analyze represent FULL                  how well LoRA and RandLoRA can express an update (equations 7, 8)
  randlora-pl analyze cka FULL OTHER ...              similarity of activations to full fine-tuning (Figure 4a)
  randlora-pl analyze landscape RUN RUN RUN           the loss on the plane through three models (Figures 4b and 5)
  randlora-pl analyze forgetting RUN ... --datasets NAME ...    zero-shot accuracy elsewhere, before and after tuning

For the options of a command, run: randlora-pl analyze COMMAND --help
"""

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
