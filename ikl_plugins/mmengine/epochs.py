"""Models that hear where epochs begin, and the class priors inside any model."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._run_record import settings_of
from ..class_prior import ClassPrior

__all__ = ["EpochModel", "class_priors", "end_epoch"]

HOOK_LINE = "custom_hooks = [dict(type='IKLHook')]"


def class_priors(model: nn.Module) -> dict[str, ClassPrior]:
    """The class priors inside a model, by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ClassPrior)}


def end_epoch(model: nn.Module) -> None:
    """Rolls the class priors of any model; one that hears of epochs does it itself. All ranks must call this."""
    if isinstance(model, EpochModel):
        model.end_epoch()
        return
    for prior in class_priors(model).values():
        prior.end_epoch()


class EpochModel(nn.Module):
    """Base of models that ``IKLHook`` tells of the run, its epochs and its iterations.

    Attributes:
        epoch: number of the running epoch, 1 for the first; None until ``IKLHook`` has set it.
        epochs: number of epochs of the training; None likewise.
        attached: whether ``IKLHook`` has introduced itself.
    """

    epoch: int | None = None
    epochs: int | None = None
    attached: bool = False

    def attach(self, runner: Any) -> None:
        """Called by ``IKLHook`` before the training, with MMEngine's runner."""
        self.attached = True

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Starts an epoch.

        Args:
            epoch: its number, 1 for the first.
            epochs: number of epochs of the training.

        Raises:
            ValueError: ``epoch`` is below 1.
        """
        if epoch < 1:
            raise ValueError(
                f"{type(self).__name__}.begin_epoch: `epoch` must be at least 1, got {epoch}. Epochs count from 1."
            )
        self.epoch = epoch
        self.epochs = epochs

    def end_iteration(self) -> None:
        """Called after every training iteration."""

    def end_epoch(self) -> None:
        """Rolls the class priors. All ranks must call this."""
        for prior in class_priors(self).values():
            prior.end_epoch()

    def run_settings(self) -> dict[str, Any]:
        """The settings that a resumed run must share, beside those of its losses."""
        return settings_of(self)

    def epoch_reasons(self) -> list[str]:
        """The settings that must know where epochs begin, empty if none does; subclasses add theirs."""
        return [f"global_info=True of `{path.rpartition('.')[0]}`" for path in class_priors(self)]

    def check_epochs(self) -> None:
        """Refuses a training batch if a setting must know the epoch and no hook has set it.

        Raises:
            ValueError: the message has the config line that is missing.
        """
        if self.epoch is None and self.training and (reasons := self.epoch_reasons()):
            raise ValueError(
                f"{type(self).__name__}: {' and '.join(reasons)} must know where epochs begin. "
                f"Add to the config:\n  {HOOK_LINE}"
            )
