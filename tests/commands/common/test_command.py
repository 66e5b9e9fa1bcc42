"""A command from its signature and docstring: parser, checks and help page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from randlora_pl.commands.common import Command, check_file, check_output, check_parent, entry, first_sentence
from randlora_pl.commands.data import present_root
from randlora_pl.data.catalog import find
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, Fraction, Option, Rest, Root, Runs, Weights, Words


@dataclass(frozen=True)
class Shared:
    """Options of several commands.

    Attributes:
        rounds: Number of measurements.
        device: Device.
    """

    rounds: Count = 3
    device: str = "auto"


def paint(
    files: Sequence[Path],
    words: Words,
    *,
    part: Literal["image", "text"],
    batch_size: Count = 8,
    rate: Annotated[float, Fraction] = 0.5,
    ranks: Sequence[Count] = (),
    frame: bool = True,
    fast: bool = False,
    from_: Annotated[str | None, Option("WHERE", read=str.upper)] = None,
    root: Root = None,
    pretrained: Weights = (),
    shared: Shared = Shared(rounds=5),
) -> int:
    """Paint files: all of them.

    Slowly.

    Examples:
        randlora-pl paint FILE --part image

    Args:
        files: Files to paint.
        part: Part of
            the picture.
        batch_size: Files at a time
        rate: Speed
        ranks: Ranks
        from_: Place
        frame: Leave out the frame
        fast: Paint faster

    Returns:
        0 if it is painted.

    Note:
        Paint is wet.
    """
    return 0


COMMAND = Command("paint", paint)
BASE = ["a", "--part", "image"]


def arguments(*words: str) -> dict[str, Any]:
    return COMMAND.arguments([*BASE, *words])


def test_what_is_not_typed_has_the_default_of_the_signature() -> None:
    assert arguments() == {"words": BASE, "files": [Path("a")], "part": "image", "shared": Shared(5)}


def test_values_have_the_types_of_the_signature() -> None:
    words = "b --batch_size 4 --rate=1 --ranks 1 2 --fast --no-frame --ranks 3 --from here --data.root r --device cpu"
    found = arguments(*words.split(), "--pretrained", "w", "--pretrained", "v")
    assert found.pop("words") == [*BASE, *words.split(), "--pretrained", "w", "--pretrained", "v"]
    assert found == {
        "files": [Path("a"), Path("b")], "part": "image", "batch_size": 4, "rate": 1.0, "ranks": [1, 2, 3],
        "fast": True, "frame": False, "from_": "HERE", "root": "r", "pretrained": [Path("w"), Path("v")],
        "shared": Shared(5, "cpu"),
    }  # fmt: skip
    assert paint(**found, words=Words()) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--batch-size", "0"), "--batch-size is 0: give a positive whole number."),
        (("--ranks", "2", "-1"), "--ranks is -1: give a positive whole number."),
        (("--rate", "1.5"), "--rate is 1.5: give a number from 0 to 1."),
        (("--rounds", "0"), "--rounds is 0"),
        (("--batch-size", "many"), "invalid int value: 'many'"),
        (("--part", "imag"), "Did you mean 'image'?"),
        (("--batchsize", "4"), "Did you mean '--batch-size'"),
        (("--fas",), "unrecognized arguments"),  # no abbreviations
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        arguments(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_page_has_examples_then_options_beside_their_explanation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert (
        COMMAND.page
        == """\
Paint files: all of them.

