"""Analyses of adapter files: spectra of updates, and effects on activations, losses and other datasets.

Examples:
    >>> from randlora_pl.adapters import read_adapter
    >>> from randlora_pl.lab.analysis import common_layers, layer_spectrum, matrix_updates, means, spectrum_figure
    >>> updates = matrix_updates(read_adapter("runs/one/adapter"))
    >>> spectrum = [layer_spectrum(layer, update) for layer, update in updates.items()]
    >>> len(common_layers([spectrum, spectrum])), sorted(means(spectrum))[:2]
    (30, ['effective_rank', 'full_rank'])
    >>> figure = spectrum_figure({"RandLoRA": spectrum})

    >>> from randlora_pl.lab.analysis import batches, cka_figure, compare
    >>> from randlora_pl.data import ImageData
    >>> from randlora_pl.tasks import AdaptationModule, load_task, make_trainer
    >>> one, two = load_task("runs/one/adapter"), load_task("runs/two/adapter")
    >>> data = ImageData(dataset="digits")
    >>> (metrics,) = make_trainer().test(AdaptationModule(one), data, verbose=False)
    >>> images = [image for image, _ in batches(data, data.samples("test"), 60)]
    >>> curves = compare(one.model, {"two": two.model}, images)
    >>> figure = cka_figure(curves, "one", "60 test images of digits")

    >>> from randlora_pl.lab.analysis import POSITIONS, Grid, Landscape, Plane, contour_figure, loss
    >>> three = load_task("runs/one/adapter")
    >>> kept = list(batches(data, data.samples("test"), 20))
    >>> plane = Plane.through([one, two, three], POSITIONS["paper"])
    >>> plane.write_point(0.5, 0.5)
    >>> height = loss(one, kept)
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.data.unlabelled import batches
    from randlora_pl.lab.analysis.models import (
        POSITIONS,
        Grid,
        Landscape,
        Plane,
        cka_figure,
        compare,
        contour_figure,
        loss,
    )
    from randlora_pl.lab.analysis.weights import (
        LayerSpectrum,
        common_layers,
        layer_spectrum,
        matrix_updates,
        means,
        spectrum_figure,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
