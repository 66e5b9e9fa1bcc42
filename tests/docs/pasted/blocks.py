"""The blocks of shell of the pages, those that cannot run here, and what stands for the words in CAPITALS."""

import functools
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from randlora_pl.language.offline import find_wheel
from randlora_pl.utils.errors import UserError
from tests.docs.pages import PAGES, ROOT, shown
from tests.test_readme import chats, photos, texts

TEXTS = PAGES | {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.glob("docs/results/*/verdict.md"))
}
BLOCKS = {
    name: found
    for name, text in TEXTS.items()
    if name != "README.md" and (found := re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, flags=re.S | re.M))
}
WRONG = {command for command, output in shown(PAGES["docs/troubleshooting.md"]) if "error:" in output}
"""Commands that are shown with their error."""


@functools.cache
def wheel() -> Path | None:
    """The wheel with the weights of SmolLM2; None if it is not on this machine."""
    try:
        return find_wheel().absolute()
    except UserError:
        return None


MISSING = {
    "weights or a dataset": r"clip_vit\w+ (?!--data.root (?:DATA|PATH))|glue_|pretrained openai|"
    r"texts/minilm|table11 --skip|imagenet_a|cifar10$|coop$|analyze forgetting|--model vit_base|--jobs 2",
    "a package index, docker or an account": r"-m venv|docker build|wandb|mlflow",
    "a server of another project": "^vllm|convert_hf_to_gguf",
    "the extra torchao; test_quantize.py runs the block": "--model.quantize int8",
    "several machines; test_several_machines.py runs two processes": "^(RESTARTS|NODES|sbatch)|--launcher slurm",
}
"""What blocks need that cannot run here, and the pattern of their first lines."""


def missing(block: str) -> bool:
    return any(re.search(pattern, first(block)) for pattern in MISSING.values())


def downloads(block: str) -> bool:
    """True for a block that needs the wheel."""
    return first(block).startswith("pip download")


def runs(block: str) -> bool:
    return not missing(block) and (wheel() is not None or not downloads(block))


def shards(folder: Path) -> None:
    """Write a tar shard for each split."""
    folder.mkdir()
    photos(folder.parent / "sharded", 40)
    for split in ("train", "val", "test"):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as file:
            for number, picture in enumerate(sorted((folder.parent / "sharded").iterdir())):
                file.add(picture, f"{number:04}.png")
                label = tarfile.TarInfo(f"{number:04}.cls")
                label.size = 1
                file.addfile(label, io.BytesIO(str(number % 2).encode()))


def classes(folder: Path) -> None:
    """Write images of two classes."""
    for name in ("cat", "dog"):
        photos(folder / name, 20)


def written(text: str) -> Callable[[Path], object]:
    """Return what writes the text to a file."""
    return lambda path: path.write_text(text, encoding="utf-8")


def folder_of_texts(folder: Path) -> None:
    """Write prompts and labelled texts."""
    folder.mkdir()
    texts(folder)


def own_sweep(path: Path) -> None:
    """Write the sweep of the page on own data, on the digits."""
    (body,) = re.findall(r"```yaml\n(models:.*?)```", PAGES["docs/your_own_data.md"], flags=re.S)
    path.write_text(yaml.safe_dump(yaml.safe_load(body) | {"datasets": ["digits"]}), encoding="utf-8")


def quickstart(name: str = "") -> Callable[[Path], object]:
    """Return what copies the quickstart's run, or a part of it."""
    return lambda path: shutil.copytree(path.parent / "runs" / "quickstart" / "latest" / name, path)


def decoder(folder: Path) -> None:
    """Save the adapter of a small decoder."""
    from randlora_pl.adapters import RandLoRA
    from randlora_pl.language import CausalLMTask

    shape = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 96, "vocab_size": 300}
    task = CausalLMTask("llama", "random", config_overrides=shape, max_new_tokens=8, adapter=RandLoRA(rank=4))
    task.adapt()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.05 * parameter.requires_grad)  # so that the update is not zero
    task.save(folder)


PROMPTS = "".join(json.dumps({"prompt": f"{number} and two is"}) + "\n" for number in range(3))
MADE: dict[str, Callable[[Path], object]] = {
    "PHOTOS": photos,
    "FOLDER": quickstart("adapter"),
    "RUN": quickstart(),
    "OTHER": quickstart(),
    "PATH": classes,
    "SHARDS": shards,
    "MINE": folder_of_texts,
    "REVIEWS": folder_of_texts,
    "CHATS": chats,
    "ADAPTER": decoder,
    "OWN.yaml": own_sweep,
    "NEW.txt": written("a fine film\na dull film\n"),
    "QUESTIONS.txt": written("two and two is\n"),
    "QUESTIONS.jsonl": written(PROMPTS),
}
"""What makes the file or folder that stands for a word in CAPITALS."""


def capitals(blocks: list[str]) -> set[str]:
    """The words in CAPITALS that stand for the reader's own files."""
    commands = re.sub(r"<<'(\w+)'\n.*?^\1$", "", "".join(blocks), flags=re.S | re.M)  # without code between EOF and EOF
    words = re.findall(r"(?<![\w$./-])[A-Z]{3,}(?:\.[a-z]+)?(?![\w=])", re.sub(r"#.*", "", commands))
    return {word for word in words if word not in ("USER", "NAME")}


def first(block: str) -> str:
    """The line that names a block in the table."""
    return block.splitlines()[0]
