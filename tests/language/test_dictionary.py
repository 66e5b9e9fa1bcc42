"""Word pairs of a dictionary in the format of dictd, written here; and those of Debian's, where it is installed."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from randlora_pl.adapters import FullFineTuning, SHiRA, inject, make_optimizer, merge_and_unload
from randlora_pl.language import CausalLMTask
from randlora_pl.language.prompt_sets import read_items, read_training
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import unpack_bits
from tests.support.cli import Run
from tests.support.scripts import load_script

from .small import typed
from .test_cli import SMALL

script = load_script("offline_dictionary")

WORDS = """apple tree=Apfelbaum|red wine=Rotwein|old town=Altstadt|bee=Biene|to-do list=Aufgabenliste
cat's eye=Katzenauge|bread roll=Brötchen|brush=Bürste|butter dish=Butterdose|candle=Kerze|castle=Burg
chair leg=Stuhlbein|cherry=Kirsche|church tower=Kirchturm|cloud=Wolke|coal=Kohle|coat=Mantel|copper=Kupfer
cow=Kuh|cup=Tasse|dew=Tau|door=Tür|dove=Taube|dream=Traum|dust=Staub|ear=Ohr|early train=früher Zug
earth=Erde|egg=Ei|elbow=Ellbogen|fence=Zaun|field=Feld|fir=Tanne|flag=Fahne|flea=Floh|flour=Mehl|fog=Nebel
garden gate=Gartentor|goose=Gans|grass=Gras|hail=Hagel|hat=Hut|hay=Heu|heel=Ferse|hen=Henne|herb=Kraut
ice=Eis|iron=Eisen|ivy=Efeu|wedge heels=Keilabsätze"""
PAIRS = dict(pair.split("=") for pair in WORDS.replace("\n", "|").split("|"))
SIZES = {"train": 10, "val": 5, "test": 5}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def digits(number: int) -> str:
    return (digits(number // 64) if number >= 64 else "") + LETTERS[number % 64]


def dictionary(folder: Path, entries: list[str], index: str = "") -> Path:
    """Write entries and their index; further lines of the index are added."""
    data, lines = b"", []
    for entry in entries:
        word = entry.splitlines()[0].split(" /")[0].lower()
        lines.append(f"{word}\t{digits(len(data))}\t{digits(len(entry.encode()))}\n")
        data += entry.encode()
    folder.mkdir(exist_ok=True)
    (folder / "own.dict.dz").write_bytes(gzip.compress(data))
    (folder / "own.index").write_text("".join(lines) + index, encoding="utf-8")
    return folder / "own.dict.dz"


def entries() -> list[str]:
    """All pairs in the forms that entries have, and entries of which no pair can be made."""
    forms = (
        "{} /sˈaʊnd/\n{} <neut>\n see: {{x}}\n\n",
        "{} /sˈaʊnd/ <n>\n [Br.]  [techn.] {}, Zweites <masc>\n",
        "{} /sˈaʊnd/\n{} [cook.]\n",
        '{} /sˈaʊnd/\n{}\n      "x"  - y\n',
    )
    usable = [forms[place % 4].format(*pair) for place, pair in enumerate(PAIRS.items())]
    others = ["00-database-info\nown\n", "help sb. /s/\njdm. helfen\n", "B2C /s/\nHandel\n", "no sound\nTon\n"]
    others += [f"{'long ' * 100}word /s/\nWort\n", "bee /s/\nImme\n", "half /s/\nhalb (ganz)\n", "cut /s/\nSchnitt"]
    return others[:2] + usable + others[2:]


def test_pairs_are_headwords_with_their_first_translation(tmp_path: Path) -> None:
    assert len(PAIRS) == 50
    assert script.read_pairs(dictionary(tmp_path, entries())) == PAIRS
    brackets = f"word /s/\n{'[] ' * 120}7\n"  # nothing to search for long
    assert script.read_pairs(dictionary(tmp_path, [brackets] * 100)) == {}


def test_learned_pairs_are_tested_and_unseen_ones_are_others(tmp_path: Path) -> None:
    def write(name: str, count: int, seed: int) -> dict[str, str]:
        folders = script.write_pairs(PAIRS, tmp_path / name, count, seed, SIZES)
        return {f"{each.name}/{file.name}": file.read_text() for each in folders for file in each.iterdir()}

    files = write("one", 30, 0)
    assert (
        files == write("again", 30, 0) and files["learned/train.jsonl"] != write("other", 30, 1)["learned/train.jsonl"]
    )
    assert files.items() - write("fewer", 20, 0).items() == {each for each in files.items() if "learned" in each[0]}
    seen: list[str] = []
    for name, count in (("learned", 30), ("unseen", 10)):
        train, val = read_training("jsonl", tmp_path / "one" / name, None)
        tests = read_items("jsonl", tmp_path / "one" / name, None)
        assert len(train) == count
        if name == "learned":
            assert train == val and [(each.prompt, each.answer) for each in tests] == [
                (prompt, completion.strip()) for prompt, completion in train
            ]
        for prompt, completion in train if name == "learned" else [*train, *val]:
            word = prompt.removeprefix("English: ").removesuffix("\nGerman:")
            assert completion == f" {PAIRS[word]}"
            seen.append(word)
        seen += [each.prompt[9:-8] for each in tests if name == "unseen"]
    assert sorted(seen) == sorted(PAIRS)
    with pytest.raises(UserError, match=r"--pairs 31: 50 pairs of the dictionary .* Give a number from 1 to 30"):
        write("many", 31, 0)
    assert not (tmp_path / "many").exists()


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ("word\tA\n", r"own.index, line 59: b'word.tA.n' is not 'word, start, size' in the format of dictd"),
        ("word\tA=\tB\n", "line 59: .* is not 'word, start, size'"),
        ("word\t////////\tB\n", "line 59: .* places it outside of the dictionary"),
        ("word\tA\t////////\n", "line 59: .* places it outside of the dictionary"),
        (f"word\tA\t{'A' * 9}\n", "line 59: .* is not 'word, start, size'"),
    ],
)
def test_lines_of_another_format_are_refused(tmp_path: Path, index: str, told: str) -> None:
    assert len(entries()) == 58
    with pytest.raises(UserError, match=told):
        script.read_pairs(dictionary(tmp_path, entries(), index))


def test_damaged_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["offline_dictionary.py", *words, "--output", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as exit_:
            script.main()
        assert exit_.value.code == 2 and not (tmp_path / "out").exists()
        return capsys.readouterr().err.split("error: ")[1]

    assert "is missing. Install the dictionary: apt-get install dict-freedict-eng-deu" in told(
        str(tmp_path / "a.dict.dz")
    )
    file = dictionary(tmp_path, entries())
    with monkeypatch.context() as patch:
        patch.setattr(script, "MOST_LINES", 57)
        assert "own.index has more than 57 lines" in told(str(file))
    assert "--pairs 9: 50 pairs of the dictionary are usable, and 4,200 stay unseen" in told(str(file), "--pairs", "9")
    whole = file.read_bytes()
    for content in (whole[:-20], b"plain text", whole[:20] + b"\xff\xff" + whole[22:]):
        file.write_bytes(content)
        assert "cannot be read as a .dict.dz" in told(str(file))
    file.write_bytes(gzip.compress(b"\xe4\n" * 50_000))
    file.with_name("own.index").write_text("a\tBhn\tP\n")
    assert "line 1: its entry is not UTF-8 text" in told(str(file))
    monkeypatch.setattr(script, "LARGEST", 50_000)
    assert "more than 50,000 bytes when unpacked" in told(str(file))


def test_a_run_records_which_pairs_were_written_exactly(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that writes every second answer: share, file and record agree, in the order of the file."""
    script.write_pairs(PAIRS, tmp_path / "pairs", 30, 0, SIZES)
    known = {item.prompt: item.answer for item in read_items("jsonl", tmp_path / "pairs/learned", None)[::2]}
    monkeypatch.setattr(
        CausalLMTask, "write_answers", lambda task, batch, items: [known.get(item.prompt, "Apfel") for item in items]
    )
    shown = run(
        "fit", *typed("bytes", "llama", 260), *SMALL, "--data.dataset", "jsonl", "--data.root", "pairs/learned",
        "--data.mask_prompt", "true", "--data.steps", "1", "--run.name", "one",
    )  # fmt: skip
    assert shown.code == 0, shown.err
    (folder,) = (tmp_path / "runs" / "one").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    right = unpack_bits(results["test/right"])
    assert right is not None and right.tolist() == [True, False] * 15 and results["test/acc"] == 0.5
    assert [json.loads(line)["right"] for line in (folder / "answers.jsonl").open()] == right.tolist()
    assert results["val/loss"] > 0  # of the pairs that it learns


