"""HTTP serving of adapters with LitServe: options, `uploads` and `app` with server and workers, `on_demand` loading."""

from dataclasses import dataclass
from typing import Annotated, Literal

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.machine import Precision
from randlora_pl.utils.options import Adapter, Check, Count, Folder, Option, between

MAX_PIXELS = 50_000_000
"""Maximum number of pixels of an image: decoding takes at least 4 bytes per pixel."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of the server.

    Attributes:
        adapter: Folder, file or run of an image adapter. It stores base model name, class names and prompts.
        adapters: Folder with adapters of one base model, NAME or NAME.safetensors, instead of --adapter. A request
            names one: adapter=NAME. Files may change while the server runs. Links are not followed.
        adapter_memory: Maximum memory for adapters of the folder, per worker. One with its head needs up to twice its
            file. The least recently used are unloaded.
        host: 127.0.0.1 is for this machine only, 0.0.0.0 or :: for all.
        port: TCP port.
        token: Answer only requests with the header Authorization: Bearer TOKEN. Other users can see the option in the
            list of processes, but not the environment variable RANDLORA_PL_TOKEN.
        precision: tf32: faster products on NVIDIA GPUs from 2020 or later. bf16: as in training with bf16-mixed.
        workers: Processes with a model of their own. One worker per GPU is usually enough.
        batch_size: Maximum number of images per batch.
        batch_timeout: Seconds to wait for a batch to fill. 0 does not wait.
        max_upload_mb: Larger uploads get status 413, much larger ones before they are read.
        max_pixels: Larger images get status 413 after reading their header.
    """

    adapter: Adapter | None = None
    adapters: Folder | None = None
    adapter_memory: Annotated[float, Check(lambda size: 0 < size < 1e9, "a positive number of MB"), Option("MB")] = (
        1000.0
    )
    host: Literal["127.0.0.1", "0.0.0.0", "::"] = "127.0.0.1"
    port: Annotated[int, between(1024, 65535)] = 8000
    token: Annotated[str, Option("TOKEN")] = ""
    precision: Precision = "32"
    workers: Count = 1
    batch_size: Count = 16
    batch_timeout: Annotated[float, between(0, 10), Option("SECONDS")] = 0.01
    max_upload_mb: Annotated[
        float, Check(lambda size: 0 < size <= 1000, "more than 0 and at most 1000 MB"), Option("MB")
    ] = 20.0
    max_pixels: Count = MAX_PIXELS

    def __post_init__(self) -> None:
        if (self.adapter is None) == (self.adapters is None):
            raise UserError("serve: give either --adapter ADAPTER, or a folder with several, --adapters DIR.")
