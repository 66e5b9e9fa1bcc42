"""Plain English on the pages, in help and messages: the field's words, short sentences, few semicolons."""

import ast
import json
import re
from collections.abc import Iterable

from tests.docs.help import help_pages
from tests.docs.pages import PAGES, ROOT
from tests.support.products import in_one_item

_ENDS = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\bal)(?<!vs)[.!?][\"')*_]*\s+(?=[\"'(*_`]*[A-Z0-9`\[])")
"""A full stop, and what can begin a sentence behind it."""


def blocks_of(text: str) -> list[str]:
    """Paragraphs and items of lists of a Markdown page, each on one line; what stands between backticks is one word."""
    text = re.sub(r"^ *```.*?^ *``` *$", "\n", text, flags=re.S | re.M)
    text = re.sub(r"`[^`]+`", lambda code: f"`{re.sub(r'[^A-Za-z0-9]+', 'x', code[0])}`", text)
    text = re.sub(r"<!--.*?-->|<[^>]+>", "", text, flags=re.S)
    text = re.sub(r"\$\$.*?\$\$", "\n", text, flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks: list[str] = [""]
    for line in text.splitlines():
        item = re.match(r"\s*([-*]|\d+\.) +", line)
        code = line.startswith("    ") and not item and not blocks[-1]
        if not line.strip() or line.lstrip().startswith(("|", "#", "!!!", "===")) or code:
            blocks.append("")
        elif item:
            blocks.append(line[item.end() :])
        else:
            blocks[-1] += " " + line.strip().lstrip("> ")
    return [" ".join(block.split()) for block in blocks if block.strip()]


def sentences_of(text: str) -> list[str]:
    """The sentences of a Markdown page"""
    found = []
    for block in blocks_of(text):
        found += [part.strip() for part in _ENDS.split(block) if re.search(r"[A-Za-z]{2}", part)]
    return found


def words_of(sentence: str) -> int:
    """The number of words of a sentence."""
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


def help_sentences(page: str) -> list[str]:
    """The sentences of a help page: paragraphs, and the text of each option; examples of commands are left out."""
    blocks = [""]
    for line in page.splitlines():
        option = re.match(r"  (\S.*?)(?:  +|$)(.*)", line)
        if re.match(r"  +(randlora-pl|curl|eval) ", line):
            continue
        if not line.strip() or (option and not line.startswith("   ")):
            blocks.append(option[2] if option else "")
        else:
            blocks[-1] += f" {line.strip()}"
    text = (re.sub(r"(\w+, ){4,}\w+", "names", " ".join(block.split())) for block in blocks)  # of options, of tasks
    parts = (part.strip() for block in text for part in _ENDS.split(block))
    return [part for part in parts if re.search(r"[A-Za-z]{2}", part)]


def comment_sentences(config: str) -> list[str]:
    """The sentences of the comments of a YAML file or script; indented lines are commands."""
    lines = [line for line in config.splitlines() if not re.match(r"#!|#SBATCH|# {3,}", line)]
    head = [line.removeprefix("#").strip() if line.startswith("#") else "" for line in lines]
    beside = [found[1] for line in lines if (found := re.match(r"[^#\n].*? # (.*)", line))]
    return sentences_of("\n".join(head)) + beside


LONGEST = 30
"""Words of a sentence; the rule is 25."""
SEMICOLONS = 0.05
"""Of a sentence."""
WORDS = {
    r"untrained (CLIP|model)": "pretrained",
    r"told|tells?": "printed, reported",
    r"for want of|in vain|anew|shall|mere|lone|spoilt|dear": "a plain word",
    r"(that|those) of": "the noun again",
    r"gone on|go(es)? on": "resume",
    r"a training(?! (run|step|set|image|sample|loss|batch|loop|split))": "a training run",
    r"(?-i:figures)": "metrics, plots",
    r"where (it|there|they|none|no)": "if",
    r"nobody|somebody|whoever|belongs? into|is none of": "a plain word",
    r"data sets?": "dataset",
    r"shipped": "bundled",
    r"verbs?": "command",
    r"(?<![`(])(?<!ran )(?<!form )(?<!form: )beside(?!:)(?! itself)": "next to, alongside, with, other than",
    r"(is|are|was|were) refused": "you get an error, raises UserError",
    r"(that|which|it|each|message|error|line|page|run|config|option) names": "has, contains, gives",
    r"planned draws": "a run is one pass",
    r"shown without its minimum": "above the minimum",
    r"(are|is) of (texts|images)|exclude each other": "are texts, cannot be combined",
}
"""Words that the field does not use, and what it says.

Exceptions: the value `beside` of ``--from-form``, the method that keeps a LoRA beside itself, and programs that ran
beside others.
"""
VERDICTS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/results/*/verdict.md"))]
PROSE = PAGES | {name: (ROOT / name).read_text(encoding="utf-8") for name in VERDICTS}
TEXTS = {name: sentences_of(text) for name, text in PROSE.items()}


HELP = {name: help_sentences(text) for name, text in help_pages().items()}


def faults(sentences: Iterable[str]) -> list[str]:
    """What is wrong with the sentences of a page."""
    sentences = list(sentences)
    found = [f"{words_of(one)} words: {one}" for one in sentences if words_of(one) > LONGEST]
    for words, better in WORDS.items():
        found += [f"{better}: {one}" for one in sentences if re.search(rf"\b({words})\b", one, flags=re.I)]
    with_semicolons = [one for one in sentences if ";" in one]
    if len(with_semicolons) > max(1, SEMICOLONS * len(sentences)):
        found += [f"semicolon: {one}" for one in with_semicolons]
    return found


@in_one_item("name", TEXTS)
def test_pages_are_in_plain_english(name: str) -> None:
    assert not faults(TEXTS[name])


@in_one_item("name", HELP)
def test_help_is_in_plain_english(name: str) -> None:
    assert not faults(HELP[name])


def written_in(source: str) -> tuple[list[str], list[str]]:
    """The docstrings of a module, those of its options included, and the messages of its errors and of the log."""
    docstrings, messages = list[str](), list[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.append(node.value.value)
        elif isinstance(node, ast.Call) and re.search(r"Error$|^log\.|^warn", ast.unparse(node.func)):
            texts = [argument for argument in node.args if isinstance(argument, ast.Constant | ast.JoinedStr)]
            messages += [re.sub(r"\{[^}]*\}", "x", ast.unparse(text).strip("f'\"")) for text in texts]
    return docstrings, messages


def test_docstrings_and_messages_are_in_plain_english() -> None:
    wrong, count = list[str](), 0
    for path in (ROOT / "src").rglob("*.py"):
        docstrings, messages = written_in(path.read_text(encoding="utf-8"))
        count += len(messages)
        found = [fault for text in docstrings for fault in faults(sentences_of(text))]
        found = [fault for fault in found if not re.match(r"\d+ words|semicolon", fault)]  # equations and lists
        found += [fault for text in messages for fault in faults(sentences_of(text))]
        wrong += [f"{path.name}: {fault}" for fault in found]
    assert count > 900 and not wrong


@in_one_item("name", [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))])
def test_notebooks_are_in_plain_english(name: str) -> None:
    cells = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert sentences_of(text) and not faults(sentences_of(text))


def test_comments_of_configs_are_in_plain_english() -> None:
    files = [path for path in sorted((ROOT / "configs").rglob("*")) if path.suffix in (".yaml", ".sh", ".sbatch")]
    found = {path.name: faults(comment_sentences(path.read_text(encoding="utf-8"))) for path in files}
    assert len(found) > 40 and not {name: wrong for name, wrong in found.items() if wrong}


def test_there_are_few_semicolons() -> None:
    pages = [one for sentences in TEXTS.values() for one in sentences]
    assert len(pages) > 1000
    assert sum(one.count(";") for one in pages) < SEMICOLONS * len(pages)


def test_tables_use_the_words_of_the_field() -> None:
    for name in TEXTS:
        for line in re.sub(r"```.*?```|`[^`]*`", "", PROSE[name], flags=re.S).splitlines():
            words = [word for word in WORDS if re.search(rf"\b({word})\b", line, flags=re.I)]
            assert not words or not line.startswith("|"), (name, line)


def test_faults_are_found() -> None:
    text = "# A verb\nThe untrained CLIP is\ntold `x; y`. It works; it does. A *b* is c.\n\n- One\n  two\n\n| verb |\n"
    sentences = sentences_of(text)
    assert sentences == ["The untrained CLIP is told `xxxyx`", "It works; it does", "A *b* is c.", "One two"]
    assert [fault.partition(":")[0] for fault in faults(sentences)] == ["pretrained", "printed, reported"]
    assert faults(["a " * 31]) and not faults(["a " * 30])
    assert [fault[:9] for fault in faults(["a; b", "c; d"])] == ["semicolon"] * 2
    text = "Do a; do b.\n\n  randlora-pl fit   told\n\n  --root DIR   Folder of the\n               data sets\n"
    assert help_sentences(text) == ["Do a; do b.", "Folder of the data sets"]
    text = "# A verb\n#\n#   fit   told\n#\n# It is a\n# verb.\na: 1 # told\n"
    assert comment_sentences(text) == ["A verb", "It is a verb.", "told"]
    assert written_in('"""A verb."""\nraise UserError(f"{a} is refused.")\n') == (["A verb."], ["x is refused."])
    assert len(faults(["`beside` and form: beside", "It ran beside others.", "x is refused.", "b beside c"])) == 2
