"""The blocks of shell of the pages, those that cannot run here, and what stands for the words in CAPITALS."""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.docs.pages import PAGES, RESULTS, ROOT, shown
from tests.test_readme import photos, texts

TEXTS = PAGES | {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(ROOT.glob("docs/results/*/*.md"))
    if path.stem in ("report", "verdict")
}
BLOCKS = {
    name: found
    for name, text in TEXTS.items()
    if name != "README.md" and (found := re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, flags=re.S | re.M))
}
WRONG = {command for command, output in shown(PAGES["docs/troubleshooting.md"]) if "error:" in output}
"""Commands that are shown with their error."""

WEIGHTS = "downloads weights or a dataset"
INDEX = "installs from a package index"
PROMPTS_PAGE = "needs a run of a language model; docs/prompts.md has one"
DOCKER = "needs docker"
MACHINES = "needs several machines"
TWO = "two processes: test_several_machines.py runs it"
REPEAT = "# in the folder of this report: regenerate it from cells.csv, or repeat the runs"
LISTED = [
    ("docs/commands.md", "randlora-pl fit --config clip_vitb32 --config lora --data.dataset cifar10 \\", WEIGHTS),
    (
        "docs/commands.md",
        "randlora-pl predict --adapter RUN --texts QUESTIONS.jsonl --output answers.csv",
        PROMPTS_PAGE,
    ),
    ("docs/commands.md", "randlora-pl zeroshot --model.name ViT-B-32 --model.pretrained openai \\", WEIGHTS),
    ("docs/commands.md", "randlora-pl adapter import DIR --from peft --model vit_base_patch16_224 \\", WEIGHTS),
    ("docs/commands.md", "randlora-pl analyze forgetting runs/lora runs/quickstart \\", WEIGHTS),
    ("docs/commands.md", "randlora-pl data get cifar10", WEIGHTS),
    ("docs/analyses.md", "randlora-pl analyze forgetting runs/lora runs/randlora runs/full \\", WEIGHTS),
    (
        "docs/labelled_texts.md",
        "randlora-pl fit --config glue_roberta_large --data.root GLUE --data.dataset cola \\",
        WEIGHTS,
    ),
    ("docs/rank_and_alpha.md", "randlora-pl fit --config clip_vitb32 --model.adapter.match lora:32", WEIGHTS),
    ("docs/prompt_tuning.md", "randlora-pl fit --config clip_vitb32 --config maple_dept \\", WEIGHTS),
    ("docs/measurements.md", "randlora-pl compare-methods --config compare_bases_fashion", WEIGHTS),
    ("docs/reproducing.md", "randlora-pl sweep table11 --skip-missing --only seed=1", WEIGHTS),
    *((f"docs/results/{name}/report.md", REPEAT, WEIGHTS) for name in RESULTS),
    ("docs/reproducing.md", "randlora-pl data check dtd --split coop", WEIGHTS),
    ("docs/reproducing.md", "randlora-pl test --adapter RUN/adapter --data.dataset imagenet_a", WEIGHTS),
    ("docs/results/evidence/verdict.md", "randlora-pl sweep evidence --jobs 2", WEIGHTS),
    ("docs/results/offline/verdict.md", "randlora-pl sweep offline --jobs 2", WEIGHTS),
    ("docs/results/methods/verdict.md", "randlora-pl sweep methods --jobs 2", WEIGHTS),
    ("docs/results/prompts/verdict.md", "randlora-pl sweep prompts --jobs 2", WEIGHTS),
    ("docs/install.md", "python3 -m venv .venv", INDEX),
    ("docs/install.md", "conda create --name randlora python=3.11", "needs conda"),
    ("docs/install.md", "docker build -t randlora-pl .", DOCKER),
    ("docs/install.md", 'docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" \\', DOCKER),
    ("docs/install.md", "pip uninstall randlora-pl", "removes the package"),
    (
        "docs/from_peft.md",
        "randlora-pl adapter import peft-adapter --from peft --model vit_base_patch16_224 \\",
        WEIGHTS,
    ),
    (
        "docs/labelled_texts.md",
        "randlora-pl fit --config glue_roberta_base --data.root PATH --data.dataset rte \\",
        WEIGHTS,
    ),
    ("docs/labelled_texts.md", "randlora-pl fit --model TextClassificationTask --model.name texts/minilm \\", WEIGHTS),
    ("docs/logging.md", 'pip install ".[wandb]"   # in the checkout', "needs an account"),
    ("docs/logging.md", 'pip install ".[mlflow]"   # in the checkout', "needs mlflow"),
    ("docs/many_devices.md", "randlora-pl fit --config clip_vitb32 --data.dataset cifar10", WEIGHTS),
    (
        "docs/many_devices.md",
        "randlora-pl fit --config clip_vith14 --data.dataset cifar10 --trainer.strategy fsdp2 \\",
        WEIGHTS,
    ),
    (
        "docs/several_machines.md",
        "RESTARTS=0 GPUS=2 NAME=two bash torchrun.sh --config tiny_clip --data.batch_size 32 \\",
        TWO,
    ),
    (
        "docs/several_machines.md",
        "NODES=2 NODE=0 MASTER=node0 NAME=cifar bash torchrun.sh --config clip_vitb32 \\",
        MACHINES,
    ),
    (
        "docs/several_machines.md",
        "NODES=2 NODE=1 MASTER=node0 NAME=cifar bash torchrun.sh --config clip_vitb32 \\",
        MACHINES,
    ),
    ("docs/several_machines.md", "sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 slurm.sbatch \\", MACHINES),
]
"""Blocks that cannot run here: page, first line, reason."""


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
    "OWN.yaml": own_sweep,
    "NEW.txt": written("a fine film\na dull film\n"),
    "QUESTIONS.txt": written("two and two is\n"),
    "QUESTIONS.jsonl": written(PROMPTS),
}
"""What makes the file or folder that stands for a word in CAPITALS."""


def capitals(blocks: list[str]) -> set[str]:
    """The words in CAPITALS that stand for the reader's own files."""
    words = re.findall(r"(?<![\w$./-])[A-Z]{3,}(?:\.[a-z]+)?(?![\w=])", re.sub(r"#.*", "", "".join(blocks)))
    return {word for word in words if word not in ("USER", "NAME")}


def first(block: str) -> str:
    """The line that names a block in the table."""
    return block.splitlines()[0]
