"""Selection of a dataset's images, identical for all models of an analysis."""

from randlora_pl.data import ImageData
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.sampling.splits import stratified
from randlora_pl.utils.errors import UserError


def stratified_fraction(samples: Samples, fraction: float, seed: int) -> Samples:
    """Return a stratified fraction of the samples, at least one; only seed and sample keys decide."""
    total = max(1, round(fraction * len(samples)))
    return samples.subset(stratified(samples.labels, samples.numbers, total, seed, "analysis"))


def check_classes(data: ImageData, classnames: list[str]) -> None:
    """Raise a `UserError` if the data has captions, or other classes than the model."""
    if data.row.captions:
        raise UserError(f"{data.row.name} has captions, not classes. Set a dataset with classes: --dataset NAME")
    if data.classnames != classnames:
        raise UserError(
            f"{data.row.name} has {len(data.classnames)} classes ({data.classnames[:3]} ...), but the model has "
            f"{len(classnames)} others ({classnames[:3]} ...). Set its dataset: --dataset NAME"
        )
