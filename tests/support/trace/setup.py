"""Steps of the shipped configs, and the adapters that are counted on them."""

from typing import Any

from randlora_pl.adapters import Adapter, FullFineTuning, LoRA, RandLoRA
from randlora_pl.run.options.compose import DEFAULTS, compose
from randlora_pl.tasks.prompt.task import PARTS
from tests.support.trace.step import StepSetup

_PRECISIONS = {"32-true": "32", "32": "32", "bf16-mixed": "bf16"}
_OPTIONS = {"name", "pretrained", "targets", "gradient_checkpointing", "logit_scale", "loss_batch", "img_size"}
_OPTIONS |= {"config_overrides", "loss_average", "label_smoothing", "max_grad_norm", "text_chunk_tokens", "optimizer"}
"""Options of a task that its step depends on."""


def step_setup(*configs: str) -> tuple[StepSetup, dict[str, Any]]:
    """Return the step of some configs, and the options of their RandLoRA, empty if they have another method."""
    tree = compose("fit", [word for name in configs for word in ("--config", name)], DEFAULTS).config
    data, trainer = tree.get("data", {}), tree.get("trainer", {})
    model = tree["model"]["init_args"]
    precision: Any = _PRECISIONS[str(trainer.get("precision", "32-true"))]
    if precision == "bf16" and model.get("frozen_dtype") in ("bfloat16", "auto"):
        precision = "bf16-frozen"
    task = tree["model"]["class_path"].rpartition(".")[2]
    options = {name: value for name, value in model.items() if name in _OPTIONS}
    if task == "PromptTask":
        options |= _prompt_parts(model)
    if task == "CausalLMTask":
        options["tokenizer"] = "bytes"  # none is loaded
    size, accumulate = data.get("batch_size", 64), trainer.get("accumulate_grad_batches", 1)
    adapter = model.get("adapter", {})
    randlora = str(adapter.get("class_path", "")).endswith("RandLoRA")
    return StepSetup(task, options, size, accumulate, precision), dict(adapter.get("init_args", {})) if randlora else {}


def adapter_of(name: str, options: dict[str, Any]) -> Adapter:
    """Return a method, with the options of the config's RandLoRA; ranks of LoRA are the paper's."""
    if name == "full":
        return FullFineTuning()
    if name == "lora":
        return LoRA(rank=32, dropout=options.get("dropout", 0.0))
    return RandLoRA(**options | ({"basis": "hadamard"} if name == "randlora-hadamard" else {}))


def _prompt_parts(options: dict[str, Any]) -> dict[str, Any]:
    """Return learner, head and regulation of a config as objects."""
    named = {name: options[name] for name in PARTS if options.get(name)}
    return {
        name: PARTS[name][str(value["class_path"]).rpartition(".")[2]](**value.get("init_args") or {})
        for name, value in named.items()
    }
