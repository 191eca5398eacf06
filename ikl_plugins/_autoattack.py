"""pyautoattack with the interface of autoattack, which RobustBench and many evaluation scripts call."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyautoattack
from torch import Tensor, nn

__all__ = ["AutoAttack"]

_LOGGER = "auto-attack"  # pyautoattack's; it says at DEBUG what the original prints


class AutoAttack(pyautoattack.AutoAttack):  # type: ignore[misc]
    """AutoAttack, an ensemble of parameter-free attacks (Croce and Hein, ICML 2020).

    Arguments, their order and their defaults are those of the original, but for the device, which is that of the model
    and not 'cuda'. The attacks themselves are pyautoattack's, which are the original's.

    Args:
        model: classifier of images in [0, 1], shape (N, C, H, W), returning logits (N, classes).
        norm: 'Linf', 'L2' or 'L1'.
        eps: radius, above 0.
        seed: of all attacks; None takes the time.
        verbose: print the progress.
        attacks_to_run: with ``version='custom'``, some of 'apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t'.
        version: 'standard', 'plus', 'rand' or 'custom'.
        is_tf_model: must be False.
        device: where to attack; None for the device of the model's first parameter, the CPU if it has none.
        log_path: a file to which the progress is appended.

    Raises:
        ValueError: ``is_tf_model``, or attacks named beside a version that brings its own.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: Any = None,
        log_path: Path | str | None = None,
    ) -> None:
        if is_tf_model:
            raise ValueError(
                "AutoAttack: `is_tf_model` must be False, as pyautoattack attacks PyTorch models alone, got True. "
                "Install the original: pip install git+https://github.com/fra31/auto-attack"
            )
        if device is None:
            parameter = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
            device = "cpu" if parameter is None else parameter.device
        self._prints = verbose
        self._log_path = log_path
        super().__init__(
            model,
            norm=norm,
            eps=eps,
            seed=seed,
            attacks=list(attacks_to_run) or None,
            version=version,
            device=device,
        )

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: Path | None = None,
        *,
        batch_size: int | None = None,
    ) -> Any:
        """Runs the attacks one after another, each on the images that the earlier ones left standing.

        Args:
            x_orig: images in [0, 1], shape (N, C, H, W).
            y_orig: class indices (N,).
            bs: images per batch.
            return_labels: also return what the model takes the adversarial images for.
            state_path: where the state is kept.
            batch_size: pyautoattack's own name for ``bs``; its own calls, which expect both results, have it.

        Returns:
            Adversarial images (N, C, H, W), those that fell to no attack unchanged; with ``return_labels`` a pair with
            the predictions (N,).
        """
        if batch_size is not None:
            return super().run_standard_evaluation(x_orig, y_orig, batch_size=batch_size, state_path=state_path)
        with self._log():
            found = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
        return found if return_labels else found[0]

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Runs every attack on all images.

        Returns:
            By attack, what :meth:`run_standard_evaluation` returns.
        """
        with self._log():
            found = super().run_standard_evaluation_individual(x_orig, y_orig, batch_size=bs)
        return found if return_labels else {attack: images for attack, (images, _) in found.items()}

    @contextlib.contextmanager
    def _log(self) -> Iterator[None]:
        """Hands on what pyautoattack logs, for as long as an evaluation runs."""
        tracer = sys.gettrace()  # pyautoattack's check for dynamic defences takes the place of a debugger's
        handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)] if self._prints else []
        if self._log_path is not None:
            handlers.append(logging.FileHandler(self._log_path))
        logger = logging.getLogger(_LOGGER)
        level, propagate = logger.level, logger.propagate
        if handlers:
            logger.setLevel(logging.DEBUG)
            logger.propagate = False  # once is enough
        for handler in handlers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for handler in handlers:
                logger.removeHandler(handler)
                handler.close()
            logger.setLevel(level)
            logger.propagate = propagate
            sys.settrace(tracer)
