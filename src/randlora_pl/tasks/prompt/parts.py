"""Parts of `PromptTask` other than its prompts: second heads (DePT, Tip-Adapter) and the regulation of PromptSRC.

DePT: arXiv 2309.07439. Tip-Adapter: Zhang et al., arXiv 2207.09519. PromptSRC: Khattak et al., arXiv 2307.06948.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from randlora_pl.adapters import disabled
from randlora_pl.adapters.described import Described
from randlora_pl.data import ImageData
from randlora_pl.data.catalog import IMAGENET_TEMPLATES
from randlora_pl.data.image_batches import EvalBatches, TrainBatches
from randlora_pl.data.loader import DrawPlan, EvalSchedule, Loader, TrainSchedule
from randlora_pl.models.text import TextRows, class_prompts, encode_rows, image_features, is_causal, text_tower
from randlora_pl.tasks.images import normalize, similarities
from randlora_pl.tasks.objective import Objective
from randlora_pl.tasks.prompt.features import PromptedClip
from randlora_pl.tasks.second_head import SecondHead
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError, log
from randlora_pl.utils.options import Fraction, NotNegative, Positive, between

VIEWS = 10
"""Augmented views of an image, whose mean is its key."""
MOST_IMAGES = 100_000
"""More keys, and their classes, take gigabytes."""
ALPHAS, BETAS = 20, 200
"""Values that the search tries: alpha up to 3, beta up to 7."""
Batches = Iterator[tuple[dict[str, Any], Tensor]]
"""Batches with the unit features (b, e) of their images."""


class SecondHeadOptions(Described):
    """Options of a second head.

    Attributes:
        why_not_linear: Why no linear head has the logits of both heads.
    """

    why_not_linear: ClassVar[str]
    rate_factor: float = 1.0
    """Learning rate of the second head, as a multiple of the prompts'."""

    @abstractmethod
    def build(self, task: PromptedClip, features: int) -> SecondHead:
        """Return the second head for the classes of a task, whose features have this width."""


class DePT(SecondHeadOptions):
    """Decoupled prompt tuning: what only the known classes need goes into features of its own.

    Features of images and of texts, not normalized, are scaled and shifted channel by channel, and one linear probe
    classifies both. Its loss has the share ``weight`` of the whole. Known classes are predicted from both heads'
    logits, ``(1 - weight) similarities + weight probe``; other classes from the similarities alone. It adds
    4 e + C (e + 1) numbers.

    Examples:
        >>> task = PromptTask("tiny", prompts=MaPLe(depth=2), head=DePT())
    """

    why_not_linear = "DePT adds the logits of two heads, which no library does"

    weight: Annotated[float, Fraction] = 0.7
    """Share of the second head."""
    rate_factor: Annotated[float, Positive] = 6.5
    """Learning rate of the second head, as a multiple of the prompts'."""

    def build(self, task: PromptedClip, features: int) -> "Decoupled":
        """Return the second head for the classes of a task, whose features have this width."""
        return Decoupled(self.weight, features, len(task.own_classes), task.seed)


class Affine(nn.Module):
    """Scale and shift of each channel (e,), the identity at first."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return features (n, e), scaled and shifted."""
        return self.scale * x.float() + self.shift


