"""Trained models as programs without adapters, in ONNX and PyTorch's own format, from pixels or tokens to logits.

Pixels are RGB in 0..1; mean and standard deviation are inside the module, so that its users only resize, crop and
divide by 255. The outputs of a file are verified before it gets its name.
"""

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import read_adapter
from randlora_pl.interop.base_model import refuse_texts
from randlora_pl.tasks import ImageTask, load_task, losses, restore
from randlora_pl.utils import __version__
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors, move, scratch_folder
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.machine import check_onnx_packages


class ImageEncoder(nn.Module):
    """Module from pixels to the features of an image tower, of unit length if ``unit``, as CLIP compares them."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, frame: ImageSpec, unit: bool) -> None:
        super().__init__()
        self.tower, self.unit = tower, unit
        self.register_buffer("mean", torch.tensor(frame.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(frame.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (n, 3, H, W) in 0..1 to (n, features)."""
        features: Tensor = self.tower((pixels - self.mean) / self.std)
        return nn.functional.normalize(features, dim=-1) if self.unit else features


class ExportedClassifier(nn.Module):
    """Module from pixels to logits and probabilities of all classes, which the task computes from the logits."""

    def __init__(self, encoder: ImageEncoder, head: nn.Module, predictions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.head, self.predictions = encoder, head, predictions

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n, 3, H, W) in 0..1 to (n, classes) logits and probabilities."""
        logits = self.head(self.encoder(pixels))
        return logits, self.predictions(logits)


class TextEncoder(nn.Module):
    """Module from token ids to text features of unit length."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip: Any = clip

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, context length) int64 to (n, features)."""
        return nn.functional.normalize(self.clip.encode_text(tokens), dim=-1)


PARTS = ("classifier", "image", "text")
FORMAT_VERSION = 2
"""Version of the facts in exported files; raise it when a name or its meaning changes. 2: other names of ``resize``."""


@dataclass(frozen=True)
class Program:
    """Frozen module in eval mode, on the CPU, in float32, and the names of its input and its outputs.

    ``examples`` makes an input of n samples from n and a seed; ``facts`` are JSON values for users of the file.
    """

    module: nn.Module
    input: str
    outputs: tuple[str, ...]
    examples: Callable[[int, int], Tensor]
    facts: dict[str, Any]


def load_program(path: Path, part: str = "classifier") -> Program:
    """Load one of `PARTS` of the merged model of an adapter saved by a task.

    Raises:
        UserError: The adapter has no task or class names, or the model has no such part.
    """
    file = read_adapter(path)
    refuse_texts(file, "become programs")
    if part != "image":
        restore.require_classes(file.metadata, path, "an exported classifier")
    return make_program(load_task(path, gradient_checkpointing=False), part)


def make_program(task: ImageTask, part: str = "classifier") -> Program:
    """Convert one of `PARTS` of a task with classes to a plain module; its adapter is unloaded permanently.

    Raises:
        UserError: The model has no such part.
    """
    task.eval()
    frame = task.frame
    task.check_part(part)
    probabilities = "sigmoid of each logit, since an image may have several classes" if task.several else "softmax"
    described = {
        "classifier": f"logits and probabilities: float32 (n, {len(task.classnames)}), in the order of classnames",
        "image": "features: float32 (n, features)",
        "text": "features: float32 (n, features) of unit length",
    }
    facts = {
        "format_version": FORMAT_VERSION,
        "randlora_pl_version": __version__,
        "part": part,
        "output": described[part],
        "classnames": task.classnames,
        "prompts": list(task.used_prompts().evaluation),
        "task": type(task).__name__,
        **({"probabilities": probabilities} if part == "classifier" else {}),
        "base_model": task.identity.as_dict(),
        "adapter": task.adapter.describe(),
        **task.described_parts(),
    }
    with torch.no_grad():
        if part == "text":
            return _text(task, facts)
        head = None if part == "image" else task.feature_head()
        task.unload()
        second = task.decoupled if part == "classifier" else None
        unit = task.unit_features and (second is None or second.unit_features)
        encoder = ImageEncoder(task.image_tower(), frame, unit)
        module: nn.Module = encoder
        if head is not None:
            module = ExportedClassifier(encoder, head, task.predictions)
    outputs = ("features",) if part == "image" else ("logits", "probabilities")

    def examples(count: int, seed: int) -> Tensor:
        return torch.rand(count, 3, frame.size, frame.size, generator=torch.Generator().manual_seed(seed))

    if part == "image" and unit:
        facts["output"] += " of unit length"
    facts |= {
        "input": f"pixels: float32 (n, 3, {frame.size}, {frame.size}), RGB in 0..1",
        "preprocessing": f"{frame.steps()}, divide by 255; mean and std are subtracted and divided inside",
        "image_size": frame.size,
        **{name: getattr(frame, name) for name in ("interpolation", "resize", "crop_pct", "background")},
        **{name: list(getattr(frame, name)) for name in ("mean", "std", "fill")},
    }
    return Program(module.eval().requires_grad_(False), "pixels", outputs, examples, facts)


def _text(task: ImageTask, facts: dict[str, Any]) -> Program:
    """Return the text tower: the trained one, or for a frozen text head the one that encoded its prompts."""
    clip, tokenizer = task.text_model()
    del clip.visual
    prompts = [text.replace("{}", name) for name in task.classnames for text in facts["prompts"]]
    context = int(tokenizer(prompts[:1]).shape[1])

    def examples(count: int, seed: int) -> Tensor:
        tokens: Tensor = tokenizer([prompts[(seed + index) % len(prompts)] for index in range(count)])
        return tokens

    name = task.identity.name if task.identity.config_sha256 else task.name  # without a local path
    same = f", which is open_clip.get_tokenizer({name!r})(texts)" if name != "tiny" else ""
    facts |= {
        "input": f"tokens: int64 (n, {context}), ids of the model's tokenizer",
        "preprocessing": f"randlora_pl.models.load_tokenizer({name!r})(texts){same}",
        "context_length": context,
    }
    return Program(TextEncoder(clip).eval().requires_grad_(False), "tokens", ("features",), examples, facts)


TOLERANCE = 1e-4
"""Largest difference accepted as rounding, relative to the largest value if that is above 1."""
LARGEST_FILE = 2**31 - 2**27  # protobuf's limit is 2 GiB, including the graph
FACTS = "randlora_pl.json"
"""Name of the facts inside an exported program; ONNX files have them as metadata entries."""


@dataclass(frozen=True)
class Exported:
    """The file and one with its weights if they do not fit into it, bytes, and the largest difference of outputs."""

    files: tuple[Path, ...]
    size: int
    difference: float


def export_onnx(program: Program, path: Path) -> Exported:
    """Write a program as an ONNX file with variable batch size; facts become metadata, non-strings as JSON.

    Weights above 2 GB go to a second file, ``NAME.data``, which must be in the same folder. Older files are replaced.

    Raises:
        UserError: A package is missing, an operation has no ONNX form, onnxruntime's outputs differ, or the disk is
            full. No files remain.
    """
    check_onnx_packages()
    exported = _export(program)
    with _refusing("has no ONNX form", " or --to torch"), _silence():
        shapes = {program.input: {0: torch.export.Dim("batch")}}
        converted: Any = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=[program.input],
            output_names=list(program.outputs),
            dynamic_shapes=shapes,
            verbose=False,
        )
    for name, value in program.facts.items():
        converted.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    weights = sum(t.numel() * t.element_size() for t in exported.state_dict.values())
    with disk_errors(path), scratch_folder(path) as part:
        with _silence():
            converted.save(part / path.name, external_data=weights > LARGEST_FILE)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(part / path.name), options, providers=["CPUExecutionProvider"])

        def run(example: Tensor) -> tuple[Tensor, ...]:
            values = session.run(list(program.outputs), {program.input: example.numpy()})
            return tuple(torch.from_numpy(value) for value in values)

        return _move_files(part, path, _compare(program, run, "onnxruntime"))


def export_torch(program: Program, path: Path) -> Exported:
    """Write a program for ``torch.export.load`` with variable batch size; its facts are the extra file `FACTS`.

    Raises:
        UserError: The model cannot be exported, the file's outputs differ, or the disk is full. No files remain.
    """
    exported = _export(program)
    with disk_errors(path), scratch_folder(path) as part:
        file = part / path.name
        with _silence():
            held = BytesIO()  # PyTorch's own writer ends the process if the disk is full
            torch.export.save(exported, held, extra_files={FACTS: json.dumps(program.facts)})
            file.write_bytes(held.getbuffer())
            loaded = torch.export.load(file).module()
        return _move_files(part, path, _compare(program, loaded, "the exported program"))


def _export(program: Program) -> Any:
    """Return the module as a graph with a variable batch size."""
    shapes = ({0: torch.export.Dim("batch")},)
    with _refusing("cannot be exported"), _silence(), torch.no_grad():
        exported = torch.export.export(program.module, (program.examples(2, 0),), dynamic_shapes=shapes, strict=False)
    for graph in exported.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # would write local paths into the file
    return exported


def _compare(program: Program, run: Callable[[Tensor], Any], where: str) -> float:
    """Return the largest difference between the module's and the exported outputs, which must be rounding."""
    largest = 0.0
    for seed, batch in enumerate((1, 3), 1):
        example = program.examples(batch, seed)
        with torch.no_grad():
            results = program.module(example), run(example)
        expected, actual = (each if isinstance(each, tuple) else (each,) for each in results)
        losses.check_numbers(expected[0], "the adapter")
        for name, ours, theirs in zip(program.outputs, expected, actual, strict=True):
            difference = float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))
            if not difference <= TOLERANCE:  # NaN as well
                raise UserError(
                    f"{where} and PyTorch give different {name} (difference {difference:.2e}, at most {TOLERANCE:g} is "
                    "rounding), so nothing was written. Other versions of torch and onnxruntime may do better."
                )
            largest = max(largest, difference)
    return largest


