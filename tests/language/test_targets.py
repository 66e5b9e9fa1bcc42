"""The paper's parameter counts on models of true size, made of their configs without storage."""

from typing import Any

import pytest
import torch
import yaml
from torch import nn

from randlora_pl.adapters import Adapter, FullFineTuning, LoRA, RandLoRA, inject
from randlora_pl.adapters.select import select
from randlora_pl.language.catalog import KNOWN
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tasks.common import TARGETS
from randlora_pl.language.tokenization import model_config
from randlora_pl.run.options.shipped import find_config
from tests.support.products import in_two_items, marked

transformers = pytest.importorskip("transformers", reason="transformers, of the extra `language`, is missing")

CONFIGS = {
    "qwen2-0.5b": KNOWN["Qwen/Qwen2-0.5B-Instruct"],
    "llama3-8b": KNOWN["meta-llama/Meta-Llama-3-8B"],
    "phi3-mini": KNOWN["microsoft/Phi-3-mini-4k-instruct"],
    "roberta-base": KNOWN["FacebookAI/roberta-base"],
    "roberta-large": KNOWN["FacebookAI/roberta-large"],
    "gpt2-medium": KNOWN["openai-community/gpt2-medium"],
}
HEADS = {"roberta": "AutoModelForSequenceClassification"}


def on_meta(name: str, **options: Any) -> nn.Module:
    """A model of true size without storage."""
    known = CONFIGS[name]
    config = transformers.AutoConfig.for_model(known.kind, **(known.shape | options))
    kind = getattr(transformers, HEADS.get(known.kind, "AutoModelForCausalLM"))
    with torch.device("meta"):
        model: nn.Module = kind.from_config(config)
    return model


# The figures; in millions where it has them so.
COUNTS: list[tuple[str, Adapter, int | str]] = [
    ("qwen2-0.5b", LoRA(rank=16), "5.90M"),
    ("qwen2-0.5b", RandLoRA(rank=10), "5.96M"),
    ("qwen2-0.5b", RandLoRA(rank=5), "11.84M"),
    ("llama3-8b", LoRA(rank=16), "28.3M"),
    ("llama3-8b", LoRA(rank=32), "56.6M"),
    ("llama3-8b", LoRA(rank=64), "113.2M"),
    ("llama3-8b", RandLoRA(rank=60), "28.8M"),
    ("llama3-8b", RandLoRA(rank=30), "56.6M"),
    ("llama3-8b", RandLoRA(rank=15), "112.7M"),
    ("phi3-mini", LoRA(rank=16), "22.0M"),
    ("phi3-mini", LoRA(rank=32), "44.0M"),
    ("phi3-mini", LoRA(rank=64), "88.1M"),
    ("phi3-mini", RandLoRA(rank=40), "23.0M"),
    ("phi3-mini", RandLoRA(rank=20), "45.7M"),
    ("phi3-mini", RandLoRA(rank=10), "91.1M"),
    ("roberta-base", LoRA(rank=4), "0.66M"),
    ("roberta-base", RandLoRA(rank=64), "0.72M"),
    ("roberta-large", RandLoRA(rank=100), 1_780_416),
    ("gpt2-medium", RandLoRA(rank=20), 5_211_648),
    ("gpt2-medium", LoRA(rank=16), 5_505_024),
]


BY_DEFAULT = ("5.96M", "0.72M")
"""Counts of a decoder and of an encoder."""


@pytest.mark.parametrize(("name", "adapter", "count"), marked(COUNTS, lambda row: row[2] in BY_DEFAULT))
def test_the_paper_s_counts(name: str, adapter: Adapter, count: int | str) -> None:
    report = inject(on_meta(name), adapter, TARGETS[CONFIGS[name].kind])
    if isinstance(count, int):
        assert report.trainable == count
    else:
        decimals = len(count.partition(".")[2]) - 1
        assert f"{report.trainable / 1e6:.{decimals}f}M" == count


