"""``bench train`` and ``bench captions``: speed of whole training steps, measured in turns."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.commands.bench import common
from randlora_pl.commands.bench.common import PRECISIONS, command, machine_line, measuring, parser_of, prepare, setup_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.files.documents import parse_yaml
from randlora_pl.utils.text.formatting import duration
from randlora_pl.utils.text.tables import table

if TYPE_CHECKING:
    from randlora_pl.lab.bench.steps import Measured

_NOTE = (
    "Times are medians (min..max) of {rounds} interleaved rounds. Ratios are computed per round. Saved: bytes kept "
    "for the backward pass, without parameters and batch. GFLOP: matrix products, convolutions and attention."
)


def train_verb(args: list[str]) -> int:
    """Measure whole training steps of full fine-tuning, our methods and PEFT's, on a model with random weights."""
    parser = parser_of("train", 5)
    parser.add_options(model="vit_base_patch32_224", library=("timm", "open_clip", "transformers"), batch_size=int)
    parser.add_options(tokens=256, overrides="{}", dropout=0.0, methods=[str], targets=[str], rss=False)
    typed = parser.parse_args(args)
    facts = prepare(typed, ["batch_size", "tokens"])
    from randlora_pl.adapters.kernels.dropout import check_dropout
    from randlora_pl.adapters.targets.select import DEFAULT_TARGETS
    from randlora_pl.lab.bench.memory import rss_elsewhere
    from randlora_pl.lab.bench.methods import METHODS, chosen
    from randlora_pl.lab.bench.problems import library_of
    from randlora_pl.lab.bench.steps import Measured, measure, ticks
    from randlora_pl.lab.bench.train import Setup, Training, estimated_seconds, one_training

    names = chosen(typed.methods)
    library = typed.library or library_of(typed.model)
    typed.batch_size = typed.batch_size or (4 if library == "transformers" else 64)
    setup = Setup(
        typed.model, library, typed.batch_size, typed.precision, typed.device, typed.threads or 0, typed.targets,
        typed.tokens, overrides_of(typed.overrides), check_dropout(typed.dropout),
    )  # fmt: skip
    if setup.overrides and library != "transformers":
        raise UserError(f"--overrides needs a decoder, but {typed.model} is a model of {library}. Remove the option")
    training = Training(setup)
    gemm = training.gemm()
    rate = gemm.rate()
    estimate = estimated_seconds(training.forward_flops(), rate, len(names), typed.rounds)
    estimate += 20 * len(names) * typed.rss
    what = f"{typed.model} ({library}), {training.problem.words}, {PRECISIONS[typed.precision]}"
    what += "".join(f", {name} {value}" for name, value in (setup.overrides or {}).items())
    what += f", dropout {typed.dropout}" if typed.dropout else ""
    where = machine_line(facts, typed.device)
    targets = " ".join(typed.targets or DEFAULT_TARGETS)
    print(f"{what}; random weights\non {where}: {rate / 1e9:,.0f} GFLOP/s at best")
    print(f"{len(training.layers)} adapted layers ({targets})")
    print(f"{len(names)} methods, {typed.rounds} rounds in turns: about {duration(estimate)}")
    bases = {name: "full" for name in names if name != "full"}
    peers = {name: METHODS[name].peer for name in names}
    rss: dict[str, int | None] = {}

    def work(keep: Callable[[list[Measured]], None]) -> list[Measured]:
        cases, missing = training.cases(names)

        def whole(results: list[Measured]) -> list[Measured]:
            for one in results:
                one.rss = rss.get(one.name)
            return sorted([*results, *missing], key=lambda one: names.index(one.name))

        with measuring(ticks(len(cases), typed.rounds) + len(cases) * typed.rss) as tick:
            if typed.rss:
                for case in cases:
                    tick(1)
                    rss[case.name] = rss_elsewhere(one_training, setup, case.name)
            found = measure(cases, gemm, typed.rounds, lambda _: tick(1), lambda results: keep(whole(results)))
        return whole(found)

    about = {"command": command("train", args), "machine": facts, "setup": vars(setup), "gemm_flops_per_second": rate}
    title = f"{what}, adapted: {targets}, on {where}"
    _report("train", typed, work, title, about, bases, peers, "of full")
    return 0


def overrides_of(text: str) -> dict[str, int]:
    """Return the parsed value of ``--overrides``, a mapping of names."""
    import yaml

    try:
        found = parse_yaml(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"--overrides is {text!r}: give options of the model such as '{{num_hidden_layers: 4}}'")
    return found


def captions_verb(args: list[str]) -> int:
    """Measure steps of the vision-language task with each caption encoded once, and with one caption per image."""
    parser = parser_of("captions", 3)
    parser.add_options(model="ViT-B-32", batch_size=128, classes=10)
    typed = parser.parse_args(args)
    facts = prepare(typed, ["batch_size", "classes"])
    import torch

    from randlora_pl.lab.bench.captions import BASES, Captions
    from randlora_pl.lab.bench.flops import Gemm
    from randlora_pl.lab.bench.steps import Measured, measure, ticks
    from randlora_pl.lab.bench.train import dtype_of

    captions = Captions(typed.model, typed.batch_size, typed.classes, typed.precision, typed.device)
    gemm = Gemm(torch.device(typed.device), dtype_of(typed.precision))
    images = f"{typed.batch_size} images of {typed.classes} classes"
    what = f"{typed.model}, {images}, RandLoRA, {PRECISIONS[typed.precision]}"
    where = machine_line(facts, typed.device)
    print(f"{what}; random weights\non {where}: {gemm.rate() / 1e9:,.0f} GFLOP/s at best")

    def work(keep: Callable[[list[Measured]], None]) -> list[Measured]:
        cases = captions.cases()
        with measuring(ticks(len(cases), typed.rounds)) as tick:
            return measure(cases, gemm, typed.rounds, lambda _: tick(1), keep)

    about = {"command": command("captions", args), "machine": facts, "setup": setup_of(typed)}
    _report("captions", typed, work, f"{what}, on {where}", about, BASES, {}, "of one an image")
    return 0


def _report(
    verb: str,
    typed: Any,
    work: Callable[[Callable[[list["Measured"]], None]], list["Measured"]],
    title: str,
    about: dict[str, Any],
    bases: Mapping[str, str],
    peers: Mapping[str, str],
    base: str,
) -> None:
    """Run the work and write its table, results and plot."""
    from randlora_pl.lab.bench.report import as_json, bars, cells, markdown, write_figure, write_json

    def note(results: list["Measured"], folder: Path) -> None:
        write_json(about | {"cases": as_json(results, bases, peers)}, folder / common.JSON)

    def finish(results: list["Measured"], folder: Path) -> None:
        note(results, folder)
        rounds = max((len(one.seconds) for one in results), default=0)
        header, rows = cells(results, bases, peers, base)
        text = markdown(title, header, rows, about["command"])
        write_text(folder / common.TABLE, f"{text}\n{_NOTE.format(rounds=rounds)}\n")
        write_figure(bars(title, results, bases, base), folder / common.PICTURE)
        print(f"\n{table(header, rows)}\n\n{_NOTE.format(rounds=rounds)}")

    common.in_folder(typed.output, verb, work, note, finish)
