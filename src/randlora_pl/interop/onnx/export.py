"""Programs as files for other systems: ONNX, and PyTorch's own exported programs, compared before they get a name."""

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

from randlora_pl.interop.onnx.packages import check_packages
from randlora_pl.interop.onnx.program import Program
from randlora_pl.tasks.evaluation import check_numbers
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import move, part_folder

TOLERANCE = 1e-4
"""The largest difference that is taken for rounding, relative to the largest value where that is above 1."""
BATCHES = (1, 3)
LARGEST_FILE = 2**31 - 2**27  # protobuf ends at 2 GiB, and the graph needs room beside the weights
FACTS = "randlora_pl.json"
"""Name of the facts inside an exported program; ONNX files have them as metadata, an entry each."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: The file, and one with its weights where they do not fit into it.
        size: Bytes of both.
        difference: The largest difference from the module's own outputs, as `TOLERANCE` counts.
    """

    files: tuple[Path, ...]
    size: int
    difference: float


def export_onnx(program: Program, path: Path) -> Exported:
    """Writes a program as an ONNX file with any batch size; its facts are metadata, as JSON where not strings.

    Weights above 2 GB go to a second file, ``NAME.data``, which must lie beside the first.

    Args:
        program: What to write.
        path: The file; an older one is replaced.

    Raises:
        UserError: A package is missing, an operation has no ONNX form, onnxruntime computes something else, or the
            disk is full. Nothing is left behind then.
    """
    check_packages()
    exported = _exported(program)
    with _refusing("has no ONNX form", "--to torch"), _silence():
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
    with part_folder(path) as part:
        with _silence():
            converted.save(part / path.name, external_data=weights > LARGEST_FILE)
        difference = _compared(program, _onnx_runner(part / path.name, program), "onnxruntime")
        return _moved(part, path, difference)


def export_torch(program: Program, path: Path) -> Exported:
    """Writes a program for ``torch.export.load`` with any batch size; its facts are the extra file `FACTS`.

    Args:
        program: What to write.
        path: The file; an older one is replaced.

    Raises:
        UserError: The model cannot be exported, the file computes something else, or the disk is full. Nothing is left
            behind then.
    """
    exported = _exported(program)
    with part_folder(path) as part:
        file = part / path.name
        with _silence():
            held = BytesIO()  # PyTorch's own writer ends the process where the disk is full
            torch.export.save(exported, held, extra_files={FACTS: json.dumps(program.facts)})
            file.write_bytes(held.getbuffer())
            loaded: nn.Module = torch.export.load(file).module()

        def run(example: Tensor) -> tuple[Tensor, ...]:
            return _as_tuple(loaded(example))

        return _moved(part, path, _compared(program, run, "the exported program"))


def _exported(program: Program) -> Any:
    """The module as a graph in which the batch size is a variable."""
    shapes = ({0: torch.export.Dim("batch")},)
    with _refusing("cannot be exported", "none"), _silence(), torch.no_grad():
        exported = torch.export.export(program.module, (program.examples(2, 0),), dynamic_shapes=shapes, strict=False)
    for graph in exported.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # would carry this machine's paths into the file
    return exported


def _onnx_runner(file: Path, program: Program) -> Callable[[Tensor], tuple[Tensor, ...]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(example: Tensor) -> tuple[Tensor, ...]:
        found = session.run(list(program.outputs), {program.input: example.numpy()})
        return tuple(torch.from_numpy(value) for value in found)

    return run


def _compared(program: Program, run: Callable[[Tensor], tuple[Tensor, ...]], where: str) -> float:
    """The largest difference between the module and what was written.

    Raises:
        UserError: It is more than rounding, or a number is not finite.
    """
    largest = 0.0
    for seed, batch in enumerate(BATCHES, 1):
        example = program.examples(batch, seed)
        with torch.no_grad():
            expected = _as_tuple(program.module(example))
        check_numbers(expected[0], "the adapter")
        for name, ours, theirs in zip(program.outputs, expected, run(example), strict=True):
            difference = float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))
            if not difference <= TOLERANCE:  # NaN as well
                raise UserError(
                    f"{where} gives other {name} than PyTorch (difference {difference:.2e}, at most {TOLERANCE:g} is "
                    "rounding), so nothing was written. Other versions of torch and onnxruntime may do better."
                )
            largest = max(largest, difference)
    return largest


def _moved(part: Path, path: Path, difference: float) -> Exported:
    """Gives the files of a folder their final names, the weights before the graph that needs them."""
    names = sorted((file.name for file in part.iterdir()), key=lambda name: name == path.name)
    files, replaced = tuple(path.with_name(name) for name in names), path.exists()
    for file in files:
        move(part / file.name, file)
    if replaced and (stale := _weights_of(path)) not in files:
        stale.unlink(missing_ok=True)  # of the older file; the new one has its weights inside
    return Exported(files[::-1], sum(file.stat().st_size for file in files), difference)


def _weights_of(path: Path) -> Path:
    """Where the exporter puts weights that do not fit into a file."""
    return path.with_name(f"{path.name}.data")


def _as_tuple(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@contextmanager
def _refusing(what: str, other: str) -> Iterator[None]:
    """Turns whatever an exporter raises into one line with its reason."""
    try:
        yield
    except Exception as error:  # exporters raise errors of every kind, most of them private
        ways = " or ".join(["adapter merge (weights for open_clip or timm)", *([other] if other != "none" else [])])
        raise UserError(f"the model {what} with PyTorch {torch.__version__}: {_reason(error)}. Use {ways}.") from error


def _reason(error: BaseException) -> str:
    """The line of an exporter's error that names the operation, or else the first line of its innermost cause."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in chain:
        if found := re.search(r"No (?:ONNX function|decomposition)[^\n]*?OpOverload\(op='([\w.:]+)'", str(link)):
            return f"the operation {found[1]} is unknown to its ONNX exporter"
    line = next((line for line in str(chain[-1]).splitlines() if line.strip()), type(chain[-1]).__name__)
    return re.sub(r"\x1b\[[0-9;]*m", "", line).strip()[:200].rstrip(".")


@contextmanager
def _silence() -> Iterator[None]:
    """No progress and no remarks of the exporters, which a user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
