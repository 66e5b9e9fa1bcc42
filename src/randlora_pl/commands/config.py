"""List, print, copy and check configs."""

import sys
from pathlib import Path
from typing import Annotated

from randlora_pl.commands.common import check_parent, print_json
from randlora_pl.run.options.mistakes import mistakes_in
from randlora_pl.run.options.shipped import config_names, find_config, headline, scripts
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import write_bytes
from randlora_pl.utils.options import File, Json, Option
from randlora_pl.utils.text import table

Config = Annotated[str, Option("CONFIG", "A config (randlora-pl config list) or a file")]


def _find(name: str) -> Path:
    known = scripts()
    return known.get(name) or known.get(f"cluster/{name}") or find_config(name)


def list_(*, json: Json = False) -> int:
    """List the bundled configs and scripts."""
    names, starters = config_names(), scripts()
    if json:
        return print_json({name: headline(file) for name, file in (names | starters).items()})
    print(table(("config", "what it is"), [(name, headline(file)) for name, file in names.items()]))
    print("\nUse: randlora-pl fit --config NAME; several --config are merged, the last one wins.")
    print("For sweeps/: randlora-pl sweep NAME.\n")
    print(table(("script", "what it is"), [(name, headline(file)) for name, file in starters.items()]))
    print("\nUse: randlora-pl config cp NAME, and the commands in its first lines.")
    return 0


def cat(name: Config) -> int:
    """Print a bundled config or script.

    Examples:
        randlora-pl config cat clip_vitb32
    """
    sys.stdout.write(_find(name).read_text(encoding="utf-8"))
    return 0


def cp(name: Config, file: File | None = None) -> int:
    """Copy a bundled config or script so that you can change it.

    Examples:
        randlora-pl config cp clip_vitb32 mine.yaml

    Args:
        file: New file, or a folder for it. An existing file is not overwritten
    """
    source = _find(name)
    target = file or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten; give another name: config cp {source.stem} FILE")
    check_parent(target)
    write_bytes(target, source.read_bytes())
    use = f"randlora-pl fit --config {target}" if source.suffix == ".yaml" else "see its first lines"
    if source.parent.name == "sweeps":
        use = f"randlora-pl sweep {target}"
    print(f"{target}  (use: {use})")
    return 0


def check(file: Config) -> int:
    """Print all mistakes of a config with their lines.

    Examples:
        randlora-pl config check mine.yaml

    Returns:
        0, or 2 if there are mistakes.
    """
    if not (mistakes := mistakes_in(find_config(file))):
        print(f"{file}: no mistakes found")
        return 0
    print("\n".join(mistakes))
    raise UserError(f"{file} has {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}.")
