"""Attacks of others: how they are called, and what they may give."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..eps import Eps
from .plan import defined

__all__ = ["distances", "outside", "own_attack", "source_sha256"]

_ROUNDING = 2**-23  # of a pixel in [0, 1]


def own_attack(
    caller: str, name: str, called: Callable[..., Any], model: nn.Module, norm: str, eps: Eps, seed: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """An attack that takes the images and labels of a batch, and whose images are checked."""

    def perturb(images: Tensor, labels: Tensor) -> Tensor:
        before = _state(model)
        with _seeded(seed), torch.enable_grad():
            try:
                found = called(model, images.clone(), labels.clone(), norm=norm, eps=float(eps), seed=seed)
            except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:
                said = f"{type(error).__name__}: {error}"
                raise RuntimeError(f"{caller}: attack `{name}` must give images, but raised {said}.") from error
        if _state(model) != before:
            raise ValueError(
                f"{caller}: attack `{name}` must leave the model as it is, but changed weights, buffers, hooks or its "
                "mode. Attack a copy."
            )
        return _checked(f"{caller}: attack `{name}` must give", images, found, norm, eps)

    return perturb


def _checked(rule: str, images: Tensor, found: object, norm: str, eps: Eps) -> Tensor:
    """What an attack gave, refused unless it is images in [0, 1] and in the ball."""
    if not isinstance(found, Tensor) or found.shape != images.shape or not found.is_floating_point():
        got = f"{found.dtype} of {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{rule} floating images of shape {tuple(images.shape)}, got {got}.")
    found = found.detach().to(images)
    low, high = (bound.item() for bound in torch.aminmax(found))
    if not (low >= 0 and high <= 1):  # also of NaN
        raise ValueError(f"{rule} images in [0, 1], got values from {low:.9g} to {high:.9g}. Clamp them.")
    over = int(outside(images, found, norm, float(eps)).sum())
    if over:
        worst = distances(images, found, norm).max().item()
        raise ValueError(
            f"{rule} images within {norm} eps {eps}, got {over} of {len(images)} further away, up to {worst:.6g}. "
            "Project them."
        )
    return found


def distances(images: Tensor, others: Tensor, norm: str) -> Tensor:
    """How far images (N, C, H, W) are from others, by image (N,), in double precision."""
    order = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}[norm]
    found: Tensor = torch.linalg.vector_norm((others.double() - images.double()).flatten(1), order, dim=1)
    return found


def outside(images: Tensor, others: Tensor, norm: str, eps: float) -> Tensor:
    """Which of the others, by image (N,), lie outside the balls around images, by more than float32 rounds."""
    pixels = images[0].numel()
    rounding: float = _ROUNDING * {"Linf": 1.0, "L2": pixels**0.5, "L1": float(pixels)}[norm]
    return distances(images, others, norm) > eps * (1 + 1e-5) + rounding


def _state(model: nn.Module) -> tuple[Any, ...]:
    """What an attack must leave alone: which values were written how often, the values, and modes and hooks."""
    tensors = [*model.parameters(), *model.buffers()]
    written = [(id(value), value._version) for value in tensors]
    # What is written through .data counts no version. Weighted by place, so that values that move are seen too.
    bits = [value.detach().contiguous().flatten().view(torch.uint8) for value in tensors]
    sums = [int((one * torch.arange(1, len(one) + 1, device=one.device)).sum()) for one in bits]
    modes = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]
    return written, sums, modes


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python begin anew; those of NumPy and Python are the caller's again behind."""
    numbers, state = np.random.get_state(), random.getstate()
    torch.manual_seed(seed)  # the evaluation keeps torch's for the caller
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numbers)
        random.setstate(state)


# --- what an attack is made of ---------------------------------------------------------------------------------------


def source_sha256(attack: Any) -> str | None:
    """A checksum of an attack: of the file it is from, and of the values it was made with; None without a file, or
    where such a value holds itself.

    A run with another one does not go on with what this one has found.
    """
    try:
        return _source_sha256(attack)
    except (RecursionError, ValueError):  # ValueError: of an enclosed name that has no value yet
        return None


def _source_sha256(attack: Any) -> str | None:
    try:
        file = inspect.getsourcefile(inspect.unwrap(defined(attack)))
        with open(file or "", "rb") as opened:
            digest = hashlib.sha256(opened.read())
    except (OSError, TypeError):
        return None
    digest.update(_described(_made_with(attack)).encode())
    return digest.hexdigest()


def _made_with(attack: Any) -> list[Any]:
    """What else decides what a callable does: arguments of partials, attributes, defaults and enclosed values."""
    if isinstance(attack, functools.partial):
        return [attack.args, attack.keywords, _made_with(attack.func)]
    if inspect.ismethod(attack):
        return [_made_with(attack.__self__), _made_with(attack.__func__)]
    if inspect.isfunction(attack):
        cells = [cell.cell_contents for cell in attack.__closure__ or ()]
        return [attack.__qualname__, attack.__defaults__, attack.__kwdefaults__, cells]
    return [] if inspect.isclass(attack) else [vars(attack) if hasattr(attack, "__dict__") else None]


def _described(value: Any) -> str:
    """The same text for the same value in any process."""
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {_described(value.state_dict())}"
    if isinstance(value, Tensor):
        return f"{value.dtype} {_described(value.detach().cpu().float().numpy())}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_described(key)}: {_described(one)}' for key, one in value.items())}}}"
    if isinstance(value, Set):
        return f"set({sorted(map(_described, value))})"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return f"[{', '.join(map(_described, value))}]"
    if callable(value) and not inspect.isclass(value):
        return f"{defined(value).__qualname__} {_source_sha256(value)}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
