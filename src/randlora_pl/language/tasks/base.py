"""What tasks on texts share: a model of transformers by name or with random weights, and its tokenizer."""

from functools import cached_property
from typing import Any

from torch import nn

from randlora_pl.adapters import Adapter
from randlora_pl.language.models.loading import RANDOM, checkpoint_blocks, identity_name, set_checkpointing_mode
from randlora_pl.language.models.tokenizers import BYTES, load_tokenizer
from randlora_pl.models import ModelIdentity
from randlora_pl.tasks.base import AdaptationTask

_RATES = {"VeRA": 1e-2, "FullFineTuning": 1e-5}
"""Learning rates that differ from the released scripts' 1e-4 (commonsense and GLUE)."""
_USUAL_RATE = 1e-4


class LanguageTask(AdaptationTask):
    """Base of the tasks on texts. Subclasses load a model and say what a sample's loss is.

    Args:
        tokenizer: A name, a folder, a tokenizer.json, or ``bytes``; None for the model's own, and ``bytes`` with random
            weights.
        config_overrides: What a model with random weights has instead.
        options: See `AdaptationTask`.

    Attributes:
        auto: The class of transformers that loads the whole model again.
    """

    auto: str

    def __init__(self, *, tokenizer: str | None, config_overrides: dict[str, Any] | None, **options: Any) -> None:
        super().__init__(**options)
        self.tokenizer = tokenizer or (BYTES if self.pretrained == RANDOM else None)
        self.config_overrides = config_overrides

    def usual_rate(self, adapter: Adapter) -> float:
        """That of the released scripts; DoRA takes that of its inner method."""
        return _RATES.get(getattr(adapter, "inner", adapter).method(), _USUAL_RATE)

    @cached_property
    def vocabulary(self) -> Any:
        """The tokenizer; the data module asks for it."""
        return self.own_tokenizer()

    def own_tokenizer(self, sentences: bool = False) -> Any:
        """What `load_tokenizer` gives for the option that was typed."""
        for option, source in (("tokenizer", self.tokenizer), ("pretrained", self.pretrained)):
            if source:
                return load_tokenizer(source, sentences, f"--model.{option}")
        return load_tokenizer(self.name, sentences, "--model.name")

    def load(self) -> nn.Module:
        """The backbone, its dtype that of the frozen weights."""
        raise NotImplementedError

    def completed(self, backbone: nn.Module) -> Any:
        """The whole model of transformers around a backbone that `build` has just made."""
        return backbone

    def build(self) -> nn.Module:
        """Loads the backbone, and says which one it is."""
        model = self.load()
        seed = self.seed if self.pretrained == RANDOM else None
        weights = self.pretrained or self.name
        self.identity = ModelIdentity("transformers", identity_name(self.name), weights, None, seed)
        return model

    def checkpoint_gradients(self, backbone: nn.Module) -> None:
        """Blocks recompute their activations."""
        checkpoint_blocks(backbone)

    def train(self, mode: bool = True) -> "LanguageTask":
        """Training mode for what trains; blocks that recompute must take themselves for training, too."""
        super().train(mode)
        if self.backbone is not None and self.gradient_checkpointing:
            set_checkpointing_mode(self.backbone, mode)
        return self
