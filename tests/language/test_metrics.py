"""The scores against nltk, the slow definitions and figures of an earlier implementation."""

import importlib.util
import math
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.language import metrics as generation
from randlora_pl.language.glue import TASKS
from randlora_pl.language.metrics import (
    PredictionCollector,
    bleu,
    cider,
    generation_scores,
    grades,
    nist,
    rouge_l,
    words,
)

TEXTS = [
    "The Vaults is an expensive pub near Café Adriatic with a 5 star rating .",
    "Aromi is a family-friendly coffee shop in the riverside area, it isn't cheap.",
    "A pub called Cocum serves food for less than £20.",
]
REFERENCES = [
    [
        "The Vaults pub near Café Adriatic has a 5 star rating. Prices start at £30.",
        "Close to Café Adriatic, The Vaults is a pub with 5 stars and high prices.",
    ],
    ["Aromi is a coffee shop in the riverside area that is not family-friendly."],
    [
        "Cocum is a pub with cheap food.",
        "There is a pub Cocum where a meal costs less than £20 .",
        "Cocum serves food for less than £20.",
    ],
]
WORD = st.sampled_from(["a", "b", "c", "d", "e"])
SENTENCE = st.lists(WORD, min_size=1, max_size=9).map(" ".join)


def slow_nist(texts: list[str], references: list[list[str]], order: int = 5) -> float:
    """NIST word by word as Doddington (2002) states it: equations 2 and 3."""
    everything = [reference.split() for group in references for reference in group]

    def occurrences(gram: list[str]) -> int:
        spots = range(max(map(len, everything)) + 1)
        return sum(line[spot : spot + len(gram)] == gram for line in everything for spot in spots if spot < len(line))

    def information(gram: list[str]) -> float:
        before = occurrences(gram[:-1]) if len(gram) > 1 else sum(map(len, everything))
        return math.log2(before / occurrences(gram))

    total = 0.0
    for n in range(1, order + 1):
        gain = count = 0.0
        for text, group in zip(texts, references, strict=True):
            tokens = text.split()
            grams = [tokens[spot : spot + n] for spot in range(len(tokens) - n + 1)]
            count += len(grams)
            lines = [reference.split() for reference in group]
            most = {
                tuple(gram): max(
                    sum(line[spot : spot + n] == gram for spot in range(len(line) - n + 1)) for line in lines
                )
                for gram in grams
            }
            for gram in grams:  # each gram of the text is matched until the richest reference has no more of it
                if most[tuple(gram)] > 0:
                    most[tuple(gram)] -= 1
                    gain += information(gram)
        total += gain / count if count else 0.0
    length = sum(len(text.split()) for text in texts)
    expected = sum(Fraction(sum(len(line.split()) for line in group), len(group)) for group in references)
    ratio = min(1.0, float(length / expected))
    beta = math.log(0.5) / math.log(1.5) ** 2
    return total * math.exp(beta * math.log(ratio) ** 2)


