"""What a run of MMEngine does for the first time after an epoch, done before the first step."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.optim import _ParamScheduler
from torch import nn
from torch.utils.data import DataLoader

from .. import _validation as check
from .._random_states import kept_random_states
from .._value_checks import read_value_checks

__all__ = ["batches", "dry_run", "first_batch"]

_CALLER = "IKLHook"
_UNCOMPUTED = "not computed of one batch: "


def first_batch(runner: Any) -> Any:
    """The first batch of the validation data, None without one; no random number generator is changed.

    Raises:
        ValueError: validation data that cannot be read.
    """
    if runner.val_loop is None:
        return None
    loader = runner.val_loop.dataloader
    pipeline = getattr(getattr(loader, "dataset", None), "pipeline", None)
    with kept_random_states(), _telling("val_dataloader", getattr(pipeline, "transforms", ())):
        return _first_batch(loader)


def dry_run(runner: Any, model: nn.Module, batch: Any) -> None:
    """Validates a batch, and looks whether the hooks that save checkpoints will get what they ask for.

    Args:
        runner: MMEngine's runner, in ``before_train``. Neither its state nor a random number generator is changed.
        model: its model, unwrapped.
        batch: of :func:`first_batch`.

    A metric that has taken the batch and cannot be computed of it, an area under a curve of one class for example, is
    a warning: all batches together may do.

    Raises:
        ValueError: a CheckpointHook with an unknown option, or whose ``save_best`` is no metric of the validation;
            a metric that cannot take predictions.
    """
    _check_schedules(runner)
    savers = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    for hook in savers:
        _check_options(hook, runner)
    metrics = None if batch is None else _validated(runner, model, batch)
    if metrics is None:
        return  # which names there are is not known
    metrics = {**metrics, **{hook.metric: None for hook in runner.hooks if hasattr(hook, "metric")}}
    for hook in savers:
        for name in hook.save_best or ():
            if name != "auto" and name not in metrics:
                raise ValueError(
                    f"{_CALLER}: `save_best` must be a metric of `val_evaluator`, {', '.join(map(repr, metrics))}, "
                    f"got {name!r}. "
                    f"Correct it in `default_hooks`."
                )


def batches(loader: Any) -> Iterator[Any]:
    """The loader's batches, made here: its workers and its own iterator stay as they are."""
    if getattr(loader, "batch_sampler", None) is None:
        yield from loader
        return
    for indices in loader.batch_sampler:
        yield loader.collate_fn([loader.dataset[index] for index in indices])


def _check_schedules(runner: Any) -> None:
    """Computes what each schedule would set after its first step, which MMEngine does behind the first epoch."""
    found = runner.param_schedulers or []
    for schedule in itertools.chain(*found.values()) if isinstance(found, dict) else found:
        if not isinstance(schedule, _ParamScheduler):  # of what a metric decides, and of those that only look alike
            continue
        before = schedule.last_step
        schedule.last_step = before + 1
        try:
            with _telling(f"param_scheduler: {type(schedule).__name__}"):
                schedule._get_value()  # reads the optimizer, and writes nothing
        finally:
            schedule.last_step = before


def _check_options(hook: Any, runner: Any) -> None:
    """MMEngine's hook hands options that it does not know to ``save_checkpoint``, at the end of the first epoch."""
    taken = inspect.signature(runner.save_checkpoint).parameters
    for name in hook.args:
        if name not in taken:
            known = set(inspect.signature(CheckpointHook).parameters) - {"kwargs"}
            raise ValueError(check.unknown_name_message(_CALLER, "option of CheckpointHook", name, known))


@torch.no_grad()
def _validated(runner: Any, model: nn.Module, batch: Any) -> dict[str, Any] | None:
    """The metrics of a batch; None if it does not give all of them."""
    modes = [(module, module.training) for module in model.modules()]
    evaluator = runner.val_loop.evaluator
    try:
        with kept_random_states():
            model.eval()
            outputs = runner.model.val_step(batch)  # an error of the network is shown as it is
            read_value_checks()
            with _telling("val_evaluator"):
                evaluator.process(data_samples=outputs, data_batch=batch)
                with _uncomputed_as_warnings(evaluator.metrics):
                    metrics: dict[str, Any] = evaluator.evaluate(len(outputs) * get_world_size())
            return None if any(_UNCOMPUTED in name for name in metrics) else metrics
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _uncomputed_as_warnings(metrics: list[Any]) -> Iterator[None]:
    """Lets a metric that cannot be computed give a mark for its value: it forgets the batch, and no rank waits."""

    def guarded(number: int, metric: Any) -> Callable[[list[Any]], dict[str, Any]]:
        compute = metric.compute_metrics

        def computed(results: list[Any]) -> dict[str, Any]:
            try:
                found: dict[str, Any] = compute(results)
            except Exception as error:  # of metrics of any kind
                MMLogger.get_current_instance().warning(
                    "%s: %s of `val_evaluator` gives no value of one batch (%s: %s). If all batches will not do "
                    "either, correct it now.",
                    _CALLER,
                    type(metric).__name__,
                    type(error).__name__,
                    error,
                )
                return {f"{_UNCOMPUTED}{number}": 0.0}
            return found

        return computed

    changed = [metric for metric in metrics if hasattr(metric, "compute_metrics")]
    for number, metric in enumerate(changed):
        metric.compute_metrics = guarded(number, metric)
    try:
        yield
    finally:
        for metric in changed:
            del metric.compute_metrics  # the class's own is seen again


@contextmanager
def _telling(block: str, steps: Sequence[object] = ()) -> Iterator[None]:
    """Names the block of the config, and the step of its pipeline, that an error after an epoch would come from."""
    try:
        yield
    except Exception as error:  # of data sets, transforms, metrics and schedules of any kind
        step = check.failing_step(error, steps)
        source = "" if step is None else f"`pipeline` {step} "
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{_CALLER}: `{block}` must work after an epoch, but {source}gives {type(error).__name__}: {reason}. "
            f"Correct it, or set rehearse=False in dict(type='IKLHook')."
        ) from error


def _first_batch(loader: DataLoader[Any]) -> Any:
    workers = loader.num_workers
    if not isinstance(workers, int) or isinstance(workers, bool):
        raise TypeError(f"`num_workers` must be a whole number, got {workers!r}")
    return next(batches(loader), None)
