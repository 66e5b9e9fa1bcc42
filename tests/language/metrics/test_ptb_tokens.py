import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from randlora_pl.language.metrics import words

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


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("It isn't £20-25, but 3.5/5!") == ["it", "is", "n't", "#", "20-25", "but", "3.5", "/", "5"]
    assert words("?!") == words("") == []


def test_words_are_those_of_stanfords_tokenizer(tmp_path: Path) -> None:
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
