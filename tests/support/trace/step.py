"""Training steps of the real tasks and of bundled configs on tensors without data: model, loss and optimizer."""

import gc
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from randlora_pl.adapters import Adapter, FullFineTuning, LoRA, RandLoRA
from randlora_pl.adapters.kernels import common
from randlora_pl.lab.bench.steps import Precision
from randlora_pl.run.options.compose import DEFAULTS, compose
from randlora_pl.tasks.module import AdaptationModule, total_steps
from randlora_pl.tasks.prompt.task import PARTS
from randlora_pl.utils.errors import UserError
from tests.support.trace.fake_gpu import DEVICE, cuda_rules, fake, to_fake
from tests.support.trace.recorder import Recorder, Traced

CLASSES = 10


@dataclass(frozen=True)
class StepSetup:
    """An optimizer step as a config describes it.

    Attributes:
        task: Name of its task: `VisionLanguageTask`, `PromptTask`, `LinearHeadTask` or `CausalLMTask`.
        options: Options of the task, without the adapter.
        batch_size: Images or texts of a micro-batch.
        accumulate: Micro-batches of the step.
        captions: Captions of the step that differ, for `VisionLanguageTask`, or all classes, for `PromptTask`.
        tokens: Tokens of a text, all of which are learned.
    """

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    accumulate: int = 1
    precision: Precision = "bf16"
    captions: int = 128
    tokens: int = 256


def trace_step(setup: StepSetup, adapter: Adapter) -> tuple[Traced, int]:
    """Return what an optimizer step does with an adapter, and the number of parameters that train.

    An earlier step has made the optimizer's state and what layers keep between steps. No data and no weights are read.

    Raises:
        UserError: The task cannot be traced, or the adapter does not fit the model.
    """
    module = _module(setup, adapter)
    task = module.objective
    mode, recorder = FakeTensorMode(), Recorder()
    to_fake(mode, task)
    module._device = DEVICE
    batches = [_on_device(mode, batch) for batch in _batches(setup, task)]
    with cuda_rules(), _thresholds_once(), mode, recorder:
        recorder.hold([*task.parameters(), *task.buffers()])
        recorder.hold(value for batch in batches for value in batch.values() if isinstance(value, Tensor))
        optimizer = module.configure_optimizers()["optimizer"]
        module._start_procedure()
        _step(module, optimizer, setup, [{**batches[0], "micro_batches": 1}])
        gc.collect()
        recorder.start()
        _step(module, optimizer, setup, batches)
    return recorder.traced, sum(one.numel() for one in task.parameters() if one.requires_grad)


def _thresholds_once() -> AbstractContextManager[Any]:
    """Keep the thresholds of rounding, as for tensors with data."""
    return patch.object(common, "thresholds", cache(common.thresholds))


def _step(module: Any, optimizer: Any, setup: StepSetup, batches: list[dict[str, Any]]) -> None:
    """Do what Lightning does in an optimizer step; gradients of the step before stay until the first backward pass."""
    for number, batch in enumerate(batches):
        with _precision(setup):
            loss = module.training_step(batch, number) / setup.accumulate
        if number == 0:
            module.optimizer_zero_grad(0, number, optimizer)
        loss.backward()
        del loss
    module.configure_gradient_clipping(optimizer)
    optimizer.step()
    if (between := module.objective.report.procedure) is not None:
        between.after_step(module.trainer.global_step, total_steps(module.trainer))


def _precision(setup: StepSetup) -> AbstractContextManager[Any]:
    """Return the autocast of a forward pass; in float32 it casts nothing, but the GPU's attention runs."""
    return torch.autocast("cuda", torch.float32 if setup.precision == "32" else torch.bfloat16)


def _module(setup: StepSetup, adapter: Adapter) -> Any:
    """Return the task in its module, with the model on the meta device."""
    options = {"learning_rate": 1e-3, **setup.options}  # no step depends on it, but SGD wants one
    casts = setup.precision == "bf16-frozen" and adapter.keeps_base
    options["frozen_dtype"] = "bfloat16" if casts else "float32"
    if setup.task not in _BUILDERS:
        raise UserError(f"No step of {setup.task} can be traced. Known: {', '.join(_BUILDERS)}")
    with torch.device("meta"):
        task = _class(setup.task)(adapter=adapter, **options)
        task.take_data = lambda stage: None
        module: Any = AdaptationModule(task)
        module._trainer = _trainer(setup)
        module.log = lambda *_, **__: None
        module.setup("fit")
        task.classnames = _names(max(CLASSES, setup.captions))
        task.build = lambda: _BUILDERS[setup.task](task)
        task.adapt()
        module.train()
    return module


