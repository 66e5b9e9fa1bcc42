"""Comparison of whole models: similarity of activations by layer (Figure 4a of the paper), and forgetting.

The similarity is linear centered kernel alignment (CKA),

    CKA = sum_i HSIC_1(K_i, L_i) / sqrt(sum_i HSIC_1(K_i, K_i) * sum_i HSIC_1(L_i, L_i))

over minibatches i, with K = X X^T and L = Y Y^T of the activations of the same images (Kornblith et al., 2019;
Nguyen et al., 2021, equation 3). HSIC_1 is the unbiased estimator of Song et al. (2012, equation 5), so that the
expected value does not depend on the batch size. The paper does not specify the kernel, the number of images, or the
treatment of tokens. Here the activations of all tokens of an image are concatenated.

Forgetting of a fine-tuned CLIP is its zero-shot accuracy on other datasets, before and after fine-tuning.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile
from randlora_pl.lab.analysis.figures import colors, footnote, legend, new_figure
from randlora_pl.models.execution import repeated_blocks
from randlora_pl.tasks import restore
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import for_figure

FEWEST = 4
"""Minimum batch size, because HSIC_1 divides by n (n - 3)."""
KINDS = {"attention": ("attn", "self_attn", "attention"), "mlp": ("mlp", "ffn")}
"""Compared parts of each block, with their names in open_clip, timm and transformers."""

Layer = tuple[int, str]
"""Number of the block, and ``attention`` or ``mlp``."""


def gram(features: Tensor) -> Tensor:
    """Return the linear kernel X X^T (n, n) of activations (n, ...), in float64."""
    x = features.detach().flatten(1)
    x = (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64
    return x @ x.T


def hsic1(k: Tensor, m: Tensor) -> Tensor:
    """Return the unbiased Hilbert-Schmidt independence criterion of two kernels (n, n), n >= 4; may be negative."""
    n = len(k)
    k, m = k - k.diag().diag(), m - m.diag().diag()
    whole = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return ((k * m).sum() + whole - 2 * (k.sum(0) @ m.sum(0)) / (n - 2)) / (n * (n - 3))


@dataclass
class MinibatchCKA:
    """Sums of HSIC_1 over minibatches; `value` is their CKA.

    Attributes:
        sums: HSIC_1 of (K, L), (K, K) and (L, L), float64.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def update(self, k: Tensor, m: Tensor) -> None:
        """Add the kernels (n, n) of one minibatch of at least four images."""
        self.sums = self.sums + torch.stack([hsic1(k, m), hsic1(k, k), hsic1(m, m)]).cpu()

    @property
    def value(self) -> float:
        """CKA: 1 if the activations differ by rotation and scale only, NaN if one of them is constant."""
        cross, one, other = self.sums.tolist()
        return float(cross / (one * other) ** 0.5) if one > 0 and other > 0 else float("nan")


def vision_layers(model: nn.Module) -> dict[Layer, nn.Module]:
    """Return the attention and MLP layers of every block of the image tower, in order.

    Raises:
        UserError: The model has no such layers.
    """
    blocks = repeated_blocks(model)
    if any(path.startswith("visual.") for path in blocks):  # CLIP: exclude the text tower
        blocks = {path: block for path, block in blocks.items() if path.startswith("visual.")}
    layers: dict[Layer, nn.Module] = {}
    for number, block in enumerate(blocks.values()):
        for kind, names in KINDS.items():
            layer = next((child for name, child in block.named_children() if name in names), None)
            if layer is not None:
                layers[number, kind] = layer
    if not layers:
        raise UserError("the model has no blocks with attention and MLP layers. CKA needs a transformer.")
    return layers


