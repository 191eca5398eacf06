"""Robust accuracy against eps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conditions import own_conditions
from ..eps import Eps
from .checks import check_data, check_radii
from .log import percent
from .run import Progress, evaluate, shown

__all__ = ["curve"]


@own_conditions()
def curve(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radii: Sequence[str | float | Eps],
    *,
    norm: str = "Linf",
    version: str = "standard",
    attacks: Sequence[str | Callable[..., Tensor]] | None = None,
    folder: str | Path | None = None,
    progress: bool | Callable[[Eps, Progress], None] | None = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """Robust accuracy against eps.

    Each radius is attacked on the images that stand at the smaller ones: an adversarial image of a small ball lies in
    the larger ones too, so that the curve never rises.

    Args:
        model, images, labels, norm, version: see :func:`evaluate`.
        radii: in any order; each once.
        attacks: see :func:`evaluate`. Some attacks alone give a quicker, looser curve.
        folder: for a log per radius, from which an interrupted curve goes on.
        progress: as in :func:`evaluate`; a function is called with the radius and the progress on the images that stood
            before it.
        **options: further arguments of :func:`evaluate`, but ``log``.

    Returns:
        By rising radius, mappings of 'eps', 'eps_value', 'robust_accuracy' (percent), 'robust' (per image 0 or 1) and
        'attacks'.

    Raises:
        TypeError: as :func:`evaluate`, or no sequence of radii.
        ValueError: as :func:`evaluate`; no radius, or one that comes twice.
    """
    caller = "curve"
    parsed = check_radii(caller, radii, norm)
    images, labels = check_data(caller, images, labels)
    standing = torch.arange(len(images))
    points = []
    tried = "eps"
    for eps in parsed:
        # The images that are left depend on the smaller radii, and so the name of the log does.
        tried += f"_{eps.text.replace('/', '-')}"
        run: list[str] = []
        if callable(progress):
            tell: Callable[[Progress], None] = functools.partial(progress, eps)
        else:
            tell = shown(caller, progress, f"eps {eps}, ")
        if len(standing):
            result = evaluate(
                model,
                images[standing],
                labels[standing],
                eps=eps,
                norm=norm,
                version=version,
                attacks=attacks,
                log=None if folder is None else Path(folder) / f"{tried}.json",
                progress=tell,
                **options,
            )
            standing = standing[torch.tensor(result.log["robust"], dtype=torch.bool)]
            run = result.log["attacks"]
        robust = torch.zeros(len(images), dtype=torch.int64).index_fill(0, standing, 1).tolist()
        points.append(
            {
                "eps": eps.text,
                "eps_value": float(eps),
                "robust_accuracy": percent(robust),
                "robust": robust,
                "attacks": run,
            }
        )
    return points
