import json
from pathlib import Path

import pytest

from randlora_pl.cli.bench.trace import options, step_setup
from randlora_pl.utils.errors import UserError
from tests.support.cli import Run
from tests.support.products import in_one_item

TINY = ("bench", "trace", "--config", "tiny_clip", "--batch-size", "4", "--captions", "4")


def test_a_step_is_traced_and_written(run: Run, tmp_path: Path) -> None:
    done = run(*TINY, "--adapter", "randlora-ternary", "--device-model", "h100", "a100", "--operators", "3")
    assert done.code == 0, done.err
    assert "tiny, 4 images, 4 captions" in done.out and "LoRA-32" in done.out and "ms on A100" in done.out
    (folder,) = (tmp_path / "runs" / "bench-trace").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "table.md"]
    report = json.loads((folder / "bench.json").read_text())
    assert [method["name"] for method in report["methods"]] == ["full", "lora", "randlora-ternary"]
    assert all(method["seconds"]["a100"] > method["seconds"]["h100"] > 0 for method in report["methods"])
    assert f"`{report['command']}`" in (folder / "table.md").read_text()
    done = run(*TINY, "--methods", "lora", "--json", "--precision", "32")
    assert done.code == 0 and json.loads(done.out)["methods"][0]["cast_bytes"] < 1000


@in_one_item(
    ("words", "message"),
    [
        (["--device-model", "h10"], "Did you mean 'h100' or 'a100'? Known: h100 a100 rtx4090"),
        (["--methods", "randlore"], "--methods: unknown 'randlore'. Did you mean 'randlora'"),
        (["--methods", "peft-lora"], "unknown 'peft-lora'"),
        (["--model", "ViT-B-32"], "--config names a model already"),
        (["--dropout", "2"], "dropout"),
        (["--json", "--output", "x"], "Leave out one of them"),
        (["--captions", "0"], "--captions"),
    ],
)
def test_bad_input_gets_one_line(run: Run, words: list[str], message: str) -> None:
    done = run(*TINY, *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") <= 2


@in_one_item(
    ("text", "message"),
    [
        ("{adapter: {class_path: LoRA}}", "names no model"),
        ("{name: tiny, adapter: {class_path: RandLoRA, init_args: {rnk: 3}}}", "no option 'rnk'. Did you mean 'rank'?"),
        ("{name: tiny, quantize: 4bit}", "cannot count model.quantize 4bit"),
    ],
)
def test_configs_that_cannot_be_traced(run: Run, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"model: {{class_path: VisionLanguageTask, init_args: {text}}}\n")
    done = run("bench", "trace", "--methods", "randlora", "--config", str(path))
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_several_configs_and_the_names_of_models() -> None:
    typed = options().parse_args(["--config", "commonsense_llama3", "--config", "recipes/llama3_40gb"])
    setup, _ = step_setup(typed)
    assert (setup.batch_size, setup.accumulate) == (4, 4) and setup.options["gradient_checkpointing"]
    setup, _ = step_setup(options().parse_args(["--model", "ViT-L-14"]))
    assert setup.task == "VisionLanguageTask"
    setup, _ = step_setup(options().parse_args(["--config", "clip_vitb32", "--config", "maple_dept"]))
    assert (setup.task, setup.batch_size, setup.precision) == ("PromptTask", 4, "bf16-frozen")
    assert (setup.options["prompts"].depth, setup.options["head"].weight) == (9, 0.7)
    official = ["--config", "commonsense_qwen2", "--config", "recipes/commonsense_official"]
    with pytest.raises(UserError, match="not 16-mixed"):
        step_setup(options().parse_args(official))
