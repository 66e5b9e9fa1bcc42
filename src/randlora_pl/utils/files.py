"""File access: atomic writes, and reads of untrusted files within limits on size, depth and time.

Content is written under a hidden name next to the final one, synced to disk, and then renamed. A full disk or a power
failure never leaves an incomplete file, and the older one stays until it is replaced.

Every invalid document raises one exception type: `ValueError` for JSON, `yaml.YAMLError` for YAML. A folder may
contain a named pipe, which blocks forever, or a link to a device such as ``/dev/zero``, which never ends.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from randlora_pl.utils.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, and rename it to its final name if the block ends without an error.

    Its folder is created. Several processes may write the same file. A folder that is not writable raises before the
    block begins.

    Raises:
        OSError: The file cannot be written, for example because the disk is full; the error has the final path.
    """
    part = path.with_name(f".{path.name[:100]}.part")
    with _errors_name(path, part):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = part.open("xb")
        except FileExistsError:  # another process writes it, or was killed
            part = part.with_name(f"{part.name}-{secrets.token_hex(8)}")
            stream = part.open("xb")
        try:
            with stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        except BaseException:
            with suppress(OSError):  # read-only file system
                part.unlink(missing_ok=True)  # frees space on a full disk
            raise


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file with `atomic_file`; the older file stays if an error occurs."""
    with atomic_file(path) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file with `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder next to a path, and delete it with its remaining files at the end of the block.

    Missing parent folders are created, and removed again if they are still empty.

    Raises:
        OSError: A file cannot be written; the error has the final path.
    """
    part = path.absolute().with_name(f".{path.name}.part-{os.getpid()}")
    created = [parent for parent in part.parents if not parent.exists()]
    shutil.rmtree(part, ignore_errors=True)
    try:
        with _errors_name(path, part):
            part.mkdir(parents=True)
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # not empty
            for parent in created:
                parent.rmdir()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder, and rename it to its final name if the block ends without an error.

    Raises:
        OSError: A file cannot be written; the error has the final path, and the older folder stays.
    """
    with scratch_folder(path) as part:
        yield part
        move(part, path)


def move(source: Path, path: Path) -> None:
    """Sync a finished file or folder to disk and give it its final name and permissions; an older one is replaced.

    A folder is replaced by two renames. A process that is killed between them leaves both folders under hidden names
    (see `remove_leftovers`).
    """
    for file in [source, *source.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~umask())  # safetensors gives access to the owner only
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
    if not path.is_dir() or path.is_symlink():
        source.replace(path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    try:
        source.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of a process that was killed while writing.

    A folder that was being replaced gets its name back if the new one is missing.
    """
    for old in folder.glob(".*.old-*"):
        final = folder / old.name[1:].partition(".old-")[0]
        if not final.exists():
            old.rename(final)
    for pattern in (".*.part*", "*/.*.part*", ".*.old-*"):
        for left in folder.glob(pattern):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, hint: str = "Set another --output.") -> Iterator[None]:
    """Raise a `UserError` if a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}).", hint, str(path)) from error


def disk_size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def refuse_inputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise an error if an output would overwrite an input adapter.

    Raises:
        UserError: An output is an input, or a parent folder of one.
    """
    for file in outputs:
        for source in inputs:
            if source.resolve() in (file.resolve(), *file.resolve().parents):
                raise UserError(f"--output {file} would replace the adapter {source}. Set another --output.")


