"""Base of the tasks on texts, and the way back from an adapter file to one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile, read_adapter
from randlora_pl.language.catalog import KNOWN
from randlora_pl.language.chat import Chat
from randlora_pl.language.offline import NAME, source_of
from randlora_pl.language.tokenization import BYTES, RANDOM, load_tokenizer, model_config, possible, reached, try_out
from randlora_pl.models.weights import ModelIdentity, seeded
from randlora_pl.tasks.objective import Objective
from randlora_pl.tasks.optim import TEXTS
from randlora_pl.tasks.restore import make_ready, make_task
from randlora_pl.utils.errors import UserError, log
from randlora_pl.utils.options import Fraction, NotNegative


class TextTask(Objective):
    """Base of the tasks on texts.

    Attributes:
        auto: Name of the class of transformers that loads the whole model again.
        pipeline_tag: What a model does, by the Hub's names.
        example: Call of a loaded task, for a model card.
        generates: True if it writes texts.
        batch_size: Texts at a time in a prediction, as in a test.
        max_new_tokens: Maximum number of tokens per text that it writes.
        sentences: True if the byte tokenizer sets its end of text around and between sentences.
    """

    place = TEXTS
    tuned_by = "loss"
    auto = pipeline_tag = example = ""
    sentences = generates = False
    batch_size = 64
    max_new_tokens = 0

    name: str = field(kw_only=False)
    """A model of the Hugging Face Hub, or a folder."""
    pretrained: str | None = field(default=None, kw_only=False)
    """A folder with other weights, or ``random``. Default: the weights of the name."""
    tokenizer: str | None = None
    """A name, a folder, a tokenizer.json, or ``bytes`` (a token for each byte). Default: the model's own, and ``bytes``
    with random weights."""
    config_overrides: dict[str, Any] | None = None
    """Configuration of a model with random weights, for example ``{num_hidden_layers: 2}``."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Decay after the warm-up, ``linear`` or ``cosine``."""
    final_lr_fraction: Annotated[float, Fraction] = 0.0
    """End of the schedule, as a fraction of the learning rate."""
    weight_decay: Annotated[float, NotNegative] = 0.0
    """Decay of AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None and self.pretrained == RANDOM:
            self.tokenizer = BYTES

    def default_targets(self, model: Any) -> list[str] | None:
        """Return the targets of the adapter: the given ones, its family's, or every linear layer.

        They are None if none are given and the method chooses its tensors.
        """
        if self.targets is not None or self.adapter.trains_base:
            return self.targets
        return list(TARGETS.get(model.config.model_type, EVERY))

    def take_targets(self, model: Any) -> None:
        """Set the targets of the adapter to their default, and log it if the model's family has no list."""
        given, self.targets = self.targets, self.default_targets(model)
        if given is None and self.targets == EVERY:
            log.info(
                "No targets are listed for %s: every linear layer of the blocks is adapted. --model.targets names "
                "others.",
                model.config.model_type,
            )

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer: the chosen one, else the one of the weights (see `load_tokenizer`)."""
        for option, source in (("tokenizer", self.tokenizer), ("pretrained", self.pretrained)):
            if source:
                return load_tokenizer(source, self.sentences, f"--model.{option}")
        return load_tokenizer(self.name, self.sentences, "--model.name")

    def model_identity(self) -> ModelIdentity:
        """Return the identity of the base model."""
        seed = self.seed if self.pretrained == RANDOM else None
        name = Path(self.name).name if Path(self.name).is_dir() else self.name  # the path of a folder is private
        return ModelIdentity("transformers", name, self.pretrained or self.name, None, seed)

    def check_vocabulary(self, config: Any) -> None:
        """Refuse a tokenizer of more tokens than the model has."""
        if len(self.vocabulary) > config.vocab_size:
            raise UserError(
                f"The tokenizer has {len(self.vocabulary):,} tokens and {self.name} only {config.vocab_size:,}: give "
                "the model's own (--model.tokenizer), or for random weights --model.config_overrides '{vocab_size: N}'."
            )

    def random_model(self, auto: Any, config: Any, pad: int | None) -> Any:
        """Return a model of transformers with random weights and the special tokens of the tokenizer, in float32."""
        for token in ("bos_token_id", "eos_token_id"):  # a smaller vocabulary may not have its own
            setattr(config, token, getattr(self.vocabulary, token))
        config.pad_token_id = pad
        with seeded(self.seed), possible(self.config_overrides, config=config):
            model = auto.from_config(config)
            if self.config_overrides:
                try_out(model)
        return model

    def pretrained_model(self, auto: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Return a model of transformers with pretrained weights, and its loading info."""
        source = self.pretrained or self.name
        with reached(source, "--model.pretrained" if self.pretrained else "--model.name"):
            model, info = auto.from_pretrained(source_of(source), output_loading_info=True, **options)
        return model, info

    def on_meta(self) -> tuple[nn.Module, list[str] | None] | None:
        """Return the backbone without values and head, and its targets; None if its config needs the network.

        Raises:
            UserError: The extra is missing, or an option of the model is wrong.
        """
        source = self.pretrained or self.name
        if self.pretrained == RANDOM or (source != NAME and Path(source).is_dir()):
            config = model_config(self.name, self.pretrained, self.config_overrides)
        elif source in KNOWN:
            config = model_config(source, RANDOM, None)
        else:
            return None
        import transformers

        with torch.device("meta"):
            model: Any = getattr(transformers, self.auto).from_config(config)
        return self.backbone_of(model), self.default_targets(model)

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """Return the backbone of a model of transformers, without its head."""
        return model

    def take_saved(self, metadata: Mapping[str, Any]) -> None:
        """Take from the metadata of an adapter file what the backbone needs."""

    def completed(self, backbone: nn.Module) -> Any:
        """Return the model of transformers around a new backbone."""
        return backbone

    def write(self, prompts: Sequence[str | Chat], batch_size: int = 16, separate: bool = False) -> list[str]:
        """Return the generated texts after prompts or conversations, in their order, if the task `generates`."""
        raise NotImplementedError

    def classify(self, texts: Sequence[str | Sequence[str]], max_length: int = 128, batch_size: int = 64) -> Tensor:
        """Return probabilities (n, classes) or scores (n, 1) of texts or pairs of texts, if the task predicts them."""
        raise NotImplementedError

    def checkpoint_gradients(self, backbone: nn.Module) -> None:
        """Make the blocks recompute their activations in the backward pass, without the reentrant kind of PyTorch.

        The reentrant kind gives no gradient if a block's input needs none, as after a frozen embedding.

        Raises:
            UserError: The model cannot.
        """
        model: Any = backbone
        switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            switch({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"{type(model).__name__} cannot recompute its activations. Use --model.gradient_checkpointing false "
                "and a smaller --data.batch_size."
            ) from error

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what trains; blocks that recompute depend on it, too, but their layers stay as they are."""
        super().train(mode)
        if self.backbone is not None and self.gradient_checkpointing:
            for module in self.backbone.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = mode
        return self


TARGETS: dict[str, list[str]] = {
    "qwen2": ["qkv", "fc1", "fc2"],  # as in the released scripts: no gate_proj, no o_proj
    "llama": ["qkv", "fc1", "fc2"],
    # All three fused weights, which is what the paper's fractions of parameters agree with; the released scripts name
    # layers that Phi-3 does not have, and would adapt down_proj alone.
    "phi3": ["qkv", "fc1", "fc2"],
    # Every dense layer of the encoder. The head trains as a whole: an update of its first layer, whose name ends in
    # "dense" as well, would be 9,984 parameters more than the paper's 0.72M for RandLoRA-64 of the base model.
    "roberta": ["qkv", "o", "fc1", "fc2"],
    "gpt2": ["q", "v", "fc1", "fc2"],  # E2E: two thirds of c_attn
    "bert": ["qkv", "fc1", "fc2"],  # not in the paper: the layers of the published sweeps on texts (MiniLM)
}
"""Layers to adapt in each family of language models, by the ``model_type`` of transformers' configs: the paper's.

Other families have `EVERY`, because the layers that a list leaves out may hold most of their weights.
Targets are aliases of `adapters.targets`, and so fit separate and fused projections alike:

| ``model_type`` | ``qkv``, or ``q`` and ``v`` | ``fc1``, ``fc2`` | ``o`` |
|---|---|---|---|
| qwen2, llama | q_proj, k_proj, v_proj | up_proj, down_proj | o_proj |
| phi3 | qkv_proj | gate_up_proj, down_proj | o_proj |
| roberta | query, key, value | intermediate.dense, output.dense | attention.output.dense |
| gpt2 | rows of attn.c_attn | mlp.c_fc, mlp.c_proj | attn.c_proj |
| bert | query, key, value | intermediate.dense, output.dense | attention.output.dense |
"""

EVERY = ["all"]
"""Targets of a family without a list: every linear layer of the blocks, without routers, embeddings and heads."""


def load_language_task(folder: str | Path, **overrides: Any) -> TextTask:
    """Rebuild the task that saved an adapter folder, with its adapter merged for evaluation.

    Args:
        folder: The adapter folder.
        overrides: Constructor arguments to change, for example ``pretrained`` if a folder moved.

    Returns:
        The task in eval mode, on the CPU, ``task.vocabulary`` its tokenizer: ``task.model`` of a `CausalLMTask` writes,
        ``task.classify(texts)`` of a `TextClassificationTask` returns classes.

    Raises:
        UserError: The folder was not written by a language task, or its base model differs.
    """
    file = read_adapter(folder)
    return make_ready(plain_task(file, **overrides), file)


def plain_task(file: AdapterFile, dequantized: bool = False, **overrides: Any) -> TextTask:
    """Return the task of an adapter, before its backbone is built; on request without quantization.

    Raises:
        UserError: It was written by no language task.
    """
    if dequantized and file.metadata.get("arguments", {}).get("quantize"):
        overrides["quantize"] = None
    task = make_task(file, TextTask, "texts", overrides)  # type: ignore[type-abstract]
    task.take_saved(file.metadata)
    return task
