"""The quick verbs: what there is to choose from, without importing PyTorch."""

from collections.abc import Sequence
from typing import TypeVar

from randlora_pl.cli.sources import ClassSource, subclasses
from randlora_pl.cli.tables import entry, table
from randlora_pl.errors import UserError, near

Row = TypeVar("Row")


def adapters_verb(args: list[str]) -> int:
    """``adapters``: the methods; ``adapters NAME``: the options of one, from its docstring."""
    known = subclasses("adapters", "Adapter")
    if not args:
        print(table(("adapter", "what it is"), [(name, source.summary) for name, source in known.items()]))
        print("\nUse: randlora-pl fit --model.adapter NAME; options of one: randlora-pl adapters NAME")
        return 0
    for name in args:
        print(describe(_pick(name, known, "adapter"), "--model.adapter."))
    return 0


def describe(source: ClassSource, prefix: str) -> str:
    """A class, its summary and its options as the user types them.

    Args:
        source: The class.
        prefix: What stands before an option's name, for example ``--model.adapter.``.
    """
    lines = [source.summary, ""]
    for option in source.options.values():
        default = "required" if option.default is None else f"default {option.default}"
        lines.append(entry(f"{prefix}{option.name}", f"{option.help} ({option.kind}; {default})", column=38))
    return "\n".join([*lines, ""] if source.options else lines)


def datasets_verb(args: list[str]) -> int:
    """``datasets``: the data sets; ``datasets NAME``: one in full."""
    from randlora_pl.data.catalog import CATALOG, default_root, find

    if not args:
        rows = []
        for row in CATALOG.values():
            counts = [row.counts.get(split) for split in ("train", "val", "test")]
            there = "yours" if row.own else "built in"
            got = ("data get" if row.download else "by hand") if row.layout and not row.own else there
            rows.append((row.name, row.classes, *counts, row.epochs, got, row.title))
        header = ("data set", "classes", "train", "val", "test", "epochs", "images", "what it is")
        print(table(header, rows))
        print("\nUse: randlora-pl fit --data.dataset NAME; all about one: randlora-pl datasets NAME")
        print("Get the images: randlora-pl data get NAME; where it says by hand, this tells which file to put where")
        print("Your own images: --data.dataset folder --data.root PATH (a sub-folder for each class)")
        return 0
    for name in args:
        row = find(name)
        facts = {
            "what it is": row.title,
            "classes": _some(row.classnames, 260)
            or (f"{row.classes}, named by its files" if row.classes else "as in your files"),
            "images": ", ".join(f"{split} {count:,}" for split, count in row.counts.items()) or "as in your files",
            "epochs": str(row.epochs),
            "prompts": _some(row.templates, 20, " | "),
            "files": row.layout and (row.layout if row.own else f"{row.layout} below {default_root()} or --data.root"),
            "get it": "" if row.own or not row.layout else f"randlora-pl data get {row.name}",
            "source": row.source,
            "licence": row.licence,
            "note": row.note,
        }
        print(f"{row.name}\n" + "\n".join(entry(key, value, column=14) for key, value in facts.items() if value) + "\n")
    return 0


def _some(words: Sequence[str], most: int, between: str = ", ") -> str:
    """The words, or the first of them and how many there are."""
    return between.join(words if len(words) <= most else [*words[:10], f"... ({len(words)})"])


def models_verb(args: list[str]) -> int:
    """``models``: backbones that have been tried, with a config where there is one."""
    from randlora_pl.models.catalog import MODELS

    rows = {row.name: row for row in MODELS}
    chosen = [_pick(name, rows, "model") for name in args] if args else list(rows.values())
    header = ("model", "library", "config", "parameters", "pixels", "weights", "licence")
    print(
        table(
            header,
            [
                (m.name, m.library, m.config, f"{m.parameters / 1e6:.1f} M", m.image_size, ", ".join(m.tags), m.licence)
                for m in chosen
            ],
        )
    )
    print("\nUse: randlora-pl fit --config CONFIG, or --model.name NAME --model.pretrained TAG, a file or random")
    return 0


def _pick(name: str, known: dict[str, Row], what: str) -> Row:
    if name not in known:
        raise UserError(f"There is no {what} {name!r}.{near(name, known)} See: randlora-pl {what}s")
    return known[name]
