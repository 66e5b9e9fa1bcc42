"""Comparison of what all processes must have in common: options, and the samples of every split."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randlora_pl.data.parts import BLOCK, Part
from randlora_pl.parallel.meeting import Ask, Meeting
from randlora_pl.utils.errors import brief

_OWN = ("config", "run", "data.root", "data.num_workers", "data.cache_images", "data.download", "ckpt_path")
_OWN_TRAINER = (
    "accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "profiler", "default_root_dir",
    "enable_progress_bar",
)  # fmt: skip
_ALONE = (*_OWN, *(f"trainer.{name}" for name in _OWN_TRAINER))
"""Options that may differ: places on local disks, devices, workers, caches, loggers."""
_MOST = 3


def common_options(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that all processes must have in common; existing paths are replaced, as they may differ.

    Args:
        flat: The resolved config by short names.
    """
    kept = {name: value for name, value in flat.items() if not f"{name}.".startswith(tuple(f"{n}." for n in _ALONE))}
    return {name: "a path" if _is_path(value) else value for name, value in kept.items()}


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and os.sep in value and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def compare_options(meeting: Meeting, options: Mapping[str, Any]) -> None:
    """Refuse processes with different options.

    Raises:
        UserError: They differ; see also `Meeting.compare`.
    """
    own = json.dumps(options, sort_keys=True, default=str)
    meeting.compare(lambda question: own, lambda ask: _options_differ([json.loads(text) for text in ask("")]))


def _options_differ(found: list[dict[str, Any]]) -> str:
    first = found[0]
    for rank, other in enumerate(found):
        names = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if names:
            pairs = [f"--{n} is {brief(first.get(n))} in process 0, {brief(other.get(n))}" for n in names[:_MOST]]
            return f"{'; '.join(f'{pair} in process {rank}' for pair in pairs)}. Give all processes the same options."
    return ""


def compare_splits(meeting: Meeting, parts: Mapping[str, Part]) -> None:
    """Refuse processes with different samples.

    Raises:
        UserError: They differ; see also `Meeting.compare`.
    """

    def answer(question: str) -> str:
        if not question:
            return json.dumps({name: part.digest() for name, part in parts.items()})
        name, block = json.loads(question)
        if name not in parts:
            return "[]"
        return json.dumps(parts[name].blocks() if block is None else parts[name].samples(block))

    meeting.compare(answer, _splits_differ)


def _splits_differ(ask: Ask) -> str:
    found: list[dict[str, list[Any]]] = [json.loads(text) for text in ask("")]
    first = found[0]
    different = ((rank, name) for rank, own in enumerate(found) for name in {**first, **own})
    pair = next(((rank, name) for rank, name in different if first.get(name) != found[rank].get(name)), None)
    if pair is None:
        return ""
    rank, name = pair
    counts = [own.get(name, [0])[0] for own in (first, found[rank])]
    blocks = [json.loads(text) for text in ask(json.dumps([name, None]))]
    place = _first_difference(blocks[0], blocks[rank])
    samples = [json.loads(text) for text in ask(json.dumps([name, place]))]
    index = _first_difference(samples[0], samples[rank])
    ours, theirs = (json.loads(own[index])[1] if index < len(own) else "missing" for own in (samples[0], samples[rank]))
    return (
        f"the {name} differ: process 0 has {counts[0]:,}, process {rank} has {counts[1]:,}; number "
        f"{place * BLOCK + index:,} is {ours} in process 0 and {theirs} in process {rank}. Copy the data again, "
        "and the files that --data.templates and --data.classnames name."
    )


def _first_difference(ours: list[Any], theirs: list[Any]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
