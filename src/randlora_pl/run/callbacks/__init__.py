"""Callbacks of a run: printed summaries, measurements, checks, checkpoints and plots.

`randlora-pl fit` adds all of them. In Python you choose:

Examples:
    >>> from lightning.pytorch.loggers import CSVLogger
    >>> from randlora_pl.run.callbacks import RunCheckpoint, Figures, GradientFlow, Patience, PeakMemory, PerClass
    >>> from randlora_pl.run.callbacks import Elsewhere, Gates, NewClasses, ProgressBar, ProgressLines, Throughput
    >>> from randlora_pl.run.callbacks import UnseenGradient, UpdateSpectrum, ValidationSchedule
    >>> callbacks = [GradientFlow(action="raise"), UpdateSpectrum(every_n_steps=2), PeakMemory(), Throughput()]
    >>> callbacks += [ValidationSchedule(), Patience("val/acc", "max", patience=3), PerClass(), Figures(samples=4)]
    >>> callbacks += [Elsewhere(["mnist_5k"], images=100), Gates(), ProgressLines()]
    >>> callbacks += [RunCheckpoint()]  # last, so that its files have what the others keep
    >>> trainer = make_trainer(callbacks=callbacks, logger=CSVLogger("runs/mine"), default_root_dir="runs/mine")
    >>> trainer.fit(AdaptationModule(VisionLanguageTask("tiny")), ImageData(dataset="digits", steps=4))

    A test on the classes that the training left out:

    >>> trainer = make_trainer(callbacks=[NewClasses()])
    >>> base = ImageData(dataset="digits", classes="base", steps=4)
    >>> trainer.fit(module := AdaptationModule(VisionLanguageTask("tiny")), base)
    >>> sorted(trainer.test(module, base, verbose=False)[0])
    ['test/acc', 'test/loss', 'test/new/acc']

    Plots of predictions and of gates (layers, classes, heads):

    >>> from randlora_pl.run.callbacks import confusion_figure, gates_figure, samples_figure
    >>> confusion = confusion_figure(torch.tensor([[9, 1], [0, 10]]), ["cat", "dog"])
    >>> samples = samples_figure([torch.zeros(3, 32, 32)], ["cat"], ["dog"], [0.93])
    >>> gates = gates_figure(torch.full((2, 2, 3), 1 / 3), ["fc1", "fc2"], ["cat", "dog"])
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.run.callbacks.checkpoint import GaussianAverage, Patience, RunCheckpoint, ValidationSchedule
    from randlora_pl.run.callbacks.evaluation import Elsewhere, NewClasses, PerClass, WrittenAnswers, ZeroShot
    from randlora_pl.run.callbacks.figures import Figures, Gates, confusion_figure, gates_figure, samples_figure
    from randlora_pl.run.callbacks.gradients import GradientFlow, UnseenGradient, UpdateSpectrum
    from randlora_pl.run.callbacks.progress import (
        HeldLock,
        NonFiniteLoss,
        PeakMemory,
        ProgressBar,
        ProgressLines,
        StepNumbers,
        Termination,
        Throughput,
    )
    from randlora_pl.run.callbacks.summary import StartSummary

__getattr__, __dir__ = lazy_exports(__name__, __file__)
