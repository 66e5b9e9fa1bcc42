"""Check of a method of your own: the contract that every method of this program keeps.

Examples:
    >>> from randlora_pl.testing import check_adapter
    >>> check_adapter(LoRA(rank=4), width=16, skip=["exact gradients"])[:3]
    ['one update', 'start', 'count']
"""

import copy
import io
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from randlora_pl import adapters
from randlora_pl.adapters import Adapter, DeltaWeight
from randlora_pl.adapters.operations import report_of
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.utils.errors import UserError, brief, first_line, log, near
from randlora_pl.utils.own_classes import is_own

__all__ = ["ContractError", "check_adapter"]


class ContractError(AssertionError):
    """Broken checks of a method.

    Attributes:
        findings: Layer, value, allowed value and fix by the name of the check.
    """

    def __init__(self, method: str, checks: int, findings: Mapping[str, str]) -> None:
        super().__init__(method, checks, findings)
        self.method, self.checks, self.findings = method, checks, findings

    def __str__(self) -> str:
        first = f"{self.method} breaks {len(self.findings)} of {self.checks} checks:"
        return "\n".join([first, *(f"  {name}, {text}" for name, text in self.findings.items())])


def check_adapter(method: Adapter | type[Adapter], *, width: int = 64, skip: Collection[str] = ()) -> list[str]:
    """Check the contract of a method on linear, attention and convolution layers, on the CPU and in seconds.

    A layer that the method refuses by a `UserError` is logged and left out. Dropout is set to 0. The class of the
    method is registered, see `randlora_pl.adapters.register`.

    Args:
        method: Method, or its class if all options have defaults.
        width: Input features of the layers, a multiple of 16. A rank above 3/4 of it does not fit.
        skip: Names of checks to leave out, such as ``exact gradients`` if a part is constant on purpose.

    Returns:
        Names of the checks that ran.

    Raises:
        ContractError: A check found something. The message has all findings.
        UserError: This is not a method, it refuses all layers, or a name in ``skip`` is not a check.
    """
    try:
        adapter = method() if isinstance(method, type) and issubclass(method, Adapter) else method
    except TypeError as error:  # an abstract class, or an option without a default
        raise UserError(
            f"{error}.", "Define all methods, and pass an object of a class whose options need values."
        ) from None
    if not isinstance(adapter, Adapter):
        raise UserError(f"check_adapter needs a subclass of Adapter, or an object of one, not {brief(method)}.")
    if unknown := [name for name in skip if name not in CHECKS]:
        raise UserError(
            f"check_adapter has no check {unknown[0]!r}.{near(unknown[0], CHECKS)}", f"Skip {', '.join(CHECKS)}."
        )
    ran, refused = dict[str, None](), ""
    collected: dict[str, list[str]] = {}
    with torch.random.fork_rng(devices=[]):
        for layer, build in _layers(width).items():
            contract = Contract(adapter.replace(dropout=0.0) if adapter.dropout else adapter, build)
            try:
                findings = contract.findings(skip)
            except UserError as refusal:
                refused = str(refusal)
                log.warning("%s refuses %s, so it is not checked there: %s", adapter.method(), layer, refused)
                continue
            ran |= dict.fromkeys(findings)
            for name, text in findings.items():
                collected.setdefault(name, []).extend([f"on {layer}{{}}: {text}"] * bool(text))
    if not ran:
        raise UserError(f"{adapter.method()} refuses every layer of width {width}, the last one with: {refused}")
    more = {name: f" and {len(texts) - 1} more" if len(texts) > 1 else "" for name, texts in collected.items()}
    if texts := {name: own[0].replace("{}", more[name], 1) for name, own in collected.items() if own}:
        raise ContractError(adapter.method(), len(ran), texts)
    return list(ran)


Build = Callable[[], nn.Module]


