"""``adapter ...``: commands that inspect and convert adapter files."""

from randlora_pl.commands.common.dispatch import dispatch

PAGE = """\
Inspect, convert and share adapters. ADAPTER is a folder, one .safetensors file,
or a run (RUN, or runs/NAME for its newest run), whose tested adapter is used.

  randlora-pl adapter info ADAPTER                             method, base model, rank and size of each update
  randlora-pl adapter diff ADAPTER ADAPTER                     differences between two adapters
  randlora-pl adapter merge ADAPTER --output FILE              weights for open_clip or timm, without this program
  randlora-pl adapter add ADAPTER ADAPTER --output DIR         weighted sums of updates (task arithmetic)
  randlora-pl adapter export ADAPTER --to peft --output DIR    also: lora, onnx, torch, adapter
  randlora-pl adapter import PATH --from peft --output DIR     also: official
  randlora-pl adapter push ADAPTER --repo USER/NAME            to the Hugging Face Hub, with a model card
  randlora-pl adapter pull USER/NAME --output DIR              from the Hugging Face Hub

For the options of a command, run: randlora-pl adapter COMMAND --help
"""

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
    return dispatch("adapter", VERBS, PAGE, args, logs=False)
