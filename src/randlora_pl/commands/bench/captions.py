"""``bench captions``: speed of steps with each caption encoded once, and with one caption per image."""

from collections.abc import Callable

from randlora_pl.commands.bench.common import Timing, machine_line, measuring
from randlora_pl.commands.bench.train import report
from randlora_pl.utils.option_types import Words
from randlora_pl.utils.options import Count


def captions(
    words: Words, *, model: str = "ViT-B-32", batch_size: Count = 128, classes: Count = 10, timing: Timing = Timing()
) -> int:
    """Time steps of the vision-language task: captions encoded once, and one per image.

    The weights and the data are random.

    Args:
        model: A CLIP model of open_clip
        batch_size: Images per step
        classes: Number of different captions
    """
    device, facts = timing.prepare()
    import torch

    from randlora_pl.lab.bench.captions import BASES, Captions
    from randlora_pl.lab.bench.flops import Gemm
    from randlora_pl.lab.bench.steps import Measured, measure, ticks
    from randlora_pl.lab.bench.train import dtype_of

    measured = Captions(model, batch_size, classes, timing.precision, device)
    gemm = Gemm(torch.device(device), dtype_of(timing.precision))
    images = f"{batch_size} images of {classes} classes"
    what = f"{model}, {images}, RandLoRA, {timing.numbers}"
    where = machine_line(facts, device)
    print(f"{what}; random weights\non {where}: {gemm.rate() / 1e9:,.0f} GFLOP/s at best")

    def work(keep: Callable[[list[Measured]], None]) -> list[Measured]:
        cases = measured.cases()
        with measuring(ticks(len(cases), timing.rounds)) as tick:
            return measure(cases, gemm, timing.rounds, lambda _: tick(1), keep)

    setup = timing.setup(model=model, batch_size=batch_size, classes=classes) | {"device": device}
    about = {"command": words.command("bench captions", "--output"), "machine": facts, "setup": setup}
    report("captions", timing.output, work, f"{what}, on {where}", about, BASES, {}, "of one an image")
    return 0
