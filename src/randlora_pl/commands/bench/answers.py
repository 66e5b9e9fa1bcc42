"""``bench answers``: speed of a decoder's answers in batches and one by one."""

from collections.abc import Callable, Sequence
from pathlib import Path

from randlora_pl.commands.bench.common import JSON, TABLE, Timing, in_folder, machine_line, measuring
from randlora_pl.commands.bench.train import Overrides, overrides_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.option_types import Words
from randlora_pl.utils.options import Count
from randlora_pl.utils.text.tables import table

Timings = dict[int, list[float]]


def answers(
    words: Words,
    *,
    model: str = "Qwen/Qwen2-0.5B-Instruct",
    overrides: Overrides = "{}",
    batch_sizes: Sequence[Count] = (),
    samples: Count = 32,
    beams: Count = 4,
    new_tokens: Count = 32,
    timing: Timing = Timing(),
) -> int:
    """Time a decoder's answers in batches, and one by one.

    It writes no bench.png, and bf16 equals bf16-frozen. The weights and the data are random.

    Args:
        model: A decoder
        batch_sizes: Prompts per batch, besides 1 (default: 16, or all samples if there are fewer)
        samples: Number of prompts
        beams: Beams of the search, 1 is greedy
        new_tokens: Tokens per answer
    """
    device, facts = timing.prepare()
    import torch

    from randlora_pl.lab.bench.answers import Answers, speedups
    from randlora_pl.lab.bench.report import markdown, significant, write_json
    from randlora_pl.lab.bench.timing import Spread, in_turns
    from randlora_pl.language.models.generate import Decoding

    for size in batch_sizes:
        if size > samples:
            raise UserError(f"--batch-sizes is {size}, and there are {samples} prompts: raise --samples")
    sizes = sorted({1, *(batch_sizes or [min(16, samples)])})
    changes = overrides_of(overrides)
    dtype = torch.float32 if timing.precision == "32" else torch.bfloat16
    decoding = Decoding(beams, new_tokens)
    measured = Answers(model, samples, decoding, changes, device, dtype)
    how = "greedy" if beams == 1 else f"{beams} beams"
    what = f"{model}, {samples} prompts, {new_tokens} new tokens, {how}"
    what += f", {str(dtype).removeprefix('torch.')}"
    what += "".join(f", {name} {value}" for name, value in changes.items())
    title = f"{what}, on {machine_line(facts, device)}"
    print(f"{title}; random weights")
    typed = words.command("bench answers", "--output")
    setup = timing.setup(
        model=model, overrides=overrides, batch_sizes=sizes, samples=samples, beams=beams, new_tokens=new_tokens
    )
    about = {"command": typed, "machine": facts, "setup": setup | {"device": device}}

    def work(keep: Callable[[Timings], None]) -> Timings:
        def sized(timings: dict[str, list[float]]) -> Timings:
            return {int(name): list(found) for name, found in timings.items()}

        cases = {str(size): (lambda size=size: measured.seconds(size)) for size in sizes}
        with measuring((timing.rounds + 1) * len(sizes)) as tick:
            rounds, after = timing.rounds, lambda timings: keep(sized(timings))
            return sized(in_turns(cases, rounds, lambda _: tick(1), to_and_fro=True, after_round=after))

    def note(seconds: Timings, folder: Path) -> None:
        cases = [
            {"batch_size": size, "seconds": taken, "speedup": speedups(seconds)[size], "equal": measured.equal(size)}
            for size, taken in seconds.items()
        ]
        write_json(about | {"cases": cases}, folder / JSON)

    def finish(seconds: Timings, folder: Path) -> None:
        note(seconds, folder)
        header = ["prompts at a time", "answers/s", "times one by one", "same answers"]
        rows = []
        for size, taken in seconds.items():
            speed, gain = Spread.of([samples / one for one in taken]), Spread.of(speedups(seconds)[size])
            cells = [
                f"{significant(each.median)} ({significant(each.low)}..{significant(each.high)})"
                for each in (speed, gain)
            ]
            rows.append([str(size), cells[0], cells[1] if size > 1 else "", f"{measured.equal(size)} of {samples}"])
        write_text(folder / TABLE, markdown(title, header, rows, typed))
        print(f"\n{table(header, rows)}")

    in_folder(timing.output, "answers", work, note, finish)
    return 0