def umask() -> int:
    """Return the process's file mode creation mask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def _errors_name(path: Path, part: Path) -> Iterator[None]:
    """Replace the temporary path in errors of the system with the final one."""
    try:
        yield
    except OSError as error:
        if str(error.filename or part).startswith(str(part)):
            error.filename, error.filename2 = str(path), None
        raise


DEEPEST = 100
"""Maximum levels of nesting; a config has about ten."""

LARGEST = 1 << 18
"""Maximum characters of a YAML document, before and after its aliases are expanded; a config has a few thousand."""

LONGEST_NUMBER = 100
"""Maximum digits of an integer; with 309 it would be larger than any float."""


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON document.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or has an integer of too many digits.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [part for parts in inner for part in parts]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def read_mapping(file: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged, or has no mapping.
    """
    content = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no mapping")
    return content


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def parse_yaml(text: str) -> Any:
    """Parse a YAML document; ``1e-3`` is a float, a date is a string, duplicate keys are errors.

    Raises:
        yaml.YAMLError: The text is not YAML, contains Python objects, or is too large or nested too deeply.
    """
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {LARGEST:,}")
    if odd := _Loader.NON_PRINTABLE.search(text):
        mark = yaml.Mark("", odd.start(), text.count("\n", 0, odd.start()), 0, None, 0)
        raise yaml.MarkedYAMLError(problem=f"the character U+{ord(odd[0]):04X} is not allowed", problem_mark=mark)
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError(f"it is nested deeper than {DEEPEST} levels") from None
    except Exception as error:  # PyYAML's constructors, for tagged values such as `!!bool maybe`
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits, without dates, and with floats such as ``1e-3``."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Open a list or a mapping in brackets, of which PyYAML compares each with all open ones."""
        if self.flow_level >= DEEPEST:
            raise yaml.scanner.ScannerError(None, None, f"it is nested deeper than {DEEPEST} levels", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document's nodes and reject aliases that would expand to too many values."""
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping and reject duplicate keys, of which PyYAML silently uses the last."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _refusal(f"duplicate key {key.value!r}", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_constructors = {  # only the types of JSON
    tag: make
    for tag, make in _Loader.yaml_constructors.items()
    if tag is None or not tag.endswith((":binary", ":set", ":omap", ":pairs", ":timestamp"))
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$|^[-+]?(?:\d+\.\d*|\.\d+)$|^[-+]?\.(?:inf|nan)$"),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {  # a date is a string, as on the command line
    start: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for start, known in _Loader.yaml_implicit_resolvers.items()
}


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the size and depth of a node with its aliases expanded.

    Args:
        node: Node to measure.
        known: Results by node id; None for the nodes that contain this one.

    Raises:
        yaml.YAMLError: The node is too large, too deep, or contains itself or a number of too many digits.
    """
    if id(node) in known:
        measured = known[id(node)]
        if measured is None:
            raise _refusal("an alias contains itself", node)
        return measured
    known[id(node)] = None
    size, depth = 1, 0
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value)
        if node.tag.endswith(":int") and len(node.value) > LONGEST_NUMBER:
            raise _refusal(f"a number of {len(node.value):,} digits", node)
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        for inner in part if isinstance(part, tuple) else (part,):
            inner_size, inner_depth = _measure(inner, known)
            size, depth = size + inner_size, max(depth, inner_depth)
    if size > LARGEST:
        raise _refusal(f"its aliases expand to more than {LARGEST:,} characters", node)
    if depth >= DEEPEST:
        raise _refusal(f"it is nested deeper than {DEEPEST} levels", node)
    known[id(node)] = size, depth + 1
    return size, depth + 1


def _refusal(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


MOST_BYTES = 2**32
"""Maximum size of a text or table in bytes, because it is read into memory."""


def open_plain(path: Path | str, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: The file cannot be opened, is a pipe, a device or a folder, or is too large.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(path, flags)  # O_NONBLOCK: opening a pipe returns at once
    try:
        state = os.fstat(number)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file, but a folder, a pipe or a device", str(path))
        if most is not None and state.st_size > most:
            text = f"it has {state.st_size:,} bytes, and at most {most:,} are read"
            raise OSError(errno.EFBIG, text, str(path))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_plain(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a regular file, opened by `open_plain`."""
    with open_plain(path, most) as stream:
        return stream.read(most)


def is_file(path: Path) -> bool:
    """Return True if the path is a file, without raising for any path that a user types."""
    try:
        return path.is_file()
    except OSError:  # the name is too long, or the folder is not readable
        return False
