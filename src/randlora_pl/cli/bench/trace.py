"""``bench trace``: costs of a training step on a GPU, counted without one."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.cli.bench import common
from randlora_pl.cli.bench.common import PRECISIONS, command, setup_of
from randlora_pl.cli.common.arguments import CommandParser, check_positive
from randlora_pl.cli.common.progress import counting
from randlora_pl.config.classes import normalize
from randlora_pl.config.compose import DEFAULTS, compose, merge, read_config
from randlora_pl.config.shipped import config_names
from randlora_pl.engine.run_folder import check_new
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.text.tables import table

if TYPE_CHECKING:
    from randlora_pl.bench.trace.step import StepSetup
    from randlora_pl.bench.trace.table import Row

_NOTE = (
    "Counted, not measured: the training step ran on tensors without data. Time: the sum over kernels of the largest "
    "of operations / rate, bytes / bandwidth and the shortest kernel, at rates that good kernels reach; without the "
    "host. Peak: weights, gradients, the optimizer's state and everything alive at once."
)


def options() -> CommandParser:
    """Return the parser of the command."""
    parser = CommandParser("bench trace")
    parser.add_argument("--precision", choices=tuple(PRECISIONS))
    parser.add_argument("--config", action="extend", nargs="+")
    parser.add_options(model=str, methods=[str], adapter=str, device_model=[str], batch_size=int)
    parser.add_options(accumulate=int, captions=128, tokens=256, rank=int, dropout=float, targets=[str], operators=0)
    parser.add_options(gradient_checkpointing=("true", "false"), json=False, output=str)
    return parser


def trace_verb(args: list[str]) -> int:
    """Trace optimizer steps of a model with several methods, and print their costs by a model of a device."""
    typed = options().parse_args(args)
    check_positive(typed, "batch_size", "accumulate", "captions", "tokens", "rank")
    if typed.operators < 0:
        raise UserError(f"--operators is {typed.operators}, but must be at least 0")
    check_new(typed.output)
    if typed.json and typed.output:
        raise UserError("--json prints what --output writes to bench.json. Leave out one of them")
    from randlora_pl.adapters.kernels.dropout import check_dropout
    from randlora_pl.bench.trace.roofline import device_model
    from randlora_pl.bench.trace.step import trace_step
    from randlora_pl.bench.trace.table import PROMPTED, Row, adapter_of, chosen, label_of

    devices = {name: device_model(name) for name in typed.device_model or ["h100"]}
    if typed.dropout is not None:
        check_dropout(typed.dropout)
    methods = [*(typed.methods or ()), *(["full", "lora", typed.adapter] if typed.adapter else ())] or None
    setup, config = step_setup(typed)
    names = chosen(methods or (PROMPTED if setup.task == "PromptTask" else None))
    what = f"{setup.options['name']}, {setup.words}, {PRECISIONS[setup.precision]}"
    what += ", activations recomputed" if setup.options.get("gradient_checkpointing") else ""
    if not typed.json:
        print(what)

    def work(keep: Any) -> list[Row]:
        rows: list[Row] = []
        with counting(not typed.json, "{task.completed} of {task.total} methods", len(names)) as tick:
            for name in names:
                adapter = adapter_of(name, setup, config, typed.rank, typed.dropout)
                step, trained = trace_step(setup, adapter)
                rows.append(Row(name, label_of(name, adapter), trained, step))
                keep(list(rows))
                tick(1)
        return rows

    about = {"command": command("trace", args), "setup": setup_of(typed), "step": what}
    if typed.json:
        from randlora_pl.bench.trace.table import as_json

        print(json.dumps(about | {"methods": as_json(work(lambda _: None), devices)}, indent=2))
        return 0
    _report(typed, work, what, about, devices)
    return 0


def _report(typed: argparse.Namespace, work: Any, what: str, about: dict[str, Any], devices: dict[str, Any]) -> None:
    """Run the work and write its table and results."""
    from randlora_pl.bench.report import markdown, write_json
    from randlora_pl.bench.trace.table import as_json, cells, longest

    def note(rows: list["Row"], folder: Path) -> None:
        write_json(about | {"methods": as_json(rows, devices)}, folder / common.JSON)

    def finish(rows: list["Row"], folder: Path) -> None:
        note(rows, folder)
        header, body = cells(rows, list(devices.values()))
        write_text(folder / common.TABLE, f"{markdown(what, header, body, about['command'])}\n{_NOTE}\n")
        print(f"\n{table(header, body, ['trained', 'GB moved', 'TFLOP'], range(1, len(header)))}")
        for device in devices.values() if typed.operators else ():
            titles, lines = longest(rows, device, typed.operators)
            print(f"\n{table(titles, lines, right=range(1, len(titles)))}")
        print(f"\n{_NOTE}")

    common.in_folder(typed.output, "trace", work, note, finish)


def step_setup(typed: argparse.Namespace) -> tuple["StepSetup", dict[str, Any]]:
    """Return the step of a config, or of a model, with the typed options, and the options of the config's RandLoRA."""
    from randlora_pl.bench.trace.step import StepSetup

    if typed.config and typed.model:
        raise UserError("--config names a model already. Leave out --model, or --config")
    tree = compose(
        "fit", [word for name in typed.config or ["clip_vitb32"] for word in ("--config", name)], DEFAULTS
    ).config
    if typed.model:
        tree = _tree_of(typed.model)
    model, data, trainer = tree.get("model", {}), tree.get("data", {}), tree.get("trainer", {})
    if "name" not in model.get("init_args", {}):
        raise UserError(
            f"--config {' '.join(typed.config)} names no model. Add model.init_args.name, or a config with it"
        )
    precision = str(trainer.get("precision", "32-true"))
    if not typed.precision and precision not in ("32-true", "32", "bf16-mixed"):
        raise UserError(f"bench trace counts float32 and bf16-mixed, not {precision}. Add --precision bf16, or 32")
    if quantize := model["init_args"].get("quantize"):
        raise UserError(f"bench trace cannot count model.quantize {quantize}. Remove it from the config")
    own = {name: value for name, value in model.get("init_args", {}).items() if name in _OPTIONS}
    adapter = model["init_args"].get("adapter", {})
    mixed = str(trainer.get("precision", "32-true")) == "bf16-mixed"
    frozen = mixed and model["init_args"].get("frozen_dtype") in ("bfloat16", "auto")
    if typed.gradient_checkpointing:
        own["gradient_checkpointing"] = typed.gradient_checkpointing == "true"
    if typed.targets:
        own["targets"] = typed.targets
    task = model["class_path"].rpartition(".")[2]
    if task == "PromptTask":
        own |= _prompt_parts(model["init_args"])
    if task == "CausalLMTask":
        own["tokenizer"] = "bytes"  # none is loaded
    setup = StepSetup(
        task,
        own,
        typed.batch_size or data.get("batch_size", 64),
        typed.accumulate or trainer.get("accumulate_grad_batches", 1),
        typed.precision or ("bf16-frozen" if frozen else "bf16" if mixed else "32"),
        typed.captions,
        typed.tokens,
    )
    randlora = str(adapter.get("class_path", "")).endswith("RandLoRA")
    return setup, dict(adapter.get("init_args", {})) if randlora else {}


