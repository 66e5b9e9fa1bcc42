"""Bundled configs: one folder at the top of the repository, inside the package once it is built."""

from functools import cache
from pathlib import Path

from randlora_pl.utils.errors import UserError, near


def config_folder() -> Path:
    """Return the folder of the bundled configs: in the installed package, else in the checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parents[1] / "configs"


@cache  # a sweep asks hundreds of times
def config_names() -> dict[str, Path]:
    """Return the bundled configs by name, for example ``adapters/lora``."""
    folder = config_folder()
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """Return a config by path or by name; the folder of a bundled one may be left out (``lora``).

    Raises:
        UserError: The name is neither a file nor a bundled config; near names are suggested.
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
        f"Unknown config {name!r}: neither a file nor a bundled config.{guess} See: randlora-pl config list"
    )


def scripts() -> dict[str, Path]:
    """Return the bundled scripts that start a fit on many devices, by name, for example ``cluster/slurm.sbatch``."""
    folder = config_folder()
    return {file.relative_to(folder).as_posix(): file for file in sorted((folder / "cluster").iterdir())}


def headline(file: Path) -> str:
    """Return the first comment line of a config: its purpose."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("#!"):
            return line.lstrip("# ")
    return ""