def test_full_fine_tuning_of_the_sweep_s_layers_is_shira_with_every_place() -> None:
    """Two steps of AdamW, in a decoder with tied embeddings, which no target selects."""
    sweep = yaml.safe_load((Path(__file__).parents[2] / "configs/sweeps/dictionary.yaml").read_text())
    (pattern,) = sweep["set"]["model.targets"]
    targets, ends = [pattern.replace("16|18|20", "1")], []
    config = {"hidden_size": 24, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    for adapter in (FullFineTuning(), SHiRA(rank=12)):  # 12 (24 + 24) is 24 x 24
        torch.manual_seed(0)
        config |= {"vocab_size": 50, "tie_word_embeddings": True, "initializer_range": 0.2}
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).double()
        tokens = torch.arange(24).view(2, 12)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert inject(model, adapter, targets).trainable == 3 * 24 * 24
        optimizer = make_optimizer(model, lr=0.1, eps=1e-4, weight_decay=0.0)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        ends.append(merge_and_unload(model).state_dict())
    changed = {name for name, value in before.items() if not torch.equal(value, ends[0][name])}
    assert changed == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)
    with pytest.raises(UserError, match="shares its weight"):
        inject(model, FullFineTuning(), ["lm_head"])


@pytest.mark.slow
def test_counts_of_the_installed_dictionary() -> None:
    """Version 2022.04.21 of the package."""
    if not script.INSTALLED.is_file():
        pytest.skip(f"no {script.INSTALLED}: apt-get install {script.PACKAGE}")
    pairs = script.read_pairs(script.INSTALLED)
    assert len(pairs) == 329_761 and pairs["wedge heels"] == "Keilabsätze"
    assert sum(map(len, pairs.values())) / len(pairs) == pytest.approx(14.11, abs=0.005)
