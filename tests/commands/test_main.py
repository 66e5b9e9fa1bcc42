import errno
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest.mock import Mock

import pytest

from randlora_pl import __version__
from randlora_pl.adapters import methods
from randlora_pl.commands import config
from randlora_pl.commands.common import Command
from randlora_pl.commands.main import COMMANDS, completion, function_of, main, members
from randlora_pl.run.options.classes import RunOptions, callback_classes, classes, data_class, options_of
from randlora_pl.run.options.compose import CLASSES
from randlora_pl.run.options.saved_config import public_path
from randlora_pl.utils.errors import LostProcessError, Terminated
from tests.support.cli import Refused, Result, Run
from tests.support.products import in_one_item, marked

VERBS = [*COMMANDS, *(f"{name} {member}" for name in COMMANDS for member in members(name))]
RUNS = ("fit", "test", "validate")
QUICK = ("--version", "--help", "datasets", "models", "models --all", "adapters", "config list", "report --help")
REFUSED = {
    "compare A B": "is not a run folder",
    "adapters LoRAX": "Unknown adapter 'LoRAX'. Did you mean 'LoRAXS'",
    "adapter info B": "no adapter",
    "adapter export A --to lora --output B": "--error",
    "adapter export A --to onnx --output B.onnx": "[onnx]'",
    "adapter add A A --as lora --output C": "--error",
}


def test_quick_verbs_and_refusals_import_nothing_heavy(tmp_path: Path) -> None:
    """All of them in one process, which has imported nothing heavy after any of them."""
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "adapter_config.json").touch()
    code = (
        "import json, sys; sys.modules['onnx'] = None; from randlora_pl.commands.main import main\n"
        "from contextlib import redirect_stderr, redirect_stdout; from io import StringIO\n"
        "heavy = {'torch', 'lightning', 'matplotlib', 'numpy', 'pandas', 'timm', 'open_clip', 'rich'}\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err: code = main(words)\n"
        "    print(json.dumps([words, code, out.getvalue(), err.getvalue(), sorted(heavy & set(sys.modules))]))"
    )
    pages = [[*verb.split(), "--help"] for verb in VERBS if verb not in RUNS]
    every = [*map(str.split, (*QUICK, *REFUSED)), *pages]
    command = [sys.executable, "-c", code, json.dumps(every)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [words for words, *_ in found] == every
    for words, code, out, err, heavy in found:
        wrong = REFUSED.get(" ".join(words))
        assert not heavy or (words in pages and heavy == ["rich"]), (words, heavy)
        assert code == (2 if wrong else 0), err
        assert wrong in err if wrong else out.strip()


@in_one_item(
    ("words", "word"),
    [
        ("--confg quickstart", "mean --config"),
        ("--lr 1", "mean --model.learning_rate?"),
        ("--model.adapter LoRA --model.adapter.basis uniform", "It belongs to RandLoRA"),
        ("--config quickstart --data.balance weight", "'weights'"),
        ("--config quickstart --data.mixup 0.2", "softmax"),
        ("--config quickstart --data.dataset folder", "--data.root"),
        ("--model TextClassificationTask --data.dataset stsb --data.balance weights", "scores"),
    ],
)
def test_a_wrong_option_gets_its_mend(refused: Refused, words: str, word: str) -> None:
    assert word in refused("fit", *words.split())


def test_version_and_page(run: Run) -> None:
    assert run("--version").out.strip() == f"randlora-pl {__version__}"
    page = run("--help").out
    assert page == run().out
    assert all(verb in page for verb in COMMANDS)
    assert len(page.splitlines()) < 40


@in_one_item("verb", VERBS)
def test_every_verb_has_a_short_page_that_is_shown_where_words_are_missing(run: Run, tmp_path: Path, verb: str) -> None:
    asked = run(*verb.split(), "--help")
    lines = [line for line in asked.out.splitlines() if not line.startswith("Exit code: ")]
    assert asked.code == 0 and 3 < len(lines) < 60 and max(map(len, lines)) <= 120
    assert all(f"randlora-pl {verb} {member} " in asked.out for member in members(verb))
    if members(verb):
        assert run(verb) == run(verb, "-h") == asked
    elif verb in RUNS or Command(verb, function_of(verb)).needed:
        assert f"randlora-pl {verb} " in asked.out
        assert run(*verb.split()) == Result(2, "", asked.out)
    assert not list(tmp_path.iterdir())


def test_every_option_is_explained_and_every_class_found() -> None:
    names = [name for name in COMMANDS if not members(name)]
    names += [f"{name} {member}" for name in COMMANDS for member in members(name)]
    commands = [Command(name, function_of(name)) for name in names]
    assert len(commands) > 25 and all(each.parameters or each.raw or each.name == "config" for each in commands)
    assert not [(each.name, one.name) for each in commands for one in each.parameters if not one.text]
    assert set(classes("model.adapter")) == set(methods.__all__)
    kinds = [kind for option in CLASSES for kind in classes(option).values()]
    kinds += [RunOptions, *callback_classes().values(), *map(data_class, classes("model").values())]
    assert not [(kind, name) for kind in kinds for name, option in options_of(kind).items() if not option.help]
    for room in ("adapters", "data", "language", "prompts", "run.callbacks", "tasks"):
        package = import_module(f"randlora_pl.{room}")
        exported = {f"{package.__name__}.{name}": getattr(package, name) for name in package.__all__}
        for path, value in exported.items():
            assert not isinstance(value, type) or public_path(value) == path

    class Hidden: ...

    assert public_path(Hidden) == f"{__name__}.{Hidden.__qualname__}"


def test_page_of_fit_starts_with_the_own_options(run: Run) -> None:
    page = run("fit", "--config", "quickstart", "--help").out
    order = ("--config NAME", "--run.name", "--resume RUN", "--model TASK", "--data.dataset NAME", "--trainer.OPTION")
    own = [page.index(word) for word in order]
    assert own == sorted(own)
    assert "--help-all" in page and "--checkpoint.every_n_steps" in page


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("fitt", "'fit'"),
        ("modles", "'models'"),
        ("quickstart", "fit --config quickstart"),
        ("--config", "The command comes first"),
        ("train", "'fit'?"),
        ("export", "'adapter export'?"),
        ("represent", "'analyze represent'?"),
    ],
)
def test_unknown_verbs_get_a_hint(refused: Refused, word: str, hint: str) -> None:
    assert hint in refused(word)


