"""What the classifiers with a teacher share: they hold it, look for its files, move it and test it before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._random_states import kept_random_states
from .classifier import EpochClassifier
from .teacher import FrozenTeacher, MissingTeacherError, build_teacher
from .teacher_check import check_teacher

__all__ = ["TaughtClassifier"]


class TaughtClassifier(EpochClassifier):
    """An :class:`EpochClassifier` that may hold a frozen teacher outside the module tree.

    Attributes:
        teacher_val_batches: how many validation batches :meth:`attach` tests the teacher on; 0 for none.
    """

    teacher_val_batches = 0
    _teacher: FrozenTeacher | None = None
    _missing: tuple[Callable[..., FrozenTeacher], str] | None = None

    def hold_teacher(
        self,
        teacher: str | Path | Mapping[str, Any] | nn.Module,
        teacher_ckpt: str | Path | None,
        *,
        teacher_val_batches: int,
        **settings: Any,
    ) -> None:
        """Builds the teacher; one whose files are not in the working directory is looked for by :meth:`attach`.

        Args:
            teacher: as in :func:`ikl_plugins.mmpretrain.build_teacher`.
            teacher_ckpt: likewise.
            teacher_val_batches: becomes the attribute, an integer of at least 0.
            **settings: other keywords of ``build_teacher``.

        Raises:
            ValueError: no such number of batches, or a teacher that does not fit.
        """
        if isinstance(teacher_val_batches, bool) or not isinstance(teacher_val_batches, int) or teacher_val_batches < 0:
            raise ValueError(
                f"{self._name}: `teacher_val_batches` must be a number of batches, got {teacher_val_batches!r}. Use 0."
            )
        self.teacher_val_batches = teacher_val_batches
        build = partial(build_teacher, teacher, teacher_ckpt, student=self, **settings)
        try:
            self._teacher = build()
        except MissingTeacherError as error:  # it may lie beside the config, which `attach` tells
            self._missing = build, str(error)

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher, found or still to be found."""
        return self._teacher is not None or self._missing is not None

    @property
    def teacher(self) -> FrozenTeacher:
        """The holder of the teacher.

        Raises:
            ValueError: there is none, or its files are not in the working directory, and no hook has told where the
                config is.
        """
        if self._teacher is None:
            raise ValueError(self._missing[1] if self._missing else f"{self._name}: there is no `teacher`. Give one.")
        return self._teacher

    @teacher.setter
    def teacher(self, holder: FrozenTeacher) -> None:
        self._teacher = holder

    def attach(self, runner: Any) -> None:
        """Looks for the teacher beside the config, and logs its accuracy; no random number generator moves."""
        super().attach(runner)
        if self._missing is not None:
            config = getattr(runner.cfg, "filename", None)
            folder = None if config is None else Path(config).resolve().parent
            with kept_random_states():
                self._teacher = self._missing[0](folder=folder)
            self._teacher.module.to(next(self.parameters()).device)
            self._missing = None
        if self.teacher_val_batches:
            check_teacher(self, runner)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TaughtClassifier:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._teacher is not None:
            self._teacher.apply(fn)
        return self
