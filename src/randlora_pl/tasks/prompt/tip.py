"""Tip-Adapter: a cache of training images beside the similarities (Zhang et al., arXiv 2207.09519).

Functions take a `PromptTask` as ``Any``, because it imports this module.
"""

import logging
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile
from randlora_pl.adapters.described import Described
from randlora_pl.data.image_batches import EvalBatches, TrainBatches
from randlora_pl.data.loader import Loader
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.schedule import DrawPlan, EvalSchedule, TrainSchedule
from randlora_pl.tasks.losses import normalize
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import NotNegative

VIEWS = 10
"""Augmented views of an image, whose mean is its key."""
MOST_IMAGES = 100_000
"""More keys, and their classes, take gigabytes."""
ALPHAS, BETAS = 20, 200
"""Values that the search tries: alpha up to 3, beta up to 7."""
EPS = 1e-4
"""AdamW's, for the keys."""

log = logging.getLogger("randlora_pl")


class TipAdapter(Described):
    """Tip-Adapter-F: the classes of similar training images are added to the similarities.

    The keys F (N, e) are unit means of features of ten augmented views of each training image, with classes Y (N, C).
    The logits of a unit feature f are the similarities plus ``alpha exp(-beta (1 - f F^T)) Y``. The keys train by the
    loss of these logits; other classes are predicted from the similarities alone. It needs ``Fixed`` prompts and the
    adapter ``Frozen``.

    Examples:
        >>> task = PromptTask("tiny", prompts=Fixed(), head=TipAdapter())
    """

    rate_factor: Annotated[float, NotNegative] = 1.0
    """Learning rate of the keys, as a multiple of the prompts'. 0 is Tip-Adapter without training."""
    alpha: Annotated[float, NotNegative] = 1.0
    """Factor of the cache."""
    beta: Annotated[float, NotNegative] = 5.5
    """Sharpness of the cache."""
    search: bool = True
    """Replace alpha and beta by the best of a grid on the validation images, once, before the training; they stay
    without such images."""

    def build(self, task: Any, features: int, classes: int) -> "Cache":
        """Return an empty cache for the training images of a task, or of the file that it loads.

        Raises:
            UserError: There are none, or too many.
        """
        labels = _saved_labels(task.saved, classes) if task.saved is not None else _own_labels(task)
        if len(labels) > MOST_IMAGES:
            raise UserError(
                f"TipAdapter keeps a feature of each training image: {len(labels):,} are too many, at most "
                f"{MOST_IMAGES:,} are possible. Choose some, for example --data.shots 16."
            )
        return Cache(self, labels, features, classes)


def _own_labels(task: Any) -> Tensor:
    """Return the classes (N,) of the training images of a run."""
    data: Any = getattr(task._trainer, "datamodule", None)
    if not hasattr(data, "crop_scale"):
        raise UserError("TipAdapter keeps features of training images: it needs a run with ImageData.")
    return torch.from_numpy(data.samples("train").labels)


def _saved_labels(file: AdapterFile, classes: int) -> Tensor:
    """Return the classes (N,) of the keys in a file, which are numbers of float32 there, as all of its tensors."""
    labels = file.extra.get("decoupled.labels")
    known = torch.arange(classes)
    if labels is None or labels.dim() != 1 or not bool(torch.isin(labels, known.to(labels)).all()):
        raise UserError(f"{file.path} lacks the classes of the images that TipAdapter keeps: it is damaged.")
    return labels.long()


class Cache(nn.Module):
    """The keys and classes of `TipAdapter`; without keys it adds nothing to the similarities."""

    labels: Tensor
    factors: Tensor
    values: Tensor

    def __init__(self, options: TipAdapter, labels: Tensor, features: int, classes: int) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(len(labels), features))
        self.register_buffer("labels", labels.float())
        self.register_buffer("factors", torch.tensor([options.alpha, options.beta]))
        self.register_buffer("values", F.one_hot(labels, classes).float(), persistent=False)

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


def start(task: Any) -> None:
    """Fill the cache of a new run, and choose its factors.

    Raises:
        UserError: The run has several steps, but nothing trains.
    """
    cache, head = task.decoupled, task.head
    if not isinstance(cache, Cache):
        return
    if not head.rate_factor and task.total_steps() > 1:
        raise UserError("the keys of TipAdapter do not train (rate_factor is 0): give --data.steps 1.")
    if task.trainer.global_step:  # a resumed run
        return
    data, strategy, training = task.trainer.datamodule, task.trainer.strategy, task.training
    task.eval()
    with torch.no_grad():
        sums = torch.zeros(cache.keys.shape)
        for batch, features in _features(task, _views(data)):
            counts = (batch["weight"] > 0).float()  # neither padding nor unreadable
            sums.index_add_(0, batch["index"], features.cpu() * counts[:, None])
        cache.keys.copy_(strategy.broadcast(normalize(sums)))
        samples = data.samples("val") if head.search and not data.splits.trains_on_val else None
        if samples is not None and len(samples):
            cache.factors.copy_(torch.tensor(strategy.broadcast(_best(task, cache, samples))))
            log.info("TipAdapter: alpha %g and beta %g are best on validation images", *cache.factors.tolist())
    task.train(training)


def _views(data: Any) -> TrainBatches:
    """Return batches of all views of all training images."""
    samples, size = data.samples("train"), data.eval_batch_size
    plan = DrawPlan(len(samples), VIEWS * len(samples), size, data.seed, "epochs", stream="cache")
    return TrainBatches(samples, TrainSchedule(plan, size), data.frame, data.crop_scale, data.flip, data.skip)


def _features(task: Any, batches: TrainBatches | EvalBatches) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield batches and the unit features (b, e) of their images, the same in all processes."""
    data = task.trainer.datamodule
    for batch in Loader(batches, 0, data.processes("train"), data.skipped):
        with task.trainer.precision_plugin.forward_context():
            features = task._images(batch["image"].to(task.device))
        yield batch, normalize(features.float())


def _best(task: Any, cache: Cache, samples: Samples) -> tuple[float, float]:
    """Return the alpha and beta of the most correct validation images; of equals the given ones, then the smallest."""
    data, device = task.trainer.datamodule, task.device
    given = cache.factors.tolist()
    alphas = torch.tensor([given[0], *(each * 3 / ALPHAS for each in range(1, ALPHAS + 1))], device=device)
    betas = [given[1], *(each * 7 / BETAS for each in range(1, BETAS + 1))]
    right = torch.zeros(len(betas), len(alphas), device=device)
    texts = task._texts(task.model)
    schedule = EvalSchedule(len(samples), data.eval_batch_size)
    for batch, features in _features(task, EvalBatches(samples, schedule, data.frame, data.skip)):
        labels, counts = batch["label"].to(device), (batch["weight"] > 0).to(device)
        similarities = task._logits(features, texts).float()
        far = 1 - features @ cache.keys.T
        for number, beta in enumerate(betas):
            found = similarities + alphas[:, None, None] * (torch.exp(-beta * far) @ cache.values)
            right[number] += ((found.argmax(2) == labels) & counts).sum(1)
    ranked = right.flatten().tolist()
    best = ranked.index(max(ranked))
    return float(alphas[best % len(alphas)]), betas[best // len(alphas)]