def test_the_function_of_a_command_is_one_of_its_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    own = config.list_
    monkeypatch.delattr(config, "list_")
    monkeypatch.setattr(config, "list", sorted, raising=False)  # imported, and before the own one
    monkeypatch.setattr(config, "list_", own, raising=False)
    assert function_of("config list") is own


def test_listings_name_what_there_is(run: Run) -> None:
    from randlora_pl.data.catalog import CATALOG
    from randlora_pl.models.catalog import MODELS

    listed = run("datasets").out
    assert all(f"\n{name} " in listed for name in CATALOG)
    listed = run("models").out
    assert "openai-community/gpt2-medium      transformers  e2e_gpt2_medium" in listed
    assert "3,821.1 M" in run("models", "Microsoft/phi-3-mini-4k-instruct").out
    assert all(f"\n{row.name} " in listed for row in MODELS)
    assert "RandLoRA" in run("adapters").out
    shown = [line.split()[0] if line.startswith("  ") else line for line in run("adapters").out.splitlines()]
    assert shown.index("fixed rank") < shown.index("LoRA") < shown.index("full rank") < shown.index("RandLoRA")
    assert shown.index("RandLoRA") < shown.index("whole") < shown.index("BitFit")


def test_listings_are_json_for_other_programs(run: Run) -> None:
    from randlora_pl.data.catalog import CATALOG
    from randlora_pl.run.options.shipped import config_names

    def found(*words: str) -> Any:
        result = run(*words, "--json")
        assert result.code == 0 and not result.err
        return json.loads(result.out)

    assert [row["dataset"] for row in found("datasets")] == list(CATALOG)
    assert found("datasets", "digits")["digits"][0]["license"] == "CC BY 4.0"
    (model,) = found("models", "ViT-B-32")
    assert model["library"] == "open_clip" and model["parameters"] > 1e8
    assert {"RandLoRA", "LoRA"} < {row["name"] for row in found("adapters")}
    (lora,) = found("adapters", "lora")
    assert lora["name"] == "LoRA" and lora["options"]["rank"]["default"] == "32"
    assert found("config", "list").keys() > config_names().keys()


def test_details_and_near_names_of_listings(run: Run, refused: Refused) -> None:
    assert "CC BY 4.0" in run("datasets", "digits").out
    for name, source in (("commonsense_15k", "LLM-Adapters"), ("e2e", "e2e-dataset"), ("rte", "gluebenchmark.com")):
        out = run("datasets", name).out
        assert source in out and f"--data.dataset {name}" in out
    assert {"docs/prompts.md", "docs/labelled_texts.md"} <= set(run("datasets", "jsonl").out.split())
    assert "'commonsense_15k'" in refused("datasets", "commonsense_15")
    out = run("adapters", "RandLoRA").out
    assert "--model.adapter.rank" in out and "(uniform | normal | binary | ternary | hadamard; default: uniform)" in out
    assert "``" not in out and "BasisName" not in out
    assert "openai" in run("models", "ViT-B-32").out
    assert "'ViT-B-32'" in refused("models", "ViT-B-23")
    assert "'Qwen/Qwen2-0.5B-Instruct'" in refused("models", "qwen")
    assert "'openai-community/gpt2-medium'" in refused("models", "gpt3")
    assert "Did you mean" not in refused("models", "nonsense")
    assert "'RandLoRA'" in refused("adapters", "Randlora2")
    assert run("adapters", "randlora").out == run("adapters", "RandLoRA").out
    assert "is not a folder" in refused("datasets", "--root", "nowhere")


