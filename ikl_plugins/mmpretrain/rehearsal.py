"""What a run of MMEngine does for the first time after an epoch, done before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook
from torch.utils.data import DataLoader

from .. import _validation as check
from .classifier import EpochClassifier
from .distillation import batches, kept_random_states

__all__ = ["rehearse"]

_CALLER = "IKLHook"


def rehearse(runner: Any, model: EpochClassifier) -> None:
    """Validates a batch, and looks whether the hooks that save checkpoints will get what they ask for.

    Args:
        runner: MMEngine's runner, in ``before_train``. Neither its state nor a random number generator is changed.
        model: the classifier, unwrapped.

    Raises:
        ValueError: a CheckpointHook with an unknown option, or whose ``save_best`` is no metric of the validation;
            validation data that cannot be read, a metric that cannot be computed.
    """
    savers = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    for hook in savers:
        _check_options(hook, runner)
    if runner.val_loop is None:
        return
    metrics = _validated(runner, model)
    if metrics is None:
        return
    for hook in savers:
        for name in hook.save_best or ():
            if name != "auto" and name not in metrics:
                raise ValueError(
                    f"{_CALLER}: `save_best` of CheckpointHook must be a metric of `val_evaluator`, "
                    f"{', '.join(map(repr, metrics))}, got {name!r}. Correct it in `default_hooks`."
                )


def _check_options(hook: Any, runner: Any) -> None:
    """MMEngine's hook hands options that it does not know to ``save_checkpoint``, at the end of the first epoch."""
    taken = inspect.signature(runner.save_checkpoint).parameters
    for name in hook.args:
        if name not in taken:
            known = set(inspect.signature(CheckpointHook).parameters) - {"kwargs"}
            raise ValueError(check.unknown_name_message(_CALLER, "option of CheckpointHook", name, known))


@torch.no_grad()
def _validated(runner: Any, model: EpochClassifier) -> dict[str, Any] | None:
    """The metrics of the first batch of the validation data; None if it has none."""
    modes = [(module, module.training) for module in model.modules()]
    evaluator = runner.val_loop.evaluator
    try:
        with kept_random_states():
            with _telling("val_dataloader"):
                batch = _first_batch(runner.val_loop.dataloader)
            if batch is None:
                return None
            model.eval()
            outputs = runner.model.val_step(batch)  # a network that cannot take it cannot be trained: its own words
            with _telling("val_evaluator"):
                evaluator.process(data_samples=outputs, data_batch=batch)
                metrics: dict[str, Any] = evaluator.evaluate(len(outputs) * get_world_size())
            return metrics
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _telling(block: str) -> Iterator[None]:
    """Names the block of the config that an error in the validation comes from."""
    try:
        yield
    except Exception as error:  # of data sets, transforms and metrics of any kind
        raise ValueError(
            f"{_CALLER}: the validation after an epoch must work, but on its first batch `{block}` gives "
            f"{type(error).__name__}: {error}. Correct it, or turn this check off: "
            f"custom_hooks = [dict(type='IKLHook', rehearse=False)]."
        ) from error


def _first_batch(loader: DataLoader[Any]) -> Any:
    """The first batch, read here: the loader's own workers and iterator stay as they are."""
    workers = loader.num_workers
    if not isinstance(workers, int) or isinstance(workers, bool):
        raise TypeError(f"`num_workers` must be a whole number, got {workers!r}")
    return next(batches(loader), None)