@given(st.lists(st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_nist_is_that_of_the_slow_definition(pairs: list[tuple[str, list[str]]]) -> None:
    texts, references = [text for text, _ in pairs], [group for _, group in pairs]
    assert nist(texts, references) == pytest.approx(slow_nist(texts, references), abs=1e-9)


def test_nist_takes_the_tokens_of_mteval_in_lower_case() -> None:
    assert nist(["The pub, it's £30."], [["the PUB , it's £30 ."]]) == pytest.approx(math.log2(6))  # six tokens
    assert nist([""], [["a"]]) == 0


def test_rouge_l_and_cider_are_those_of_coco_on_its_tokens() -> None:
    """The figures are those of an own implementation, which 0.1.0 had before pycocoevalcap was used."""
    assert rouge_l(TEXTS, REFERENCES) == pytest.approx(0.7570845505128593)
    assert cider(TEXTS, REFERENCES) == pytest.approx(3.8408456245323337)
    assert rouge_l(["A b, c!"], [["a x C", "nothing"]]) == pytest.approx(2 / 3)
    assert cider(["The pub!", "cheap food"], [["the PUB"], ["cheap food", "the pub"]]) < 10
    assert rouge_l([""], [["a"]]) == cider(["", "a"], [["a"], ["b"]]) == cider(["a"], [["..."]]) == 0
    repeated = [group[-1] for group in REFERENCES]
    assert rouge_l(repeated, REFERENCES) == pytest.approx(1) and cider(repeated, REFERENCES) > 3.9


def test_all_scores_are_given_and_meteor_or_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generation.shutil, "which", lambda _: None)
    found = generation_scores(TEXTS, REFERENCES)
    assert list(found) == ["BLEU", "NIST", "ROUGE-L", "CIDEr"]
    assert "install a Java runtime" in caplog.text
    assert found["BLEU"] == bleu(TEXTS, REFERENCES) < bleu([group[-1] for group in REFERENCES], REFERENCES)
    assert bleu([group[-1] for group in REFERENCES], REFERENCES) == pytest.approx(100)  # of one, two or three each
    assert found["ROUGE-L"] == 100 * rouge_l(TEXTS, REFERENCES)
    monkeypatch.setattr(generation, "meteor", lambda *_: (0.25, ""))
    assert generation_scores(TEXTS, REFERENCES)["METEOR"] == 25
    for texts, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(ValueError, match="references"):
            generation_scores(texts, references)


@pytest.mark.slow
def test_meteor_is_that_of_its_program() -> None:
    if shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None:
        pytest.skip("METEOR needs Java and pycocoevalcap")
    # A stem, a synonym and an empty text; bars would end a sentence in the program's protocol.
    texts = ["the welcome pub |||", "inexpensive food", ""]
    found, said = generation.meteor(texts, [["a zebra", "The welcomed pub!"], ["Cheap food."], ["pub"]])
    assert said == ""
    assert found is not None
    assert 0.5 < found < 0.95


@pytest.mark.parametrize("does", ["exit 1", "echo nothing"])
def test_a_program_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{does}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(generation, "_program", lambda: tmp_path / "meteor.jar")
    found, said = generation.meteor(["a"], [["a"]])
    assert found is None
    assert "METEOR's program failed" in said
    monkeypatch.setattr(generation, "_program", lambda: None)
    assert "pip install" in generation.meteor(["a"], [["a"]])[1]


def test_grades_of_a_few_predictions() -> None:
    found = grades("acc", [0, 1, 1, 0], [0, 1, 0, 0])
    assert found == {"acc": 0.75, "f1": pytest.approx(2 / 3), "matthews": pytest.approx(1 / math.sqrt(3))}
    three = grades("acc", [0, 1, 2, 2], [0, 1, 2, 1])
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)  # the mean over the classes
    scores = grades("pearson", [1.0, 2.0, 4.0], [2.0, 1.0, 5.0])
    pearson = 48 / 3276**0.5
    assert scores == pytest.approx({"pearson": pearson, "spearman": 0.5, "combined": (pearson + 0.5) / 2})
    assert grades("pearson", [2.0, 2.0], [1.0, 2.0]) == {"pearson": 0, "spearman": 0, "combined": 0}, "a constant"
    for name, task in TASKS.items():
        assert next(iter(grades(task.metric, [0, 1], [0, 1]))) == task.metric, f"the paper's of {name} comes first"


def test_predictions_are_gathered_whole() -> None:
    """Batches of any size, also of none, as where a device only pads."""
    metric = PredictionCollector()
    for size, start in ((3, 0), (0, 3), (1, 3)):
        values = torch.arange(start, start + size)
        metric.update(values, values + 1, values.float())
    assert metric.compute() == {"predicted": [0, 1, 2, 3], "labels": [1, 2, 3, 4], "loss": 1.5}


SENTENCES = [
    "The Vaults pub near Café Adriatic has a 5 star rating.  Prices start at £30.",
    "Near Raja Indian Cuisine, it isn't family-friendly; price range: £20-25 (moderate).",
    "There's a kid-friendly coffee shop called \"Alimentum\" that's less than £20, and rated 5 out of 5!",
    "It's 3.5/5 - can't recommend, don't go... The owners' pub; Clare Hall's rating -- 1,000 people.",
    "Blue Spice is a $20 to €25 pub/bar & café, e.g. cheap food, in U.K. and you'll love it.",
    "'Zizzi' has a rating of 1-out-of-5 'stars'. £20–25 They've they're I'm we'd cannot",
    "high-priced. Customers rated it 3 out of 5.It is located in city centre.Near the Crown Plaza Hotel? Yes.",
    "name : The Vaults | more than £ 30 . Isn’t it “cheap” ?",
]
DROPPED = {"''", "'", "``", "`", "-lrb-", "-rrb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""What COCO's evaluation leaves out."""


def test_words_are_those_of_stanfords_tokenizer(tmp_path: Path) -> None:
    assert words("It isn't £20-25, but 3.5/5!") == ["it", "is", "n't", "#", "20-25", "but", "3.5", "/", "5"]
    assert words("?!") == words("") == []
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or package.submodule_search_locations is None or shutil.which("java") is None:
        pytest.skip("Stanford's tokenizer needs Java and pycocoevalcap")
    jar = Path(next(iter(package.submodule_search_locations))) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    file = tmp_path / "sentences.txt"
    file.write_text("\n".join(SENTENCES), encoding="utf-8")
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
    found = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "UTF-8", file], capture_output=True, check=True
    )
    for sentence, line in zip(SENTENCES, found.stdout.decode().splitlines(), strict=True):
        assert words(sentence) == [word for word in line.split() if word not in DROPPED]