class Decoupled(SecondHead):
    """The second head of `DePT`."""

    unit_features = False

    def __init__(self, weight: float, features: int, classes: int, seed: int) -> None:
        super().__init__()
        self.weight, self.share = weight, 1 - weight
        self.image, self.text = Affine(features), Affine(features)
        with rng.seeded(int(rng.words(seed, "prompts.probe", torch.tensor(0)))):
            self.probe = nn.Linear(features, classes)

    def _logits(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.probe(features)
            return logits

    def losses(self, losses: Tensor, images: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
        """Return the losses (b,) of both heads: the probe sees each image, and the text of its class."""
        of_images = nn.functional.cross_entropy(self._logits(self.image(images)), labels, reduction="none")
        of_texts = nn.functional.cross_entropy(self._logits(self.text(texts[labels])), labels, reduction="none")
        return (1 - self.weight) * losses + self.weight * (of_images + of_texts) / 2

    def mixed(self, similarities: Tensor, images: Tensor) -> Tensor:
        """Return the logits (b, C) of both heads for images (b, e), not normalized."""
        return (1 - self.weight) * similarities + self.weight * self._logits(self.image(images))

    def classifier(self, head: Tensor) -> nn.Module:
        """Return similarities and the probe as one module on features that are not normalized."""
        return _Folded(self, head)


class _Folded(nn.Module):
    """The heads of `Decoupled` for a prediction: the probe is one linear layer on image features."""

    head: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, second: Decoupled, head: Tensor) -> None:
        super().__init__()
        self.share, probe, image = second.weight, second.probe, second.image
        bias = probe.bias + probe.weight @ image.shift
        for name, value in (("head", head), ("weight", probe.weight * image.scale), ("bias", bias)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        near = nn.functional.linear(nn.functional.normalize(features, dim=-1), self.head)
        own = nn.functional.linear(features, self.weight, self.bias)
        return (1 - self.share) * near + self.share * own


class TipAdapter(SecondHeadOptions):
    """Tip-Adapter-F: the classes of similar training images are added to the similarities.

    The keys F (N, e) are unit means of features of ten augmented views of each training image, with classes Y (N, C).
    The logits of a unit feature f are the similarities plus ``alpha exp(-beta (1 - f F^T)) Y``. The keys train by the
    loss of these logits; other classes are predicted from the similarities alone. It needs ``Fixed`` prompts and the
    adapter ``Frozen``.

    Examples:
        >>> task = PromptTask("tiny", prompts=Fixed(), head=TipAdapter())
    """

    why_not_linear = "TipAdapter compares an image with training images, which no linear head can"

    rate_factor: Annotated[float, NotNegative] = 1.0
    """Learning rate of the keys, as a multiple of the prompts'. 0 is Tip-Adapter without training."""
    alpha: Annotated[float, NotNegative] = 1.0
    """Factor of the cache."""
    beta: Annotated[float, NotNegative] = 5.5
    """Sharpness of the cache."""
    search: bool = True
    """Replace alpha and beta by the best of a grid on the validation images, once, before the training; they stay
    without such images."""

    def build(self, task: PromptedClip, features: int) -> "Cache":
        """Return an empty cache for the training images of a run, or of the file that is loaded.

        Raises:
            UserError: There are none, or too many.
        """
        file, known = task.saved, torch.arange(len(task.own_classes))
        if file is not None:
            saved = file.extra.get("decoupled.labels")  # numbers of float32, as all tensors of a file
            if saved is None or saved.dim() != 1 or not bool(torch.isin(saved, known.to(saved)).all()):
                raise UserError(f"{file.path} lacks the classes of the images that TipAdapter keeps: it is damaged.")
            labels = saved.long()
        elif (data := task.run.data) is not None and hasattr(data, "crop_scale"):
            labels = torch.from_numpy(data.samples("train").labels)
        else:
            raise UserError("TipAdapter keeps features of training images: it needs a run with ImageData.")
        if len(labels) > MOST_IMAGES:
            raise UserError(
                f"TipAdapter keeps a feature of each training image: {len(labels):,} are too many, at most "
                f"{MOST_IMAGES:,} are possible. Choose some, for example --data.shots 16."
            )
        return Cache(self, labels, features, len(known))


class Cache(SecondHead):
    """The keys and classes of `TipAdapter`; without keys it adds nothing to the similarities."""

    eps = 1e-4
    labels: Tensor
    factors: Tensor
    values: Tensor

    def __init__(self, options: TipAdapter, labels: Tensor, features: int, classes: int) -> None:
        super().__init__()
        self.options = options
        self.keys = nn.Parameter(torch.zeros(len(labels), features))
        self.register_buffer("labels", labels.float())
        self.register_buffer("factors", torch.tensor([options.alpha, options.beta]))
        self.register_buffer("values", nn.functional.one_hot(labels, classes).float(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return what the cache adds to the logits (b, C) of unit features (b, e)."""
        near = torch.exp(-self.factors[1] * (1 - features @ self.keys.T))
        added: Tensor = self.factors[0] * (near @ self.values)
        return added

    def mixed(self, similarities: Tensor, images: Tensor) -> Tensor:
        """Return the logits (b, C) of similarities and cache for images (b, e), not normalized."""
        with torch.autocast(images.device.type, enabled=False):
            added: Tensor = self(normalize(images))
            return similarities + added

    training_logits = mixed

    def classifier(self, head: Tensor) -> nn.Module:
        """Return similarities and cache as one module: two products and an exponential more."""
        return _Cached(self, head)

    def chosen(self) -> dict[str, Tensor]:
        """Return the factors alpha and beta."""
        return {"factors": self.factors}

    def start(self, task: Objective, encode: Callable[[Tensor], Tensor], compare: Callable[[Tensor], Tensor]) -> None:
        """Fill the cache of a new run, and choose its factors.

        Raises:
            UserError: The run has several steps, but nothing trains.
        """
        if not self.options.rate_factor and task.run.total_steps() > 1:
            raise UserError("the keys of TipAdapter do not train (rate_factor is 0): give --data.steps 1.")
        if task.run.step():  # a resumed run
            return
        run, data, training = task.run, task.run.data, task.training
        assert isinstance(data, ImageData)
        task.eval()

        def features(batches: TrainBatches | EvalBatches) -> Batches:
            """Yield batches and the unit features (b, e) of their images, the same in all processes."""
            for batch in Loader(batches, 0, data.processes("train"), data.skipped):
                with run.autocast():
                    features = encode(batch["image"].to(task.device))
                yield batch, normalize(features.float())

        with torch.no_grad():
            images, size, sums = data.samples("train"), data.eval_batch_size, torch.zeros(self.keys.shape)
            plan = DrawPlan(len(images), VIEWS * len(images), size, data.seed, "epochs", stream="cache")
            views = TrainBatches(
                images, TrainSchedule(plan, size), data.frame, data.crop_scale, bool(data.flip), data.skip
            )
            for batch, units in features(views):
                counts = (batch["weight"] > 0).float()  # neither padding nor unreadable
                sums.index_add_(0, batch["index"], units.cpu() * counts[:, None])
            self.keys.copy_(run.broadcast(normalize(sums)))
            samples = data.samples("val") if self.options.search and not data.trains_on_val else None
            if samples is not None and len(samples):
                schedule = EvalSchedule(len(samples), size)
                batches = features(EvalBatches(samples, schedule, data.frame, data.skip))
                self.factors.copy_(torch.tensor(run.broadcast(self._best(batches, compare))))
                log.info("TipAdapter: alpha %g and beta %g are best on validation images", *self.factors.tolist())
        task.train(training)

    def _best(self, batches: Batches, compare: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Return the alpha and beta of the most correct images; of equals the given ones, then the smallest."""
        given, device = self.factors.tolist(), self.factors.device
        alphas = torch.tensor([given[0], *(each * 3 / ALPHAS for each in range(1, ALPHAS + 1))], device=device)
        betas = [given[1], *(each * 7 / BETAS for each in range(1, BETAS + 1))]
        right = torch.zeros(len(betas), len(alphas), device=device)
        for batch, features in batches:
            labels, counts = batch["label"].to(device), (batch["weight"] > 0).to(device)
            similarities = compare(features).float()
            far = 1 - features @ self.keys.T
            for number, beta in enumerate(betas):
                logits = similarities + alphas[:, None, None] * (torch.exp(-beta * far) @ self.values)
                right[number] += ((logits.argmax(2) == labels) & counts).sum(1)
        ranked = right.flatten().tolist()
        best = ranked.index(max(ranked))
        return float(alphas[best % len(alphas)]), betas[best // len(alphas)]


class _Cached(nn.Module):
    """A linear head with the cache next to it."""

    head: Tensor

    def __init__(self, cache: Cache, head: Tensor) -> None:
        super().__init__()
        self.cache = cache
        self.register_buffer("head", head.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        added: Tensor = self.cache(features)
        return nn.functional.linear(features, self.head) + added


class SelfRegulation(Described):
    """Self-regulation: features and logits of the prompts stay near the pretrained model's.

    With units p of the prompted and z of the frozen model, a step's loss gets ``text`` times the mean of |g_p - g_z|
    over classes and channels, ``image`` times the mean of |f_p - f_z| over images and channels, and ``logits`` times
    KL(z || p) of the class probabilities, divided by C as the released code does.

    Examples:
        >>> task = PromptTask("tiny", prompts=DeepPrompts(depth=2), regulation=SelfRegulation(templates=4))
    """

    text: Annotated[float, NotNegative] = 25.0
    """Factor of the class features' term."""
    image: Annotated[float, NotNegative] = 10.0
    """Factor of the image features' term."""
    logits: Annotated[float, NotNegative] = 1.0
    """Factor of the divergence."""
    templates: Annotated[int, between(1, 80)] = 60
    """How many of CLIP's templates for ImageNet the frozen class features are means of."""

    def build(self, model: nn.Module, tokenizer: Callable[..., Tensor], classnames: Sequence[str]) -> "Teacher":
        """Return the pretrained model's class features: units of the means of features that are not normalized."""
        device = next(model.parameters()).device
        with torch.no_grad(), disabled(model):
            sums: Tensor | float = 0.0
            for template in IMAGENET_TEMPLATES[: self.templates]:
                ids = tokenizer(class_prompts(classnames, [template])).to(device)
                if is_causal(model):  # it need not read beyond the ends of the texts
                    features = encode_rows(text_tower(model), TextRows(ids, torch.full_like(ids, -1), ids.argmax(1)))
                else:
                    features = model.encode_text(ids)  # type: ignore[operator]
                sums = sums + features.float()
        assert isinstance(sums, Tensor)
        return Teacher(self, normalize(sums))


class Teacher(nn.Module):
    """The pretrained model's class features (C, e), and the distances to them."""

    texts: Tensor

    def __init__(self, factors: SelfRegulation, texts: Tensor) -> None:
        super().__init__()
        self.factors = factors
        self.register_buffer("texts", texts, persistent=False)

    def text_loss(self, texts: Tensor) -> Tensor:
        """Return the term of the class features (C, e), not normalized."""
        return self.factors.text * (normalize(texts) - self.texts).abs().mean()

    def image_losses(self, model: nn.Module, images: Tensor, features: Tensor, logits: Tensor, scale: Tensor) -> Tensor:
        """Return the terms (b,) of images, whose frozen features the model gives without its adapter and prompts."""
        tower: Any = model.visual
        with torch.no_grad(), disabled(model):
            frozen = normalize(image_features(tower, images))
        wanted = (scale * similarities(frozen, self.texts)).softmax(1)
        near = (normalize(features) - frozen).abs().mean(1)
        divergence = (
            nn.functional.kl_div(logits.float().log_softmax(1), wanted, reduction="none").sum(1) / logits.shape[1]
        )
        return self.factors.image * near + self.factors.logits * divergence
