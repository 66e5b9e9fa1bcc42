"""Interpretation of PEFT configs: each key is read, harmless, or refused; none is ignored silently."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict

from randlora_pl.interop.peft.files import PeftAdapter
from randlora_pl.interop.peft.layerwise import TRANSLATIONS
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.options import misfit

_HARMLESS = {  # origin, initialization and training
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "init_weights", "runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    "fan_in_fan_out",  # for transformers' Conv1D, recognized by its class here and in PEFT
}
_TARGETS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
_READ = {
    "RANDLORA": {
        *("r", "randlora_alpha", "randlora_dropout", "projection_prng_key", "save_projection", "sparse", "very_sparse"),
    },
    "VERA": {"r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection"},
    "LORA": {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        *("init_lora_weights", "target_parameters"),
    },
}
STARTS = ("pissa", "olora")
"""Values of ``init_lora_weights`` that subtract the start of the update from the base weight."""

_READ |= {name: set(each.keys) for name, each in TRANSLATIONS.items()}
METHODS = {"RANDLORA": "RandLoRA", "LORA": "LoRA and DoRA", "VERA": "VeRA"}
METHODS |= {name: each.method.method() for name, each in TRANSLATIONS.items()}


PATIENCE = 5.0
"""Seconds for the regular expressions of a config; ordinary ones take milliseconds."""

_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        try:
            re.match(pattern, name)
        except (re.error, RecursionError, OverflowError):
            break
"""


class _Kinds(TypedDict, total=False):
    """Types of the keys that are more than a number or a switch."""

    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    modules_to_save: list[str] | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_pattern: list[str] | str | None
    target_parameters: list[str] | None


def _check_kinds(config: dict[str, Any], path: Path) -> None:
    """Check value types, ranks of at least 1, and the syntax of patterns.

    Raises:
        UserError: A value is invalid; the message has the first.
    """
    wrong: object = misfit(config, _Kinds)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if wrong is None and (low := next((pattern for pattern, rank in ranks.items() if rank < 1), None)) is not None:
        wrong = f"rank_pattern.{low} is {brief(ranks[low])}"
    for pattern in () if wrong else (*ranks, *alphas):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            wrong = f"the pattern {brief(pattern)} is not a regular expression"
    if wrong is not None:
        raise UserError(f"{path}: {wrong} in its config; copy it again.")


def check_config(adapter: PeftAdapter) -> str:
    """Return the method of a PEFT adapter after checking that its whole config can be converted.

    Raises:
        UserError: The method, or an option that changes the outputs, is not supported.
    """
    config, path = adapter.config, adapter.path
    method = str(config["peft_type"]).upper()
    if method not in METHODS:
        raise UserError(f"{path} is a {method} adapter; {', '.join(METHODS.values())} can be imported.")
    _check_kinds({key: value for key, value in config.items() if (method, key) != ("ADALORA", "rank_pattern")}, path)
    ranked = "r" in _READ[method] and "init_r" not in _READ[method]
    least = 0 if method == "OFT" else 1  # OFT's r may be derived
    if ranked and (type(config.get("r")) is not int or config["r"] < least):
        raise UserError(
            f"{path}: r is {brief(config.get('r'))} in its config, not a positive whole number; copy it again."
        )
    for name, value in config.items():
        if name in _HARMLESS | _TARGETS | _READ[method] or not value or (name == "bias" and value == "none"):
            continue
        raise UserError(
            f"{path}: its config has {name}: {brief(value)}, which changes the outputs and has no counterpart here. "
            "Merge it with PEFT instead: model.merge_and_unload()"
        )
    start = config.get("init_lora_weights", True)
    known = isinstance(start, bool) or start in STARTS or start in ("gaussian", "orthogonal", "eva", "mica")
    if not known or (start in STARTS and config.get("use_dora")):
        raise UserError(
            f"{path}: init_lora_weights {start!r} changes the base weights. Write it as a plain LoRA first: "
            "model.save_pretrained(DIR, path_initial_model_for_weight_conversion=START)"
        )
    return method


def check_patterns(adapter: PeftAdapter, names: Iterable[str]) -> None:
    """Match the regular expressions of a config in another process first, because they may take forever.

    Raises:
        UserError: They take longer than `PATIENCE`.
    """
    config = adapter.config
    forms = {"target_modules": "({})$", "exclude_modules": "({})$", "layers_pattern": r".*\.{}\.(\d+)\."}
    forms |= dict.fromkeys(("rank_pattern", "alpha_pattern"), r"(.*\.)?({})$")  # as PEFT does
    given = {key: [config[key]] if isinstance(config.get(key), str) else config.get(key) or () for key in forms}
    patterns = [forms[key].format(text) for key, texts in given.items() for text in texts if not _is_plain(text)]
    if not patterns:
        return
    try:
        command = [sys.executable, "-I", "-S", "-c", _MATCH_ALL]
        work = json.dumps([patterns, list(names)])
        subprocess.run(command, input=work, text=True, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{adapter.path}: the regular expressions in its config take too long. Write the layers as a list of names "
            "in target_modules, if you trust it."
        ) from None


def _is_plain(pattern: str) -> bool:
    return re.fullmatch(r"[\w.-]*", pattern) is not None


def option(adapter: PeftAdapter, name: str, kind: Callable[[Any], Any], default: Any) -> Any:
    """Return a value of the config.

    Raises:
        UserError: The value has a different type.
    """
    value = adapter.config.get(name)
    try:
        found = default if value is None else kind(value)
        if not math.isfinite(found):
            raise ValueError
        return found
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{adapter.path}: {name} is {brief(value)} in its config; copy it again.") from None
