"""The language experiments: text data, prompts, answers and scores, behind the extra ``language``.

`catalog` imports no PyTorch, so that listing the data sets is instant; what is exported here is loaded on first use.
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.language.data.labelled_module import LabelledTexts
    from randlora_pl.language.data.prompts_module import TextData
    from randlora_pl.language.tasks.causal_lm import CausalLMTask
    from randlora_pl.language.tasks.classification import TextClassificationTask
    from randlora_pl.language.tasks.restore import load_language_task

__all__ = ["CausalLMTask", "LabelledTexts", "TextClassificationTask", "TextData", "load_language_task"]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
