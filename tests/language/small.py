"""Tiny decoders with random weights, a tokenizer that is trained here, and toy tasks."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import lightning as L
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from randlora_pl.adapters import RandLoRA
from randlora_pl.language.data import TextData
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tokenization import END, PAD
from randlora_pl.tasks import AdaptationModule, make_trainer

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.1,
    },
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
}  # fmt: skip
SHAPES["llama"] = SHAPES["qwen2"]
SHAPES["phi3"] = SHAPES["qwen2"] | {"num_key_value_heads": 4}

WORDS = ("red", "old", "tall", "wet", "mild", "loud", "soft", "dry", "blue", "new")


def train_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words, trained on the toy task; as a ``tokenizer.json``."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=[PAD, END, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([text for record in records() for text in record.values()], trainer)
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def records() -> list[dict[str, str]]:
    """The toy instruction: repeat the first or the last of three words."""
    return [
        {"prompt": f"repeat the {which} word: {' '.join(words)} answer:", "completion": f" {words[place]}"}
        for words in itertools.permutations(WORDS, 3)
        for which, place in (("first", 0), ("last", 2))
    ]


def write_toy(folder: Path, tests: int = 90) -> Path:
    """The toy task as JSON lines; the questions of the test are not among those that are learned."""
    mixed = records()
    random.Random(0).shuffle(mixed)
    parts = {"test": mixed[:tests], "val": mixed[tests : 2 * tests], "train": mixed[2 * tests :]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return folder


def make(tokenizer: Path | str, kind: str = "qwen2", **options: Any) -> CausalLMTask:
    """A tiny decoder with random weights, not built yet."""
    shape = SHAPES[kind] | {"vocab_size": 300} | options.pop("overrides", {})
    defaults: dict[str, Any] = {
        "name": kind, "pretrained": "random", "tokenizer": str(tokenizer), "config_overrides": shape,
        "adapter": RandLoRA(rank=8), "learning_rate": 1e-2, "max_new_tokens": 4,
    }  # fmt: skip
    return CausalLMTask(**(defaults | options))


def typed(tokenizer: Path | str, kind: str = "qwen2", size: int = 64) -> list[str]:
    """A tiny decoder as words of a command."""
    shape = json.dumps(SHAPES[kind] | {"vocab_size": size})
    return [
        *("--model", "CausalLMTask", "--model.name", kind, "--model.pretrained", "random"),
        *("--model.config_overrides", shape, "--model.tokenizer", str(tokenizer)),
        *("--model.adapter", "RandLoRA", "--model.adapter.rank", "8"),
    ]


def texts(folder: Path, **options: Any) -> TextData:
    """The toy task."""
    return TextData(
        **({"dataset": "jsonl", "root": str(folder), "mask_prompt": True, "batch_size": 8, "steps": 3} | options)
    )


def fit(task: CausalLMTask, data: TextData, start: Path | None = None, **options: Any) -> L.Trainer:
    """Trains on the CPU, without validation unless asked for."""
    trainer = make_trainer(**({"accelerator": "cpu", "limit_val_batches": 0} | options))
    trainer.fit(AdaptationModule(task), data, ckpt_path=start, weights_only=True)
    return trainer


def trained(task: CausalLMTask) -> dict[str, Tensor]:
    """Copies of what trains, by name."""
    return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}