_OPTIONS = {"name", "pretrained", "targets", "gradient_checkpointing", "logit_scale", "loss_batch", "img_size"}
_OPTIONS |= {"config_overrides", "loss_average", "label_smoothing", "max_grad_norm", "text_chunk_tokens", "optimizer"}
"""Options of a task that its step depends on."""


def _prompt_parts(options: dict[str, Any]) -> dict[str, Any]:
    """Return learner, head and regulation of a config as objects."""
    from randlora_pl.tasks.prompt.saved import PARTS

    named = {name: options[name] for name in PARTS if options.get(name)}
    return {
        name: PARTS[name][str(value["class_path"]).rpartition(".")[2]](**value.get("init_args") or {})
        for name, value in named.items()
    }


def _tree_of(model: str) -> dict[str, Any]:
    """Return the bundled config of a model, or one that has its name alone."""
    for name, file in config_names().items():
        if "/" not in name and not name.startswith("clip_vision"):  # the image tower alone
            tree = merge(normalize(DEFAULTS), normalize(read_config(file)))
            if tree["model"].get("init_args", {}).get("name") == model:
                return tree  # type: ignore[no-any-return]
    from randlora_pl.bench.problems import library_of

    tasks = {"timm": "LinearHeadTask", "open_clip": "VisionLanguageTask", "transformers": "CausalLMTask"}
    library = library_of(model)
    return {
        "model": {
            "class_path": tasks[library],
            "init_args": {"name": model, "pretrained": "random", "adapter": {"class_path": "RandLoRA"}},
        },
        "trainer": {"precision": "bf16-mixed"},
        "data": {"batch_size": 4 if library == "transformers" else 64},
    }
