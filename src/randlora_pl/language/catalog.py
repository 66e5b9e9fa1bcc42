"""Catalog of names known without a network: datasets of texts, and the shapes of the paper's models."""

from dataclasses import dataclass, field
from typing import Any

from randlora_pl.language.tasks import TASKS as TASKS
from randlora_pl.utils.errors import UserError, near

DATASETS = {
    "commonsense_15k": "15,000 questions with their answers to learn, and eight tests of commonsense reasoning",
    "commonsense_170k": "170,000 questions with their answers to learn, and the same eight tests",
    "e2e": "descriptions of restaurants to write from their facts, scored by BLEU, NIST, METEOR, ROUGE-L and CIDEr",
    "jsonl": "your own prompts and completions",
    "chat": "your own conversations, in the template of the model",
}

OWN_LABELLED = {
    "csv": "your own labelled texts: train.csv, val.csv and test.csv with columns text (or text_a, text_b) and label",
    "jsonl": "your own labelled texts: the same as JSON lines, in train.jsonl, val.jsonl and test.jsonl",
}
LABELLED = {
    "sst2": "GLUE: sentiment of sentences on films, accuracy",
    "mrpc": "GLUE: whether two sentences have the same meaning, accuracy",
    "cola": "GLUE: whether a sentence is good English, Matthews correlation",
    "qnli": "GLUE: whether a sentence answers a question, accuracy",
    "rte": "GLUE: whether one sentence follows from another, accuracy",
    "stsb": "GLUE: how alike two sentences are (0 to 5), Pearson correlation",
    **OWN_LABELLED,
}


OWN_TEXTS = {"jsonl": "jsonl", "csv": "csv", "chat": "jsonl"}
"""Datasets of a user's own texts, of unknown size, which differ by their path only: the extension of their files."""


def given_to(task: str | None) -> str:
    """Return the inputs of the predict command for an adapter of a task."""
    return "--texts FILE" if task in TASKS else "--images PATH"


def check_dataset(name: str, labelled: bool = False) -> None:
    """Refuse an unknown dataset of prompts and completions, or of labelled texts, and suggest near names."""
    known, task = (LABELLED, TASKS[1]) if labelled else (DATASETS, "a language task")
    if name not in known:
        raise UserError(f"--data.dataset {name!r} is unknown.{near(name, known)} Known to {task}: {', '.join(known)}")


@dataclass(frozen=True)
class KnownModel:
    """A model's configuration, as its publishers state it.

    Attributes:
        kind: `model_type` of transformers.
        parameters: Parameters of the model; an output layer that is the table of embeddings counts once.
        config: Bundled configuration that uses it.
        license: License of the weights as their publishers state it; their own page decides.
        shape: Differences from the defaults of that kind's configuration class.
    """

    kind: str
    parameters: int
    config: str
    license: str
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        """True if the weights need an accepted license on the model's page."""
        return self.license.endswith("gated")


_QWEN2 = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
_QWEN2 |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
_LLAMA3 = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
_LLAMA3 |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192}
_PHI3 = {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
_PHI3 |= {"num_attention_heads": 32, "num_key_value_heads": 32, "sliding_window": 2047}
_QWEN3: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
_QWEN3 |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
_QWEN3 |= {"max_position_embeddings": 40960, "rope_theta": 1e6}
_SMOLLM2: dict[str, Any] = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
_SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
_SMOLLM2 |= {"max_position_embeddings": 8192, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}

KNOWN: dict[str, KnownModel] = {
    "Qwen/Qwen2-0.5B-Instruct": KnownModel("qwen2", 494_032_768, "commonsense_qwen2", "Apache-2.0", _QWEN2),
    "Qwen/Qwen3-0.6B": KnownModel("qwen3", 596_049_920, "qwen3_0.6b", "Apache-2.0", _QWEN3),
    "smollm2": KnownModel("llama", 134_515_008, "smollm2_135m", "Apache-2.0", _SMOLLM2),
    "microsoft/Phi-3-mini-4k-instruct": KnownModel("phi3", 3_821_079_552, "commonsense_phi3", "MIT", _PHI3),
    "meta-llama/Meta-Llama-3-8B": KnownModel(
        "llama", 8_030_261_248, "commonsense_llama3", "Llama 3 license, gated", _LLAMA3
    ),
    "openai-community/gpt2-medium": KnownModel(
        "gpt2", 354_823_168, "e2e_gpt2_medium", "MIT", {"n_embd": 1024, "n_layer": 24, "n_head": 16}
    ),
    "FacebookAI/roberta-base": KnownModel("roberta", 124_645_632, "glue_roberta_base", "MIT", _ROBERTA),
    "FacebookAI/roberta-large": KnownModel(
        "roberta",
        355_359_744,
        "glue_roberta_large",
        "MIT",
        _ROBERTA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
}