@contextmanager
def outputs(layers: Mapping[Layer, nn.Module]) -> Iterator[dict[Layer, Tensor]]:
    """Record the last output of each layer inside the block, (b, ...)."""
    seen: dict[Layer, Tensor] = {}

    def keep(name: Layer, layer: nn.Module, inputs: Any, output: Any) -> None:
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        batch_second = isinstance(layer, nn.MultiheadAttention) and not layer.batch_first
        seen[name] = tensor.transpose(0, 1) if batch_second else tensor

    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def compare(reference: nn.Module, others: Mapping[str, nn.Module], batches: Iterable[Tensor]) -> dict[str, Any]:
    """Compute the CKA of each layer of several models with the same layer of a reference model.

    Args:
        reference: Reference model in eval mode, merged or not.
        others: Models by name, with the same compared layers.
        batches: Images (b, 3, H, W) on the models' device; batches of fewer than four images are skipped.

    Returns:
        CKA by layer, by name of the model.

    Raises:
        UserError: A model has other layers, or no batch had four images.
    """
    mine = vision_layers(reference)
    theirs = {name: vision_layers(model) for name, model in others.items()}
    for name, layers in theirs.items():
        if layers.keys() != mine.keys():
            raise UserError(f"{name} has {len(layers)} layers to compare, the reference has {len(mine)}.")
    sums = {name: {layer: MinibatchCKA() for layer in mine} for name in others}
    count = 0
    for images in batches:
        if len(images) < FEWEST:
            continue
        count += 1
        with outputs(mine) as seen:
            embed(reference, images)
            kernels = {layer: gram(tensor) for layer, tensor in seen.items()}
        for name, model in others.items():
            with outputs(theirs[name]) as seen:
                embed(model, images)
                for layer, tensor in seen.items():
                    sums[name][layer].update(kernels[layer], gram(tensor))
    if not count:
        raise UserError(f"CKA needs a batch of at least {FEWEST} images. Use more images.")
    return {name: {layer: one.value for layer, one in layers.items()} for name, layers in sums.items()}


def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Return the embeddings of images by a CLIP's image tower, or by the model itself."""
    encode = getattr(model, "encode_image", model)
    features: Tensor = encode(images)
    return features


def cka_figure(curves: Mapping[str, Mapping[Layer, float]], reference: str, about: str) -> Figure:
    """Plot CKA by depth, one line per model, attention and MLP side by side (Figure 4a of the paper)."""
    figure = new_figure(9.5, 4.2, "")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, kind in zip(panels, KINDS, strict=True):
        for label, color in colors(list(curves)).items():
            line = {number + 1: value for (number, which), value in curves[label].items() if which == kind}
            axes.plot(list(line), list(line.values()), marker="o", markersize=4, color=color, label=for_figure(label))
        axes.set(xlabel="block", title="self-attention" if kind == "attention" else "MLP")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(for_figure(f"CKA with {reference}"))
    legend(figure, panels[0], 3)
    footnote(figure, about)
    return figure


TASKS = ("VisionLanguageTask", "TextHeadTask", "PromptTask")
"""Tasks whose classifier is computed from class names, so that it can be computed for other classes."""


@dataclass(frozen=True)
class Forgetting:
    """Accuracy of one adapter on one dataset's test images, in percent, before and after fine-tuning."""

    dataset: str
    images: int
    classes: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """Change in percentage points; negative values mean forgetting."""
        return self.after - self.before


def check_task(file: AdapterFile) -> None:
    """Refuse an adapter that cannot name the classes of other datasets.

    Raises:
        UserError: The adapter has no text head, was trained on captions, was not saved by a task, or has prompts that
            depend on the image or are of each class alone.
    """
    task = file.metadata.get("task")
    if task not in TASKS:
        raise UserError(
            f"{file.path} was trained by {task or 'no task'}. Zero-shot accuracy on other datasets needs a CLIP with a "
            f"text head ({' or '.join(TASKS)})."
        )
    if prompts := file.metadata["arguments"].get("prompts"):
        options = prompts["options"]
        if prompts["method"] == "CoCoOp" or options.get("class_specific"):
            raise UserError(f"{file.path}: its prompts ({prompts['method']}) cannot name classes of other datasets.")
    if file.metadata.get("captions"):
        raise UserError(f"{file.path} was trained on captions and has no prompt for class names.")


def prompts_of(file: AdapterFile, templates: list[str]) -> list[str]:
    """Return the evaluation prompts of the adapter's task: its caption, typed prompts, or the dataset's to average.

    For learned prompts they are the words that these start from, which the base model is tested with.
    """
    used = restore.plain_task(file).used_prompts(templates)
    if used.learned and not used.training:
        words = file.metadata["arguments"].get("prompts", {"options": {}})["options"].get("words")
        return [f"{words or 'a photo of a'} {{}}."]
    return list(used.evaluation or used.training)
