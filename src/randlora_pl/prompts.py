"""Prompt learners: learned tokens in place of words, and next to the patches of an image.

Examples:
    >>> task = PromptTask("tiny", prompts=CoOp(length=4, words=None))
    >>> make_trainer().fit(AdaptationModule(task), ImageData(dataset="digits", steps=2))
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora_pl.adapters.described import Described
from randlora_pl.models import text
from randlora_pl.models.text import Tokenizer
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, NotNegative

__all__ = ["CoCoOp", "CoOp", "DeepPrompts", "Fixed", "MaPLe", "PromptLearner", "Prompts"]


class PromptLearner(Described):
    """Options of a prompt learner, independent of a model and its classes.

    Attributes:
        visual: True if it has tokens in the image tower.
        per_image: True if the context of a text depends on the image.
        learns: True if it has something to train.
        starts_pretrained: True if it begins as a prompt of words, so that a test before the training is one of the
            pretrained model.
        class_specific: True if each class has tokens of its own, so that it cannot describe other classes.
    """

    visual: ClassVar[bool] = False
    per_image: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    starts_pretrained: ClassVar[bool] = False
    class_specific = False

    @abstractmethod
    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> "Prompts":
        """Return the learned tokens for a CLIP model without an adapter.

        Args:
            model: Model of open_clip; it is not changed.
            tokenizer: Its tokenizer.
            classnames: C names, of which class-specific tokens need the number.
            seed: Seed of random tokens, which depend on nothing else.

        Raises:
            UserError: The options do not fit the model.
        """


class Prompts(nn.Module):
    """Learned tokens of a model: float32 parameters, and the texts of classes with them.

    Subclasses override what they learn; without overrides a model's own texts and images stay as they are.

    Attributes:
        classes: Token rows of the texts of classes; None before `take_classes`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.classes: text.TextRows | None = None

    def take_classes(
        self, model: nn.Module, classnames: Sequence[str], chunk_tokens: int, device: torch.device
    ) -> None:
        """Tokenize the texts of classes, for `encode_texts`.

        Args:
            model: Model of open_clip.
            classnames: C names.
            chunk_tokens: Tokens of the texts that are alive at a time (see `TextRows`).
            device: Device of the token rows.

        Raises:
            UserError: A name is too long, or tokens of other classes were learned.
        """
        self.classes = self.rows(classnames, chunk_tokens).to(device)

    def encode_texts(self, model: nn.Module, shift: Tensor | None = None, again: bool = False) -> Tensor:
        """Return the features (C, e) of the classes' texts, not normalized.

        Args:
            model: Model of open_clip.
            shift: (d,), added to the context.
            again: Compute a single chunk again in the backward pass, too.
        """
        assert self.classes is not None
        context = self.context()
        if shift is not None and context is not None:
            context = context + shift
        return text.encode_rows(text.text_tower(model), self.classes, context, self.deep(), again)

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> text.TextRows:
        """Return the token rows of classes (see `TextRows`).

        Raises:
            UserError: A name is too long, or tokens of other classes were learned.
        """
        raise NotImplementedError

    def context(self) -> Tensor | None:
        """Return the learned tokens in the texts, (M, d) or one set for each class (C, M, d)."""
        return None

    def shifts(self, images: Tensor) -> Tensor | None:
        """Return what unit image features (B, e) add to the context, (B, d), or None if nothing."""
        return None

    def deep(self) -> list[Tensor]:
        """Return tokens (n, d) that replace states of the text tower before its second block and later ones."""
        return []

    def vision(self) -> list[Tensor]:
        """Return tokens (n, d) after an image's patches, and those that replace them before later blocks."""
        return []


def _draw_tokens(shape: Sequence[int], seed: int, name: str, device: torch.device | str = "cpu") -> Tensor:
    """Return random tokens in float32, a function of seed and name alone."""
    if torch.device(device).type == "meta":
        return torch.empty(*shape, device=device)
    with rng.seeded(int(rng.words(seed, name, torch.tensor(0)))):
        return torch.empty(*shape).normal_(std=0.02).to(device)  # as in all of the papers


