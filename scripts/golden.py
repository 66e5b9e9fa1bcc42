"""Compare what two checkouts compute, bit for bit.

    python scripts/golden.py OLD NEW    # folders with src/; the exit code is 1 if anything differs

Each checkout runs in processes of its own, on one thread. Modules may have moved and positions of arguments may have
changed between them, so that only commands, names exported by `randlora_pl.adapters`, and keywords are used.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from timm.layers import Attention
from torch import nn

import randlora_pl
from randlora_pl import adapters

Results = dict[str, Any]

METHODS = """
AdaLoRA(rank=4, target_rank=2); AutoLoRA(rank=4, select="bases"); DoRA(inner=LoRA(rank=4, alpha=4.0))
DoRA(inner=RandLoRA(rank=5)); Fira(rank=4); GaLore(rank=4); HiRA(rank=4); HydraLoRA(rank=4, heads=3)
LoRA(rank=4, alpha=4.0, dropout=0.2); LoRA(rank=4, rslora=True, init="official", qkv="split"); LoRAXS(rank=4)
LoRAXS(rank=4, balance="both", init="official"); NoLA(rank=4, num_bases=16); NoLA(num_bases=16, init="official")
OFT(block=4); OFT(neumann_terms=5, qkv="split"); PiSSA(rank=4); PiSSA(rank=4, start="minor")
PiSSA(rank=4, start="olora"); PRANC(coefficients=50); PRANC(coefficients=50, form="dense"); RandLoRA(match="lora:2")
RandLoRA(rank=5, basis="hadamard"); RandLoRA(rank=5, basis="normal", memory="low"); RandLoRA(rank=5, lead=2)
RandLoRA(rank=5, basis="ternary", sparsity=3); RandLoRA(rank=5, basis="binary", init="lambda")
RandLoRA(rank=5, num_bases="floor+1"); RandLoRA(rank=5, pairing="peft"); RandLoRA(rank=5, variant="a")
RandLoRA(rank=5, variant="b", memory="fast"); RandLoRA(rank=5, qkv="split", dropout=0.2)
SHiRA(rank=3, places="top"); SVFT(off_diagonals=3); SVFT(pattern="random")
Together(parts=[LoRA(rank=4), RandLoRA(rank=5)]); VeRA(rank=30, alpha=4.0)
"""
"""Any other method runs with its defaults."""
WHOLE = ("BitFit", "Fira", "Frozen", "FullFineTuning", "GaLore", "LinearProbe")
"""They choose their tensors themselves."""
EXPORTS = {name: getattr(adapters, name) for name in adapters.__all__}

SHAPE = '"hidden_size":32,"intermediate_size":64,"num_hidden_layers":2,"num_attention_heads":2,"vocab_size":300'
IMAGES = "--config quickstart --data.shots 2 --model.warmup_steps 0"
PROMPTS = "--config tiny_clip --data.shots 2 --data.steps null --data.epochs 2 --config prompts/"
TEXTS = "--model.pretrained random --data.root . --model.config_overrides {" + SHAPE
TASKS = {
    "VisionLanguageTask": f"{IMAGES} --model.adapter.dropout 0.1",
    "TextHeadTask": f"{IMAGES} --model TextHeadTask --model.adapter DoRA",
    "LinearHeadTask": f"{IMAGES} --model LinearHeadTask --model.adapter.basis hadamard",
    "PromptTask": f"{PROMPTS}promptsrc --model.prompts.depth 4",
    "PromptTask with CoCoOp": f"{PROMPTS}cocoop",
    "PromptTask with DePT": f"{PROMPTS}maple_dept --model.prompts.depth 4",
    "PromptTask with Tip-Adapter": f"{PROMPTS}tip_adapter",
    "CausalLMTask": f'--model CausalLMTask --model.name qwen2 --data.dataset jsonl {TEXTS},"num_key_value_heads":1}}',
    "TextClassificationTask": "--model TextClassificationTask --model.name roberta --data.dataset csv "
    f'{TEXTS},"max_position_embeddings":400}}',
    "AutoLoRA": f"{IMAGES} --model.learning_rate null --model.adapter AutoLoRA",
    "AdaLoRA": f"{IMAGES} --model.learning_rate null --model.adapter AdaLoRA --model.adapter.every 1 "
    "--model.adapter.dropout 0.1",
}
SHORT = (
    "--data.steps 4 --data.batch_size 4 --data.num_workers 0 --run.name run --run.logger csv --trainer.accelerator cpu "
    "--trainer.deterministic true --trainer.accumulate_grad_batches 2 --trainer.enable_progress_bar false "
    "--trainer.limit_val_batches 1 --trainer.limit_test_batches 1 --checkpoint.every_n_steps 2"
)
METRIC = re.compile(r"(zeroshot|val|test|best)/|(trainable|adapter|total)_parameters$|basis_fingerprint$")
STOP = """
from pathlib import Path
from lightning.pytorch import Callback

