"""Errors that the user can fix: the command line prints them in one or two lines and exits with code 2; and the log."""

import contextlib
import difflib
import errno
import logging
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby

log = logging.getLogger("randlora_pl")
"""The log of the application, whose warnings the user reads, too."""


def install(extra: str) -> str:
    """Return the command that installs an extra, from any folder: pip keeps the package, as it is installed already."""
    return f"{shlex.quote(sys.executable)} -m pip install 'randlora-pl[{extra}]'"


class UserError(Exception):
    """A mistake of the user, printed in one or two lines without a traceback.

    The parts are separate attributes, also after pickling, so that no code has to parse the message.

    Args:
        what: Description of the mistake, usually with its location.
        hint: Fix, with the command. It is printed on its own line unless ``what`` ends a sentence.
        where: File, option or entry with the mistake; printed unless ``what`` contains it.
    """

    def __init__(self, what: str, hint: str = "", where: str = "") -> None:
        super().__init__(what, hint, where)
        self.what, self.hint, self.where = what, hint, where

    def __str__(self) -> str:
        text = self.what
        if self.where not in text:
            stop = "." if text.endswith(".") else ""
            text = f"{text.removesuffix('.')} in {self.where}{stop}"
        gap = " " if text.endswith((".", "?", "!")) else "\n"
        return f"{text}{gap}{self.hint}" if self.hint else text

    def within(self, location: object) -> "UserError":
        """Return the error with a location in front, unless it has this location already."""
        what = self.what if self.where == str(location) else f"{location}: {self.what}"
        return type(self)(what, self.hint, self.where or str(location))


@contextlib.contextmanager
def errors_in(location: object) -> Iterator[None]:
    """Put a location, such as a file or a config entry, in front of each `UserError` of the block."""
    try:
        yield
    except UserError as error:
        raise error.within(location) from error


class UnreadableImageError(UserError):
    """Error for an image that cannot be decoded."""


class TooLargeImageError(UnreadableImageError):
    """Error for an image with more pixels than allowed."""


class LostProcessError(Exception):
    """Error for a lost process of a distributed run, with the command to resume in the message. Exit code 1."""


class Terminated(KeyboardInterrupt):
    """Exception for SIGTERM, which batch systems send; handled like Ctrl-C, exit code 143."""


class DryRunEnd(Exception):  # noqa: N818 (not an error)
    """End of ``fit --dry-run``, after its start page."""


def near(word: str, choices: Iterable[str], count: int = 3) -> str:
    """Return a suggestion such as `` Did you mean 'digits'?``, or an empty string if no choice is similar.

    Args:
        word: Word that the user typed.
        choices: Accepted words.
        count: Maximum number of suggestions.
    """
    lowered = {choice.lower(): choice for choice in choices}
    matches = [lowered[match] for match in difflib.get_close_matches(word.lower()[:100], lowered, count, 0.5)]
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def brief(value: object, longest: int = 80) -> str:
    """Return the ``repr`` of a value, shortened so that a message does not contain a whole file.

    Args:
        value: Value that the user gave.
        longest: Maximum number of characters.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, or a list in a list in a list ...
        text = f"a {type(value).__name__} too large to show"
    return shorten(text, longest)


def shorten(text: str, longest: int) -> str:
    """Return a text of at most this many characters, with ``...`` in place of its middle."""
    end = longest // 4
    return text if len(text) <= longest else f"{text[: longest - end - 5]} ... {text[len(text) - end :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, and the second one if the first ends with a colon."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {others[0].strip()}" if others and first.endswith(":") else first)[:160]


_WRAPPERS = ("Does not validate", "Parser key", "Problem with given class_path", "Not a valid subclass")
_NOISE = ("Expected a <class 'NoneType'>", "Expected a path but", "Given value", "Subtypes:", "Errors:")

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping such as {pattern: value}",
    "list": "a list such as [a,b]",
    "tuple": "a list such as [0.5,1]",
    "collections.abc.Iterable": "a list",
    "NoneType": "nothing",
}


def parse_message(message: str) -> str:
    """Return a message of jsonargparse, nested with every alternative that did not fit, in one line.

    The line has the option, what was expected and what was given.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    option = f"--{'.'.join(key for key, _ in groupby(keys))}" if keys else ""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    useful = [line for line in lines if line and not line.startswith((*_WRAPPERS, *_NOISE))]
    types = [_KINDS.get(name, name) for name in re.findall(r"Expected an? <class '([^']+)'>", message)]
    literals = re.findall(r"[^', ]+", ",".join(re.findall(r"Literal\[([^\]]*)\]", message)))
    types = [name for name in dict.fromkeys(types) if name != "nothing"]
    types += [f"one of {', '.join(dict.fromkeys(literals))}"] if literals else []
    given = re.findall(r"(?:Given|Got) value: (?:NestedArg\(.*val='(?=.*'\)))?(.*?)(?:'\))?$", message, re.MULTILINE)
    if types:
        value = given[0] if given else ""
        hint = near(value, literals) if value else ""
        if re.fullmatch(r"[\w./-]+", value):
            types = [name.replace("[a,b]", f"'[{value}]'") for name in types]
        return f"{option}: expected {' or '.join(types)}{f', not {value}' if value else ''}{'.' * bool(hint)}{hint}"
    first = useful[0] if useful else message.splitlines()[0]
    if first.startswith("Subclass types expect"):
        value = f", not {given[0]}" if given else ""
        first = f"expected the name of a class, or {{class_path: NAME, init_args: {{...}}}}{value}"
    return f"{option}: {first}" if option and not first.startswith(option) else first


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its explicit causes, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def cause(error: BaseException) -> BaseException:
    """Return the exception that matters: the first `UserError`, else the innermost one that is not a wrapper."""
    links = list(chain(error))
    users = [link for link in links if isinstance(link, UserError)]
    plain = [link for link in links if not str(link).lstrip("- ").startswith(_WRAPPERS)]
    return [*users, *plain, links[-1]][0]


