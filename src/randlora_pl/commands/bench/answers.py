"""``bench answers``: speed of a decoder's answers in batches and one by one."""

from collections.abc import Callable
from pathlib import Path

from randlora_pl.commands.bench.common import (
    JSON,
    TABLE,
    command,
    in_folder,
    machine_line,
    measuring,
    parser_of,
    prepare,
    setup_of,
)
from randlora_pl.commands.bench.steps import overrides_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.text.tables import table

Timings = dict[int, list[float]]


def answers_verb(args: list[str]) -> int:
    """Measure answers per second of a decoder with random weights, for several batch sizes."""
    parser = parser_of("answers", 3)
    parser.add_options(model="Qwen/Qwen2-0.5B-Instruct", overrides="{}", batch_sizes=[int], samples=32, beams=4)
    parser.add_options(new_tokens=32)
    typed = parser.parse_args(args)
    facts = prepare(typed, ["batch_sizes", "samples", "beams", "new_tokens"])
    import torch

    from randlora_pl.lab.bench.answers import Answers, speedups
    from randlora_pl.lab.bench.report import markdown, significant, write_json
    from randlora_pl.lab.bench.timing import Spread, in_turns
    from randlora_pl.language.models.generate import Decoding

    for size in typed.batch_sizes or ():
        if size > typed.samples:
            raise UserError(f"--batch-sizes is {size}, and there are {typed.samples} prompts: raise --samples")
    sizes = typed.batch_sizes = sorted({1, *(typed.batch_sizes or [min(16, typed.samples)])})
    overrides = overrides_of(typed.overrides)
    dtype = torch.float32 if typed.precision == "32" else torch.bfloat16
    decoding = Decoding(typed.beams, typed.new_tokens)
    answers = Answers(typed.model, typed.samples, decoding, overrides, typed.device, dtype)
    how = "greedy" if typed.beams == 1 else f"{typed.beams} beams"
    what = f"{typed.model}, {typed.samples} prompts, {typed.new_tokens} new tokens, {how}"
    what += f", {str(dtype).removeprefix('torch.')}"
    what += "".join(f", {name} {value}" for name, value in overrides.items())
    title = f"{what}, on {machine_line(facts, typed.device)}"
    print(f"{title}; random weights")
    about = {"command": command("answers", args), "machine": facts, "setup": setup_of(typed)}

    def work(keep: Callable[[Timings], None]) -> Timings:
        def sized(timings: dict[str, list[float]]) -> Timings:
            return {int(name): list(found) for name, found in timings.items()}

        cases = {str(size): (lambda size=size: answers.seconds(size)) for size in sizes}
        with measuring((typed.rounds + 1) * len(sizes)) as tick:
            rounds, after = typed.rounds, lambda timings: keep(sized(timings))
            return sized(in_turns(cases, rounds, lambda _: tick(1), to_and_fro=True, after_round=after))

    def note(seconds: Timings, folder: Path) -> None:
        cases = [
            {"batch_size": size, "seconds": taken, "speedup": speedups(seconds)[size], "equal": answers.equal(size)}
            for size, taken in seconds.items()
        ]
        write_json(about | {"cases": cases}, folder / JSON)

    def finish(seconds: Timings, folder: Path) -> None:
        note(seconds, folder)
        header = ["prompts at a time", "answers/s", "times one by one", "same answers"]
        rows = []
        for size, taken in seconds.items():
            speed, gain = Spread.of([typed.samples / one for one in taken]), Spread.of(speedups(seconds)[size])
            cells = [
                f"{significant(each.median)} ({significant(each.low)}..{significant(each.high)})"
                for each in (speed, gain)
            ]
            rows.append(
                [str(size), cells[0], cells[1] if size > 1 else "", f"{answers.equal(size)} of {typed.samples}"]
            )
        write_text(folder / TABLE, markdown(title, header, rows, command("answers", args)))
        print(f"\n{table(header, rows)}")

    in_folder(typed.output, "answers", work, note, finish)
    return 0