class Stop(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 5 and not Path("stopped").exists():  # between two micro-batches, after a checkpoint
            Path("stopped").touch()
            raise KeyboardInterrupt
"""


def cli(*words: str) -> str:
    """Run a command in this process and return what it prints."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch("sys.argv", ["randlora-pl", *words])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module("randlora_pl", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"randlora-pl {' '.join(words)}: {err.getvalue()}") from end
    return out.getvalue()


def method_names() -> list[str]:
    """List the methods that `randlora_pl.adapters` exports."""
    kinds = [kind for kind in EXPORTS.values() if isinstance(kind, type) and issubclass(kind, adapters.Adapter)]
    return [kind.__name__ for kind in kinds if kind is not adapters.Adapter]


def train(row: str, dtype: torch.dtype, folder: Path) -> Results:
    """Train a tiny model for two steps, save the adapter, load it into another model, and merge it."""
    torch.manual_seed(1)
    linear = {"attn": Attention(16, 2), "fc1": nn.Linear(16, 20), "act": nn.ReLU(), "fc2": nn.Linear(20, 16)}
    convolutions = {"stem": nn.Conv2d(3, 12, 8, 8), "mix": nn.Conv2d(12, 12, 3, padding=1, groups=3)}
    layers = {**convolutions, "rows": nn.Flatten(2), **linear, "flat": nn.Flatten(), "head": nn.Linear(192, 5)}
    model = nn.Sequential(OrderedDict(layers)).to(dtype)
    again, images = copy.deepcopy(model), torch.randn(4, 3, 32, 32).to(dtype)
    targets = None if row.startswith(WHOLE) else ["stem", "mix", "attn", "fc1", "fc2"]
    report = adapters.inject(model, eval(row, EXPORTS), targets=targets, trained=["head"])
    values: Results = {"count": report.trainable}
    adapters.set_train_mode(model)
    optimizer = adapters.make_optimizer(model, lr=0.01, weight_decay=0.1)
    for step in (1, 2):
        logits = model(images)
        torch.nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
        values[f"step {step}, logits"] = logits.detach()
        for name, tensor in adapters.trainable_parameters(model).items():
            values[f"step {step}, {name}"] = tensor.detach().clone()
            values[f"step {step}, gradient of {name}"] = None if tensor.grad is None else tensor.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    adapters.save_adapter(model, folder)
    values |= {f"file, {name}": tensor for name, tensor in adapters.read_adapter(folder).tensors.items()}
    adapters.load_adapter(again, folder)
    with torch.no_grad():
        values |= {"logits": model.eval()(images), "logits once loaded": again.eval()(images)}
        if not row.startswith("HydraLoRA"):  # its update depends on the input
            values |= {f"update of {name}": delta for name, delta in adapters.delta_weights(model).items()}
            values["logits once merged"] = adapters.merge_and_unload(model)(images)
    return values


def probe_methods() -> Iterator[tuple[str, Any]]:
    """Train every method."""
    rows = re.split(r"[;\n]\s*", METHODS.strip())
    named = {row.split("(")[0] for row in rows}
    rows += [f"{name}()" for name in method_names() if name not in named]
    for row, dtype in itertools.product(rows, (torch.float32, torch.bfloat16)):
        with tempfile.TemporaryDirectory() as folder:
            values = train(row, dtype, Path(folder) / "adapter")
        yield from ((f"{row}, {dtype}: {key}", value) for key, value in values.items())


def probe_tasks() -> Iterator[tuple[str, Any]]:
    """Train every task with two micro-batches a step, some on two processes, and one that is stopped and resumed."""
    cases = [(name, "") for name in TASKS]
    cases += [("VisionLanguageTask", ", 2 processes"), ("CausalLMTask", ", 2 processes"), ("AdaLoRA", ", resumed")]
    for name, how in cases:
        with tempfile.TemporaryDirectory() as path, contextlib.chdir(path):
            for split, first in (("train", 0), ("val", 3), ("test", 6)):
                sums = [(f"{first} and {second} is", (first + second) % 2) for second in range(12)]
                records = [json.dumps({"prompt": prompt, "completion": f" {last}"}) for prompt, last in sums]
                Path(f"{split}.jsonl").write_text("\n".join(records), encoding="utf-8")
                table = ["text,label", *(f"{prompt},{last}" for prompt, last in sums)]
                Path(f"{split}.csv").write_text("\n".join(table), encoding="utf-8")
            words = ["fit", *SHORT.split(), *TASKS[name].split()]
            if "processes" in how:
                spawn(*words, "--trainer.devices", "2")
            elif "resumed" in how:
                Path("stop.py").write_text(STOP, encoding="utf-8")
                spawn(*words, "--trainer.callbacks", "stop.Stop", code=130)
                spawn("fit", "--resume", "runs/run/latest", "--import", "stop")
            else:
                cli(*words)
            run = Path("runs/run/latest")
            metrics = json.loads((run / "results.json").read_text(encoding="utf-8"))
            values = {key: value for key, value in metrics.items() if METRIC.search(key)}
            for place in sorted(run.glob("adapter*")):
                file = adapters.read_adapter(place)
                values |= {f"{place.name}, {key}": tensor for key, tensor in {**file.tensors, **file.extra}.items()}
        yield from ((f"{name}{how}: {key}", value) for key, value in values.items())


def spawn(*words: str, code: int = 0) -> None:
    """Run a command in a process of its own, which has to end with this exit code."""
    ended = subprocess.run([sys.executable, "-m", "randlora_pl", *words], capture_output=True, text=True)
    if ended.returncode != code:
        raise RuntimeError(f"{' '.join(words)} ended with {ended.returncode}, not {code}: {ended.stderr[-3000:]}")


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Walk over the leaves of a config with their dotted names, and with class paths by the class alone.

    Empty ``init_args`` are those of a class without options, which one version may leave out.
    """
    if isinstance(tree, list) and any(isinstance(part, dict) for part in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            if (key, value) == ("init_args", {}):  # of a class without options
                continue
            yield from flat(value, f"{name}.{key}".lstrip(".").removesuffix(".init_args").removesuffix(".class_path"))
    else:
        yield name, re.sub(r"^randlora_pl\.[\w.]*\.", "", tree) if isinstance(tree, str) else tree


def config_names() -> list[str]:
    """List the bundled configs of `fit`."""
    names = json.loads(cli("config", "list", "--json"))
    return [name for name in names if not name.startswith(("cluster/", "sweeps/"))]


def resolved(name: str) -> Results:
    """Resolve a config of `fit`, a fragment together with a model, and data that may not be here as other ones.

    The Trainer's options that are null are left out: they depend on Lightning's version.
    """
    base = "commonsense_qwen2" if re.search("commonsense|llama3", name) else "tiny_clip"
    words = ["--config", base] if "/" in name else []
    if name.startswith(("clip", "dinov", "metaclip2", "mobileclip2", "pe_core", "siglip2")):
        words = ["--data.dataset", "digits"]
    elif name.startswith(("qwen3", "smollm2")):
        words = ["--data.root", "."]
    tree = yaml.safe_load(cli("fit", *words, "--config", name, "--print_config"))
    return {key: value for key, value in flat(tree) if value is not None or not key.startswith("trainer.")}


def probe_configs() -> Iterator[tuple[str, Any]]:
    """Resolve every bundled config."""
    for name in config_names():
        yield from ((f"{name}: {key}", value) for key, value in resolved(name).items())


PROBES = {"methods": probe_methods, "tasks": probe_tasks, "configs": probe_configs}


def probe(place: Path, group: str) -> Results:
    """Run a group in a process of its own, in a checkout; return its results."""
    with tempfile.TemporaryDirectory() as path:
        environment = os.environ | {"PYTHONPATH": str(place / "src"), "RANDLORA_PL_CACHE": f"{path}/cache"}
        environment |= {"RANDLORA_PL_DATA": f"{path}/none", "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, str(Path(__file__).resolve()), str(place), f"{path}/results", "--probe", group]
        subprocess.run(words, cwd=place, env=environment, check=True)
        values: Results = torch.load(f"{path}/results", weights_only=True)
        return values


def difference(old: Any, new: Any) -> str:
    """Describe how two results differ; the text is empty if no bit does."""
    if not (isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)):
        return "" if repr(old) == repr(new) else f"{old!r:.150} became {new!r:.150}"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{old.dtype} {list(old.shape)} became {new.dtype} {list(new.shape)}"
    same = torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (old, new)))
    return "" if same else f"the largest difference is {(old.double() - new.double()).abs().max():.3g}"


def compare(title: str, old: Results, new: Results) -> int:
    """Print a line for each difference; return their number."""
    texts = {name: difference(old.get(name, "(absent)"), new.get(name, "(absent)")) for name in old | new}
    lines = [f"{name}: {text}" for name, text in texts.items() if text]
    print(*lines, f"{title}: {len(texts)} results, {len(lines)} differences", sep="\n", flush=True)
    return len(lines)


def main() -> int:
    """Compare two checkouts, or be one of the processes that do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("OLD", "NEW"):
        parser.add_argument(name, type=lambda name: Path(name).resolve())
    parser.add_argument("--probe", choices=PROBES, help=argparse.SUPPRESS)
    typed = parser.parse_args()
    old, new = typed.OLD, typed.NEW
    if typed.probe:
        assert Path(randlora_pl.__file__).is_relative_to(old), f"{randlora_pl.__file__} is used instead of {old}"
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.save(dict(PROBES[typed.probe]()), new)
        return 0
    found = 0
    for group in PROBES:
        before, after = probe(old, group), probe(new, group)
        found += compare(group, before, after)
        if group != "tasks":
            continue
        whole = {name: value for name, value in after.items() if name.startswith("AdaLoRA:")}
        resumed = {name.replace(", resumed", ""): value for name, value in after.items() if ", resumed:" in name}
        found += compare("resumed, not interrupted", whole, resumed)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
