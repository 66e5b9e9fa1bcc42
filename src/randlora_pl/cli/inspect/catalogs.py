"""Quick commands that list the available choices, without importing PyTorch."""

import difflib
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from randlora_pl.cli.common.arguments import CommandParser
from randlora_pl.cli.common.tables import entry
from randlora_pl.cli.help.pages import describe
from randlora_pl.config.class_index import subclasses
from randlora_pl.language.catalog import OWN_TEXTS
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.text.tables import table

if TYPE_CHECKING:
    from randlora_pl.data.catalog.registry import DatasetSpec

Row = TypeVar("Row")

OWN_PAGE = "docs/your_own_data.md"
TEXT_PAGES = ("docs/prompts.md", "docs/labelled_texts.md")


def adapters_verb(args: list[str]) -> int:
    """Run ``adapters``: print the methods by folder; ``adapters NAME``: the options of one, from its docstring."""
    known = subclasses("adapters", "Adapter")
    if not args:
        rows = []
        for folder, sources in groupby(known.values(), lambda source: source.folder):
            rows += [(folder.replace("_", " "), ""), *((f"  {source.name}", source.summary) for source in sources)]
        print(table(("adapter", "what it is"), rows))
        print("\nUse: randlora-pl fit --model.adapter NAME; options of one: randlora-pl adapters NAME")
        return 0
    for name in args:
        print(describe(_pick(name, known, "adapter"), "--model.adapter."))
    return 0


def datasets_verb(args: list[str]) -> int:
    """Run ``datasets``: print the datasets; ``datasets NAME``: one in full."""
    from randlora_pl.data.catalog.registry import CATALOG, default_root
    from randlora_pl.language.catalog import DATASETS, LABELLED

    parser = CommandParser("datasets")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--root", "--data.root")
    typed = parser.parse_args(args)
    root = default_root() if typed.root is None else Path(typed.root).expanduser()
    if typed.root is not None and not root.is_dir():
        raise UserError(f"--root {root} is not a folder; name the one that holds the data sets")
    if not typed.names:
        rows = []
        for row in CATALOG.values():
            counts = [row.counts.get(split) for split in ("train", "val", "test")]
            rows.append((row.name, row.classes, *counts, row.epochs, state(row, root), row.licence, row.title))
        header = ("data set", "classes", "train", "val", "test", "epochs", "on this machine", "licence", "what it is")
        print(table(header, rows, optional=("licence", "epochs", "classes", "val")))
        print(f"\nOn this machine: below {root}; another folder: randlora-pl datasets --root PATH")
        print("Use: randlora-pl fit --data.dataset NAME; all about one: randlora-pl datasets NAME")
        print("Get the images: randlora-pl data get NAME; for by hand, this prints the manual steps")
        print(
            "Your own images: --data.dataset folder, table, hf, webdataset or pairs with --data.root PATH; see "
            + OWN_PAGE
        )
        print(f"Texts: --model CausalLMTask with {', '.join(DATASETS)}")
        print(f"       --model TextClassificationTask with {', '.join(LABELLED)}; see {' and '.join(TEXT_PAGES)}")
        return 0
    for name in typed.names:
        if name in DATASETS or name in LABELLED:
            print(_texts(name))
            continue
        if name not in CATALOG:
            hint = near(name, [*CATALOG, *DATASETS, *LABELLED])
            raise UserError(f"Unknown dataset {name!r}.{hint} See: randlora-pl datasets")
        row = CATALOG[name]
        facts = {
            "what it is": row.title,
            "classes": _some(row.classnames, 260)
            or (f"{row.classes}, named by its files" if row.classes else "as in your files"),
            "images": ", ".join(f"{split} {count:,}" for split, count in row.counts.items()) or "as in your files",
            "epochs": str(row.epochs),
            "prompts": _some(row.templates, 20, " | "),
            "files": row.layout and (row.layout if row.own else f"{row.layout} below {root} or --data.root"),
            "state": "" if row.own else state(row, root),
            "get it": "" if row.own or not row.layout else f"randlora-pl data get {row.name}",
            "source": row.source,
            "licence": row.licence,
            "note": row.note,
        }
        print(f"{row.name}\n" + "\n".join(entry(key, value, column=14) for key, value in facts.items() if value) + "\n")
    return 0


def _texts(name: str) -> str:
    """Return the full description of a text dataset: its tasks, its files, and their source."""
    from randlora_pl.language.catalog import DATASETS, LABELLED, TASKS
    from randlora_pl.language.datasets import commonsense, e2e, glue

    lines = [name]
    for known, task, page in zip((DATASETS, LABELLED), TASKS, TEXT_PAGES, strict=True):
        if name not in known:
            continue
        source = {"files": f"below --data.root PATH, see {page}"}
        if name in glue.TASKS:
            source = {"get it": glue.SOURCE}
        elif name not in OWN_TEXTS:
            where = e2e if name == "e2e" else commonsense
            source = {"files": f"{where.TREE}; below --data.root PATH", "get it": where.SOURCE}
        facts = {"what it is": known[name], "use": f"--model {task} --data.dataset {name}"} | source
        lines += [entry(key, value, column=14) for key, value in facts.items()]
    return "\n".join([*lines, ""])


def state(row: "DatasetSpec", root: Path) -> str:
    """Return the state of a dataset below the folder of datasets, and how to get it."""
    from randlora_pl.data.catalog.registry import present

    if row.own:
        return "yours"
    if row.package and not present(row, root):
        return f"not here: pip install {row.package}"
    if not row.layout:
        return "built in"
    return "here" if present(row, root) else f"not here: {'data get' if row.download else 'by hand'}"


def _some(words: Sequence[str], most: int, between: str = ", ") -> str:
    """Return the words, or the first of them and their number."""
    return between.join(words if len(words) <= most else [*words[:10], f"... ({len(words)})"])


def models_verb(args: list[str]) -> int:
    """Run ``models``: print the tested backbones, with a config if one is shipped."""
    from randlora_pl.language.catalog import KNOWN
    from randlora_pl.models.catalog import MODELS

    rows: dict[str, tuple[Any, ...]] = {
        row.name: (row.name, row.library, row.config, row.parameters, row.image_size, ", ".join(row.tags), row.license)
        for row in MODELS
    }
    rows |= {
        name: (name, "transformers", known.config, known.parameters, "text", "its own", known.licence)
        for name, known in KNOWN.items()
    }
    chosen = [_pick(name, rows, "model") for name in args] if args else list(rows.values())
    header = ("model", "library", "config", "parameters", "pixels", "weights", "licence")
    cells = [(*row[:3], f"{row[3] / 1e6:,.1f} M", *row[4:]) for row in chosen]
    print(table(header, cells, optional=("pixels", "library") if args else ("licence", "pixels", "library")))
    print("\nUse: randlora-pl fit --config CONFIG, or --model.name NAME --model.pretrained TAG, a file or random")
    return 0


def _pick(name: str, known: dict[str, Row], what: str) -> Row:
    """Return the row of a name, ignoring case, as ``fit`` does."""
    spelled = {candidate.lower(): candidate for candidate in known}
    if name.lower() not in spelled:
        hint = near(name, known) or _near_part(name, known)
        raise UserError(f"Unknown {what} {name!r}.{hint} See: randlora-pl {what}s")
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