def build_error(error: Exception) -> UserError:
    """Return the `UserError` for an exception raised while objects were built."""
    inner = cause(error)
    if isinstance(inner, UserError):
        return inner
    if trouble := file_trouble(inner):
        return UserError(trouble)
    first = str(inner).strip().splitlines()
    return UserError(first[0] if first else type(inner).__name__)


def out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that memory ran out, on a GPU or on the host."""
    names = {type(link).__name__ for link in chain(error)}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or (
        isinstance(error, RuntimeError)
        and re.search(r"out of memory|can't allocate memory|not enough memory", str(error), re.IGNORECASE) is not None
    )


def lost_process(error: BaseException) -> bool:
    """Return True if an exception means that another process of the job has ended, or did not answer in time."""
    pattern = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|socket"
    reasons = [str(link) for link in chain(error) if isinstance(link, RuntimeError)]
    return any(re.search(pattern, reason, re.IGNORECASE) for reason in reasons)


def lost_worker(error: BaseException) -> str:
    """Return PyTorch's reason why a data loader worker has ended; empty for any other exception."""
    pattern = r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is )?(exited unexpectedly|killed by signal: [^.]+)"
    matches = (re.search(pattern, str(link)) for link in chain(error) if isinstance(link, RuntimeError))
    return next((match[1] for match in matches if match), "")


def full_disk(error: BaseException) -> str:
    """Return the file that could not be written because the disk is full; empty for any other exception."""
    for link in chain(error):
        full = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or re.search(r"No space left on device|Disk quota exceeded|StorageFull|File too large", str(link)):
            name = getattr(link, "filename", None)
            why = "the file would exceed the size limit" if "too large" in str(link) else "the disk is full"
            return f"{name or 'a file'} cannot be written: {why}"
    return ""


def file_trouble(error: BaseException) -> str:
    """Return the file that cannot be read or written, and why; empty for an exception that is not about a file."""
    if full := full_disk(error):
        return f"{full}. Free some space there, or use another folder"
    for link in chain(error):
        if not isinstance(link, OSError) or isinstance(link, ConnectionError | ChildProcessError | TimeoutError):
            continue
        if link.filename is not None and link.strerror:
            name = shorten(str(link.filename), 160)
            return f"{name}: {link.strerror}. Use another folder, or change its permissions"
    return ""


def trouble_of_machine(error: BaseException) -> str:
    """Return the problem with a file or with memory, for any command; empty for any other exception."""
    if trouble := file_trouble(error):
        return trouble
    why = shorten(str(error).partition("\n")[0], 300) or "this machine has too little of it"
    return f"out of memory: {why}" if out_of_memory(error) else ""


def memory_advice(batch_size: int, accumulate: int, stage: str, eval_batch_size: int) -> str:
    """Return advice on the batch size and the accumulation to try.

    Args:
        batch_size: Images per micro-batch.
        accumulate: Micro-batches per optimizer step.
        stage: ``fit``, ``validate`` or ``test``.
        eval_batch_size: Images per evaluation batch.
    """
    if stage != "fit":
        return f"out of memory; try --data.eval_batch_size {max(1, eval_batch_size // 2)}"
    if batch_size == 1:
        return (
            "out of memory with one image at a time; try --model.gradient_checkpointing true, "
            "--trainer.precision bf16-mixed or a smaller model"
        )
    half = batch_size // 2
    same = " for the same effective batch" if batch_size % 2 == 0 else ""
    return (
        f"out of memory; try --data.batch_size {half} --trainer.accumulate_grad_batches {2 * accumulate}{same}, "
        "or --model.gradient_checkpointing true"
    )