class Fixed(PromptLearner):
    """A template for each class; nothing is learned in the prompt.

    With LoRA of rank 2 this is CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541): ``--config clip_lora``.

    Examples:
        >>> task = PromptTask("tiny", prompts=Fixed(template="a photo of a {}."), adapter=LoRA(rank=2))
    """

    template: str = "a photo of a {}."
    """Text with ``{}`` for the name of the class."""

    learns = False
    starts_pretrained = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.template:
            raise UserError(f"template is {self.template!r}: it needs {{}} for the name (--model.prompts.template).")

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return prompts without learned tokens."""
        return _FixedPrompts(self.template, tokenizer)


class _FixedPrompts(Prompts):
    words: Tensor  # of a tower whose words see later ones

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.template, self._tokenizer = template, tokenizer

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> text.TextRows:
        rows = [text.word_ids(self._tokenizer, self.template.replace("{}", name)) for name in classnames]
        room = self._tokenizer([""]).shape[1]
        return text.padded(rows, [[-1] * len(row) for row in rows], classnames, room, chunk_tokens)

    def take_classes(
        self, model: nn.Module, classnames: Sequence[str], chunk_tokens: int, device: torch.device
    ) -> None:
        if text.is_causal(model):
            super().take_classes(model, classnames, chunk_tokens, device)
            return
        prompts = [self.template.replace("{}", name) for name in classnames]
        tokens = self._tokenizer(prompts)
        room = tokens.shape[1]
        padding = self._tokenizer([""], context_length=2 * room).mode().values
        uncut = self._tokenizer(prompts, context_length=2 * room)
        lengths, whole = ((rows != padding).sum(1) for rows in (tokens, uncut))
        if (lengths != whole).any():
            long = classnames[int((whole - lengths).argmax())]
            raise UserError(
                f"the prompt of class {long!r} is longer than the {room} tokens that the text tower has room for. Take "
                "a shorter one (--model.prompts.template) or a shorter name."
            )
        self.register_buffer("words", tokens.to(device), False)
        self._chunk_tokens = chunk_tokens

    def encode_texts(self, model: nn.Module, shift: Tensor | None = None, again: bool = False) -> Tensor:
        if self.classes is not None:
            return super().encode_texts(model, shift, again)
        encode: Any = model.encode_text
        chunks = torch.split(self.words, max(1, self._chunk_tokens // self.words.shape[1]))
        if len(chunks) > 1 and torch.is_grad_enabled():  # as `encode_rows`
            encode = partial(checkpoint, encode, use_reentrant=False)
        return torch.cat([encode(chunk) for chunk in chunks])


class CoOp(PromptLearner):
    """Context optimization: M learned tokens in place of "a photo of a" (Zhou et al., arXiv 2109.01134).

    The prompt of class c is ``[start] v_1 .. v_M name_c . [end]``. M d numbers train, 2,048 for CLIP-ViT-B with four
    tokens; class-specific ones C M d. After training, class features are constant, so prediction costs nothing more.

    Examples:
        >>> task = PromptTask("tiny", prompts=CoOp(length=4, words=None))
    """

    length: Count | None = None
    """Number of learned tokens M; None for as many as ``words`` are."""
    words: str | None = "a photo of a"
    """Words that the tokens start from; None for random tokens with standard deviation 0.02."""
    position: text.Position = "end"
    """Place of the class name: at the ``end``, in the ``middle`` of the context, or at the ``front``."""
    class_specific: bool = False
    """Learn a context for each class. It predicts no other classes then."""

    @property
    def starts_pretrained(self) -> bool:  # type: ignore[override]
        """True if the context starts from words."""
        return self.words is not None

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned context."""
        prompts = _ContextPrompts(model, tokenizer, self.words, self.length, seed, position=self.position)
        if self.class_specific:
            prompts.tokens = nn.Parameter(prompts.tokens.detach().expand(len(classnames), -1, -1).clone())
        return prompts


