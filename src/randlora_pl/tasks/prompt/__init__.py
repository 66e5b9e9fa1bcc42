"""The task of learned prompts, its second head, and its regulation by the pretrained model."""

from randlora_pl.tasks.prompt.decoupled import DePT
from randlora_pl.tasks.prompt.regulation import SelfRegulation
from randlora_pl.tasks.prompt.task import PromptTask
from randlora_pl.tasks.prompt.tip import TipAdapter

__all__ = ["DePT", "PromptTask", "SelfRegulation", "TipAdapter"]
