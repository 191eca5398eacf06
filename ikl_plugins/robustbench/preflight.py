"""What RobustBench asks of a model, checked before an evaluation is paid for or a submission is written.

The rules are RobustBench's: input gradients that are not zero in general, a deterministic forward pass, no optimisation
in it (https://github.com/RobustBench/robustbench, "Main idea"). The other checks are for the mistakes that make an
evaluation wrong without a word: images in the wrong range, normalised twice, a model in training mode, a radius that
was rounded.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import _validation as check
from .eps import Eps, parse_eps

__all__ = ["CHECKS", "Check", "Preflight", "preflight"]

CHECKS = (
    "eval mode",
    "output",
    "deterministic",
    "batch",
    "gradients",
    "logits",
    "inputs",
    "normalisation",
    "optimisation",
    "eps",
    "claim",
)

_CALLER = "preflight"
_SHOWN = 4  # names in a message
_ALONE = 16  # images that are also passed one at a time
_RELATIVE = 1e-4  # of the largest logit: what the order of float32 sums may change, with room
_DEAD = 0.1  # share of images whose gradient may be zero: single ones lie where every unit is off
_POINTS = 5.0  # by which another input range must be better before it is taken for the right one
_ROUNDING = 0.005  # points: accuracies are stated with two decimals
_GREY_LEVELS = 255
_AUTOCAST = ("cpu", "cuda")
# (mean, std) that models are commonly trained with, tried when none is given.
_COMMON = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR's": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "0.5 and 0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
# Steps along the gradient, in grey levels. The small ones stay below the levels of a quantiser for most images.
_STEPS = (1.0, 0.2, 0.02, 0.002, 0.0005)
_NOISE = 1e-5  # of an image's largest logit: changes below are rounding, and tell nothing about a gradient
_ULPS = 32  # a predicted change of so many roundings shows in float32, unless the function is constant
_BAND = 20.0  # times: how far the median change may be from the one that the gradient predicts
_PRECISION = 1e-3  # of their sum: how equal the sums of probabilities are
_MEANS = ("mean", "mu", "means")
_STDS = ("std", "sigma", "stds")


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: one of :data:`CHECKS`.
        passed: None where the check could not be made.
        why: what was found, or what was missing, as sentences.
    """

    name: str
    passed: bool | None
    why: str


