"""``bench``: speed of the input pipeline and of training steps on this machine."""

from randlora_pl.cli.common.dispatch import dispatch
from randlora_pl.cli.help.pages import page

VERBS = {
    "data": "bench.data:data_verb",
    "train": "bench.steps:train_verb",
    "captions": "bench.steps:captions_verb",
    "answers": "bench.answers:answers_verb",
    "adapters": "bench.sweeps:adapters_verb",
}


def bench_verb(args: list[str]) -> int:
    """Run ``bench data | train | adapters | captions | answers``."""
    return dispatch("bench", VERBS, page("bench"), args, paged=False)