class Holder(nn.Module):
    """A new layer, with inputs (batch, length, features)."""

    def __init__(self, features: int, layer: Build) -> None:
        super().__init__()
        self.fc, self.features = layer(), features
        for parameter in self.parameters():
            if not parameter.any():  # a lost bias of zero would not be seen
                nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: attention to the input itself, a convolution to images of three equal rows."""
        if isinstance(self.fc, nn.MultiheadAttention):
            x = self.fc(x, x, x, need_weights=False)[0]
        elif isinstance(self.fc, nn.Conv2d):
            x = self.fc(x.mT[:, :, None].expand(-1, -1, 3, -1)).mean(2).mT
        else:
            x = self.fc(x)
        return x


class Conv1D(nn.Module):
    """As in GPT-2 of transformers: a linear layer whose weight is stored as (in, out)."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) * 0.3)
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., in) to (..., out)."""
        return F.linear(x, self.weight.T, self.bias)


def _layers(width: int) -> dict[str, tuple[Build, list[str]]]:
    """Return functions that make models with one layer, and the targets in it, by a description of the layer."""
    less = width * 3 // 4
    attention = partial(nn.MultiheadAttention, width, 4, batch_first=True)
    convolution = partial(nn.Conv2d, kernel_size=3, stride=(2, 1), groups=4, padding_mode="circular", padding=1)
    layers: dict[str, tuple[Build, list[str]]] = {
        f"a linear layer of {rows} x {width}": (partial(nn.Linear, width, rows), ["fc"])
        for rows in (less, width, width + 3, 2 * width)
    }
    layers |= {
        "a Conv1D of transformers": (partial(Conv1D, less, width), ["fc"]),
        "nn.MultiheadAttention": (attention, ["qkv", "out_proj"]),
        "q and v of nn.MultiheadAttention": (attention, ["q", "v"]),
        "a convolution": (partial(convolution, width, width), ["fc"]),
    }
    return {name: (partial(Holder, width, layer), targets) for name, (layer, targets) in layers.items()}


def inputs(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random input, (batch, length, features)."""
    return torch.randn(3, 5, int(model.features), dtype=dtype)  # type: ignore[arg-type]


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    return {name: each.detach().clone() for name, each in [*model.named_parameters(), *model.named_buffers()]}


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str:
    """Return the names of the tensors of the first that do not have the same bits in the second."""
    return ", ".join(name for name in first if name not in second or not torch.equal(first[name], second[name]))


def apart(actual: Tensor, expected: Tensor, share: float, what: str, fix: str) -> Iterator[str]:
    """Yield a finding if two tensors differ by more than a share of the largest value."""
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= share * largest:  # NaN, too
        seen = f"{difference / (largest or 1):.0e} of the largest value"
        yield f"{what} differ by {seen}, {share:.0e} is allowed. {fix}"


def train(model: nn.Module, steps: range, optimizer: Any = None) -> dict[str, bool]:
    """Do some steps of a run of 12; return True for each trained tensor that had a gradient other than zero."""
    parameters, procedure = adapters.trainable_parameters(model), report_of(model).procedure
    moved = dict.fromkeys(parameters, False)
    if parameters and optimizer is None:
        optimizer = adapters.make_optimizer(model, lr=0.01, weight_decay=0.1)
    for step in steps if parameters else ():
        torch.manual_seed(step)
        x = inputs(model)
        loss = (model(x) - x.sum(-1, keepdim=True)).square().mean()
        if procedure is not None and (penalty := procedure.penalty()) is not None:
            loss = loss + penalty
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        for name, parameter in parameters.items():
            moved[name] |= parameter.grad is not None and bool(parameter.grad.any())
        optimizer.step()
        with suppress(UserError):  # a procedure that needs the data of a task
            if procedure is not None:
                procedure.after_step(step, 12)
    return moved


ONE = "Make change(weight), add(x, weight, bias) and contribution(x, weight) the same update."


