"""Devices as rooflines: what a kernel takes at the rates that real kernels reach."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceModel:
    """Rates that kernels reach on a GPU, below the rates in its data sheet.

    Attributes:
        label: Name in tables.
        half: Operations a second of products in bfloat16 or float16.
        single: The same in float32, without TF32.
        bandwidth: Bytes a second of its memory.
        floor: Seconds of the smallest kernel.
    """

    label: str
    half: float
    single: float
    bandwidth: float
    floor: float

    def seconds(self, flops: float, size: float, dtype: torch.dtype, launches: int = 1) -> float:
        """Return the time of some launches that share operations and bytes: the slowest of the three limits.

        Args:
            flops: Operations of the products.
            size: Bytes read and written.
            dtype: Of the products.
            launches: Kernels that are started.
        """
        rate = self.half if dtype in (torch.bfloat16, torch.float16) else self.single
        return max(flops / rate, size / self.bandwidth, launches * self.floor)


DEVICES = {
    "h100": DeviceModel("H100", 600e12, 50e12, 2.75e12, 2.5e-6),
    "a100": DeviceModel("A100", 225e12, 17e12, 1.65e12, 3.5e-6),
    "rtx4090": DeviceModel("RTX 4090", 140e12, 60e12, 0.88e12, 2.5e-6),
}
