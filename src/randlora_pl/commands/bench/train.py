"""``bench train``: speed of whole training steps, measured in turns."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from randlora_pl.commands.bench import JSON, PICTURE, TABLE, Timing, in_folder, machine_line, measuring
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import parse_yaml, write_text
from randlora_pl.utils.options import Count, Option, Probability, Words
from randlora_pl.utils.text import duration, table

Overrides = Annotated[str, Option("OPTIONS", "Changes to a decoder's configuration, such as '{num_hidden_layers: 4}'")]


def train(
    words: Words,
    *,
    model: str = "vit_base_patch32_224",
    library: Literal["timm", "open_clip", "transformers"] | None = None,
    batch_size: Count | None = None,
    tokens: Count = 256,
    overrides: Overrides = "{}",
    dropout: Annotated[float, Probability] = 0.0,
    methods: Sequence[str] = (),
    targets: Sequence[str] = (),
    rss: bool = False,
    timing: Timing = Timing(rounds=5),
) -> int:
    """Time whole training steps of full fine-tuning and of adapters, in turns.

    The weights and the data are random.

    Examples:
        randlora-pl bench train
        randlora-pl bench train --model Qwen/Qwen2-0.5B-Instruct --methods lora randlora

    Args:
        model: A model of timm, the image tower of an open_clip model, or a decoder such as Qwen/Qwen2-0.5B-Instruct
        library: Library of the model, if two know the name
        batch_size: Images per step (default: 64), or texts (default: 4)
        tokens: Tokens per text
        dropout: Dropout on the input of the adapters' paths
        methods: Also: randlora-low (memory: low) dora vera nola adalora pissa loraxs hydralora hira shira kradapter oft
            svft pranc peft-dora peft-vera (default: full lora randlora randlora-hadamard randlora-ternary peft-lora
            peft-randlora)
        targets: Layers to adapt, as in --model.targets (default: qkv fc1 fc2, as in the paper). all selects every
            linear layer of the blocks, conv their convolutions
        rss: Also measure the resident set of a process per method, which takes as long again
    """
    device, facts = timing.prepare()
    import yaml

    from randlora_pl.adapters.targets.select import DEFAULT_TARGETS
    from randlora_pl.lab.bench.costs import rss_elsewhere
    from randlora_pl.lab.bench.methods import chosen
    from randlora_pl.lab.bench.report import as_json, bars, cells, markdown, write_figure, write_json
    from randlora_pl.lab.bench.steps import Measured, measure, ticks
    from randlora_pl.lab.bench.train import Setup, Training, estimated_seconds, library_of, one_training

    try:
        changes = parse_yaml(overrides)
    except yaml.YAMLError:
        changes = None
    if not isinstance(changes, dict) or not all(isinstance(name, str) for name in changes):
        raise UserError(f"--overrides is {overrides!r}: give options of the model such as '{{num_hidden_layers: 4}}'")
    names = chosen(methods)
    library = library or library_of(model)
    batch_size = batch_size or (4 if library == "transformers" else 64)
    setup = Setup(
        model, library, batch_size, timing.precision, device, timing.threads or 0, list(targets) or None, tokens,
        changes, dropout,
    )  # fmt: skip
    if setup.overrides and library != "transformers":
        raise UserError(f"--overrides needs a decoder, but {model} is a model of {library}. Remove the option")
    training = Training(setup)
    gemm = training.gemm()
    rate = gemm.rate()
    estimate = estimated_seconds(training.forward_flops(), rate, len(names), timing.rounds)
    estimate += 20 * len(names) * rss
    what = f"{model} ({library}), {training.words}, {timing.numbers}"
    what += "".join(f", {name} {value}" for name, value in (setup.overrides or {}).items())
    what += f", dropout {dropout}" if dropout else ""
    where = machine_line(facts, device)
    adapted = " ".join(targets or DEFAULT_TARGETS)
    print(f"{what}; random weights\non {where}: {rate / 1e9:,.0f} GFLOP/s at best")
    print(f"{len(training.layers)} adapted layers ({adapted})")
    print(f"{len(names)} methods, {timing.rounds} rounds in turns: about {duration(estimate)}")
    sets: dict[str, int | None] = {}

    def work(keep: Callable[[list[Measured]], None]) -> list[Measured]:
        cases, missing = training.cases(names)

        def whole(results: list[Measured]) -> list[Measured]:
            for one in results:
                one.rss = sets.get(one.name)
            return sorted([*results, *missing], key=lambda one: names.index(one.name))

        with measuring(ticks(len(cases), timing.rounds) + len(cases) * rss) as tick:
            if rss:
                for case in cases:
                    tick(1)
                    sets[case.name] = rss_elsewhere(one_training, setup, case.name)
            found = measure(cases, gemm, timing.rounds, lambda _: tick(1), lambda results: keep(whole(results)))
        return whole(found)

    about: dict[str, Any] = {
        "command": words.command("bench train", "--output"),
        "machine": facts,
        "setup": vars(setup),
        "gemm_flops_per_second": rate,
    }
    title = f"{what}, adapted: {adapted}, on {where}"

    def note(results: list[Measured], folder: Path) -> None:
        write_json(about | {"cases": as_json(results)}, folder / JSON)

    def finish(results: list[Measured], folder: Path) -> None:
        rounds = max((len(one.seconds) for one in results), default=0)
        remark = (
            f"Times are medians (min..max) of {rounds} interleaved rounds. Ratios are computed per round. Saved: bytes "
            "kept for the backward pass, without parameters and batch. GFLOP: matrix products, convolutions and "
            "attention."
        )
        header, rows = cells(results)
        write_text(folder / TABLE, f"{markdown(title, header, rows, about['command'])}\n{remark}\n")
        write_figure(bars(title, results), folder / PICTURE)
        print(f"\n{table(header, rows)}\n\n{remark}")

    in_folder(timing.output, "train", work, note, finish)
    return 0