class _ContextPrompts(Prompts):
    """A learned context of texts, which starts from words, or from random tokens if there are none.

    ``tokens`` are (M, d), or (C, M, d) for each class: the first ``length`` tokens of the context, by default all of
    the words, as they must be if ``fills`` is True. For ``position`` see `CoOp`.

    Raises:
        UserError: The length is missing, or does not fit the words.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        words: str | None,
        length: int | None,
        seed: int,
        fills: bool = True,
        position: text.Position = "end",
    ) -> None:
        super().__init__()
        tower: Any = text.text_tower(model)
        positions: Tensor = tower.positional_embedding
        if words is None and length is None:
            raise UserError("random tokens need a number: give --model.prompts.length, or words.")
        self.position: text.Position = position
        self._tokenizer, self._room = tokenizer, len(positions)
        ids = text.word_ids(tokenizer, "x" if words is None else words)[1:-1]
        self._words = ids[:1] * (length or 0) if words is None else ids
        learned = len(ids) if length is None else length
        if learned > len(self._words) or (fills and learned != len(self._words)):
            other = "Leave length out, or set words to null for random tokens" if fills else "Give more words"
            raise UserError(
                f"the words {words!r} are {len(ids)} tokens for this model, length is {length}. {other} "
                "(--model.prompts.words)."
            )
        if words is None:
            start = _draw_tokens((learned, positions.shape[1]), seed, "prompts.context", positions.device)
        else:
            first = torch.tensor(ids[:learned], dtype=torch.int64, device=positions.device)
            start = tower.token_embedding(first).detach().float().clone()
        self.tokens = nn.Parameter(start)

    def rows(self, classnames: Sequence[str], chunk_tokens: int) -> text.TextRows:
        """Return rows of start token, context, name, full stop and end token; the first of the context are learned."""
        if self.tokens.dim() == 3 and len(classnames) != len(self.tokens):
            raise UserError(
                f"class-specific prompts were learned for {len(self.tokens)} classes, these are {len(classnames)}. "
                "Train with --model.prompts.class_specific false to predict other classes."
            )
        learned = [number if number < self.tokens.shape[-2] else -1 for number in range(len(self._words))]
        pairs = list(zip(self._words, learned, strict=True))
        before = {"end": len(pairs), "middle": len(pairs) // 2, "front": 0}[self.position]
        rows, slots = [], []
        for name in classnames:
            last = self.position == "end"
            start, *own, end = text.word_ids(self._tokenizer, f"{name}." if last else name)
            stop = [] if last else text.word_ids(self._tokenizer, ".")[1:-1]
            row = [(start, -1), *pairs[:before], *((word, -1) for word in own), *pairs[before:]]
            row += [(word, -1) for word in [*stop, end]]
            rows.append([token for token, _ in row])
            slots.append([number for _, number in row])
        return text.padded(rows, slots, classnames, self._room, chunk_tokens)

    def context(self) -> Tensor | None:
        """Return the learned tokens, None if there are none."""
        return self.tokens if self.tokens.shape[-2] else None


class CoCoOp(PromptLearner):
    """Conditional context optimization: a network adds the same vector, a function of the image, to all tokens.

    The network is ``W_2 relu(W_1 f + b_1) + b_2`` of the unit image feature f (e), with e / 16 hidden units: 35,360
    numbers for CLIP-ViT-B with four tokens. Every image is compared with its own C texts, in training and afterwards,
    so each costs C passes of the text tower.

    Examples:
        >>> task = PromptTask("tiny", prompts=CoCoOp(length=4, words=None))
    """

    length: Count | None = None
    """Number of learned tokens; None for as many as ``words`` are."""
    words: str | None = "a photo of a"
    """Words that the tokens start from; None for random tokens."""

    per_image = True

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned context and its network."""
        prompts = _ConditionalPrompts(model, tokenizer, self.words, self.length, seed)
        features, (width, device) = text.embed_dim(model), (prompts.tokens.shape[1], prompts.tokens.device)
        with rng.seeded(int(rng.words(seed, "prompts.network", torch.tensor(0)))):
            first = nn.Linear(features, features // 16, device=device)
            prompts.network = nn.Sequential(first, nn.ReLU(), nn.Linear(features // 16, width, device=device))
        return prompts


class _ConditionalPrompts(_ContextPrompts):
    network: nn.Sequential

    def shifts(self, images: Tensor) -> Tensor | None:
        shifts: Tensor = self.network(images)
        return shifts


class DeepPrompts(PromptLearner):
    """Independent prompts of both towers (the baseline IVLP of MaPLe and PromptSRC; Jia et al., arXiv 2203.12119).

    Each of the first ``depth`` blocks of a tower has its own tokens: in texts at positions 1 to n, in images after the
    patches. They replace the states of the block before. J (n d_t + n_v d_v) numbers train, 46,080 for CLIP-ViT-B with
    four tokens and nine blocks.

    Examples:
        >>> task = PromptTask("tiny", prompts=DeepPrompts(length=2, vision_length=2, depth=2))
    """

    length: Annotated[int, NotNegative] = 4
    """Learned tokens n of each text, 0 for none."""
    vision_length: Annotated[int, NotNegative] = 4
    """Learned tokens n_v of each image, 0 for none."""
    depth: Count = 9
    """Blocks J that have their own tokens, in both towers."""
    words: str = "a photo of a"
    """Words that a text's first tokens start from. Words beyond ``length`` stay as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length == self.vision_length == 0:
            raise UserError("length and vision_length are 0: nothing is learned. Use --model.prompts Fixed.")

    @property
    def visual(self) -> bool:  # type: ignore[override]
        """True if images have learned tokens."""
        return self.vision_length > 0

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned tokens of both towers."""
        prompts = _DeepPrompts(model, tokenizer, self, seed, self.visual)
        if self.visual:
            shape, device = (self.vision_length, text.image_width(model.visual)), prompts.tokens.device
            prompts.images.extend(
                _draw_tokens(shape, seed, f"prompts.vision.{block}", device) for block in range(self.depth)
            )
        return prompts


class _DeepPrompts(_ContextPrompts):
    """Learned tokens of the first blocks of the text tower, and of the image tower, which are empty at first.

    Raises:
        UserError: A tower that has learned tokens has fewer blocks, or takes none.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, options: "DeepPrompts | MaPLe", seed: int, images: bool
    ) -> None:
        super().__init__(model, tokenizer, options.words, options.length, seed, fills=False)
        blocks = {"text": len(text.text_tower(model).transformer.resblocks)} if options.length else {}
        blocks |= {"image": len(text.image_blocks(model.visual))} if images else {}
        if options.depth > (least := min(blocks.values())):
            towers = " and ".join(f"the {name} tower has {count} blocks" for name, count in blocks.items())
            raise UserError(f"depth is {options.depth}: {towers}. Give {least} or less (--model.prompts.depth).")
        self.tokens.requires_grad_(options.length > 0)
        shape, device = self.tokens.shape, self.tokens.device
        later = range(1, options.depth if options.length else 1)
        self.texts = nn.ParameterList([_draw_tokens(shape, seed, f"prompts.text.{block}", device) for block in later])
        self.images = nn.ParameterList()

    def deep(self) -> list[Tensor]:
        return list(self.texts)

    def vision(self) -> list[Tensor]:
        return list(self.images)


class MaPLe(PromptLearner):
    """Multi-modal prompts: the image tower's tokens are linear functions of the text tower's, block by block.

    Each of the first J blocks has n learned tokens P_i for texts, and ``Q_i = P_i W_i^T + b_i`` for images. The
    functions hold nearly all that trains: 3,545,856 of 3,555,072 numbers for CLIP-ViT-B. A prediction needs P and Q.

    Examples:
        >>> task = PromptTask("tiny", prompts=MaPLe(depth=2))
    """

    length: Count = 2
    """Learned tokens n of each block."""
    depth: Count = 9
    """Blocks J with their own tokens, in both towers."""
    words: str = "a photo of a"
    """Words that the first tokens start from. Words beyond ``length`` stay as they are."""
    coupling: Literal["linear", "low_rank", "none"] = "linear"
    """``linear``; ``low_rank`` with W_i of rank ``rank``, ours; or ``none``, which is `DeepPrompts`."""
    rank: Count = 16
    """Rank of ``low_rank``."""
    equal_start: bool = True
    """Start the functions of all later blocks from one value, as the released code does."""

    visual = True

    def build(self, model: nn.Module, tokenizer: Tokenizer, classnames: Sequence[str], seed: int) -> Prompts:
        """Return the learned tokens and the functions that couple them."""
        if self.coupling == "none":
            return DeepPrompts(length=self.length, vision_length=self.length, depth=self.depth, words=self.words).build(
                model, tokenizer, classnames, seed
            )
        prompts = _CoupledPrompts(model, tokenizer, self, seed, True)
        prompts.projections = nn.ModuleList()
        own, width, device = prompts.tokens.shape[1], text.image_width(model.visual), prompts.tokens.device
        for block in range(self.depth):  # with PyTorch's first values of a linear layer
            part = min(block, 1) if self.equal_start else block
            with rng.seeded(int(rng.words(seed, "prompts.projection", torch.tensor(part)))):
                if self.coupling == "linear":
                    prompts.projections.append(nn.Linear(own, width, device=device))
                else:
                    layers = nn.Linear(own, self.rank, bias=False), nn.Linear(self.rank, width, bias=False)
                    prompts.projections.append(nn.Sequential(*layers).to(device))
        return prompts


class _CoupledPrompts(_DeepPrompts):
    projections: nn.ModuleList

    def vision(self) -> list[Tensor]:
        with torch.autocast(self.tokens.device.type, enabled=False):
            each = [self.tokens, *self.texts]
            return [function(tokens) for function, tokens in zip(self.projections, each, strict=True)]
