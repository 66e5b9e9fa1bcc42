"""Execution of a backbone: the dtype of its frozen weights, and compiled blocks."""

from typing import Any

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from randlora_pl.adapters import Adapter
from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.models import cast_frozen, compile_blocks, use_fast_layers