@dataclass(frozen=True)
class Preflight:
    """The checks, in the order of :data:`CHECKS`."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed; those that could not be made are in :attr:`unchecked`."""
        return all(found.passed is not False for found in self.checks)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(found.name for found in self.checks if found.passed is False)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Names of the checks that could not be made."""
        return tuple(found.name for found in self.checks if found.passed is None)

    def __getitem__(self, name: str) -> Check:
        return next(found for found in self.checks if found.name == name)

    def markdown(self) -> str:
        """The checks as a Markdown page."""
        verdict = "passed" if self.passed else f"FAILED: {', '.join(self.failed)}"
        lines = [f"# Preflight: {verdict}", ""]
        if self.unchecked:
            lines += [f"Not checked: {', '.join(self.unchecked)}.", ""]
        lines += ["| check | result | why |", "| --- | --- | --- |"]
        words = {True: "pass", False: "FAIL", None: "not checked"}
        lines += [f"| {found.name} | {words[found.passed]} | {_cell(found.why)} |" for found in self.checks]
        return "\n".join([*lines, ""])

    def to_json(self) -> str:
        """The checks as JSON text: ``passed`` and ``checks``, a list of ``name``, ``passed`` (null) and ``why``."""
        checks = [{"name": found.name, "passed": found.passed, "why": found.why} for found in self.checks]
        return json.dumps({"passed": self.passed, "checks": checks}, indent=2)


def preflight(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    eps: object = None,
    norm: str = "Linf",
    claimed: float | None = None,
    measured: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 32,
    number_forward_passes: int = 1,
) -> Preflight:
    """Checks a model against the rules of RobustBench and the usual mistakes.

    The checks work on copies of the model. One that cannot be copied is left as it was in its parameters, buffers,
    gradients and the mode of each module. All checks but 'eval mode' see it in eval mode, and without the caller's
    autocast. The generators of random numbers are put back too.

    Args:
        model: of images in [0, 1], returning logits (N, C).
        images: images in [0, 1], shape (N, channels, H, W), at least 2, on the device of the model. They are all used;
            32 to 200 are enough.
        labels: their class indices (N,). Without them the input range is judged by the structure of the model alone.
        eps: radius of the threat model, preferably as text such as '8/255'; None for corruptions.
        norm: 'Linf' or 'L2'.
        claimed: robust accuracy of the claim, in percent.
        measured: robust accuracy that the evaluation gave, in percent.
        mean: normalisation that the model was trained with, one value per channel, for images in [0, 1]. Without it
            those in common use are tried.
        std: the same.
        batch_size: images per forward, at least 1.
        number_forward_passes: how often one prediction may pass the network, at least 1, as the leaderboard states it.
            A network that shares weights between layers calls the same layer more than once, and needs that number
            here too.

    Returns:
        The checks: 'eval mode', 'output' (parameters, logits and what is computed between are float32, logits finite
        and of shape (N, C)), 'deterministic' (also whatever batches came before), 'batch' (an image's logits depend on
        no other image), 'gradients' (finite, not zero, and true: small steps along them change the margin as they
        predict), 'logits' (not probabilities), 'inputs' (in [0, 1]), 'normalisation' (once), 'optimisation' (none in
        the forward, and no more passes of the network than stated), 'eps' (exact) and 'claim' (not above what was
        measured).

    Raises:
        TypeError: the model is no module, images or labels are no tensors of the right kind.
        ValueError: shapes that do not fit each other, fewer than 2 images, labels that the model has no class for, an
            accuracy that is not in 0 to 100, only one of ``mean`` and ``std``, or a number of passes below 1.
    """
    _check_arguments(model, images, labels, mean, std, batch_size, number_forward_passes)
    found = [_eval_mode(model)]
    user, model = model, _copied(model) or model
    with _as_it_was(model), torch.no_grad():
        output, logits = _output(model, images, batch_size)
        found.append(output)
        if logits is None:
            missing = "The model gives no finite logits of shape (N, C)."
            found += [Check(name, None, missing) for name in CHECKS[2:6]]
            found += [_inputs(images), Check("normalisation", None, missing)]
        else:
            if labels is not None and int(labels.max()) >= logits.shape[1]:
                raise ValueError(
                    f"{_CALLER}: `labels` must be below {logits.shape[1]}, the number of logits, got "
                    f"{int(labels.max())}. Pass images of the classes that the model knows."
                )
            deterministic = _deterministic(model, images[:batch_size], user)
            found += [
                deterministic,
                _batch(model, images, logits, batch_size)
                if deterministic.passed
                else Check("batch", None, "The model is not deterministic, so that its batches cannot be compared."),
                _gradients(model, images, logits, labels, eps, norm, batch_size, deterministic.passed is True),
                _logits(logits),
                _inputs(images),
                _normalisation(model, images, logits, labels, mean, std, batch_size),
            ]
        found.append(_optimisation(model, images[:batch_size], number_forward_passes))
    found += [_eps(eps, norm), _claim(claimed, measured)]
    return Preflight(tuple(found))


# --- arguments and surroundings --------------------------------------------------------------------------------------


def _check_arguments(
    model: object,
    images: object,
    labels: object,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: object,
    number_forward_passes: object,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{_CALLER}: `model` must be a torch.nn.Module, got {type(model).__name__}. Wrap a function in a module."
        )
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = f"dtype {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"{_CALLER}: `images` must be a tensor of floats in [0, 1], got {what}. Divide 8-bit images by 255."
        )
    if images.dim() != 4 or len(images) < 2:
        raise ValueError(
            f"{_CALLER}: `images` must be at least 2 images of shape (N, channels, H, W), got {tuple(images.shape)}. "
            f"Pass a batch of the test set."
        )
    if not torch.isfinite(images).all():
        raise ValueError(f"{_CALLER}: `images` must be finite, got inf or nan. Pass images in [0, 1].")
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
            what = f"dtype {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"{_CALLER}: `labels` must be a tensor of class indices, got {what}. Pass long integers.")
        if labels.shape != images.shape[:1] or int(labels.min()) < 0:
            raise ValueError(
                f"{_CALLER}: `labels` must be {len(images)} class indices from 0, one per image, got shape "
                f"{tuple(labels.shape)}{f' with {int(labels.min())}' if labels.numel() else ''}. "
                f"Pass the labels of the same images."
            )
    if (mean is None) != (std is None):
        raise ValueError(f"{_CALLER}: `mean` and `std` must be given together. Pass both, or neither.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"{_CALLER}: `batch_size` must be an integer of at least 1, got {batch_size!r}. Pass 32.")
    passes = number_forward_passes
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(
            f"{_CALLER}: `number_forward_passes` must be an integer of at least 1, got {passes!r}. Pass 1, or the "
            f"number that the entry states."
        )
    if mean is not None and std is not None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != images.shape[1]:
                raise ValueError(
                    f"{_CALLER}: `{name}` must have one value per channel, got {values!r} for {images.shape[1]} "
                    f"channels. Pass {images.shape[1]} values."
                )


def _copied(model: nn.Module) -> nn.Module | None:
    """A copy that shares no state; None for a model that cannot be copied."""
    try:
        return copy.deepcopy(model)
    except (TypeError, ValueError, AttributeError, RuntimeError, copy.Error, pickle.PicklingError):
        return None


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode by the flags alone, no autocast; afterwards modes, tensors, autocast and random numbers as before."""
    modes = {module: module.training for module in model.modules()}
    # The tensors themselves, as `half` and its like put other buffers into a module. TorchScript has no such tables.
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table))
        for module in modes
        for table in (module._parameters, module._buffers)
        if isinstance(table, dict)
    ]
    tensors = [(tensor, tensor.detach().clone()) for _, tensor in _tensors(model)]
    cuda = sorted({tensor.device.index for tensor, _ in tensors if tensor.device.type == "cuda"})
    numpy_state, python_state = np.random.get_state(), random.getstate()
    autocast = {device: torch.is_autocast_enabled(device) for device in _AUTOCAST}
    _stop_autocast()
    for module in modes:
        module.training = False
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for device, enabled in autocast.items():
            torch.set_autocast_enabled(device, enabled)
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