class Contract:
    """Checks of a method on one kind of layer; each yields its findings, of which the first counts.

    Args:
        adapter: Method and its options.
        layer: Function that returns a new model, whose ``features`` is the width of its inputs, and the targets.
    """

    def __init__(self, adapter: Adapter, layer: tuple[Build, list[str]]) -> None:
        self.adapter, (self.build, self.targets) = adapter, layer

    def findings(self, skip: Collection[str] = ()) -> dict[str, str]:
        """Return the finding of each check, or "".

        Raises:
            UserError: The method refuses the layer.
        """
        findings: dict[str, str] = {}
        for name in [name for name in CHECKS if name not in skip]:
            if findings.get("one update") or findings.get(CAUSES.get(name, "")):
                continue
            torch.manual_seed(0)
            try:
                findings[name] = next(CHECKS[name](self), "")
            except UserError as error:
                self.adapt(self.build())  # raises the refusal again
                findings[name] = " ".join(str(error).split())
            except Exception as error:  # the user's code may raise anything
                file = getattr(sys.modules.get(type(self.adapter).__module__), "__file__", None)
                lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
                place = f" ({Path(str(file)).name}, line {lines[-1]}). Correct this line." if lines else "."
                findings[name] = f"{type(error).__name__}: {first_line(error)}{place}"
        return findings

    def adapt(self, plain: nn.Module, **options: Any) -> nn.Module:
        """Return a copy of a model with the method, with other options, whose procedure has started."""
        adapter, model = self.adapter.replace(**options) if options else self.adapter, copy.deepcopy(plain)
        report = adapters.inject(model, adapter, None if adapter.trains_base else self.targets)
        if report.procedure is not None:
            report.procedure.start(model)
        return model

    @torch.no_grad()
    def trained(self, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        """Return a model with the method, with noise on what trains that its outputs show."""
        plain = self.build().to(dtype)
        model, x = self.adapt(plain, **options), inputs(plain, dtype)
        for power in range(8):
            for parameter in adapters.trainable_parameters(model).values():
                parameter.add_(0.2 * 2**power * torch.randn_like(parameter))
            if (model(x) - plain(x)).abs().max() > 0.2 * plain(x).abs().max():
                break
        return model

    def _one_update(self) -> Iterator[str]:
        for layer in adapters.adapted_layers(self.trained()).values():
            if (delta := layer.delta) is None:
                continue
            weight = layer.base_weight
            bias, before = torch.randn(len(weight)), weight.clone()
            for tokens in (7, 500):
                x = torch.randn(tokens, weight.shape[1])
                expected = F.linear(x, weight, bias) + delta.contribution(x, lambda: weight)  # noqa: B023 (called here)
                delta.add(x, weight, bias)
                if not torch.equal(weight, before):
                    yield "the update changes the frozen weight. Never write to the weight that it gets."
                yield from apart(delta.add(x, weight, bias), expected, 1e-5, "outputs of add and contribution", ONE)
                matrix = F.linear(x, delta.effective_weight(weight), bias) if delta.fixed else expected
                yield from apart(expected, matrix, 1e-5, "outputs of contribution and change", ONE)

    def _start(self) -> Iterator[str]:
        if self.adapter.trains_base:  # whose decay moves the model
            return
        plain = self.build()
        model, x, fix = self.adapt(plain), inputs(plain), "Begin one factor with torch.zeros."
        for name, delta in adapters.delta_weights(model).items() if self.adapter.fixed else ():
            if largest := delta.abs().max().item():
                yield f"the update of {name} is up to {largest:.0e} before the training, 0 is allowed. {fix}"
        before = model(x)
        yield from apart(before, plain(x), 1e-6, "outputs before the training and of the base model", fix)
        optimizer = adapters.make_optimizer(model, lr=0.03, weight_decay=0.1)
        for parameter in adapters.trainable_parameters(model).values():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(20):
            optimizer.step()
        fix = "Name in `undecayed` what begins at values of the weight."
        yield from apart(model(x), before, 0, "outputs before and after weight decay without gradients", fix)

    def _count(self) -> Iterator[str]:
        report = report_of(self.adapt(self.build()))
        for row in report.rows if not self.adapter.trains_base else ():
            count = report.adapter.count(WeightShape(row.layer, *row.shape))
            if count != row.trainable:
                yield f"count returns {count}, {row.trainable} numbers train. Count the entries of each nn.Parameter."
        on_meta = self.adapt(self.build().to("meta"))
        if away := [name for name, each in on_meta.named_parameters() if not each.is_meta]:
            yield f"not on the device of the weight: {', '.join(away)}. Make tensors with device=weight.device."

    def _training(self) -> Iterator[str]:
        plain = self.build()
        model = self.adapt(plain)
        moved = train(model, range(2))
        if still := ", ".join(name for name, has in moved.items() if not has):
            yield f"without a gradient in two steps: {still}. Use it in `change`, and begin only one factor with zeros."
        if self.adapter.updates and not moved:
            yield "nothing trains. Make what trains an nn.Parameter of the update."
        frozen = {name: value for name, value in state(plain).items() if name not in moved}
        if wrong := differing(frozen, state(model)):
            yield f"frozen, and other than before: {wrong}. Never write to a weight of the model."

    def _merge(self) -> Iterator[str]:
        model = self.trained()
        if not self.adapter.fixed:
            with suppress(UserError):
                adapters.merge(model)
                yield "the merge raises no error, and no weight has the update. Set fixed = False in the update, too."
            return
        x, before, updates = inputs(model), state(model), adapters.delta_weights(model)
        unmerged = model(x)
        for _ in range(2):
            adapters.merge(model)
            yield from apart(model(x), unmerged, 1e-5, "merged and unmerged outputs", ONE)
            if differing(updates, adapters.delta_weights(model)):
                yield "change(weight) returns another matrix after merging. Let it depend on nothing else that changes."
            adapters.unmerge(model)
            if wrong := differing(before, state(model)):
                yield f"merging and unmerging changes {wrong}. Let `change` write to no tensor."

    def _exact_gradients(self) -> Iterator[str]:
        model = self.trained().double()
        parameters = adapters.trainable_parameters(model)
        values = [value.detach().clone().requires_grad_() for value in parameters.values()]

        def forward(x: Tensor, *values: Tensor) -> Any:
            return functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

        x = inputs(model, torch.float64).requires_grad_()
        if not torch.autograd.gradcheck(forward, (x, *values), fast_mode=True, raise_exception=False):
            fix = 'Correct the backward pass, or pass skip=["exact gradients"] if a part is constant on purpose.'
            yield f"gradients are not the ones of finite differences in float64. {fix}"

    def _copies(self) -> Iterator[str]:
        model = self.trained()
        x = inputs(model)
        try:
            twins: dict[str, nn.Module] = {
                "deepcopy": copy.deepcopy(model),
                "pickle": pickle.loads(pickle.dumps(model)),
            }
        except Exception as error:
            yield f"it cannot be copied: {first_line(error)}. Keep no lambda and no open file in the update."
            return
        for name, twin in twins.items():
            if not torch.equal(twin(x), model(x)):
                yield f"a copy by {name} has other outputs. Keep all that the update needs in attributes of it."

    def _dtypes(self) -> Iterator[str]:
        for mode, dtype in (("autocast", torch.float32), ("a bfloat16 model", torch.bfloat16)):
            trains = adapters.trainable_parameters(self.adapt(self.build().to(dtype)))
            odd = [name for name, each in trains.items() if each.dtype != torch.float32]
            if odd and not self.adapter.trains_base:
                fix = "Make it without dtype=weight.dtype, because bfloat16 loses small steps."
                yield f"{odd[0]} is {trains[odd[0]].dtype} in {mode}, torch.float32 is allowed. {fix}"
            model = self.trained(dtype)
            x = inputs(model, dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                actual = model(x)
            fix = "Convert the update's part of the outputs with tensor.to(x.dtype)."
            if actual.dtype != torch.bfloat16:
                yield f"outputs in {mode} are {actual.dtype}, torch.bfloat16 is allowed. {fix}"
            expected = copy.deepcopy(model).float()(x.float())
            yield from apart(actual.float(), expected, 0.1, f"outputs in {mode} and in float32", fix)

    def _traits(self) -> Iterator[str]:
        model, adapter = self.trained(), self.adapter
        for part in (each for each in model.modules() if isinstance(each, DeltaWeight)):
            names = {name for name, _ in [*part.named_parameters(), *part.named_buffers(), *part.named_modules()]}
            if odd := [name for name in (*part.kept, *part.indexes, *part.undecayed, *part.rates) if name not in names]:
                yield f"{type(part).__name__} names {odd[0]!r}, but has no such tensor. Correct the name."
        for layer in adapters.adapted_layers(model).values():
            if (delta := layer.delta) is None:
                continue
            if delta.fixed != adapter.fixed:
                yield f"`fixed` is {adapter.fixed} in the method and {delta.fixed} in the update. Set the same in both."
            weights = layer.base_weight, torch.randn_like(layer.base_weight)
            if adapter.fixed and not (adapter.reads_weight or torch.equal(*map(delta.change, weights))):
                yield "change(weight) depends on the weight. Set reads_weight = True in the method."
            x, weight, factors = torch.randn(7, layer.base_weight.shape[1]), layer.base_weight, adapter.proportional_to
            whole = delta.contribution(x, lambda: weight)  # noqa: B023
            with torch.no_grad():
                for name, each in delta.named_parameters():
                    each.mul_(0.5 if f".{name}".endswith(tuple(f".{own}" for own in factors)) else 1)
            if factors:
                fix = "Name in `proportional_to` one factor of each product."
                half = delta.contribution(x, lambda: weight)  # noqa: B023
                yield from apart(half, whole / 2, 1e-5, "the update of half these tensors, and half the update", fix)

    def _seed(self) -> Iterator[str]:
        plain, starts = self.build(), []
        for seed in (1, 2):
            torch.manual_seed(seed)
            starts.append(state(self.adapt(plain)))
        if wrong := differing(*starts):
            fix = "Draw with generator=torch.Generator().manual_seed(adapter.key)."
            yield f"at other values in each process: {wrong}. {fix}"

    def _dropout(self) -> Iterator[str]:
        with suppress(UserError):  # the method refuses it here
            model = self.trained(dropout=0.5) if "dropout" in signature(type(self.adapter)).parameters else None
            if model is not None and torch.equal(model(x := inputs(model)), model(x)):
                fix = "Call super().__init__(dropout) in the update, and use self.dropped(x) in an `add` of your own."
                yield f"dropout 0.5 changes no output. {fix}"

    def _files(self) -> Iterator[str]:
        plain = self.build()
        model, again = self.adapt(plain), copy.deepcopy(plain)
        train(model, range(3))
        for kind in {type(self.adapter), *map(type, self.adapter.leaves())}:
            if is_own(kind):
                adapters.register(kind)
        with tempfile.TemporaryDirectory() as folder:
            adapters.load_adapter(again, adapters.save_adapter(model, Path(folder) / "adapter"))
        if wrong := differing(state(model), state(again)):
            fix = "Name in `kept` the buffers that training changes, and make others from the seed alone."
            yield f"other values after saving and loading: {wrong}. {fix}"

    def _resume(self) -> Iterator[str]:
        plain = self.build()
        whole, first, second = (self.adapt(plain) for _ in range(3))
        if (one := report_of(first).procedure) is None or (two := report_of(second).procedure) is None:
            return
        train(whole, range(12))
        optimizers = [adapters.make_optimizer(each, lr=0.01, weight_decay=0.1) for each in (first, second)]
        train(first, range(6), optimizers[0])
        file = io.BytesIO()
        torch.save([first.state_dict(), optimizers[0].state_dict(), one.state_dict()], file)
        file.seek(0)
        tensors, moments, own = torch.load(file)
        second.load_state_dict(tensors)
        optimizers[1].load_state_dict(moments)
        two.load_state_dict(own)
        train(second, range(6, 12), optimizers[1])
        if wrong := differing(state(whole), state(second)):
            yield f"other values after a resume: {wrong}. Return from Procedure.state_dict all that it remembers."


CHECKS = {
    "one update": Contract._one_update,
    "start": Contract._start,
    "count": Contract._count,
    "training": Contract._training,
    "merge": Contract._merge,
    "exact gradients": Contract._exact_gradients,
    "copies": Contract._copies,
    "dtypes": Contract._dtypes,
    "traits": Contract._traits,
    "seed": Contract._seed,
    "dropout": Contract._dropout,
    "files": Contract._files,
    "resume": Contract._resume,
}
"""Checks by name. A finding of the first one explains what all others would find."""
CAUSES = {"exact gradients": "training", "resume": "files"}
"""Checks whose finding another one explains."""
