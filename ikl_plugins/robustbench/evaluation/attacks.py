"""The attacks: AutoAttack's own, set up as AutoAttack does, and what it warns of."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..._robustbench_import import import_robustbench
from ..eps import Eps

__all__ = ["autoattack", "possible_attacks", "prepared", "quiet", "run_checks"]

_LEAST_CLASSES = {"apgd-dlr": 4, "apgd-t": 4}  # the margin is divided by the distance to the third or fourth logit

_robustbench = import_robustbench()


def autoattack(
    model: nn.Module, norm: str, eps: Eps, version: str, chosen: Sequence[str] | None, seed: int, device: torch.device
) -> Any:
    named = {} if chosen is None else {"attacks_to_run": list(chosen)}
    return _robustbench.eval.AutoAttack(
        model, norm=norm, eps=float(eps), seed=seed, verbose=False, version=version, device=device, **named
    )


def run_checks(adversary: Any, images: Tensor, labels: Tensor) -> None:
    """AutoAttack's own checks of the model, and no attack."""
    adversary.attacks_to_run = []
    tracer = sys.gettrace()  # its check for dynamic defences takes the place of a debugger's
    try:
        adversary.run_standard_evaluation(images, labels, bs=len(images))
    finally:
        sys.settrace(tracer)


def possible_attacks(caller: str, wanted: Sequence[str], classes: int) -> tuple[list[str], list[dict[str, str]]]:
    """The attacks that can run with so many classes, and why the others cannot."""
    run, dropped = [], []
    for attack in wanted:
        least = _LEAST_CLASSES.get(attack, 2)
        if classes >= least:
            run.append(attack)
        else:
            dropped.append({"attack": attack, "reason": f"its loss needs {least} classes, and the model has {classes}"})
    if not run:
        raise ValueError(
            f"{caller}: `attacks` must have one that works with {classes} classes, got {', '.join(wanted)}. "
            "Add apgd-ce."
        )
    return run, dropped


def prepared(adversary: Any, attack: str) -> Callable[[Tensor, Tensor], Tensor]:
    """One attack of AutoAttack, set up as AutoAttack does it before each batch.

    Its own loop is not used, since it looks at the natural images anew in each call: a model that draws random numbers
    would get another chance to be wrong with every batch.
    """
    if attack in ("apgd-ce", "apgd-dlr"):
        found = adversary.apgd
        found.loss = attack.removeprefix("apgd-")
    elif attack == "apgd-t":
        found = adversary.apgd_targeted
    elif attack == "square":
        found = adversary.square
    else:
        found = adversary.fab
        found.targeted = attack == "fab-t"
        if found.targeted:
            found.n_restarts = 1

    def perturb(images: Tensor, labels: Tensor) -> Tensor:
        found.seed = adversary.get_seed()
        result: Tensor = found.perturb(images, labels)
        return result

    return perturb


@contextlib.contextmanager
def quiet(device: torch.device) -> Iterator[list[str]]:
    """Keeps the caller's random numbers, and collects what AutoAttack warns of, each kind once."""
    warned: list[str] = []
    handler = _Collector(warned)
    logger = logging.getLogger("auto-attack")
    logger.addHandler(handler)
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    try:
        with torch.random.fork_rng(devices=[index] if device.type == "cuda" else []):
            yield warned
    finally:
        logger.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        kinds = {re.sub(r"[\d.]+", "", known) for known in self._messages}
        if re.sub(r"[\d.]+", "", message) not in kinds:
            self._messages.append(message)