def _stop_autocast() -> tuple[str, ...]:
    """Turns autocast off; the devices it was on for."""
    on = tuple(device for device in _AUTOCAST if torch.is_autocast_enabled(device))
    for device in on:
        torch.set_autocast_enabled(device, False)
    return on


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _forward(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    # Copies: a model that writes into its input must not spoil the other checks.
    return torch.cat([model(batch.clone()) for batch in torch.split(images, batch_size)])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


# --- the checks ------------------------------------------------------------------------------------------------------


def _eval_mode(model: nn.Module) -> Check:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        return Check("eval mode", False, f"In training mode: {check.first_names(training, _SHOWN)}. Call model.eval().")
    return Check("eval mode", True, "All modules are in eval mode.")


def _output(model: nn.Module, images: Tensor, batch_size: int) -> tuple[Check, Tensor | None]:
    """The check, and the logits if the other checks can use them."""
    wrong = [
        f"{name} is {_word(tensor.dtype)}"
        for name, tensor in _tensors(model)
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype != torch.float32
    ]
    dtypes = (
        f"{check.first_names(wrong, _SHOWN)}; RobustBench evaluates in float32. Call model.float(). " if wrong else ""
    )
    before = {name: tensor.dtype for name, tensor in _tensors(model)}
    try:
        with _Precision(model) as precision:
            outputs = [model(batch.clone()) for batch in torch.split(images, batch_size)]
    except RuntimeError as error:
        return Check("output", False, f"{dtypes}The forward fails: {str(error).splitlines()[0]}"), None
    finally:
        autocast = _stop_autocast()
    recast = [
        f"{name} to {_word(tensor.dtype)}"
        for name, tensor in _tensors(model)
        if tensor.dtype != before.get(name, tensor.dtype)
    ]
    if recast:
        dtypes += f"The forward converts {check.first_names(recast, _SHOWN)}. Leave the parameters in float32. "
    if precision.found:
        named = check.first_names(precision.found, _SHOWN)
        dtypes += f"The forward computes in another precision: {named}. Compute in float32. "
    if autocast:
        dtypes += f"The forward leaves autocast on ({', '.join(autocast)}). Use it in a with statement, or not at all. "
    for output in outputs:
        if not isinstance(output, Tensor):
            return Check("output", False, f"{dtypes}The model returns a {type(output).__name__}, no tensor."), None
        if output.dim() != 2:
            why = f"{dtypes}The model returns shape {tuple(output.shape)} and not (N, C)."
            return Check("output", False, why), None
    logits = torch.cat(outputs)
    if len(logits) != len(images):
        return Check("output", False, f"{dtypes}{len(images)} images gave {len(logits)} rows of logits."), None
    bad = int((~torch.isfinite(logits)).any(dim=1).sum())
    if bad:
        return Check("output", False, f"{dtypes}{bad} of {len(images)} images gave inf or nan."), None
    if logits.dtype != torch.float32:
        dtypes += f"The logits are {_word(logits.dtype)} and not float32."
    if dtypes:
        return Check("output", False, dtypes.strip()), logits.float()
    return Check("output", True, f"Finite float32 logits of {logits.shape[1]} classes; float32 parameters."), logits


class _Precision(TorchFunctionMode):
    """Notes where a forward leaves float32: outputs of leaf modules, and any call that gives fewer bits.

    Both, since a module in TorchScript hides its calls, and a call outside any leaf has no module that would tell.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: list[str] = []
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> _Precision:
        for name, module in self._model.named_modules():
            if not any(True for _ in module.children()) and not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_hook(self._hook(name or type(module).__name__)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # float64 is not less: constants and statistics may be computed in it. `data` and such only read.
        name = getattr(func, "__name__", "a call")
        for dtype in _dtypes(result):
            if dtype.itemsize < 4 and name != "__get__":
                self._note(f"{name} gives {_word(dtype)}")
        return result

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            for dtype in _dtypes(output):
                self._note(f"`{name}` gives {_word(dtype)}", first=True)

        return hook

    def _note(self, words: str, first: bool = False) -> None:
        if words not in self.found:
            # Modules before calls, which are many and say less.
            place = sum(known.startswith("`") for known in self.found) if first else len(self.found)
            self.found.insert(place, words)


def _dtypes(output: Any) -> set[torch.dtype]:
    """The floating dtypes but float32 in what a call gave."""
    if isinstance(output, Tensor):
        floating = output.is_floating_point() or output.is_complex()
        return {output.dtype} if floating and output.dtype != torch.float32 else set()
    if isinstance(output, (list, tuple)):
        return set().union(*map(_dtypes, output))
    if isinstance(output, dict):
        return set().union(*map(_dtypes, output.values()))
    return set()


def _seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def _remembered(user: nn.Module, images: Tensor) -> float | None:
    """How far logits depend on whether another batch came first, in fresh copies; None if there are no copies."""
    half = (len(images) + 1) // 2
    # Darker, so that statistics of the two differ, however alike the images are.
    pair = images[:half], images[-half:] / 2
    seen: list[list[Tensor]] = []
    for order in ((0, 1), (1, 0)):
        fresh = _copied(user)
        if fresh is None:
            return None
        for module in fresh.modules():
            module.training = False
        logits = {}
        for which in order:
            _seed(1)
            logits[which] = fresh(pair[which].clone())
        seen.append([logits[0], logits[1]])
    return max(_distance(first, second) for first, second in zip(*seen, strict=True))


def _deterministic(model: nn.Module, images: Tensor, user: nn.Module) -> Check:
    def generators() -> tuple[bytes, ...]:
        state = [torch.get_rng_state().numpy().tobytes()]
        if images.device.type == "cuda":
            state.append(torch.cuda.get_rng_state(images.device).numpy().tobytes())
        state += [repr(np.random.get_state()).encode(), repr(random.getstate()).encode()]
        return tuple(state)

    before = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    outputs, started, ended = [], [], []
    for value in (1, 1, 2):
        _seed(value)
        started.append(generators())
        inputs = images.clone()
        outputs.append(model(inputs))
        ended.append(generators())
    first, again, other = outputs
    # The kernels of a GPU may sum in another order from call to call.
    slack = 0.0 if images.device.type == "cpu" else _tolerance(first)
    found = []
    if _distance(first, again) > slack:
        found.append(
            f"The same batch gave other logits the second time, by up to {_distance(first, again):.2g}. "
            f"Remove what changes from call to call."
        )
    elif _distance(first, other) > slack:
        found.append(
            f"The logits depend on random numbers, by up to {_distance(first, other):.2g}. "
            f"Take the noise, dropout or sampling out of the forward."
        )
    changed = [
        name for name, tensor in _tensors(model) if name not in before or not _same(tensor.detach(), before[name])
    ]
    if changed:
        found.append(f"The forward changes {check.first_names(changed, _SHOWN)}. Freeze what it keeps.")
    if not torch.equal(inputs, images):
        found.append("The forward writes into its input. Let it work on a new tensor.")
    if not found:
        with torch.enable_grad():
            graded = model(images.detach().clone().requires_grad_()).detach()
        if _distance(first, graded) > _tolerance(first):
            found.append(
                f"The logits differ when gradients are recorded, by up to {_distance(first, graded):.2g}: an attack "
                f"would see another model. Make the forward independent of torch.is_grad_enabled()."
            )
    unseen = ""
    if not found:
        remembered = _remembered(user, images)
        if remembered is None:
            unseen = " The model cannot be copied: not checked whether it remembers its first batch."
        elif remembered > max(slack, _tolerance(first) / 10):  # the same batch in the same network
            found.append(
                f"The logits depend on the batches that came before, by up to {remembered:.2g}: the model remembers "
                f"them. Keep nothing in the forward."
            )
    drawn = started[0] != ended[0]
    if drawn and any(ended[0][i] == ended[2][i] and started[0][i] != started[2][i] for i in range(len(ended[0]))):
        found.append(
            "The forward sets the seed of a global generator, from which the attacks draw too. "
            "Use a torch.Generator of its own, or constants."
        )
    if found:
        return Check("deterministic", False, " ".join(found))
    note = " It draws random numbers, but they change nothing." if drawn else ""
    return Check(
        "deterministic", True, f"The same logits under every seed, and nothing is changed by a forward.{note}{unseen}"
    )


def _batch(model: nn.Module, images: Tensor, logits: Tensor, batch_size: int) -> Check:
    tolerance = _tolerance(logits)
    alone = images[:_ALONE]
    order = torch.arange(len(images) - 1, -1, -1, device=images.device)
    half = max(1, batch_size // 2)
    views = {
        f"of {len(alone)} images passed one at a time": (_forward(model, alone, 1), logits[: len(alone)]),
        "in reversed order": (_forward(model, images[order], batch_size), logits[order]),
        f"in batches of {half}": (_forward(model, images, half), logits),
    }
    for words, (seen, expected) in views.items():
        distance = _distance(seen, expected)
        top = expected.topk(min(2, expected.shape[1]), dim=1).values
        clear = (top[:, 0] - top[:, -1] > 2 * tolerance) if top.shape[1] > 1 else torch.zeros_like(top[:, 0]).bool()
        flipped = int((seen.argmax(dim=1) != expected.argmax(dim=1))[clear].sum())
        if distance > tolerance or flipped:
            return Check(
                "batch",
                False,
                f"The logits {words} differ by up to {distance:.2g} ({flipped} predictions change). An image's logits "
                f"must not depend on the other images: normalise with stored statistics.",
            )
    return Check("batch", True, f"The same logits in any batch, within {tolerance:.1g}.")


def _gradients(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    labels: Tensor | None,
    eps: object,
    norm: str,
    batch_size: int,
    deterministic: bool,
) -> Check:
    targets = logits.argmax(dim=1) if labels is None else labels.long()
    radius = float(_read_eps(eps)) if eps is not None else 4 / _GREY_LEVELS
    generator = torch.Generator().manual_seed(0)  # its own: the user's random numbers stay
    noise = torch.rand(images.shape, generator=generator, dtype=torch.float32) * 2 - 1
    if norm == "L2":
        noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    inside = (images + radius * noise.to(images.device, images.dtype)).clamp(0, 1)

    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "the cross entropy": functools.partial(F.cross_entropy, reduction="sum"),
        "the margin": _margin,
    }
    if logits.shape[1] < 2:
        return Check("gradients", None, "One class: there is nothing to attack.")
    shares = []
    for place, points in (("the images", images), (f"points inside the ball of {radius:.4g}", inside)):
        for words, loss in losses.items():
            sizes = []
            for batch, target in zip(torch.split(points, batch_size), torch.split(targets, batch_size), strict=True):
                try:
                    with torch.enable_grad():
                        leaf = batch.detach().clone().requires_grad_()
                        loss_of = loss(model(leaf).float(), target)
                        gradient: Tensor | None = torch.autograd.grad(loss_of, leaf, allow_unused=True)[0]
                except RuntimeError as error:
                    return Check("gradients", False, f"No gradient reaches the images: {str(error).splitlines()[0]}")
                if gradient is None:
                    return Check(
                        "gradients", False, "No gradient reaches the images: the logits do not depend on them."
                    )
                sizes.append(gradient.flatten(1).abs().amax(dim=1))
            size = torch.cat(sizes)
            if not torch.isfinite(size).all():
                bad = int((~torch.isfinite(size)).sum())
                return Check(
                    "gradients", False, f"The gradient of {words} at {place} is inf or nan for {bad} of {len(size)}."
                )
            dead = int((size == 0).sum())
            shares.append(f"{dead} of {len(size)} for {words} at {place}")
            if dead > _DEAD * len(size):
                return Check(
                    "gradients",
                    False,
                    f"The gradient of {words} at {place} is zero for {dead} of {len(size)}: attacks have nothing to "
                    f"follow. Remove what has no derivative (rounding, thresholds), or scale the logits down.",
                )
    grey = (images * _GREY_LEVELS).round() / _GREY_LEVELS  # as in a file, and where quantisers have their levels
    for place, points in (("the images", grey), (f"points inside the ball of {radius:.4g}", inside)):
        if not deterministic:  # two forwards then differ by more than the step
            break
        # One batch tells: this is about the model and not about single images.
        with _without_tf32():
            longest = min(radius, 1.0) if norm == "Linf" else None
            why = _untrue(model, points[:batch_size], targets[:batch_size], longest)
        if why:
            return Check("gradients", False, f"At {place}, {why}")
    zero = [share for share in shares if not share.startswith("0 ")]
    note = f" Zero: {'; '.join(zero)}." if zero else ""
    found = "Finite, not zero and true" if deterministic else "Finite and not zero (steps along them not compared)"
    return Check("gradients", True, f"{found}, at the images and within the radius.{note}")


def _margin(logits: Tensor, targets: Tensor) -> Tensor:
    return _margins(logits, targets).sum()


def _margins(logits: Tensor, targets: Tensor) -> Tensor:
    own = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return others.amax(dim=1) - own[:, 0]


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Float32 on a GPU too: TF32, which convolutions use by default, is a quantiser of its own for small steps."""
    cudnn: Any = torch.backends.cudnn
    legacy = (cudnn, torch.backends.cuda.matmul)
    places: list[tuple[Any, str, Any]] = [(place, "allow_tf32", False) for place in legacy]
    try:
        before = [getattr(place, name) for place, name, _ in places]
    except RuntimeError:  # the caller uses `fp32_precision`, which torch lets nobody mix with the flags
        kernels = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
        places = [(kernel, "fp32_precision", "ieee") for kernel in kernels]
        before = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


def _untrue(model: nn.Module, points: Tensor, targets: Tensor, radius: float | None) -> str:
    """What is wrong with the gradients of the margin, judged by steps along their signs; empty if nothing is.

    Margins, as the cross entropy is flat where a model is sure. A gradient is true if the median change is about the
    predicted one for some step: long steps leave the linear range of a network, short ones drown in rounding. A short
    step that changes far more than predicted has met a jump.
    """
    with torch.enable_grad():
        leaf = points.detach().clone().requires_grad_()
        logits = model(leaf).float()
        (gradient,) = torch.autograd.grad(_margin(logits, targets), leaf)
    # Against the same kernels: a forward that records gradients may round in another way.
    logits = model(points.clone()).float()
    before = _margins(logits, targets)
    largest = logits.double().abs().amax(dim=1)
    steps = [step / _GREY_LEVELS for step in _STEPS] + ([] if radius is None else [radius])
    # A model may clamp: steps stay among the images, even where these are not in [0, 1], which has a check of its own.
    low, high = min(0.0, float(points.min())), max(1.0, float(points.max()))
    medians: dict[float, float] = {}
    for step in steps:
        moved = (points + step * gradient.sign()).clamp(low, high)
        # Of the step that was made, after clamping and rounding.
        predicted = (gradient.double() * (moved.double() - points.double())).flatten(1).sum(dim=1)
        actual = _margins(model(moved.clone()).float(), targets).double() - before.double()
        visible = predicted > _ULPS * torch.finfo(torch.float32).eps * largest
        still = int((actual[visible] == 0).sum())
        if int(visible.sum()) > len(points) / 4 and still > int(visible.sum()) / 2:
            return (
                f"a step of {step * _GREY_LEVELS:.4g}/{_GREY_LEVELS} along the gradient changes nothing for {still} of "
                f"{int(visible.sum())}: the model is constant in steps, and its gradient is made up. Remove the "
                f"quantiser."
            )
        judged = torch.maximum(predicted.abs(), actual.abs()) > _NOISE * largest
        if int(judged.sum()) > len(points) / 2:
            # A prediction of exactly 0 would make the ratio infinite or, without a change, no number.
            ratios = actual[judged] / predicted[judged].clamp(min=torch.finfo(torch.float64).tiny)
            medians[step] = float(ratios.median())
    jumps = [median for step, median in medians.items() if step < steps[0] and median > _BAND]
    true = [median for median in medians.values() if 1 / _BAND <= median <= _BAND]
    if jumps or (medians and not true):
        nearest = jumps[0] if jumps else min(medians.values(), key=lambda median: abs(median - 1))
        return (
            f"steps along the gradient change the margin by {nearest:.2g} times what it predicts: attacks would follow "
            f"another function. Remove what masks the gradient."
        )
    return ""


def _logits(logits: Tensor) -> Check:
    if logits.shape[1] < 2:
        return Check("logits", None, "One class has no probabilities.")
    if bool(((logits >= 0) & (logits <= 1)).all()):
        return Check(
            "logits",
            False,
            "The outputs lie in [0, 1]: they are probabilities, whose gradients vanish. Return what goes into the "
            "softmax or sigmoid.",
        )
    sums = logits.double().sum(dim=1)
    if bool((logits >= 0).all()) and float(sums.max() - sums.min()) <= _PRECISION * float(sums.max()):
        return Check(
            "logits",
            False,
            f"The outputs are not negative and each row sums to {float(sums.mean()):.4g}: they are probabilities but "
            f"for a constant, and their gradients vanish. Return what goes into the softmax.",
        )
    if bool((logits.double().logsumexp(dim=1).abs() < 1e-3).all()):
        return Check("logits", True, "The outputs are log-probabilities, which are logits too.")
    return Check("logits", True, f"Logits from {float(logits.min()):.3g} to {float(logits.max()):.3g}.")


def _inputs(images: Tensor) -> Check:
    low, high = float(images.min()), float(images.max())
    if low >= 0 and high <= 1:
        # All of an 8-bit image below 1/255 is not an image in [0, 1] that somebody divided once.
        if high * _GREY_LEVELS <= 1 + 1e-6:
            return Check("inputs", False, f"The images reach {high:.2g} at most. Divide 8-bit images by 255 only once.")
        return Check("inputs", True, f"The images lie in [{low:.3g}, {high:.3g}].")
    hint = "Divide by 255." if low >= 0 and high > 2 else "Leave the normalisation to the model."
    return Check("inputs", False, f"The images range from {low:.4g} to {high:.4g} and not within [0, 1]. {hint}")


class _Normaliser(NamedTuple):
    """A layer that subtracts and divides, and what it was given in a forward."""

    name: str
    mean: Tensor
    std: Tensor
    inputs: Tensor


def _normalisation(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    labels: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: int,
) -> Check:
    layers = _normalisers(model, images[:batch_size])
    for i, later in enumerate(layers):
        for earlier in layers[:i]:
            if _made_by(earlier, later.inputs, images[:batch_size]):
                return Check(
                    "normalisation",
                    False,
                    f"`{later.name}` normalises what `{earlier.name}` has normalised already. Remove one of them.",
                )
    structure = {0: "No normalising layer", 1: f"One normalising layer (`{layers[0].name}`)" if layers else ""}.get(
        len(layers), f"{len(layers)} normalising layers, none behind another"
    )
    if labels is None:
        return Check("normalisation", True, f"{structure}. Without labels the accuracy was not compared.")
    right = logits.argmax(dim=1) == labels
    best, most = "", 0.0
    for words, view in _views(images, mean, std).items():
        other = _forward(model, view, batch_size).argmax(dim=1) == labels
        gain, error = _paired(other, right)
        if gain > _POINTS and gain > 2 * error and gain > most:
            best, most = f"{words} gives {100 * float(other.float().mean()):.1f} % accuracy", gain
    if best:
        return Check(
            "normalisation",
            False,
            f"{best} and the images in [0, 1] {100 * float(right.float().mean()):.1f} %: the model was trained with "
            f"other inputs. Normalise exactly once, inside the model, as in training.",
        )
    accuracy = 100 * float(right.float().mean())
    return Check(
        "normalisation",
        True,
        f"{structure}. No other input range is clearly better than [0, 1], where {accuracy:.1f} % of {len(images)} "
        f"images are right.",
    )


def _views(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Tensor]:
    """The images as a wrong pipeline would have passed them."""
    views = {"Multiplying by 255": images * _GREY_LEVELS, "Dividing by 255": images / _GREY_LEVELS}
    channels = images.shape[1]
    known = {"the given": (mean, std)} if mean is not None and std is not None else _COMMON
    for words, (centre, scale) in known.items():
        if centre is None or scale is None or len(centre) != channels:
            continue
        shift = torch.tensor(centre, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
        width = torch.tensor(scale, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
        views[f"Normalising by {words} mean and std before the model"] = (images - shift) / width
        views[f"Undoing a normalisation by {words} mean and std"] = images * width + shift
    if channels == 3:
        views["Turning RGB into BGR"] = images.flip(1)
    return views


def _paired(other: Tensor, right: Tensor) -> tuple[float, float]:
    """Gain in accuracy of one set of predictions over another on the same images, and its standard error, in points."""
    difference = other.double() - right.double()
    n = len(difference)
    return 100 * float(difference.mean()), 100 * float(difference.std(unbiased=False)) / n**0.5


def _normalisers(model: nn.Module, images: Tensor) -> list[_Normaliser]:
    """The layers with a mean and a std per channel, in the order of their calls."""
    found: list[_Normaliser] = []
    handles = []

    def watch(name: str, mean: Tensor, std: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs = arguments[0] if arguments else None
            if isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.shape[1] == images.shape[1]:
                found.append(_Normaliser(name, mean, std, inputs.detach().clone()))

        return hook

    for name, module in model.named_modules():
        mean, std = _constants(module, _MEANS, images), _constants(module, _STDS, images)
        if mean is not None and std is not None and not (bool((mean == 0).all()) and bool((std == 1).all())):
            words = name or type(model).__name__
            handles.append(module.register_forward_pre_hook(watch(words, mean, std)))
    try:
        model(images.clone())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _constants(module: nn.Module, names: Sequence[str], images: Tensor) -> Tensor | None:
    """The first attribute of these names that holds one number, or one per channel."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, (list, tuple)) and value and all(isinstance(x, (int, float)) for x in value):
            value = torch.tensor(value)
        if isinstance(value, Tensor) and value.numel() in (1, images.shape[1]) and value.is_floating_point():
            return value.detach().to(images.device, images.dtype).reshape(1, -1, 1, 1)
    return None


def _made_by(earlier: _Normaliser, inputs: Tensor, images: Tensor) -> bool:
    """Whether these inputs are what a layer made of the images (or of the images times 255)."""
    if inputs.shape != images.shape or torch.allclose(inputs, images, atol=1e-4):
        return False
    made = ((scale * images - earlier.mean) / earlier.std for scale in (1.0, float(_GREY_LEVELS)))
    return any(torch.allclose(inputs, expected, rtol=1e-3, atol=1e-3) for expected in made)


def _optimisation(model: nn.Module, images: Tensor, number_forward_passes: int) -> Check:
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return Check("optimisation", None, "The model has parts in TorchScript, into which the check cannot look.")
    calls: list[str] = []
    torch_folder = os.path.dirname(torch.__file__)
    autograd = os.path.join(torch_folder, "autograd", "")
    optim = os.path.join(torch_folder, "optim", "")
    functional = os.path.join(torch_folder, "_functorch", "eager_transforms.py")

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            if getattr(argument, "__name__", "") == "run_backward":
                calls.append("torch.autograd's run_backward")
            return
        if event != "call":
            return
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(autograd) and name in ("grad", "backward", "make_dual"):
            calls.append(f"torch.autograd.{name}")
        elif file.startswith(optim) and name in ("step", "wrapper"):
            calls.append("the step of an optimiser")
        elif file == functional and name in (
            "grad_impl",
            "grad_and_value_impl",
            "_vjp_with_argnums",
            "_jvp_with_argnums",
        ):
            calls.append("a derivative of torch.func")

    failure = ""
    passes: list[Counter[str]] = []
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with _calls_of_layers(model) as counts:
            model(images.clone())
        passes.append(counts)
        with _calls_of_layers(model) as counts, torch.enable_grad():
            model(images.detach().clone().requires_grad_())
        passes.append(counts)
    except RuntimeError as error:
        failure = str(error).splitlines()[0]
    finally:
        sys.setprofile(before)
    if failure and not calls:
        return Check("optimisation", None, f"The forward fails: {failure}")
    if calls:
        return Check(
            "optimisation",
            False,
            f"The forward calls {check.first_names(sorted(set(calls)), _SHOWN)}. RobustBench takes no model that "
            f"optimises in its forward.",
        )
    name, number = max(((counts.most_common(1) or [("", 1)])[0] for counts in passes), key=lambda pair: pair[1])
    if number > number_forward_passes:
        return Check(
            "optimisation",
            False,
            f"{number} passes of the network in one forward, counted at `{name}`; state "
            f"number_forward_passes={number}, also if layers share weights, and RobustBench takes no search in the "
            f"forward.",
        )
    return Check("optimisation", True, "No derivative is taken and no optimiser steps in the forward.")


@contextlib.contextmanager
def _calls_of_layers(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the calls of each leaf that has parameters: a search without gradients calls them again and again."""
    counts: Counter[str] = Counter()

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            counts[name] += 1

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name or type(module).__name__))
        for name, module in model.named_modules()
        if not any(True for _ in module.children()) and any(True for _ in module.parameters())
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _read_eps(eps: object) -> Eps:
    # As for L2, which sets no bound and warns of nothing: the check says it.
    return parse_eps(_CALLER, eps, norm="L2")


def _eps(eps: object, norm: str) -> Check:
    if eps is None:
        return Check("eps", None, "No radius was given.")
    radius = _read_eps(eps)
    if norm != "Linf":
        return Check("eps", True, f"{radius} is exact.")
    levels = radius.exact * _GREY_LEVELS
    if radius.exact > 1:
        why = f"{radius} is above 1, the range of a pixel in [0, 1]. Write grey levels as k/{_GREY_LEVELS}."
        return Check("eps", False, why)
    if "/" in radius.text:
        whole = levels.denominator == 1
        return Check("eps", True, f"{radius} is exact{'' if whole else ', but no whole number of grey levels'}.")
    if levels.denominator == 1:
        return Check("eps", True, f"{radius} is exactly {levels}/{_GREY_LEVELS}.")
    nearest = Fraction(max(1, round(levels)))
    return Check(
        "eps",
        False,
        f"{radius} is {float(levels):.4g}/{_GREY_LEVELS}, no number of grey levels. Evaluate at a fraction such as "
        f"{nearest}/{_GREY_LEVELS}.",
    )


def _claim(claimed: float | None, measured: float | None) -> Check:
    values = {"claimed": claimed, "measured": measured}
    for name, value in values.items():
        if value is not None and check.check_number(_CALLER, name, value) > 100:
            raise ValueError(f"{_CALLER}: `{name}` must be in percent, 0 to 100, got {value}. Pass 57.09 for 57.09 %.")
    if claimed is None or measured is None:
        missing = " and ".join(name for name, value in values.items() if value is None)
        return Check("claim", None, f"No accuracy was given as {missing}.")
    if claimed > measured + _ROUNDING:
        return Check(
            "claim",
            False,
            f"The claim of {claimed:.2f} % is above the measured {measured:.2f} %. Claim the measured one.",
        )
    return Check("claim", True, f"The claim of {claimed:.2f} % is not above the measured {measured:.2f} %.")


# --- numbers ---------------------------------------------------------------------------------------------------------


def _tolerance(logits: Tensor) -> float:
    return _RELATIVE * max(1.0, float(logits.abs().max()))


def _distance(first: Tensor, second: Tensor) -> float:
    """The largest difference; infinite between different shapes and where one of them is no number."""
    if first.shape != second.shape:
        return float("inf")
    largest = float((first.double() - second.double()).abs().max())
    return largest if largest == largest else float("inf")


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(
        torch.nan_to_num(first.float()), torch.nan_to_num(second.float())
    )
