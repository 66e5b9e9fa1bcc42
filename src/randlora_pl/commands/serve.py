"""``serve``: class probabilities of uploaded images over HTTP, from an adapter alone, or from several by name."""

import dataclasses
import errno
import importlib.util
import os
import shlex
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.commands.common import pick_device
from randlora_pl.run.options.saved_config import adapter_config
from randlora_pl.serving import ServerOptions
from randlora_pl.utils.adapter_schema import method_label
from randlora_pl.utils.errors import UserError, install
from randlora_pl.utils.machine import use_precision
from randlora_pl.utils.options import Device, Folder, Weights
from randlora_pl.utils.text import printable
from randlora_pl.utils.weights_files import file_name, register_weights

if TYPE_CHECKING:
    from randlora_pl.adapters import AdapterFile

TOKEN = "RANDLORA_PL_TOKEN"
"""Environment variable for the token: other users of the machine can see the value of ``--token``."""


def serve(
    options: ServerOptions,
    *,
    allow_host: Sequence[str] = (),
    device: Device = "auto",
    samples: Folder | None = None,
    pretrained: Weights = (),
) -> int:
    """Classify images over HTTP, with a web page to drop images on (extra `serve`).

    Examples:
        randlora-pl serve --adapter runs/quickstart/latest
        randlora-pl serve --adapters adapters/
        curl -F image=@photo.jpg 'http://127.0.0.1:8000/predict?top_k=3'
        curl -F image=@photo.jpg -F adapter=cars http://127.0.0.1:8000/predict
        curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict

    Args:
        allow_host: Further names in the Host header, such as a proxy's (default: this machine's)
        samples: Offer images of this folder on the page, to everyone who can reach it

    Note:
        POST /predict returns {"classes": [{"name": "cat", "probability": 0.93}, ...]} with the probabilities of
        `predict`. Errors return a 4xx or 5xx status with {"detail": "what is wrong"}. GET / is the page. GET /health
        returns model, classes and limits, with status 200 as soon as the server is ready. At most 128 requests are
        processed at a time. More get status 503. Headers must arrive within 10 s, uploads within 60 s. With a token,
        the page (which asks for it) and the status of GET /health stay public. On Ctrl-C or SIGTERM the server finishes
        open requests, then exits.
    """
    options = dataclasses.replace(options, token=options.token or os.environ.get(TOKEN, ""))
    if options.token and not (options.token.isascii() and options.token.isprintable() and " " not in options.token):
        raise UserError("--token: give letters, digits and signs without spaces.")
    register_weights(pretrained)
    if options.adapter is not None:
        adapter_config(options.adapter)
    elif not (options.adapters or Path()).is_dir():
        raise UserError(f"--adapters {options.adapters} is not a folder.")
    if missing := [name for name in ("litserve", "python_multipart") if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {' and '.join(missing)}: {install('serve')}")
    host, port = options.host, options.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a port just released is free
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                again = f"give another one: --port {port % 65535 + 1}"
                raise UserError(f"--port {port} is in use on {host}; {again}") from None
            raise UserError(f"--host {host} --port {port}: {error.strerror}") from None
    from randlora_pl.adapters import read_adapter
    from randlora_pl.serving import app, uploads

    place = pick_device(device)
    use_precision(options.precision, place)
    limits = uploads.Limits(upload_bytes=round(options.max_upload_mb * 1e6), pixels=options.max_pixels)
    file = read_adapter(options.adapter) if options.adapter else first_readable(options.adapters or Path())
    facts, base = describe(file.config, limits.upload_bytes, limits.pixels, str(place)), None
    if options.adapter is None:
        facts = {key: value for key, value in facts.items() if key not in ("adapter", "task", "classes")}
        base = dataclasses.replace(file, tensors={}, extra={}, bases=None)
    shown = uploads.read_samples(samples, file.metadata, limits)
    print(printable(f"Starting to serve {options.adapter or options.adapters} ..."), flush=True)
    ready = printable(start_page(options, facts))
    app.run_server(options, facts, ready, place, limits, names_of(host, allow_host), shown, base)
    return 0


def first_readable(folder: Path) -> "AdapterFile":
    """Return the first adapter of a folder that can be served, by name; its base model is the server's."""
    from randlora_pl.adapters import read_adapter
    from randlora_pl.serving.on_demand import check_classes, find_files, list_names

    reasons = []
    for files in (find_files(folder, name) for name in list_names(folder)):
        try:
            if files is not None:
                adapter_config(files.path)
                check_classes((file := read_adapter(files.path)).config, files.path)
                return file
        except UserError as error:
            reasons.append(error.what.rstrip("."))
    hint = f"Copy adapters into it: cp -r runs/quickstart/latest/adapter {folder}/NAME"
    reason = next(iter(reasons), f"no {folder / 'NAME'} or NAME.safetensors; links are not followed")
    raise UserError(f"--adapters {folder} has no adapter that can be served ({reason}).", hint)


def names_of(host: str, allowed: Sequence[str]) -> set[str]:
    """Return the names that the server may be called by; ``*`` stands for every address of this machine."""
    names = {"localhost", "127.0.0.1", *(name.lower() for name in allowed)}
    if host != "127.0.0.1":
        names |= {"*", "[::1]", socket.gethostname().lower(), socket.getfqdn().lower()}
    return names


def describe(config: dict[str, Any], upload_bytes: int, pixels: int, device: str) -> dict[str, Any]:
    """Return the public facts of a server, from the description of its adapter; of this machine the device.

    Raises:
        UserError: The adapter was trained on texts, or has no class names.
    """
    from randlora_pl.serving.on_demand import check_classes

    check_classes(config, "the adapter")
    metadata, base = config.get("metadata", {}), config.get("base_model", {})
    return {
        "adapter": method_label(config),
        "base_model": {
            "library": base.get("library", ""),
            "name": base.get("name", ""),
            "pretrained": file_name(base.get("pretrained", "")),  # it may be the path of a file
        },
        "task": metadata["task"],
        "classes": list(metadata["classnames"]),
        **({"several_labels": True} if metadata.get("several_labels") else {}),
        "device": device,
        "limits": {"upload_bytes": upload_bytes, "pixels": pixels},
    }


def start_page(options: ServerOptions, facts: dict[str, Any]) -> str:
    """Return the lines printed at the start: model, address, and a request as an example."""
    from randlora_pl.serving.on_demand import list_names

    base, several = facts["base_model"], options.adapters is not None
    names = list_names(options.adapters) if options.adapters is not None else facts["classes"]
    named = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
    url = f"http://{host}:{options.port}"
    workers = f"{options.workers} worker{'s' if options.workers > 1 else ''} on {facts['device']}"
    workers += "" if options.precision == "32" else f" in {options.precision}"
    batches = f"up to {options.batch_size} images per batch, collected for {1000 * options.batch_timeout:g} ms"
    sent = f'-H "Authorization: Bearer ${TOKEN}" ' if options.token else ""
    method = f" with {facts['adapter']}" if "adapter" in facts else ""
    form = f"-F adapter={shlex.quote(names[0])} " if several and names else ""
    lines = [
        f"Serving {options.adapter or options.adapters}",
        f"  model    {base['library']} {base['name']} ({base['pretrained']}){method}, {workers}",
        f"  {'adapters' if several else 'classes '} {len(names):,}: {named}",
        f"  page     {url}/",
        f"  API      curl {sent}-F image=@photo.jpg {form}'{url}/predict?top_k=3'",
        f"  health   {url}/health",
        f"  limits   {options.max_upload_mb:g} MB and {options.max_pixels:,} pixels per image; {batches}",
    ]
    if options.host != "127.0.0.1":
        caution = "every machine that can reach this one can use it, without a password or encryption"
        lines.append(f"  caution  {'nothing is encrypted, not even the token' if options.token else caution}")
    lines.append(f"Ready: {url}/  Press Ctrl-C to stop.")
    return "\n".join(lines)
