"""``adapter export --to lora``: a plain LoRA adapter instead of any other, in our own format."""

import argparse
from typing import TYPE_CHECKING

from randlora_pl.commands.common.tables import layer_table
from randlora_pl.language.catalog import given_to
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.rank_or_error import check_rank_or_error

if TYPE_CHECKING:
    from pathlib import Path

    from randlora_pl.adapters import AdapterFile
    from randlora_pl.interop.low_rank import Converted


def export(options: argparse.Namespace) -> int:
    """Truncate the singular value decomposition of each update."""
    check_rank_or_error(options.rank, options.error)
    from randlora_pl.adapters import read_adapter
    from randlora_pl.adapters.input_dependent import check_fixed
    from randlora_pl.interop.base_model import load_base, refuse_texts
    from randlora_pl.interop.low_rank import label, write_lora
    from randlora_pl.interop.updates import updates

    file = read_adapter(options.adapter)
    check_fixed(file.adapter, file.path)
    refuse_texts(file, "are written as a plain LoRA")
    base = load_base(file)
    origin = {"adapters": [label(file)], "methods": [file.adapter.method()]}
    made = write_lora(
        options.output, base, updates(base, file), [file], file, rank=options.rank, error=options.error, origin=origin
    )
    print_converted(options.output, made, file)
    return 0


def print_converted(path: "Path", made: "Converted", file: "AdapterFile") -> None:
    """Print rank and error of the layers, size, difference from the outputs of ``file``, and the next command."""
    rows = [vars(layer) for layer in made.layers]
    print(layer_table(rows, {"rank": "rank", "error": "error (mean)", "norm": "norm of the update"}, every=False))
    worst = max(made.layers, key=lambda layer: layer.error)
    print(f"error: {made.error:.2e} of all updates together (Frobenius), at most {worst.error:.2e} ({worst.layer})")
    print(f"largest difference of outputs on random images: {made.difference:.1e}, {made.relative:.1e} of the largest")
    print(f"{path}: LoRA, {made.parameters:,} parameters, {made.size:,} bytes")
    print(f"  randlora-pl predict --adapter {path} {given_to(file.metadata.get('task'))}{import_words()}")
