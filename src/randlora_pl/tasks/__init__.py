"""The tasks: what is learned, and the LightningModule that trains it.

Examples:
    >>> from randlora_pl.adapters import RandLoRA
    >>> from randlora_pl.data import ImageData
    >>> from randlora_pl.tasks import AdaptationModule, VisionLanguageTask, load_task, make_trainer
    >>> task = VisionLanguageTask("tiny", adapter=RandLoRA(rank=6))
    >>> data = ImageData(dataset="digits", steps=20)
    >>> trainer = make_trainer()
    >>> trainer.fit(module := AdaptationModule(task), data)
    >>> (metrics,) = trainer.test(module, data, verbose=False)
    >>> metrics["test/acc"] > 0.1
    True
    >>> task.save("adapter")
    >>> probabilities = torch.cat(trainer.predict(AdaptationModule(load_task("adapter")), data))
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.tasks.images import ImageTask
    from randlora_pl.tasks.linear_head import HeadTask, LinearHeadTask
    from randlora_pl.tasks.measures import LOSS, Measure
    from randlora_pl.tasks.module import AdaptationModule, make_trainer
    from randlora_pl.tasks.objective import Objective
    from randlora_pl.tasks.prompt.parts import DePT, SelfRegulation, TipAdapter
    from randlora_pl.tasks.prompt.task import PromptTask
    from randlora_pl.tasks.restore import load_task, load_tasks, register, weighted_task
    from randlora_pl.tasks.text_head import TextHeadTask
    from randlora_pl.tasks.vision_language import VisionLanguageTask

DEFAULT = "VisionLanguageTask"
"""The task of a config without a model."""

__getattr__, __dir__ = lazy_exports(__name__, __file__)
