"""``config``: list, print and copy the bundled configs."""

import sys
from pathlib import Path

from randlora_pl.commands.common.arguments import print_json
from randlora_pl.run.options.mistakes import mistakes_in
from randlora_pl.run.options.shipped import config_names, find_config, headline, scripts
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.atomic_output import write_bytes
from randlora_pl.utils.text.tables import table


def _find(name: str) -> Path:
    """Return a script by its name, or a config."""
    known = scripts()
    return known.get(name) or known.get(f"cluster/{name}") or find_config(name)


def config_verb(args: list[str]) -> int:
    """Run ``config list``, ``config cat NAME``, ``config cp NAME [FILE]`` or ``config check FILE``."""
    match args:
        case [] | ["list"]:
            names, starters = config_names(), scripts()
            print(table(("config", "what it is"), [(name, headline(file)) for name, file in names.items()]))
            print("\nUse: randlora-pl fit --config NAME; several --config are merged, the last one wins.")
            print("For sweeps/: randlora-pl sweep NAME.\n")
            print(table(("script", "what it is"), [(name, headline(file)) for name, file in starters.items()]))
            print("\nUse: randlora-pl config cp NAME, and the commands in its first lines.")
        case ["list", "--json"]:
            print_json({name: headline(file) for name, file in (config_names() | scripts()).items()})
        case ["cat", name]:
            sys.stdout.write(_find(name).read_text(encoding="utf-8"))
        case ["cp", name]:
            _copy(_find(name), Path(_find(name).name))
        case ["cp", name, target]:
            file = _find(name)
            _copy(file, Path(target) / file.name if Path(target).is_dir() else Path(target))
        case ["check"]:
            raise UserError("config check needs a file: randlora-pl config check FILE")
        case ["check", file]:
            if not (found := mistakes_in(find_config(file))):
                print(f"{file}: no mistakes found")
                return 0
            print("\n".join(found))
            raise UserError(f"{file} has {len(found)} mistake{'s' * (len(found) > 1)}.")
        case _:
            words = " ".join(args)
            raise UserError(
                f"config {words}: not understood.{near(args[0], ['list', 'cat', 'cp', 'check'])} "
                "Use: config list | config cat NAME | config cp NAME [FILE] | config check FILE"
            )
    return 0


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten; give another name: config cp {source.stem} FILE")
    if not target.parent.is_dir():
        raise UserError(f"The folder {target.parent} does not exist; make it first: mkdir -p {target.parent}")
    write_bytes(target, source.read_bytes())
    use = f"randlora-pl fit --config {target}" if source.suffix == ".yaml" else "see its first lines"
    if source.parent.name == "sweeps":
        use = f"randlora-pl sweep {target}"
    print(f"{target}  (use: {use})")
