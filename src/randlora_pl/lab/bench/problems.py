"""Problem of a measured step: a model with random weights, a batch of random numbers, a loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.utils.errors import UserError, near

CLASSES = 100
Library = Literal["timm", "open_clip", "transformers"]


@dataclass(frozen=True)
class Problem:
    """A plain model and what it is trained on.

    Attributes:
        model: On the CPU.
        batch: Samples and all other inputs of the loss, on the CPU; each sample is a row of the first one.
        loss: The model and the batch to a scalar.
        words: Description of the batch.
        decoder: Whether it is one; methods then have their ranks for decoders rather than those for images.
    """

    model: nn.Module
    batch: Sequence[Tensor]
    loss: Callable[[nn.Module, Sequence[Tensor]], Tensor]
    words: str
    decoder: bool = False


def library_of(model: str) -> Library:
    """Return the library that has a model, timm before open_clip; a UserError suggests near names for others."""
    import open_clip
    import timm

    from randlora_pl.language.catalog import KNOWN

    known: dict[Library, list[str]] = {
        "timm": timm.list_models(),
        "open_clip": ["tiny", *open_clip.list_models()],
        "transformers": [name for name, each in KNOWN.items() if each.kind != "roberta"],
    }
    for library, names in known.items():
        if (model.partition(".")[0] if library == "timm" else model) in names:
            return library
    names = [name for names in known.values() for name in names]
    raise UserError(
        f"--model: neither timm nor open_clip has a model '{model}', and it is none of the known decoders "
        f"({', '.join(known['transformers'])}).{near(model, names)}"
    )


def image_problem(model: str, library: Library, images: int) -> Problem:
    """Return a vision model whose features are classified by a frozen matrix, like with a head of text embeddings.

    Methods so differ in the model alone.
    """
    built: nn.Module
    if library == "timm":
        from randlora_pl.models.vit import load_vit

        vit = load_vit(model, "random")
        built, size, features = vit.model, vit.image.size, vit.num_features
    else:
        from randlora_pl.models.clip import ImageTower, load_clip

        clip = load_clip(model, "random")
        built, size, features = ImageTower(clip.model), clip.image.size, clip.embed_dim
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, size, size, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    head = torch.randn(CLASSES, features, generator=generator) / features**0.5
    return Problem(built, [pixels, labels, head], _classified, f"{images} images of {size} pixels")


def _classified(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the cross-entropy of the images."""
    images, labels, head = batch
    return F.cross_entropy(F.linear(model(images), head).float(), labels)


def token_problem(model: str, samples: int, tokens: int, overrides: Mapping[str, Any] | None) -> Problem:
    """Return a decoder, known by name, that predicts each next one of the random tokens of some samples.

    Raises:
        UserError: transformers is missing, the options make no model, or it has fewer positions than tokens.
    """
    from randlora_pl.language.models.loading import RANDOM, model_config, possible, try_out
    from randlora_pl.language.models.positions import table_of_positions
    from randlora_pl.models.init_context import seeded

    if tokens < 2:
        raise UserError(f"--tokens is {tokens}: give two or more, each is predicted from those before it")
    config = model_config(model, RANDOM, overrides, "--overrides")
    from transformers import AutoModelForCausalLM

    if config.vocab_size < 2:
        raise UserError(f"--overrides: a decoder with vocab_size {config.vocab_size} has nothing to choose from")
    with seeded(0), possible(overrides, "--overrides", config):
        built = AutoModelForCausalLM.from_config(config)
        if overrides:
            try_out(built)
    if (most := table_of_positions(built)) and tokens > most:
        raise UserError(f"--tokens is {tokens}, and {config.model_type} has {most:,} positions: give no more")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (samples, tokens), generator=generator)
    return Problem(built, [ids], _predicted, f"{samples} samples of {tokens} tokens", decoder=True)


def _predicted(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Return the cross-entropy of each next token."""
    from randlora_pl.language.models.token_losses import token_losses

    (ids,) = batch
    learned = torch.arange(ids.numel(), device=ids.device).view_as(ids)[:, :-1].flatten()
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "learned": learned}
    return token_losses(model, {**texts, "padding": "right"})[0].mean()