Slowly.

  randlora-pl paint FILE --part image

  PATH ...           Files to paint
  --part NAME        Part of the picture (image | text)
  --batch-size N     Files at a time (default: 8)
  --rate X           Speed (default: 0.5)
  --ranks N ...      Ranks
  --no-frame         Leave out the frame
  --fast             Paint faster
  --from WHERE       Place
  --root PATH        Folder with the data (default: the user's data folder)
  --pretrained FILE  Weights file of a base model that this machine does not have
  --rounds N         Number of measurements (default: 5)
  --device NAME      Device (default: auto)

Paint is wet.

Exit code: 0 if it is painted.
"""
    )
    assert first_sentence(COMMAND.parts[""]) == "Paint files" and COMMAND.needed and not COMMAND.raw


def test_a_command_can_read_the_words_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(words: Words) -> int:
        """Repeat words."""
        return len(words)

    assert Command("plain", plain).raw
    assert Words(["a b", "--output", "x", "--c"]).command("data show", "--output") == "randlora-pl data show 'a b' --c"
    monkeypatch.setattr("randlora_pl.utils.own_classes._named", ["mine"])
    assert Words(["--jobs", "2"]).command("sweep") == "randlora-pl sweep --jobs 2 --import mine"


def test_other_words_are_kept_for_another_parser() -> None:
    def search(others: Rest, *, jobs: Count = 1) -> int:
        """Search."""
        return jobs

    found = Command("search", search).arguments(["--data.shots", "16", "--jobs", "2", "--fast"])
    assert found == {"others": ["--data.shots", "16", "--fast"], "jobs": 2}


def test_options_are_inherited_with_their_explanation() -> None:
    @dataclass(frozen=True)
    class More(Shared):
        """More options.

        Attributes:
            device: Another device.
        """

        late: bool = False

    def wait(more: More) -> int:
        """Wait."""
        return more.rounds

    wait.__annotations__["more"] = More
    found = {each.name: each.text for each in Command("wait", wait).parameters}
    assert found == {"rounds": "Number of measurements", "device": "Another device", "late": ""}
    assert Command("wait", wait).arguments(["--late"]) == {"more": More(late=True)}


def test_runs_are_found_with_options_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in "12":
        (tmp_path / "runs" / "a" / number).mkdir(parents=True)
        (tmp_path / "runs" / "a" / number / "config.yaml").touch()
    (tmp_path / "runs" / "a" / "latest").symlink_to("1")

    def read(runs: Runs, *, batch_size: Count = 8) -> int:
        """Read."""
        return len(runs)

    command = Command("read", read)
    found = command.arguments(["runs/a/latest", "--batch_size", "4", "runs/a"])
    assert found == {"runs": [Path("runs/a/1"), Path("runs/a/2")], "batch_size": 4}
    assert command.arguments([f"runs/a/{name}" for name in ("1", "2", "latest")])["runs"] == found["runs"]


def test_an_optional_word_can_be_left_out() -> None:
    def copy(name: str, file: Path | None = None) -> int:
        """Copy."""
        return 0

    command = Command("copy", copy)
    assert command.arguments(["a"]) == {"name": "a"} and command.arguments(["a", "b"])["file"] == Path("b")


def test_outputs_are_replaced_only_by_option(tmp_path: Path) -> None:
    check_output(tmp_path, overwrite=True)
    check_output(tmp_path / "new")
    check_parent(tmp_path / "new")
    with pytest.raises(UserError, match="or --overwrite"):
        check_output(tmp_path, overwrite=False)
    with pytest.raises(UserError, match="overwritten"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="mkdir -p"):
        check_parent(tmp_path / "missing" / "new")
    with pytest.raises(UserError, match="is a folder"):
        check_file(tmp_path, overwrite=True)


def test_all_datasets_of_a_command_must_be_there(tmp_path: Path) -> None:
    rows = [find("digits"), find("dtd")]
    assert present_root(str(tmp_path), rows[:1], "data show") == tmp_path
    with pytest.raises(UserError, match=r"dtd is not in .*randlora-pl data get dtd"):
        present_root(str(tmp_path), rows, "data show")


def test_entries_wrap_beside_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = entry("--name", "word " * 20, column=12).splitlines()
    assert lines[0].startswith("  --name    word")
    assert all(line.startswith(" " * 12 + "word") and len(line) <= 60 for line in lines[1:])
    assert entry("--a-long-name", "text", column=4) == "  --a-long-name\n    text"