def _move_files(part: Path, path: Path, difference: float) -> Exported:
    """Give the files of a folder their final names, the weights before the graph that needs them."""
    names = sorted((file.name for file in part.iterdir()), key=lambda name: name == path.name)
    files, replaced = tuple(path.with_name(name) for name in names), path.exists()
    for file in files:
        move(part / file.name, file)
    if replaced and (stale := path.with_name(f"{path.name}.data")) not in files:
        stale.unlink(missing_ok=True)  # weights of the older file; the new file includes its weights
    return Exported(files[::-1], sum(file.stat().st_size for file in files), difference)


@contextmanager
def _refusing(what: str, other: str = "") -> Iterator[None]:
    """Convert any error of an exporter to one line: the unknown operation, or the innermost cause's first line."""
    try:
        yield
    except Exception as error:  # exporters raise errors of every kind, most of them private
        ways = f"adapter merge (weights for open_clip or timm){other}"
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        line = next((line for line in str(chain[-1]).splitlines() if line.strip()), type(chain[-1]).__name__)
        reason = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()[:200].rstrip(".")
        unknown = r"No (?:ONNX function|decomposition)[^\n]*?OpOverload\(op='([\w.:]+)'"
        if operation := next((match[1] for link in chain if (match := re.search(unknown, str(link)))), None):
            reason = f"the operation {operation} is unknown to its ONNX exporter"
        raise UserError(f"the model {what} with PyTorch {torch.__version__}: {reason}. Use {ways}.") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Silence progress and warnings of the exporters that the user cannot act on."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