def layers(name: str, targets: list[str] | None) -> list[str]:
    """What targets name in a model of one block."""
    count = "n_layer" if CONFIGS[name].kind == "gpt2" else "num_hidden_layers"
    found = [site.shape.layer for site in select(on_meta(name, **{count: 1}), targets, False)]
    return [layer.partition(".0.")[2] or layer for layer in found]


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
SELF = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
LAYERS = {
    "qwen2-0.5b": [*ATTENTION, "mlp.up_proj", "mlp.down_proj"],
    "llama3-8b": [*ATTENTION, "mlp.up_proj", "mlp.down_proj"],
    "phi3-mini": ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "roberta-base": [*SELF, "intermediate.dense", "output.dense"],
    "gpt2-medium": ["attn.c_attn.q", "attn.c_attn.v", "mlp.c_fc", "mlp.c_proj"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_of_each_family(name: str) -> None:
    family = CONFIGS[name].kind
    chosen = layers(name, TARGETS[family])
    assert sorted(chosen) == sorted(LAYERS[name])
    if family not in ("roberta", "gpt2"):
        assert chosen == layers(name, None)  # the program's own default


SEVEN = ["self_attn.o_proj", "mlp.gate_proj", *LAYERS["qwen2-0.5b"]]
OF_DENSE = {
    "qwen3": SEVEN, "gemma3_text": SEVEN, "olmo2": SEVEN, "smollm3": SEVEN, "mistral": SEVEN,
    "gpt_neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
}  # fmt: skip
"""Every linear layer of a block, in families that no list has."""


def small(family: str) -> tuple[CausalLMTask, Any]:
    """A task, and a decoder of two blocks without storage."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    config = transformers.AutoConfig.for_model(family, **sizes, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return CausalLMTask(family, "random", adapter=LoRA(rank=2)), model


@in_two_items("family", marked(zip(OF_DENSE), lambda row: row[0] in ("gemma3_text", "gpt_neox")))
def test_a_family_without_a_list_is_adapted_as_a_whole(family: str, caplog: pytest.LogCaptureFixture) -> None:
    task, model = small(family)
    caplog.clear()
    with caplog.at_level("INFO", "randlora_pl"):
        task.take_targets(model)
    (line,) = caplog.messages
    assert line.startswith(f"No targets are listed for {family}: every linear layer of the blocks is adapted.")
    report = inject(model, task.adapter, task.targets)
    adapted = {".".join(row.layer.split(".0.")[1:]) for row in report.rows if ".0." in row.layer}
    assert adapted == set(OF_DENSE[family]) and len(report.rows) == 2 * len(adapted)
    assert report.coverage.share == 1 and "100" in report.coverage.line and not report.coverage.warning


def test_targets_of_listed_families_and_given_ones_are_logged_by_no_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "randlora_pl"):
        for family in ("qwen2", "llama"):
            task, model = small(family)
            task.take_targets(model)
            assert task.targets == TARGETS[family] and task.targets is not TARGETS[family]
        task, model = small("qwen3")
        given = CausalLMTask("qwen3", "random", targets=["all"])
        given.take_targets(model)
        whole = CausalLMTask("qwen3", "random", adapter=FullFineTuning())
        whole.take_targets(model)
    assert given.targets == ["all"] and whole.targets is None and not caplog.messages


def test_routers_stay_as_they_are_and_experts_are_said_to_be_frozen() -> None:
    task, model = small("qwen3_moe")
    report = inject(model, task.adapter, task.default_targets(model))
    assert {row.layer.partition(".self_attn.")[2] for row in report.rows} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    warning = report.coverage.warning
    assert report.coverage.share < 0.5 and "mlp.gate.weight" in warning and "experts, cannot be adapted" in warning


def test_the_layers_of_minilm_are_those_of_the_published_sweeps() -> None:
    """They ran without a list, by the default of `select`."""
    config = transformers.AutoConfig.for_model("bert", num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    chosen = [[site.shape.layer for site in select(model, targets, False)] for targets in (TARGETS["bert"], None)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 5


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_and_their_configs_have_the_parameters_that_are_listed(name: str) -> None:
    known = KNOWN[name]
    auto = transformers.AutoModel if known.kind == "roberta" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(model_config(name, "random", None))
    assert sum(parameter.numel() for parameter in model.parameters()) == known.parameters
    text = find_config(known.config).read_text()
    options = yaml.safe_load(text)["model"]["init_args"]
    assert options["name"] == name
    trained = inject(model, RandLoRA(**options["adapter"]["init_args"]), options["targets"]).trainable
    assert f"{trained:,} trained parameters" in text
    if known.kind == "gpt2":
        assert "LoRA-16: 5,505,024" in text  # as in COUNTS
