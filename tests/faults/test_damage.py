"""Files of a run that are cut off or have a wrong bit: refused in a line, or of no effect, and nothing is lost."""

import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from randlora_pl.adapters import read_adapter
from randlora_pl.run.callbacks.checkpoint import CheckpointFile
from randlora_pl.utils.errors import UserError
from tests.faults.checks import assert_same, equal, finish, names, resume
from tests.faults.child import Ended, run
from tests.faults.faults import Signal

LAST, RESULTS, CONFIG = "checkpoints/last.ckpt", "results.json", "config.yaml"
TENSORS, DESCRIPTION = "adapter/adapter.safetensors", "adapter/adapter_config.json"


def flip(file: Path, bit: int) -> None:
    """Changes one bit of a file."""
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        (byte,) = stream.read(1)
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def cut(file: Path, size: int) -> None:
    """Keeps so many bytes of a file."""
    file.write_bytes(file.read_bytes()[:size])


def refused(ended: Ended, *words: str) -> None:
    """The command has ended with one line or two that hold these words."""
    assert ended.code == 2, ended
    lines = ended.err.strip().splitlines()
    assert len(lines) <= 2 and lines[0].startswith("randlora-pl: error: "), ended.err
    assert all(word in ended.err for word in words), ended.err


def same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same bytes, but for the lock of a killed process, which the next one takes over."""
    held = [name for name in names(folder) if name != ".lock"]
    files = [name for name in held if (folder / name).is_file()]
    return held == [name for name in names(other) if name != ".lock"] and all(
        (folder / name).read_bytes() == (other / name).read_bytes() for name in files
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, undisturbed: Path) -> Path:
    """The place of a run that was killed in its sixth step, with a checkpoint and a best adapter."""
    from tests.faults.checks import FIT

    place = tmp_path_factory.mktemp("killed")
    assert run(FIT, place, Signal("training", 11)).code < 0
    return place


@pytest.fixture
def folder(killed: Path, tmp_path: Path) -> Path:
    """A copy of the run of `killed`, in ``tmp_path``."""
    (folder,) = killed.glob("runs/quickstart/2*")
    return Path(shutil.copytree(folder, tmp_path / folder.relative_to(killed)))


def resumed(folder: Path) -> Ended:
    place = folder.parents[2]
    return run(resume(place), place)


def test_damaged_checkpoint_is_refused_and_deleting_it_helps(folder: Path, undisturbed: Path) -> None:
    flip(folder / LAST, 8 * 1_000_000)
    before = Path(shutil.copytree(folder, folder.parents[2] / "before"))
    refused(resumed(folder), "last.ckpt is cut off or damaged (bad checksum of ", "or delete it; fit --resume")
    assert same(folder, before)
    shutil.rmtree(before)
    (folder / LAST).unlink()
    finish(folder.parents[2], undisturbed)


@pytest.mark.parametrize("size", [0, 100, 100_000, -1])
def test_checkpoint_that_is_cut_off_is_refused(folder: Path, size: int) -> None:
    cut(folder / LAST, size)
    refused(resumed(folder), "last.ckpt is cut off or damaged")


def test_no_flipped_bit_of_a_checkpoint_changes_a_weight(undisturbed: Path, tmp_path: Path) -> None:
    """150 anywhere, nearly all of it tensors, and 150 in what holds them together."""
    file, io = tmp_path / "last.ckpt", CheckpointFile()
    shutil.copyfile(undisturbed / LAST, file)
    content = io.load_checkpoint(file, weights_only=True)
    size, draw = file.stat().st_size, random.Random(0)
    with zipfile.ZipFile(file) as archive:
        parts, directory = archive.infolist(), archive.start_dir
    bits = [draw.randrange(8 * size) for _ in range(150)]
    bits += [draw.randrange(8 * directory, 8 * size) for _ in range(50)]
    bits += [8 * draw.choice(parts).header_offset + draw.randrange(8 * 64) for _ in range(50)]
    pickled = parts[0].header_offset + 64
    bits += [8 * pickled + draw.randrange(8 * parts[0].file_size) for _ in range(50)]
    refusals = 0
    for bit in bits:
        flip(file, bit)
        try:
            assert equal(io.load_checkpoint(file, weights_only=True), content), bit
        except UserError as error:
            refusals += "is cut off or damaged" in str(error)
        flip(file, bit)
    assert refusals >= 200
    assert equal(io.load_checkpoint(file, weights_only=True), content)


def test_no_flipped_bit_of_an_adapter_changes_anything(undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed / "adapter", tmp_path / "adapter"))
    whole, draw, refusals = read_adapter(folder), random.Random(0), 0
    for file in (folder / Path(TENSORS).name, folder / Path(DESCRIPTION).name):
        for bit in (draw.randrange(8 * file.stat().st_size) for _ in range(100)):
            flip(file, bit)
            try:
                read = read_adapter(folder)
                assert equal(read.tensors, whole.tensors) and read.adapter == whole.adapter, bit
                assert {k: v for k, v in whole.config.items() if k != "sha256"}.items() <= read.config.items(), bit
            except UserError:
                refusals += 1
            flip(file, bit)
    assert refusals >= 190


@pytest.mark.parametrize(
    ("name", "harm", "word"),
    [
        (TENSORS, lambda file: flip(file, 8 * 300_000), "opy it again"),
        (TENSORS, lambda file: cut(file, 300_000), "opy it again"),
        (DESCRIPTION, lambda file: flip(file, 8 * 3 + 1), "adapter_config.json"),
        (DESCRIPTION, lambda file: cut(file, 700), "adapter_config.json"),
    ],
)
@pytest.mark.parametrize("words", ["test --run {}", "test --adapter {}/adapter", "validate --adapter {}/adapter"])
def test_damaged_adapter_is_refused(
    undisturbed: Path, tmp_path: Path, name: str, harm: Callable[[Path], None], word: str, words: str
) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    harm(folder / name)
    refused(run(words.format(folder).split(), tmp_path), "adapter", word)
    assert not list(tmp_path.glob("runs/*/*")), "nothing to keep of this command"


def test_damaged_results_are_refused_and_deleting_them_helps(folder: Path, undisturbed: Path) -> None:
    cut(folder / RESULTS, 40)
    refused(resumed(folder), "results.json is cut off or damaged", "Delete it: fit --resume writes it again")
    place = folder.parents[2]
    ended = run(["fit", "--config", "quickstart", "--resume", "auto"], place)
    refused(ended, "results.json is cut off or damaged")
    (folder / RESULTS).unlink()
    assert resumed(folder).code == 0
    assert_same(folder, undisturbed, but=("config", "command"))  # what was typed at first, which was only there


@pytest.mark.parametrize("harm", [lambda file: cut(file, 1500), lambda file: flip(file, 8 * 1500 + 1)])
def test_damaged_config_is_refused(folder: Path, harm: Callable[[Path], None]) -> None:
    harm(folder / CONFIG)
    before = Path(shutil.copytree(folder, folder.parents[2] / "before"))
    refused(
        resumed(folder), "config.yaml is cut off or damaged, or was edited: copy it again, or delete the line with its"
    )
    assert same(folder, before)


def test_edited_config_is_taken_without_its_checksum(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    first, second, rest = text.split("\n", 2)
    (folder / CONFIG).write_text(f"{first}\n{rest.replace('steps: 8', 'steps: 6')}")
    ended = resumed(folder)
    assert ended.code == 0 and "checkpoint" in ended.err
    assert "steps: 6" in (folder / CONFIG).read_text() and second.startswith("# SHA-256")
