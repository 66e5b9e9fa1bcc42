"""Methods, one file each, imported together, so that parsers find them all."""

from randlora_pl.adapters.methods.adalora import AdaLoRA
from randlora_pl.adapters.methods.autolora import AutoLoRA
from randlora_pl.adapters.methods.dora import DoRA
from randlora_pl.adapters.methods.full import BitFit, Frozen, FullFineTuning, LinearProbe
from randlora_pl.adapters.methods.galore import Fira, GaLore
from randlora_pl.adapters.methods.hira import HiRA
from randlora_pl.adapters.methods.hydralora import HydraLoRA
from randlora_pl.adapters.methods.kradapter import KRAdapter
from randlora_pl.adapters.methods.lora import LoRA
from randlora_pl.adapters.methods.loraxs import LoRAXS
from randlora_pl.adapters.methods.nola import NoLA
from randlora_pl.adapters.methods.oft import OFT
from randlora_pl.adapters.methods.pissa import PiSSA
from randlora_pl.adapters.methods.pranc import PRANC
from randlora_pl.adapters.methods.randlora import RandLoRA
from randlora_pl.adapters.methods.shira import SHiRA
from randlora_pl.adapters.methods.svft import SVFT
from randlora_pl.adapters.methods.together import Together
from randlora_pl.adapters.methods.vera import VeRA

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
