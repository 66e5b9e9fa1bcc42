"""Quick commands that list the available choices, without importing PyTorch."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Any, TypeVar

from randlora_pl.commands.common.arguments import print_json
from randlora_pl.commands.common.tables import entry
from randlora_pl.commands.fit import describe
from randlora_pl.language.dataset_facts import TEXT_PAGES, dataset_facts, state_of
from randlora_pl.run.options.class_index import ClassSource, subclasses
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.option_types import Json, Option, Root
from randlora_pl.utils.text.tables import table

Row = TypeVar("Row")

OWN_PAGE = "docs/your_own_data.md"


Names = Annotated[Sequence[str], Option("NAME")]


def adapters(names: Names = (), *, json: Json = False) -> int:
    """List the methods, or explain the options of some of them.

    Examples:
        randlora-pl adapters
        randlora-pl adapters RandLoRA

    Args:
        names: Methods to explain
        json: Print the result as JSON, with all options
    """
    known = subclasses("adapters", "Adapter")
    chosen = [_pick(name, known, "adapter") for name in names]
    if json:
        print_json([asdict(source) for source in chosen or known.values()])
        return 0
    if not chosen:
        rows = []

        def group(source: ClassSource) -> str:
            return str(source.constants["group"])

        for name, sources in groupby(sorted(known.values(), key=group), group):
            rows += [(name, ""), *((f"  {source.name}", source.summary) for source in sources)]
        print(table(("adapter", "what it is"), rows))
        print("\nUse: randlora-pl fit --config CONFIG --model.adapter NAME. Its options: randlora-pl adapters NAME")
        return 0
    for source in chosen:
        print(describe(source, "--model.adapter."))
    return 0


def datasets(names: Names = (), *, root: Root = None, json: Json = False) -> int:
    """List the datasets, or show some of them in full.

    Examples:
        randlora-pl datasets
        randlora-pl datasets eurosat

    Args:
        names: Datasets to show
        root: Folder to search for the data (default: the user's data folder)
    """
    from randlora_pl.data.catalog.registry import CATALOG, default_root
    from randlora_pl.language.catalog import DATASETS, LABELLED

    folder = default_root() if root is None else Path(root).expanduser()
    if root is not None and not folder.is_dir():
        raise UserError(f"--root {folder} is not a folder; give the folder with the datasets")
    if not names:
        rows = []
        for row in CATALOG.values():
            counts = [row.counts.get(split) for split in ("train", "val", "test")]
            rows.append((row.name, row.classes, *counts, row.epochs, state_of(row, folder), row.licence, row.title))
        header = ("dataset", "classes", "train", "val", "test", "epochs", "on this machine", "licence", "what it is")
        if json:
            print_json([dict(zip(header, row, strict=True)) for row in rows])
            return 0
        print(table(header, rows, optional=("licence", "epochs", "classes", "val")))
        print(f"\nOn this machine: below {folder}. Another folder: randlora-pl datasets --root PATH")
        print(
            "Use: randlora-pl fit --config CONFIG --data.dataset NAME. Details of a dataset: randlora-pl datasets NAME"
        )
        print("Download: randlora-pl data get NAME. It prints the steps of what must be downloaded by hand")
        print(
            "Your own images: --data.dataset folder, table, hf, webdataset or pairs with --data.root PATH; see "
            + OWN_PAGE
        )
        print(f"Texts: --model CausalLMTask with {', '.join(DATASETS)}")
        print(f"       --model TextClassificationTask with {', '.join(LABELLED)}; see {' and '.join(TEXT_PAGES)}")
        return 0
    found = {name: dataset_facts(name, folder) for name in names}
    if json:
        print_json(found)
        return 0
    for name, facts in found.items():
        lines = [entry(key, value, column=14) for each in facts for key, value in each.items() if value]
        print("\n".join([name, *lines, ""]))
    return 0


def models(names: Names = (), *, all: bool = False, json: Json = False) -> int:
    """List backbones with their sizes, weights and configs, or some of them.

    Examples:
        randlora-pl models
        randlora-pl models ViT-B-32

    Args:
        names: Models to list
        all: Every architecture of open_clip and timm: what is adapted, and if preprocessing is the library's
    """
    from randlora_pl.language.catalog import KNOWN
    from randlora_pl.models.catalog import MODELS, matrix

    rows: dict[str, tuple[Any, ...]] = {
        row.name: (row.name, row.library, row.config, row.parameters, row.image_size, ", ".join(row.tags), row.license)
        for row in MODELS
    }
    rows |= {
        name: (name, "transformers", known.config, known.parameters, "text", "its own", known.licence)
        for name, known in KNOWN.items()
    }
    if all:
        rows_of: dict[str, list[dict[str, str]]] = {}
        for each in matrix():
            rows_of.setdefault(each["name"], []).append(each)
        picked = [_pick(name.partition(".")[0], rows_of, "model", "models --all") for name in names]
        return _print_matrix(list(chain(*picked)) or matrix(), json)
    chosen = [_pick(name, rows, "model") for name in names] or list(rows.values())
    header = ("model", "library", "config", "parameters", "pixels", "weights", "licence")
    if json:
        print_json([dict(zip(header, row, strict=True)) for row in chosen])
        return 0
    cells = [(*row[:3], f"{row[3] / 1e6:,.1f} M", *row[4:]) for row in chosen]
    print(table(header, cells, optional=("pixels", "library") if names else ("licence", "pixels", "library")))
    print("\nUse: randlora-pl fit --config CONFIG, or --model.name NAME --model.pretrained TAG, a file or random")
    return 0


def _print_matrix(rows: list[dict[str, str]], as_json: bool) -> int:
    """Print what the default of the methods adapts of each architecture, and what is known about its preprocessing."""
    if as_json:
        print_json(rows)
        return 0
    cells = [
        (
            row["name"],
            row["library"],
            " / ".join(row[method] or "-" for method in ("RandLoRA", "LoRA", "DoRA")),
            f"{row['equal']} of {row['tags']}" if row["tags"] != "0" else "no weights",
            row["refused"]
            or "; ".join(filter(None, [row["hub"] and f"not checked without the hub: {row['hub']}", row["frozen"]])),
        )
        for row in rows
    ]
    print(
        table(("model", "library", "adapted, %", "preprocessing", "frozen, % / why not"), cells, optional=("library",))
    )
    print(
        "\nadapted: RandLoRA / LoRA / DoRA by default, of the weights of the blocks. preprocessing: pretrained weights "
        "with the library's own, of all. More: docs/model_matrix.md"
    )
    return 0


def _pick(name: str, known: dict[str, Row], what: str, listed: str = "") -> Row:
    """Return the row of a name, ignoring case, as ``fit`` does; ``listed``: command with all names."""
    spelled = {candidate.lower(): candidate for candidate in known}
    if name.lower() not in spelled:
        hint = near(name, known) or _near_part(name, known)
        raise UserError(f"Unknown {what} {name!r}.{hint} See: randlora-pl {listed or f'{what}s'}")
    return known[spelled[name.lower()]]


def _near_part(word: str, choices: Iterable[str]) -> str:
    """Return a hint as `near` does, also for parts of a name: ``qwen3`` for ``Qwen/Qwen2-0.5B-Instruct``."""
    word = word.lower()
    found = [
        choice
        for choice in choices
        if word in choice.lower() or difflib.get_close_matches(word, re.split(r"[/_.-]", choice.lower()), 1, 0.7)
    ]
    return f" Did you mean {' or '.join(map(repr, found[:3]))}?" if found else ""
