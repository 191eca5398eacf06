"""The checks of one forward: its mode, its outputs, and what they depend on."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..conditions import stop_autocast
from .subject import (
    Finding,
    Subject,
    as_it_was,
    distance,
    first_line,
    first_names,
    hooked,
    is_leaf,
    named_tensors,
    word,
)

__all__ = ["batch", "deterministic", "eval_mode", "output"]

_ALONE = 16  # images that are also passed one at a time
_GRADIENTS = 0.01  # of their norm: by how much compiled kernels may change gradients


def eval_mode(subject: Subject) -> Finding:
    if subject.training:
        return False, f"In training mode: {first_names(subject.training)}. Call model.eval()."
    return True, "All modules are in eval mode."


def output(subject: Subject) -> Finding:
    """Whether there are logits, of float32 or one declared precision; it keeps those that the other checks can use."""
    model, images = subject.model, subject.images
    declared = {torch.float32, subject.precision}
    wrong = [
        f"{name} is {word(tensor.dtype)}"
        for name, tensor in named_tensors(model)
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in declared
    ]
    notes = []
    if wrong:
        notes.append(f"{first_names(wrong)}; RobustBench evaluates in float32. Call model.float().")
    before = {name: tensor.dtype for name, tensor in named_tensors(model)}
    said = _convert_if_needed(subject)
    try:
        with _other_precision(model, declared) as precision:
            outputs = [model(batch.clone()) for batch in torch.split(images, subject.batch_size)]
    except RuntimeError as error:
        return False, " ".join([*notes, f"The forward fails: {first_line(error)}"])
    finally:
        autocast = stop_autocast()
    recast = [
        f"{name} to {word(tensor.dtype)}"
        for name, tensor in named_tensors(model)
        if tensor.dtype != before.get(name, tensor.dtype)
    ]
    if recast:
        notes.append(f"The forward converts {first_names(recast)}. Leave the parameters in float32.")
    if precision:
        notes.append(f"The forward computes in another precision: {first_names(precision)}. Compute in float32.")
    if autocast:
        notes.append(
            f"The forward leaves autocast on ({', '.join(autocast)}). Use it in a with statement, or not at all."
        )
    unusable = _unusable(outputs, len(images))
    if unusable:
        return False, " ".join([*notes, unusable])
    logits = torch.cat(outputs)
    if logits.dtype != torch.float32:
        notes.append(f"The logits are {word(logits.dtype)} and not float32.")
    subject.logits = logits.float()
    subject.check_classes()
    notes += _compiled_otherwise(subject)
    if notes:
        return False, " ".join(notes)
    compiled = "" if subject.compiled is None else " It is compiled, and gives the same as before."
    return True, f"Finite float32 logits of {logits.shape[1]} classes; {said}{compiled}"


def _convert_if_needed(subject: Subject) -> str:
    """What is said of the precision; a model of another one that takes no float32 images, or gives no such logits,
    gets them converted."""
    if subject.precision == torch.float32:
        return "float32 parameters."
    declared = word(subject.precision)
    said = f"{declared} parameters, which RobustBench evaluates as they are; AutoAttack keeps images in float32."
    try:
        logits = subject.model(subject.images[:1].clone())
    except RuntimeError:
        logits = None
    if isinstance(logits, Tensor) and logits.dtype == torch.float32:
        return said
    subject.convert()
    return f"{said} Checked, and to be evaluated, in a module that converts images to {declared} and logits to float32."


def _compiled_otherwise(subject: Subject) -> list[str]:
    """What a compiled model computes otherwise than before it was compiled: logits or gradients."""
    if subject.compiled is None:
        return []
    images = subject.batch
    seen = []
    for model in (subject.compiled, subject.model):
        with as_it_was(model), torch.enable_grad():
            leaf = images.clone().requires_grad_()
            logits = model(leaf).float()
            largest = logits.amax(dim=1).sum()
            seen.append((logits.detach(), torch.autograd.grad(largest, leaf)[0]))
    (logits, gradient), (eager, expected) = seen
    apart = distance(logits, eager)
    if apart > subject.tolerance(eager):
        return [f"Compiled, it gives other logits, by up to {apart:.2g}. Evaluate the model that is not compiled."]
    if float((gradient - expected).norm()) > _GRADIENTS * float(expected.norm()):
        return ["Compiled, it gives other gradients. Evaluate the model that is not compiled."]
    return []


def _unusable(outputs: list[Any], count: int) -> str:
    """Why the outputs of the batches are no logits of so many images; empty if they are."""
    for output in outputs:
        if not isinstance(output, Tensor):
            return f"The model returns a {type(output).__name__}, no tensor."
        if output.dim() != 2:
            return f"The model returns shape {tuple(output.shape)} and not (N, C)."
    logits = torch.cat(outputs)
    if len(logits) != count:
        return f"{count} images gave {len(logits)} rows of logits."
    bad = int((~torch.isfinite(logits)).any(dim=1).sum())
    return f"{bad} of {count} images gave inf or nan." if bad else ""


@contextlib.contextmanager
def _other_precision(model: nn.Module, declared: set[torch.dtype]) -> Iterator[list[str]]:
    """Notes where a forward computes in fewer bits than float32, unless declared: outputs of leaf modules, any call.

    Both, since a module in TorchScript hides its calls, and a call outside any leaf has no module that would tell.
    """
    modules: list[str] = []
    calls: list[str] = []

    def hook(name: str, module: nn.Module) -> Callable[..., None] | None:
        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            modules.extend(f"`{name}` gives {word(dtype)}" for dtype in _dtypes(output) - declared)

        return after if is_leaf(module) and not isinstance(module, torch.jit.ScriptModule) else None

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = getattr(func, "__name__", "a call")
            if name != "__get__":  # `data` and such only read
                calls.extend(f"{name} gives {word(dtype)}" for dtype in _dtypes(result) - declared)
            return result

    found: list[str] = []
    with hooked(model, hook, after=True), Calls():
        yield found
    found += dict.fromkeys([*modules, *calls])  # modules before calls, which are many and say less


def _dtypes(output: Any) -> set[torch.dtype]:
    """The floating dtypes of fewer bits than float32 in what a call gave."""
    if isinstance(output, Tensor):
        return {output.dtype} if output.is_floating_point() and output.dtype.itemsize < 4 else set()
    if isinstance(output, (list, tuple)):
        return set().union(*map(_dtypes, output))
    if isinstance(output, dict):
        return set().union(*map(_dtypes, output.values()))
    return set()


def deterministic(subject: Subject) -> Finding:
    model, images = subject.model, subject.batch
    before = {name: tensor.detach().clone() for name, tensor in named_tensors(model)}
    outputs, started, ended = [], [], []
    for value in (1, 1, 2):
        _seed(value)
        started.append(_generators(images.device))
        inputs = images.clone()
        outputs.append(model(inputs))
        ended.append(_generators(images.device))
    first, again, other = outputs
    # The kernels of a GPU may sum in another order from call to call.
    slack = 0.0 if images.device.type == "cpu" else subject.tolerance(first)
    found = []
    if distance(first, again) > slack:
        found.append(
            f"The same batch gave other logits the second time, by up to {distance(first, again):.2g}. "
            f"Remove what changes from call to call."
        )
    elif distance(first, other) > slack:
        found.append(
            f"The logits depend on random numbers, by up to {distance(first, other):.2g}. "
            f"Take the noise, dropout or sampling out of the forward."
        )
    after = named_tensors(model)
    changed = [name for name, tensor in after if name not in before or not _same(tensor.detach(), before[name])]
    if changed:
        found.append(f"The forward changes {first_names(changed)}. Freeze what it keeps.")
    if not torch.equal(inputs, images):
        found.append("The forward writes into its input. Let it work on a new tensor.")
    if not found:
        with torch.enable_grad():
            graded = model(images.detach().clone().requires_grad_()).detach()
        if distance(first, graded) > subject.tolerance(first):
            found.append(
                f"The logits differ when gradients are recorded, by up to {distance(first, graded):.2g}: an attack "
                f"would see another model. Make the forward independent of torch.is_grad_enabled()."
            )
    unseen = ""
    if not found:
        remembered = _remembered(subject)
        if remembered is None:
            unseen = " The model cannot be copied: not checked whether it remembers its first batch."
        elif remembered > max(slack, subject.tolerance(first) / 10):  # the same batch in the same network
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
        return False, " ".join(found)
    subject.deterministic = True
    note = " It draws random numbers, but they change nothing." if drawn else ""
    return True, f"The same logits under every seed, and nothing is changed by a forward.{note}{unseen}"


def _generators(device: torch.device) -> tuple[bytes, ...]:
    """The states of all global generators."""
    state = [torch.get_rng_state().numpy().tobytes()]
    if device.type == "cuda":
        state.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return (*state, repr(np.random.get_state()).encode(), repr(random.getstate()).encode())


def _remembered(subject: Subject) -> float | None:
    """How far logits depend on whether another batch came first, in fresh copies; None if there are no copies."""
    images = subject.batch
    half = (len(images) + 1) // 2
    # Darker, so that statistics of the two differ, however alike the images are.
    pair = images[:half], images[-half:] / 2
    seen: list[list[Tensor]] = []
    for order in ((0, 1), (1, 0)):
        fresh = subject.fresh()
        if fresh is None:
            return None
        for module in fresh.modules():
            module.training = False
        logits = {}
        for which in order:
            _seed(1)
            logits[which] = fresh(pair[which].clone())
        seen.append([logits[0], logits[1]])
    return max(distance(first, second) for first, second in zip(*seen, strict=True))


def _seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(
        torch.nan_to_num(first.float()), torch.nan_to_num(second.float())
    )


def batch(subject: Subject) -> Finding:
    if not subject.deterministic:
        return None, "The model is not deterministic, so that its batches cannot be compared."
    images, logits = subject.images, subject.logits
    slack = subject.tolerance(logits)
    alone = images[:_ALONE]
    half = max(1, subject.batch_size // 2)
    views = {
        f"of {len(alone)} images passed one at a time": (subject.forward(alone, 1), logits[: len(alone)]),
        "in reversed order": (subject.forward(images.flip(0)), logits.flip(0)),
        f"in batches of {half}": (subject.forward(images, half), logits),
    }
    for words, (seen, expected) in views.items():
        change = distance(seen, expected)
        top = expected.topk(min(2, expected.shape[1]), dim=1).values
        clear = (top[:, 0] - top[:, -1] > 2 * slack) if top.shape[1] > 1 else torch.zeros_like(top[:, 0]).bool()
        flipped = int((seen.argmax(dim=1) != expected.argmax(dim=1))[clear].sum())
        if change > slack or flipped:
            return False, (
                f"The logits {words} differ by up to {change:.2g} ({flipped} predictions change). An image's logits "
                f"must not depend on the other images: normalise with stored statistics."
            )
    subject.independent = True
    return True, f"The same logits in any batch, within {slack:.1g}."
