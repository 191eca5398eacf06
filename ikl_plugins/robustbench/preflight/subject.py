"""What the checks look at: a copy of the model in eval mode, images, and what is claimed."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ... import _validation as check
from ...models.robustbench_zoo import given_statistics
from ..conditions import trainable_copy
from ..eps import Eps, parse_eps

__all__ = [
    "GREY_LEVELS",
    "Finding",
    "Subject",
    "as_it_was",
    "distance",
    "first_line",
    "first_names",
    "hooked",
    "is_leaf",
    "named_tensors",
    "word",
]

Finding = tuple[bool | None, str]  # whether it passed, None where it could not be checked; and why

GREY_LEVELS = 255
_CALLER = "preflight"
_SHOWN = 4  # names in a message
_RELATIVE = 1e-4  # of the largest logit: what the order of float32 sums may change, with room
_ROUNDINGS = 4  # the same in a coarser precision, in its roundings
# What a model may raise that was not made for another precision.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, NotImplementedError)


@dataclass
class Subject:
    """The arguments of :func:`~ikl_plugins.robustbench.preflight.preflight`, checked, and what later checks need.

    Attributes:
        user: the model as given; without the wrapper of ``torch.compile``.
        compiled: the model as given, if it or a module of it is compiled.
        model: a copy of ``user`` where there can be one, which runs as it was before it was compiled.
        precision: the floating dtype that all parameters have; float32 where they have several, or none.
        training: names of the modules that were in training mode.
        radius: ``eps`` as a fraction.
        logits: of all images, once 'output' has found them usable; before, and where it has not, of none.
        deterministic: whether 'deterministic' has passed.
        independent: whether 'batch' has passed, too.
        converts: whether the model gets images of its own precision, and its logits are converted to float32.
    """

    user: nn.Module
    images: Tensor
    labels: Tensor | None
    eps: object
    norm: str
    claimed: float | None
    measured: float | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    batch_size: int
    number_forward_passes: int
    model: nn.Module = field(init=False)
    compiled: nn.Module | None = field(init=False)
    precision: torch.dtype = field(init=False)
    training: tuple[str, ...] = field(init=False)
    radius: Eps | None = field(init=False)
    logits: Tensor = field(init=False)
    deterministic: bool = field(init=False, default=False)
    independent: bool = field(init=False, default=False)
    converts: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        _check_model_and_images(self.user, self.images)
        _check_labels(self.labels, self.images)
        self._check_numbers()
        # As for L2, which sets no bound and warns of nothing: the check of eps says it.
        self.radius = None if self.eps is None else parse_eps(_CALLER, self.eps, norm="L2")
        self.compiled = self.user if any(map(_is_compiled, self.user.modules())) else None
        self.user = getattr(self.user, "_orig_mod", self.user)
        named = self.user.named_modules()
        self.training = tuple(name or type(self.user).__name__ for name, module in named if module.training)
        self.user = trainable_copy(_CALLER, self.user)
        if self.images.is_inference():
            self.images = self.images.clone()
        if self.labels is not None and self.labels.is_inference():
            self.labels = self.labels.clone()
        dtypes = {parameter.dtype for parameter in self.user.parameters() if parameter.is_floating_point()}
        self.precision = dtypes.pop() if len(dtypes) == 1 else torch.float32
        fresh = self.fresh()
        self.model = self.user if fresh is None else fresh
        self.logits = torch.empty(0, 0)

    @property
    def batch(self) -> Tensor:
        """The first images, as many as a batch has."""
        return self.images[: self.batch_size]

    def forward(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """The logits of images; on copies, as a model that writes into its input must not spoil the other checks."""
        return torch.cat([self.model(batch.clone()) for batch in torch.split(images, batch_size or self.batch_size)])

    @property
    def rounding(self) -> float:
        """The relative rounding of what the model computes with; the images are float32."""
        return max(torch.finfo(self.precision).eps, torch.finfo(torch.float32).eps)

    def tolerance(self, logits: Tensor) -> float:
        """By how much the order of sums may change logits."""
        rounding = 0.0 if self.precision in (torch.float32, torch.float64) else _ROUNDINGS * self.rounding
        return max(_RELATIVE, rounding) * max(1.0, float(logits.abs().max()))

    def convert(self) -> None:
        """From now on the model gets images in its own precision, and its logits become float32."""
        self.converts = True
        _add_conversion(self.model, self.precision)

    def fresh(self) -> nn.Module | None:
        """A new copy of what was given, which shares no state and is not compiled; None where it cannot be copied."""
        model = _copied(self.user)
        if model is None:
            return None
        for module in model.modules():
            for name, child in module._modules.items() if isinstance(module._modules, dict) else ():
                module._modules[name] = getattr(child, "_orig_mod", child)
        if self.converts:
            _add_conversion(model, self.precision)
        return model

    @functools.cached_property
    def in_float64(self) -> Callable[[Tensor], Tensor] | None:
        """The logits as float64, computed in it; None where the model cannot be copied or converted.

        What the forward itself converts to a floating dtype stays float64, too.
        """
        fresh = self.fresh()
        if fresh is None:
            return None
        for module in fresh.modules():
            module.training = False

        def forward(images: Tensor) -> Tensor:
            with _default_dtype(torch.float64), _StayDouble():
                logits: Tensor = fresh(images.double())
            return logits

        try:
            fresh.double()
            logits = forward(self.images[:1])
        except _REFUSALS:
            return None
        return forward if logits.dtype == torch.float64 else None

    def _check_numbers(self) -> None:
        for name in ("batch_size", "number_forward_passes"):
            check.check_integer(_CALLER, name, getattr(self, name))
        for name in ("claimed", "measured"):
            value = getattr(self, name)
            if value is not None and check.check_number(_CALLER, name, value) > 100:
                raise ValueError(f"{_CALLER}: `{name}` must be in percent, 0 to 100, got {value}. Pass 57.09.")
        given = given_statistics(_CALLER, self.mean, self.std, self.images.shape[1])
        if given is not None:
            self.mean, self.std = given

    def check_classes(self) -> None:
        """Refuses labels that the model has no logit for."""
        if self.labels is not None and int(self.labels.max()) >= self.logits.shape[1]:
            raise ValueError(
                f"{_CALLER}: `labels` must be below {self.logits.shape[1]}, the number of logits, got "
                f"{int(self.labels.max())}."
            )


def _check_model_and_images(model: object, images: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: `model` must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = check.kind_of(images)
        raise TypeError(f"{_CALLER}: `images` must be floats in [0, 1], got {found}. Divide 8-bit images by 255.")
    if images.dim() != 4 or len(images) < 2:
        shape = tuple(images.shape)
        raise ValueError(f"{_CALLER}: `images` must have shape (N, channels, H, W) with N >= 2, got {shape}.")
    device = next((parameter.device for parameter in model.parameters()), images.device)
    if device != images.device:
        raise ValueError(f"{_CALLER}: `images` must be on the model's device, {device}, got {images.device}. Move one.")
    if not torch.isfinite(images).all():
        raise ValueError(f"{_CALLER}: `images` must be finite, got inf or nan. Pass images in [0, 1].")


def _check_labels(labels: object, images: Tensor) -> None:
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        found = check.kind_of(labels)
        raise TypeError(f"{_CALLER}: `labels` must be a tensor of class indices, got {found}. Pass a long tensor.")
    if labels.shape != images.shape[:1] or int(labels.min()) < 0:
        found = f"shape {tuple(labels.shape)}" + (f" with {int(labels.min())}" if labels.numel() else "")
        raise ValueError(f"{_CALLER}: `labels` must be {len(images)} class indices from 0, got {found}.")


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _add_conversion(model: nn.Module, precision: torch.dtype) -> None:
    model.register_forward_pre_hook(lambda module, arguments: (arguments[0].to(precision), *arguments[1:]))
    model.register_forward_hook(lambda module, arguments, logits: logits.to(torch.float32))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _StayDouble(TorchFunctionMode):
    """A conversion to a floating dtype converts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if func in (Tensor.to, Tensor.type):
            args = tuple(_doubled(value) for value in args)
            kwargs = {name: _doubled(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _doubled(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _copied(model: nn.Module) -> nn.Module | None:
    """A copy that shares no state; None for a model that cannot be copied."""
    # `torch.nn.utils.weight_norm` leaves what it has computed as an attribute, which torch does not copy.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, dict(computed))
    except (TypeError, ValueError, AttributeError, RuntimeError, copy.Error, pickle.PicklingError):
        return None


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode by the flags alone; afterwards modes, tensors and random numbers as before."""
    modes = {module: module.training for module in model.modules()}
    # The tensors themselves, as `half` and its like put other buffers into a module. TorchScript has no such tables.
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table))
        for module in modes
        for table in (module._parameters, module._buffers)
        if isinstance(table, dict)
    ]
    tensors = [(tensor, tensor.detach().clone()) for _, tensor in named_tensors(model)]
    cuda = sorted({tensor.device.index for tensor, _ in tensors if tensor.device.type == "cuda"})
    numpy_state, python_state = np.random.get_state(), random.getstate()
    for module in modes:
        module.training = False
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for module, training in modes.items():
            module.training = training
        for table, entries in tables:
            table.clear()
            table.update(entries)
        with torch.no_grad():
            for tensor, value in tensors:
                if tensor.dtype != value.dtype or tensor.shape != value.shape:
                    tensor.data = value
                elif not torch.equal(tensor, value):
                    tensor.copy_(value)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@contextlib.contextmanager
def hooked(
    model: nn.Module, make: Callable[[str, nn.Module], Callable[..., None] | None], *, after: bool = False
) -> Iterator[None]:
    """Puts on each module the hook, if any, that ``make`` gives for its name: before its forward, or ``after`` it."""
    handles = []
    for name, module in model.named_modules():
        hook = make(name or type(module).__name__, module)
        if hook is not None:
            handles.append((module.register_forward_hook if after else module.register_forward_pre_hook)(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def distance(first: Tensor, second: Tensor) -> float:
    """The largest difference; infinite between different shapes and where one of them is no number."""
    if first.shape != second.shape:
        return float("inf")
    largest = float((first.double() - second.double()).abs().max())
    return largest if largest == largest else float("inf")


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_names(names: Sequence[str]) -> str:
    """As many names as one can read."""
    return check.first_names(names, _SHOWN)
