"""The shipped configs: one folder at the top of the repository, inside the package once it is built."""

import sys
from pathlib import Path

from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.cache_folder import write_whole

_PACKAGE = Path(__file__).resolve().parents[2]


def config_folder() -> Path:
    """The folder of the shipped configs: in the installed package, else in the checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parents[1] / "configs"


def config_names() -> dict[str, Path]:
    """The shipped configs by name, for example ``adapters/lora``."""
    folder = config_folder()
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """A config by path or by name; the folder of a shipped one may be left out (``lora``).

    Args:
        name: What the user typed behind ``--config``.

    Raises:
        UserError: Neither a file nor a shipped config; near names are suggested.
    """
    if Path(name).is_file():
        return Path(name)
    names = config_names()
    short = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    if short in names:
        return names[short]
    ends = [known for known in names if known.endswith(f"/{short}")]
    if len(ends) == 1:
        return names[ends[0]]
    last = {known.rpartition("/")[2]: known for known in reversed(names)}
    guess = near(short, names) or near(short, last)
    raise UserError(
        f"There is no config {name!r}, neither a file nor a shipped one.{guess} See: randlora-pl config list"
    )


def scripts() -> dict[str, Path]:
    """The shipped scripts that start a fit on many devices, by name, for example ``cluster/slurm.sbatch``."""
    folder = config_folder()
    return {file.relative_to(folder).as_posix(): file for file in sorted((folder / "cluster").iterdir())}


def _find(name: str) -> Path:
    """A script by its name, or a config."""
    known = scripts()
    return known.get(name) or known.get(f"cluster/{name}") or find_config(name)


def headline(file: Path) -> str:
    """The first comment line of a config: what it is for."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("#!"):
            return line.lstrip("# ")
    return ""


def config_verb(args: list[str]) -> int:
    """``config list``, ``config cat NAME`` and ``config cp NAME [FILE]``."""
    match args:
        case [] | ["list"]:
            names, starters = config_names(), scripts()
            width = max(map(len, [*names, *starters]))
            for name, file in names.items():
                print(f"{name:{width}}  {headline(file)}")
            print("\nUse: randlora-pl fit --config NAME; several --config are merged, the later one wins.")
            print("Those of sweeps/: randlora-pl sweep NAME; those that compare: compare-methods --config NAME.\n")
            for name, file in starters.items():
                print(f"{name:{width}}  {headline(file)}")
            print("\nUse: randlora-pl config cp NAME, and what its first lines say.")
        case ["cat", name]:
            sys.stdout.write(_find(name).read_text(encoding="utf-8"))
        case ["cp", name]:
            _copy(_find(name), Path(_find(name).name))
        case ["cp", name, target]:
            file = _find(name)
            _copy(file, Path(target) / file.name if Path(target).is_dir() else Path(target))
        case _:
            words = " ".join(args)
            raise UserError(
                f"config {words}: not understood.{near(args[0], ['list', 'cat', 'cp'])} "
                "Use: config list | config cat NAME | config cp NAME [FILE]"
            )
    return 0


def _copy(source: Path, target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten; give another name: config cp {source.stem} FILE")
    if not target.parent.is_dir():
        raise UserError(f"The folder {target.parent} does not exist; make it first: mkdir -p {target.parent}")
    write_whole(target, lambda stream: stream.write(source.read_bytes()))
    use = f"randlora-pl fit --config {target}" if source.suffix == ".yaml" else "see its first lines"
    if source.parent.name == "sweeps":
        use = f"randlora-pl sweep {target}"
    print(f"{target}  (use: {use})")
