"""Vision-language fine-tuning of CLIP, and its losses: both towers learn to match images and captions (section 5.3)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from randlora_pl.data.image_batches import counted_classes
from randlora_pl.models.text import Tokenizer, check_distinct, class_prompts, encode_prompts
from randlora_pl.tasks.images import ClipTask, UsedPrompts, normalize, similarities
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError

CAPTION = "An image of {}"
"""The default caption: of the paper's protocol."""


class VisionLanguageTask(ClipTask):
    """Fine-tunes both towers of a CLIP model on images and one caption for each.

    A model with a logit bias (SigLIP) trains with its sigmoid loss, any other by the softmax over the captions.

    Examples:
        >>> task = VisionLanguageTask("tiny", adapter=RandLoRA(rank=6))
        >>> make_trainer().fit(AdaptationModule(task), ImageData(dataset="digits", steps=2))
    """

    takes_captions = True
    adopts = "both towers"

    logit_scale: Literal["exp", "raw"] = "exp"
    """``exp`` multiplies similarities by exp(logit_scale), as CLIP was trained; ``raw`` by logit_scale itself, as the
    official code does in this task. Not for SigLIP."""
    caption: str | None = CAPTION
    """The caption of a class, with ``{}`` for its name. ``null`` gives a class one of the dataset's prompts in each
    step, and evaluates with their mean, as typed ``data.templates`` do."""
    loss_batch: Literal["joint", "local"] = "joint"
    """``joint`` compares an image with the captions of the whole batch of an optimizer step, on all devices and in all
    micro-batches; ``local`` with the captions of its own micro-batch on its own device."""
    eval_prompts: Literal["caption", "ensemble"] = "caption"
    """``caption`` evaluates with that caption, ``ensemble`` with the dataset's templates averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.caption is not None and "{}" not in self.caption:
            raise UserError(f"caption is {self.caption!r}: it needs {{}} where the class name goes (--model.caption).")
        self._pairs: list[tuple[Tensor, ...]] = []

    def take_texts(self, model: nn.Module, tokenizer: Tokenizer) -> None:
        """Tokenize the captions of all classes.

        Raises:
            UserError: The scale of the logits does not suit the model, or two classes have the same caption.
        """
        if self.logit_scale == "raw" and logit_bias(model) is not None:
            raise UserError(
                f"--model.logit_scale raw does not suit the sigmoid loss of {self.name}: use --model.logit_scale exp."
            )
        self.tokenizer = tokenizer
        if not self.retrieval:
            check_distinct(tokenizer, self.classnames, self.used_prompts().training)
        tokens = tokenizer(class_prompts(self.classnames, self.used_prompts().training))
        self.register_buffer("tokens", tokens.view(len(self.classnames), -1, tokens.shape[1]), persistent=False)

    def used_prompts(self, templates: Sequence[str] | None = None) -> UsedPrompts:
        """Return the prompts of the task, with the templates of other data if given; captions stay as they are."""
        if self.retrieval:
            return UsedPrompts(["{}"], ["{}"], drawn=True)
        texts = self.templates_for(templates)
        if self.caption is None:
            return UsedPrompts(texts, texts, drawn=True)
        return UsedPrompts([self.caption], texts if self.eval_prompts == "ensemble" else [self.caption], drawn=True)

    def use_typed_prompts(self) -> None:
        """Let typed prompts replace the default caption.

        Raises:
            UserError: A caption is given, too.
        """
        if self.caption not in (None, CAPTION):
            raise UserError(
                f"the caption {self.caption!r} and --data.templates both set the prompts. Remove --data.templates, or "
                "add --model.caption null: a class then has one of the templates in each step."
            )
        self.caption = None

    def caption_tokens(self, classes: Tensor) -> Tensor:
        """Return the tokens (u, length) of some classes' captions in this step, of several one drawn for each class."""
        tokens: Tensor = self.tokens  # type: ignore[assignment]
        count, prompts, _ = tokens.shape
        if prompts == 1:
            return tokens[classes, 0]
        return tokens[classes, rng.integers(self.seed, "caption", classes + self.run.step() * count, prompts)]

    def scale(self) -> Tensor:
        """Return the factor of the similarities, a scalar."""
        raw: Tensor = self.model.logit_scale  # type: ignore[assignment]
        return raw.exp() if self.logit_scale == "exp" else raw

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the loss of each image over the captions of the step or micro-batch (`loss_batch`)."""
        classes, counts = self._captions(batch)

        def encode() -> Tensor:
            return normalize(self.model.encode_text(self.caption_tokens(classes)))  # type: ignore[operator]

        texts = encode() if self.loss_batch == "local" else self.shared_features(batch, encode)
        images = normalize(self.noted(self.model.encode_image(batch["image"])))  # type: ignore[operator]
        logits = self.scale() * similarities(images, texts)
        losses = pair_losses(self.model, logits, batch["label"], classes, counts)
        return losses, classes[logits.argmax(1)] == batch["label"]

    def loss_floor(self, batch: dict[str, Any]) -> Tensor | float:
        """Return the part of each loss that equal captions cause (see `pair_floor`)."""
        return pair_floor(self.model, batch["label"], *self._captions(batch))

    @property
    def loss_note(self) -> str:
        """Meaning of the metric ``train/loss``, for the start page."""
        if logit_bias(self.model) is not None:
            return "the sigmoid loss of all pairs of a batch, with the model's scale and bias: 0 is a perfect fit"
        return "loss above the minimum that equal captions in a batch allow: 0 is a perfect fit"

    def _captions(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the classes that an image is compared with, and their counts.

        Every process knows the samples of the whole step, so that nothing is exchanged for its captions.
        """
        if "captions" not in batch:  # once for the loss and its floor
            if self.loss_batch == "joint":
                counted = batch["step_classes"], batch["step_counts"]
            elif "own_classes" in batch:
                counted = batch["own_classes"], batch["own_counts"]
            else:  # the data module counts on the host; here a GPU is waited for
                counted = counted_classes(batch["label"], batch["weight"] > 0)
            # Each shape costs compiled code minutes, or a CUDA graph.
            batch["captions"] = padded_captions(*counted, most=len(self.classnames)) if self.torch_compile else counted
        captions: tuple[Tensor, Tensor] = batch["captions"]
        return captions

    def forget(self) -> None:
        """Drop what was encoded and collected with other weights."""
        super().forget()
        self._pairs = []

    def class_features(self) -> Tensor:
        """Return embeddings of the class prompts (classes, e), encoded at the first use in an evaluation."""
        if self._class_features is None:
            self._class_features = self.features_of(self.classnames, self.templates)
        return self._class_features

    def features_of(self, classnames: list[str], templates: Sequence[str] = ()) -> Tensor:
        """Return embeddings of the prompts of any classes (classes, e), made as in an evaluation."""
        prompts = self.used_prompts(templates).evaluation
        return encode_prompts(self.model, self.tokenizer, classnames, prompts, self.device)

    def evaluate(self, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        """Update loss and accuracy for classes; for captions collect what recall needs."""
        if not self.retrieval:
            return super().evaluate(batch, stage)
        features = normalize(self.model.encode_image(batch["image"]))  # type: ignore[operator]
        assert self.run.data is not None
        rows = torch.from_numpy(self.run.data.samples(stage).rows).to(self.device)
        self._pairs.append((features, rows[batch["index"]], batch["label"], batch["weight"]))
        return {}

    def stage_metrics(self, stage: str) -> dict[str, Metric]:
        """Return loss and accuracy, which captions do not have."""
        return {} if self.retrieval else super().stage_metrics(stage)

    def final_metrics(self, stage: str) -> dict[str, Tensor | float]:
        """Return recall over the pairs of all ranks of captions; ``acc`` is recall at 1 from image to caption."""
        if not self.retrieval:
            return {}
        gathered = [self.run.gather(torch.cat(parts)) for parts in zip(*self._pairs, strict=True)]
        features, images, captions, weight = gathered
        counts = weight > 0
        first, image_ids = unique_rows(images[counts])
        texts, text_ids = torch.unique(captions[counts], return_inverse=True)
        prompts = [self.classnames[number] for number in texts.tolist()]
        text_features = encode_prompts(self.model, self.tokenizer, prompts, ["{}"], self.device)
        values = recalls(features[counts][first], text_features, image_ids, text_ids)
        return {"acc": values["recall@1"], **values}

    def class_logits(self, images: Tensor) -> Tensor:
        """Return scaled similarities with every class, (b, classes)."""
        features = normalize(self.model.encode_image(images))  # type: ignore[operator]
        return self.scale() * similarities(features, self.class_features())


def caption_losses(logits: Tensor, labels: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Compute the image-to-text cross-entropy over the captions of an optimizer step, each unique caption once.

    The protocol compares every image with every caption of the batch, and equal captions are equal
    columns. Their sum is one column with the log of its count added, so with n_c captions of
    class c the loss is ``log sum_c n_c exp(z_c) - z_y``, value and gradient alike (protocol 2.3).

    Args:
        logits: (b, u) similarities of b images and the u unique captions of the step.
        labels: (b,) classes of the images.
        classes: (u,) sorted classes of the captions.
        counts: (u,) number of each in the step.

    Returns:
        (b,) loss of each image.
    """
    logits = logits.float()
    target = torch.searchsorted(classes, labels)
    own = logits.gather(1, target[:, None])[:, 0]
    return torch.logsumexp(logits + counts.float().log(), dim=1) - own


def sigmoid_losses(logits: Tensor, labels: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Compute SigLIP's sum over the pairs of an image with the captions of an optimizer step, each unique caption once.

    A pair is positive if the caption's class is the image's. With n_c captions of class c the loss is
    ``sum_c n_c log(1 + exp(-+ z_c))``, where the sign is minus for the own class (Zhai et al., arXiv 2303.15343).

    Its arguments are described at `caption_losses`; the logits contain the model's bias.
    """
    logits = logits.float()
    signed = torch.where(classes == labels[:, None], logits, -logits)
    return -(counts * nn.functional.logsigmoid(signed)).sum(1)


def logit_bias(model: nn.Module) -> Tensor | None:
    """Return the bias of a model's logits, which models that were pretrained with the sigmoid loss have; else None."""
    return getattr(model, "logit_bias", None)


def pair_losses(model: nn.Module, logits: Tensor, labels: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Return `sigmoid_losses` if a model was pretrained with them, else `caption_losses`; logits are without bias."""
    bias = logit_bias(model)
    if bias is None:
        return caption_losses(logits, labels, classes, counts)
    return sigmoid_losses(logits + bias, labels, classes, counts)


def pair_floor(model: nn.Module, labels: Tensor, classes: Tensor, counts: Tensor) -> Tensor | float:
    """Return the infimum of `pair_losses` over all logits, (b,) or 0.

    No logits can separate equal captions: it is ``log n_y``, the loss of an image that matches its own caption alone.
    """
    if logit_bias(model) is not None:
        return 0.0
    return counts[torch.searchsorted(classes, labels)].clamp(min=1).float().log()


def padded_captions(classes: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return captions and counts in one of few shapes, for compiled code: a multiple of 16, or ``most``.

    The last class is repeated with count 0, so that classes stay sorted, and losses, gradients and the likeliest class
    stay the same: its column adds exp(-inf) to each sum.

    Args:
        classes: (u,) sorted classes of the captions.
        counts: (u,) number of each in the step.
        most: Number of all classes.
    """
    extra = max(0, min(-(-len(classes) // 16) * 16, most) - len(classes))
    return torch.cat([classes, classes[-1:].expand(extra)]), torch.cat([counts, counts.new_zeros(extra)])


def recalls(images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor) -> dict[str, float]:
    """Compute the fraction of queries with a partner among the k nearest candidates.

    An image may have several captions and a caption several images; one partner among the first k is a hit.

    Args:
        images: (m, e) features of unit length, one row for each different image.
        texts: (n, e) features of unit length, one row for each different caption.
        image_ids: (p,) row of the image of each pair.
        text_ids: (p,) row of the caption of each pair.

    Returns:
        ``recall@k`` (image to text) and ``text_to_image_recall@k`` for k = 1, 5 and 10.
    """
    partners = torch.zeros(len(images), len(texts), dtype=torch.bool, device=images.device)
    partners[image_ids, text_ids] = True
    similarity = images @ texts.T
    shares = {}
    for prefix, scores, hits in (("", similarity, partners), ("text_to_image_", similarity.T, partners.T)):
        order = scores.topk(min(10, scores.shape[1]), dim=1).indices
        right = hits.gather(1, order).cumsum(dim=1) > 0
        for k in (1, 5, 10):
            shares[f"{prefix}recall@{k}"] = right[:, min(k, right.shape[1]) - 1].float().mean().item()
    return shares


def unique_rows(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first position of each different number, in sorted order, and the row of each number among them."""
    unique, rows = torch.unique(numbers, return_inverse=True)
    indices = torch.arange(len(numbers), device=numbers.device)
    first = torch.full_like(unique, len(numbers)).scatter_reduce(0, rows, indices, "amin")
    return first, rows
