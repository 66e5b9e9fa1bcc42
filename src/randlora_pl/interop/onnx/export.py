"""Export of programs to ONNX and PyTorch's own format, verified before the files get their names."""

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
from torch import Tensor

from randlora_pl.interop.onnx import check_packages
from randlora_pl.interop.onnx.program import Program
from randlora_pl.tasks.losses import check_numbers
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors, move, scratch_folder

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
    check_packages()
    exported = _exported(program)
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
            found = session.run(list(program.outputs), {program.input: example.numpy()})
            return tuple(torch.from_numpy(value) for value in found)

        return _moved(part, path, _compared(program, run, "onnxruntime"))


def export_torch(program: Program, path: Path) -> Exported:
    """Write a program for ``torch.export.load`` with variable batch size; its facts are the extra file `FACTS`.

    Raises:
        UserError: The model cannot be exported, the file's outputs differ, or the disk is full. No files remain.
    """
    exported = _exported(program)
    with disk_errors(path), scratch_folder(path) as part:
        file = part / path.name
        with _silence():
            held = BytesIO()  # PyTorch's own writer ends the process if the disk is full
            torch.export.save(exported, held, extra_files={FACTS: json.dumps(program.facts)})
            file.write_bytes(held.getbuffer())
            loaded = torch.export.load(file).module()
        return _moved(part, path, _compared(program, loaded, "the exported program"))


def _exported(program: Program) -> Any:
    """Return the module as a graph with a variable batch size."""
    shapes = ({0: torch.export.Dim("batch")},)
    with _refusing("cannot be exported"), _silence(), torch.no_grad():
        exported = torch.export.export(program.module, (program.examples(2, 0),), dynamic_shapes=shapes, strict=False)
    for graph in exported.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # would write local paths into the file
    return exported


def _compared(program: Program, run: Callable[[Tensor], Any], where: str) -> float:
    """Return the largest difference between the module's and the exported outputs, which must be rounding."""
    largest = 0.0
    for seed, batch in enumerate((1, 3), 1):
        example = program.examples(batch, seed)
        with torch.no_grad():
            results = program.module(example), run(example)
        expected, found = (each if isinstance(each, tuple) else (each,) for each in results)
        check_numbers(expected[0], "the adapter")
        for name, ours, theirs in zip(program.outputs, expected, found, strict=True):
            difference = float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))
            if not difference <= TOLERANCE:  # NaN as well
                raise UserError(
                    f"{where} gives other {name} than PyTorch (difference {difference:.2e}, at most {TOLERANCE:g} is "
                    "rounding), so nothing was written. Other versions of torch and onnxruntime may do better."
                )
            largest = max(largest, difference)
    return largest


def _moved(part: Path, path: Path, difference: float) -> Exported:
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
        if operation := next((found[1] for link in chain if (found := re.search(unknown, str(link)))), None):
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
