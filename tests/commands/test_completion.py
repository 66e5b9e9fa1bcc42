"""``completion``: the scripts complete commands, options and choices."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from randlora_pl.commands.main import COMMANDS, completion, whole_parser
from tests.support.cli import Run

SHELLS = get_args(get_type_hints(completion)["shell"])
COMPLETED = {
    "": set(COMMANDS),
    "adapter ex": {"export"},
    "adapter export --t": {"--to"},
    "bench ": {"data", "train", "adapters"},
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


@pytest.mark.parametrize("shell", SHELLS)
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


def test_every_command_is_in_the_script() -> None:
    (commands,) = (action for action in whole_parser()._actions if action.nargs == "A...")
    assert set(commands.choices or ()) == set(COMMANDS)


def test_an_unknown_shell_is_one_line(run: Run, refused: Callable[..., str]) -> None:
    bare = run("completion")
    assert bare.code == 2 and "bash | zsh | fish" in bare.err and not bare.out
    assert "Did you mean 'zsh'?" in refused("completion", "zhs")
    assert "unrecognized arguments: zsh" in refused("completion", "bash", "zsh")
