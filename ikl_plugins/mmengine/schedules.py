"""The one-cycle schedule of learning rate and momentum, and the momentum of batch normalisation."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OneCycleLR
from mmengine.optim.scheduler.momentum_scheduler import MomentumSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, OneCycleParamScheduler, _ParamScheduler
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _validation as check

__all__ = ["BatchNormMomentumHook", "OneCycleMomentum", "ResumableOneCycleLR"]


class _OneCycle(OneCycleParamScheduler):  # type: ignore[misc]
    """MMEngine's scheduler, whose state is numbers alone and which says why it cannot divide."""

    def state_dict(self) -> dict[str, Any]:
        """The state without the annealing function, which a checkpoint could hold as code only."""
        return {name: value for name, value in super().state_dict().items() if name != "anneal_func"}

    def _get_value(self) -> list[float]:
        if self._schedule_phases[0]["end_step"] == 0:
            raise ValueError(
                f"{type(self).__name__}: `pct_start` of {self.total_steps} steps must not be exactly one step. "
                f"Change it a little."
            )
        values: list[float] = super()._get_value()
        return values


class ResumableOneCycleLR(OneCycleLR, _OneCycle):  # type: ignore[misc]
    """MMEngine's ``OneCycleLR``, whose checkpoints can be resumed.

    MMEngine's own puts its annealing function into the checkpoint. Reading that would run code, so torch 2.6 and newer,
    and ``IKLHook``, refuse to resume from it. The values are the same, and those of torch's ``OneCycleLR``.

    Args:
        *args: of ``mmengine.optim.OneCycleLR``.
        **kwargs: of ``mmengine.optim.OneCycleLR``: ``eta_max``, ``pct_start`` (0.3), ``div_factor`` (25),
            ``final_div_factor`` (1e4), ``by_epoch`` (True) and others. The number of epochs is taken from the training.

    Raises:
        ValueError: ``pct_start`` of all steps is exactly one step.

    Example:
        In a config, with the momentum that torch's ``OneCycleLR`` sets as well::

            param_scheduler = [
                dict(type='ResumableOneCycleLR', eta_max=0.2, pct_start=0.025),
                dict(type='OneCycleMomentum', pct_start=0.025)]
    """


class _OneCycleMomentumValues(_OneCycle):
    """From the mixin's (optimizer, 'momentum') to the phases that the base class computes values from."""

    def __init__(
        self,
        optimizer: Any,
        param_name: str,
        base_momentum: float = 0.85,
        max_momentum: float = 0.95,
        *,
        total_steps: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        caller = "OneCycleMomentum"
        momenta = {"base_momentum": base_momentum, "max_momentum": max_momentum}
        for name, value in {**momenta, "pct_start": pct_start}.items():
            if check.check_number(caller, name, value) > 1:
                raise ValueError(f"{caller}: `{name}` must be from 0 to 1, got {value}.")
        functions = {"cos": self._annealing_cos, "linear": self._annealing_linear}
        if anneal_strategy not in functions:
            raise ValueError(check.unknown_name_message(caller, "`anneal_strategy`", anneal_strategy, functions))
        self.anneal_func = functions[anneal_strategy]
        self.total_steps = end - begin if total_steps is None else total_steps
        if self.total_steps < 1 or self.total_steps >= INF:
            raise ValueError(
                f"{caller}: `total_steps` must be the number of steps of the cycle, got {total_steps}. "
                f"Give it, or `end`."
            )
        ends = (pct_start * self.total_steps - 1, self.total_steps - 1)
        ways = (("max_momentum", "base_momentum"), ("base_momentum", "max_momentum"))
        self._schedule_phases = [
            {"end_step": end_step, "start_momentum": start, "end_momentum": target}
            for end_step, (start, target) in zip(ends, ways, strict=True)
        ]
        if last_step == -1:
            for group in optimizer.param_groups:
                group.update(momenta)
        # Not the base class's constructor, which is for learning rates alone.
        _ParamScheduler.__init__(
            self, optimizer, param_name, begin=begin, end=end, last_step=last_step, by_epoch=by_epoch, verbose=verbose
        )


class OneCycleMomentum(MomentumSchedulerMixin, _OneCycleMomentumValues):  # type: ignore[misc]
    """The momentum that goes with a one-cycle learning rate: down while that rises, and up again while it falls.

    It is what torch's ``OneCycleLR`` does to the momentum (``cycle_momentum``), which MMEngine's leaves as it is. The
    optimizer's own momentum is overridden, with Nesterov's as with the plain one; in optimizers that have ``betas``
    the first of them is.

    Args:
        optimizer: the optimizer or its wrapper.
        base_momentum: at the peak of the learning rate.
        max_momentum: at the beginning and at the end.
        total_steps: length of the cycle; by default ``end - begin``, which the runner sets to the whole training.
        pct_start: share of the steps in which the learning rate rises.
        anneal_strategy: ``'cos'`` or ``'linear'``.
        begin: the first step.
        end: the step after the last.
        last_step: -1 to begin.
        by_epoch: a step is an epoch, else an iteration.
        verbose: log each value.

    Raises:
        TypeError: a number that is none.
        ValueError: a number out of range; an unknown strategy; a cycle without an end; ``pct_start`` of all steps is
            exactly one step.

    Example:
        See :class:`ResumableOneCycleLR`.
    """


class BatchNormMomentumHook(Hook):  # type: ignore[misc]
    """Lets batch normalisation take the statistics of the first batch as they are, and average slowly from then on.

    With the first momentum 1 the running statistics after the first step are those of its last batch, whatever they
    were before. A small momentum would carry the initial 0 and 1 along for hundreds of steps.

    Args:
        momentum: share of a new batch in the running statistics, from the second step of the training on.
        first_momentum: that of the very first step.

    Raises:
        TypeError: a number that is none.
        ValueError: a number above 1; a model without batch normalisation.

    Example:
        In a config::

            custom_hooks = [dict(type='IKLHook'), dict(type='BatchNormMomentumHook', momentum=0.01)]
    """

    def __init__(self, momentum: float = 0.01, first_momentum: float = 1.0) -> None:
        for name, value in (("momentum", momentum), ("first_momentum", first_momentum)):
            if check.check_number("BatchNormMomentumHook", name, value) > 1:
                raise ValueError(f"BatchNormMomentumHook: `{name}` must be from 0 to 1, got {value}.")
        self.momentum = momentum
        self.first_momentum = first_momentum
        self._layers: list[_BatchNorm] = []

    def before_train(self, runner: Any) -> None:
        """Finds the layers, and sets the momentum of the step that comes first, in a resumed run as well."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        if not self._layers:
            raise ValueError(
                "BatchNormMomentumHook: the model must have batch normalisation. Take the hook out of `custom_hooks`."
            )
        self._set(self.first_momentum if runner.iter == 0 else self.momentum)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Ends the first step."""
        if runner.iter == 0:
            self._set(self.momentum)

    def _set(self, momentum: float) -> None:
        for layer in self._layers:
            layer.momentum = momentum
