"""Methods, one file each, in folders by the rank of their update; imported together, so that parsers find them all."""

from randlora_pl.adapters.methods.fixed_rank.adalora import AdaLoRA
from randlora_pl.adapters.methods.fixed_rank.autolora import AutoLoRA
from randlora_pl.adapters.methods.fixed_rank.dora import DoRA
from randlora_pl.adapters.methods.fixed_rank.hydralora import HydraLoRA
from randlora_pl.adapters.methods.fixed_rank.lora import LoRA
from randlora_pl.adapters.methods.fixed_rank.loraxs import LoRAXS
from randlora_pl.adapters.methods.fixed_rank.nola import NoLA
from randlora_pl.adapters.methods.fixed_rank.pissa import PiSSA
from randlora_pl.adapters.methods.fixed_rank.vera import VeRA
from randlora_pl.adapters.methods.full_rank.hira import HiRA
from randlora_pl.adapters.methods.full_rank.kradapter import KRAdapter
from randlora_pl.adapters.methods.full_rank.oft import OFT
from randlora_pl.adapters.methods.full_rank.pranc import PRANC
from randlora_pl.adapters.methods.full_rank.randlora import RandLoRA
from randlora_pl.adapters.methods.full_rank.shira import SHiRA
from randlora_pl.adapters.methods.full_rank.svft import SVFT
from randlora_pl.adapters.methods.full_rank.together import Together
from randlora_pl.adapters.methods.optimizer.galore import Fira, GaLore
from randlora_pl.adapters.methods.whole.full import BitFit, Frozen, FullFineTuning, LinearProbe

__all__ = [
    "OFT",
    "PRANC",
    "SVFT",
    "AdaLoRA",
    "AutoLoRA",
    "BitFit",
    "DoRA",
    "Fira",
    "Frozen",
    "FullFineTuning",
    "GaLore",
    "HiRA",
    "HydraLoRA",
    "KRAdapter",
    "LinearProbe",
    "LoRA",
    "LoRAXS",
    "NoLA",
    "PiSSA",
    "RandLoRA",
    "SHiRA",
    "Together",
    "VeRA",
]
