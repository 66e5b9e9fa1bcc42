"""Every command on the pages is one that the program takes, and every verb of the program is on a page."""

import re
import shlex

from randlora_pl.commands.common import Command
from randlora_pl.commands.compare_methods import compare_methods
from randlora_pl.commands.main import COMMANDS, members
from randlora_pl.run.options.classes import classes
from randlora_pl.run.session import prepare
from tests.docs.help import help_page
from tests.docs.pages import PAGES, ROOT, commands_of, joined, shown
from tests.support.products import in_one_item

GROUPS = {name: set(members(name)) for name in COMMANDS if members(name)}
WRONG = [shlex.split(command) for command, _ in shown(PAGES["docs/troubleshooting.md"])]
SHOWN = {shlex.join(words) for text in PAGES.values() for words in commands_of(text) if words not in WRONG}


def help_of(words: list[str]) -> str:
    """The help page that explains a command."""
    return help_page(" ".join(words[: 1 + (words[0] in GROUPS)]))


@in_one_item("command", sorted(SHOWN))
def test_commands_are_understood(command: str) -> None:
    words = shlex.split(re.sub(r" --import \w+", "", command))
    verb = words[0]
    assert verb in COMMANDS, command
    if verb in GROUPS and len(words) > 1 and not words[1].startswith("-"):
        assert words[1] in GROUPS[verb] | {"VERB"}, command
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if any(word.startswith("mine") for word in words):
        return  # test_shell_blocks.py runs it
    if verb == "compare-methods" and "--config" in options:  # it has its own options, and the options of a run
        own, rest = Command(verb, compare_methods).parser().parse_known_args(words[1:])
        del rest[(place := rest.index("--data.root")) : place + 2]  # an earlier command of the page made the folder
        prepare("fit", [*(word for name in own.config for word in ("--config", name)), *rest])
        return
    a_run = verb == "fit" or words[:2] == ["tune", "--config"]  # the rate of a run, with the options of fit
    if a_run and "--resume" not in options and "--help" not in options and len(words) > 1:
        typed = re.sub(
            r"--(?:config|from-adapter) runs/\S+|--data.templates \S+.txt|--from-form \w+|"
            r"--(?:sampler|pruner|trials) \w+|--search( [^-]\S*)+",
            "",
            shlex.join(words[1:]),
        )  # configs that an earlier command wrote, and the options of a search
        # This checks configs, classes, options and datasets by name.
        prepare("fit", [word for word in shlex.split(typed) if word != "--dry-run"])
        return
    explained = help_of(words) if not {"VERB"} & set(words) else ""
    for option in set(options) - {"--help", "--help-all"}:
        if verb in ("fit", "test", "validate") and "." in option:
            group, _, rest = option.rpartition(".")
            assert f"{option} " in explained or f" {rest}," in explained or group == "--trainer", (option, command)
        else:
            assert f"{option} " in explained or f"{option}\n" in explained, (option, command)


@in_one_item("name", PAGES)
def test_blocks_of_shell_can_be_pasted(name: str) -> None:
    """No word is a redirection such as ``<time>``; what stands for the reader's own is in CAPITALS."""
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", PAGES[name], flags=re.S):
        assert not re.search(r"<\w+>|/TIME\b|…", block), block
        for command in joined(block):
            shlex.split(command, comments=True)  # no quote is left open
            assert not command.startswith("$ "), command


def test_extras_are_installed_from_the_checkout() -> None:
    """The package is on no index: ``pip install randlora-pl`` would fetch nothing, or something else.

    `install` of utils/errors.py alone has its name: it adds to the package that is installed.
    """
    files = [path for folder in ("src", "docs", "configs", "notebooks") for path in (ROOT / folder).rglob("*.*")]
    texts = [path for path in files if path.suffix in (".py", ".md", ".yaml", ".ipynb", ".jinja", ".html")]
    wrong = re.compile(r"""pip install (-\S+ )*\\?["']?randlora-pl""")
    found = [path.name for path in texts if wrong.search(path.read_text(encoding="utf-8"))]
    assert len(texts) > 300 and found == ["errors.py"]
    assert wrong.search("pip install -U 'randlora-pl[onnx]'") and not wrong.search("pip install '.[onnx]'")


def test_every_verb_is_on_the_page_of_commands() -> None:
    words = commands_of(PAGES["docs/commands.md"])
    assert {each[0] for each in words} == set(COMMANDS)
    for group, verbs in GROUPS.items():
        assert {each[1] for each in words if each[0] == group} >= verbs, group
    text = PAGES["docs/commands.md"]
    for verb in set(COMMANDS) - {"adapter", "analyze"}:
        assert f"\n### {verb}\n" in text, verb


def test_a_test_of_the_pretrained_model_is_promised_for_the_tasks_that_have_one() -> None:
    tasks = classes("model")
    having = {name for name, task in tasks.items() if getattr(task, "zero_shot", False)}
    assert having == {"VisionLanguageTask", "TextHeadTask", "PromptTask"} and "CausalLMTask" in tasks
    promised = PAGES["docs/commands.md"].partition("### fit\n")[2].partition("```")[0]
    for text in (promised, help_page("fit").partition("\n")[0]):
        assert "pretrained model" in text and {name for name in tasks if name in text} == having, text


def test_commands_are_found() -> None:
    text = (
        "    .venv/bin/randlora-pl fit --config a   # why\n    randlora-pl data get x      says\n"
        "`randlora-pl bench\ntrain`\n```sh\nrandlora-pl doctor\n```\n"
    )
    assert commands_of(text) == [["doctor"], ["fit", "--config", "a"], ["data", "get", "x"], ["bench", "train"]]
    assert len(SHOWN) > 100