def _names(count: int) -> list[str]:
    """Return as many names of classes, which are ImageNet's as long as they last."""
    from randlora_pl.data.catalog import IMAGENET

    return [*IMAGENET, *(f"class {number}" for number in range(count))][:count]


def _class(name: str) -> Any:
    from randlora_pl import language, tasks

    return getattr(language if name == "CausalLMTask" else tasks, name)


def _trainer(setup: StepSetup) -> Any:
    """Return what tasks ask their trainer for."""
    return SimpleNamespace(
        precision="32-true" if setup.precision == "32" else "bf16-mixed",
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        strategy=SimpleNamespace(root_device=DEVICE, broadcast=None),
        accumulate_grad_batches=setup.accumulate,
        estimated_stepping_batches=1000,
        world_size=1,
        global_rank=0,
        global_step=1,
        progress_bar_callback=None,
    )


def _clip(task: Any) -> nn.Module:
    from randlora_pl.models.clip import meta_clip, resolve

    source = resolve(task.name, task.pretrained)
    model: Any = meta_clip(source.name)
    task.width = source.config["embed_dim"]
    return model  # type: ignore[no-any-return]


def _both_towers(task: Any) -> nn.Module:
    model: Any = _clip(task)
    tokens = torch.zeros(len(task.classnames), 1, int(model.context_length), dtype=torch.int64)
    task.register_buffer("tokens", tokens, persistent=False)
    return model  # type: ignore[no-any-return]


def _prompted(task: Any) -> nn.Module:
    from randlora_pl.models.clip import load_tokenizer, resolve

    model: Any = _clip(task)
    with torch.device("cpu"):  # where texts are tokenized
        task.take_texts(model, load_tokenizer(resolve(task.name, task.pretrained).name))
    return model  # type: ignore[no-any-return]


def _linear_head(task: Any) -> nn.Module:
    from randlora_pl.models import ImageTower
    from randlora_pl.models.vit import features_of, meta_vit

    if task.is_clip:
        tower: nn.Module = ImageTower(_clip(task))
        task.head = nn.Linear(task.width, len(task.classnames), bias=False)
        return tower
    vit = meta_vit(task.name, task.img_size)
    task.head = nn.Linear(features_of(vit), len(task.classnames), bias=False)
    return vit


def _decoder(task: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from randlora_pl.language.tokenization import RANDOM, model_config

    config = model_config(task.name, RANDOM, task.config_overrides)
    model: nn.Module = AutoModelForCausalLM.from_config(config).to(getattr(torch, task.frozen_dtype))
    task.targets = task.default_targets(model)
    return model.eval()


_BUILDERS = {
    "VisionLanguageTask": _both_towers,
    "PromptTask": _prompted,
    "LinearHeadTask": _linear_head,
    "CausalLMTask": _decoder,
}


def _batches(setup: StepSetup, task: Any) -> list[dict[str, Any]]:
    """Return the micro-batches of the step, with tensors on the meta device."""
    with torch.device("meta"):
        return [_batch(setup, task) | {"micro_batch": number} for number in range(setup.accumulate)]


def _batch(setup: StepSetup, task: Any) -> dict[str, Any]:
    size = setup.batch_size
    batch: dict[str, Any] = {"weight": torch.zeros(size), "micro_batches": setup.accumulate}
    if setup.task == "CausalLMTask":
        shape, samples = (size, setup.tokens), size * setup.accumulate
        texts: dict[str, Any] = {
            name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "attention_mask", "labels")
        }
        learned = torch.zeros(size * (setup.tokens - 1), dtype=torch.int64)
        tokens = {"step_samples": samples, "step_tokens": len(learned) * setup.accumulate}
        return batch | texts | {"learned": learned, "padding": "right"} | tokens
    pixels = task.image_spec.size
    batch |= {"image": torch.zeros(size, 3, pixels, pixels), "label": torch.zeros(size, dtype=torch.int64)}
    captions = torch.zeros(setup.captions, dtype=torch.int64)
    return batch | {"step_classes": captions, "step_counts": captions.clone()}


def _on_device(mode: FakeTensorMode, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: fake(mode, value) if isinstance(value, Tensor) else value for name, value in batch.items()}


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
