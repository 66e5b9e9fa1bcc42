"""Comparison of what all processes must have in common: options, and the samples of every split."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randlora_pl.data.parts import BLOCK, TEXTS, Part
from randlora_pl.run.parallel.meeting import Ask, Meeting
from randlora_pl.utils.errors import brief

_OWN = ("config", "run", "data.root", "data.num_workers", "data.cache_images", "data.download", "ckpt_path")
_FILES = ("data.shots_file", "data.classnames", "data.templates")
_OWN_TRAINER = ("devices", "num_nodes", "logger", "profiler", "default_root_dir", "enable_progress_bar")
_ALONE = (*_OWN, *_FILES, *(f"trainer.{name}" for name in _OWN_TRAINER))
"""Options that may differ: places, devices, workers, caches, loggers, and files whose content is compared."""
_MOST = 3
Options = dict[str, tuple[str, Any]]
"""What must be equal, as text, and what a message prints, by option."""


def common_options(flat: Mapping[str, Any]) -> Options:
    """Return the options that all processes must have in common; existing paths may differ.

    Args:
        flat: The resolved config by short names.
    """
    kept = {name: value for name, value in flat.items() if not f"{name}.".startswith(tuple(f"{n}." for n in _ALONE))}
    texts = {name: json.dumps(_placeless(value), sort_keys=True, default=str) for name, value in kept.items()}
    return {f"--{name}": (texts[name], value) for name, value in kept.items()}


def _placeless(value: Any) -> Any:
    """Return a value with existing paths replaced."""
    if isinstance(value, dict):
        return {name: _placeless(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_placeless(each) for each in value]
    return "a path" if _is_path(value) else value


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and os.sep in value and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def compare_options(meeting: Meeting, options: Options) -> None:
    """Refuse processes with different options.

    Raises:
        UserError: They differ; see also `Meeting.compare`.
    """
    own = json.dumps(options, default=str)
    meeting.compare(
        "the options", lambda question: own, lambda ask: _options_differ([json.loads(text) for text in ask("")])
    )


def _options_differ(found: list[Options]) -> str:
    first, none = found[0], ("null", None)
    for rank, other in enumerate(found):
        pairs = [(name, first.get(name, none), other.get(name, none)) for name in sorted({*first, *other})]
        different = [
            f"{name} is {brief(ours[1])} in process 0, {brief(theirs[1])} in process {rank}"
            for name, ours, theirs in pairs
            if ours[0] != theirs[0]
        ]
        if different:
            return f"{'; '.join(different[:_MOST])}. Give all processes the same options."
    return ""


def compare_weights(meeting: Meeting, fingerprint: str) -> None:
    """Refuse processes that start from different weights.

    Args:
        meeting: The processes.
        fingerprint: Checksum of this process's weights.

    Raises:
        UserError: They differ; see also `Meeting.compare`.
    """

    def judge(ask: Ask) -> str:
        found = ask("")
        differ = ", ".join(str(rank) for rank, other in enumerate(found) if other != found[0])
        return differ and (
            f"process {differ} of {len(found)} starts from other weights than process 0. Compare the weights files, "
            "checkpoints and versions of the machines (randlora-pl doctor)."
        )

    meeting.compare("the weights", lambda question: fingerprint, judge)


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

    meeting.compare("the samples", answer, _splits_differ)


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
    theirs = "the same with another content" if ours == theirs else theirs
    files = ", and the files that --data.templates and --data.classnames name" if name in TEXTS else ""
    return (
        f"the {name} differ: process 0 has {counts[0]:,}, process {rank} has {counts[1]:,}; number "
        f"{place * BLOCK + index:,} is {ours} in process 0 and {theirs} in process {rank}. Copy the data again{files}."
    )


def _first_difference(ours: list[Any], theirs: list[Any]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