def test_listing_of_data_sets_says_their_license_and_whether_they_are_here(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "MNIST").mkdir()
    out = run("datasets", "--root", str(tmp_path)).out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    for name, state, license in (
        ("digits", "built in", "CC BY 4.0"),
        ("mnist", "here", "CC BY-SA 3.0"),
        ("cifar10", "not here: data get", "not stated by its authors"),
        ("imagenet", "not here: by hand", "non-commercial research and education, after registration"),
        ("folder", "yours", "yours"),
    ):
        assert f"  {state}  " in lines[name] and f"  {license}  " in lines[name]
    assert "..." not in out
    assert "  state       here\n" in run("datasets", "mnist", "--data.root", str(tmp_path)).out


def test_pipe_that_closes_early() -> None:
    words = f"{sys.executable} -m randlora_pl models --all | head -1"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, check=True, env=os.environ.copy())
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "x.yaml"), "x.yaml"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), "too long"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried\nframe 0"), "out of memory"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), ""),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_other_errors_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, word: str
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr("randlora_pl.commands.inspect.models", fail)
    if not word:
        with pytest.raises(type(error)):
            main(["models"])
        return
    assert main(["models"]) == 2
    told = capsys.readouterr().err
    assert word in told and told.count("\n") == 1
    monkeypatch.setenv("RANDLORA_PL_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["models"])


def test_each_process_of_a_launcher_says_how_to_resume(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first may be the one that was killed."""

    monkeypatch.setattr("randlora_pl.commands.main.run", Mock(side_effect=Terminated("resume with: it")))
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(torchrun)  # of the copy that the fixture `run` made
    result = run("fit")
    assert (result.code, result.err) == (143, "[process 1] randlora-pl: terminated; resume with: it\n")


def test_a_process_that_is_ended_while_it_reports_a_lost_one_still_says_how_to_resume(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the survivors as soon as one process is gone, at any moment."""

    def lost_then_ended(words: list[str]) -> int:
        try:
            raise LostProcessError("process 0. Resume with: it")
        finally:
            raise Terminated

    monkeypatch.setattr("randlora_pl.commands.main.run", lost_then_ended)
    os.environ.update({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    result = run("fit")
    assert result.code == 143
    assert result.err == "[process 1] randlora-pl: terminated; it has lost process 0. Resume with: it\n"


SHELLS = get_args(get_type_hints(completion)["shell"])
COMPLETED = {
    "": set(COMMANDS),
    "adapter ex": {"export"},
    "adapter export --t": {"--to"},
    "bench ": {"train", "adapters", "batch"},
    "config cat q": {"quickstart"},
    "fit --data.bat": {"--data.batch_size"},
    "fit --model.adapter.basis ": {"uniform", "normal", "binary", "ternary", "hadamard"},
    "fit --config quicks": {"quickstart"},
    "completion ": set(SHELLS),
    "adapter info scr": {"script"},
    "serve --adapter scr": {"script"},
    "predict --adapter scr": {"script"},
    "fit --resume scr": {"script"},
    "test --run scr": {"script"},
}
BASH = """\
eval "$(cat script)"
while IFS= read -r line; do
    COMP_WORDS=(randlora-pl $line); [[ $line == *" " || -z $line ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=(); _shtab_randlora_pl
    echo "${COMPREPLY[*]}"
done
"""


@pytest.mark.parametrize(("shell",), marked(zip(SHELLS), lambda row: row[0] != "zsh"))
def test_a_script_completes_commands_options_and_choices(run: Run, shell: str) -> None:
    script = run("completion", shell).out
    assert all(word in script for word in (*COMMANDS, "data.batch_size", "hadamard", "quickstart", "export"))
    Path("script").write_text(script)
    if (program := shutil.which(shell)) is None:
        return  # the words are there; only the shell itself can say more
    assert subprocess.run([program, "-n", "script"], capture_output=True, check=False).stderr == b""
    if shell == "bash":
        typed = "".join(f"{line}\n" for line in COMPLETED)
        done = subprocess.run([program, "-c", BASH], input=typed, capture_output=True, text=True, check=True)
        for line, found in zip(COMPLETED, done.stdout.splitlines(), strict=True):
            assert COMPLETED[line] <= set(found.split()), line
    elif shell == "fish":
        for line, words in COMPLETED.items():
            asked = [program, "-c", f"source script; complete -C 'randlora-pl {line}'"]
            found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
            assert words <= {each.partition("\t")[0] for each in found.splitlines()}, line


def test_an_unknown_shell_is_one_line(run: Run, refused: Refused) -> None:
    bare = run("completion")
    assert bare.code == 2 and "bash | zsh | fish" in bare.err and not bare.out
    assert "Did you mean 'zsh'?" in refused("completion", "zhs")
    assert "unrecognized arguments: zsh" in refused("completion", "bash", "zsh")
