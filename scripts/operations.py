"""Floating point operations of a cell's training and test, counted on models without weights."""

from typing import Any

import torch

from randlora_pl.bench.flops import counter
from randlora_pl.data.catalog.registry import CATALOG
from randlora_pl.experiments.sweep.expand import task_of
from randlora_pl.experiments.sweep.plan import Trial
from randlora_pl.experiments.sweep.steps import evaluated_samples, global_batch, planned_steps
from randlora_pl.language.tasks.meta import meta_backbone
from randlora_pl.language.tasks.restore import LanguageTask
from randlora_pl.models import ImageTower, clip_image_spec, library_of, meta_clip, meta_vit, vit_image_spec
from randlora_pl.tasks import PromptTask, VisionLanguageTask

PASSES = 3
"""Cost of a training step in forward passes: one forward, two backward."""
TOKENS = {"e2e": 64}
"""Tokens of a sample; 128 otherwise, to which GLUE's scripts pad, and half of the cutoff for commonsense questions."""

PROMPT = 16 / 77
"""Cost of a prompt of `PromptTask` in captions: it is cut after its last token, of which there are 9 to 18."""

_passes: dict[tuple[str, str], tuple[int, int]] = {}


def operations(cell: Trial) -> int:
    """Count the operations of a cell; its dataset must be one whose size is known."""
    task: Any = task_of(cell.tree)
    key = (cell.labels.model, type(task).__name__)
    if key not in _passes:
        _passes[key] = (per_token(meta_backbone(task)), 0) if isinstance(task, LanguageTask) else per_sample(task)
    first, caption = _passes[key]
    steps, batch = (0 if cell.untrained else planned_steps(cell.tree) or 0), global_batch(cell.tree)
    samples = evaluated_samples(cell.tree) or 0
    if isinstance(task, LanguageTask):
        passes = PASSES + bool(cell.flat.get("model.gradient_checkpointing"))  # the forward pass once more
        model = cell.tree["model"].get("init_args") or {}
        learned = TOKENS.get(str(cell.tree["data"].get("dataset")), 128)
        writes = "max_new_tokens" in model or "num_beams" in model
        written = int(model.get("num_beams", 1)) * int(model.get("max_new_tokens", 32)) if writes else 0
        return first * (samples * (learned + written) + steps * passes * batch * learned)
    row = CATALOG.get(cell.flat["data.dataset"])
    classes = (row.classes if row else None) or 0
    test = samples * first + classes * caption
    if isinstance(task, PromptTask):  # all classes in each step, with the forward pass of texts once more
        texts, each = classes * PROMPT * caption, task.prompts.per_image  # those of CoCoOp are of one image
        test = samples * first + texts * (samples if each else 1)
        return round(test + steps * (PASSES * batch * first + (PASSES + 1) * texts * (batch if each else 1)))
    return test + steps * PASSES * (batch * first + min(classes or batch, batch) * caption)


def per_sample(task: Any) -> tuple[int, int]:
    """Count the forward pass of one image through the frozen model, and of one caption if a text tower trains."""
    size = getattr(task, "img_size", None)
    clip, both = library_of(task.name) == "open_clip", isinstance(task, VisionLanguageTask | PromptTask)
    model: Any = meta_clip(task.name) if clip else meta_vit(task.name, size)
    if clip and not both:
        model = ImageTower(model)
    pixels = clip_image_spec(task.name, "random", size).size if clip else vit_image_spec(task.name, size).size
    images = torch.empty(1, 3, pixels, pixels, device="meta")
    with torch.no_grad():
        with counter() as flops:
            (model.encode_image if both else model)(images)
        image = flops.get_total_flops()
        if not both:
            return image, 0
        lengths = (getattr(part, "context_length", None) for part in (model, getattr(model, "text", None)))
        length = next((found for found in lengths if isinstance(found, int)), 77)
        with counter() as flops:
            model.encode_text(torch.zeros(1, length, dtype=torch.int64, device="meta"))
        return image, flops.get_total_flops()


def per_token(model: Any) -> int:
    """Count two operations for each weight that multiplies a token, without attention among the tokens.

    The table of embeddings multiplies nothing, unless it is the output layer as well.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    table = model.get_input_embeddings().weight
    output = getattr(model, "lm_head", None)
    shared = output is not None and output.weight is table
    return int(2 * (total if shared else total - table.numel()))
