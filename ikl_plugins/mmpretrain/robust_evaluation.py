"""RobustEvaluationHook: accuracy under APGD-CE in the validation of any ``ImageClassifier``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from torch import Tensor, nn

from .._random_states import kept_random_states
from .._value_checks import read_value_checks
from ..adversarial.robust_evaluation import METRIC, RobustEvaluation
from ..adversarial.weight_perturbation import is_sharded
from ..mmengine.heads import head_fault
from .pixels import pixel_space

__all__ = ["RobustEvaluationHook"]

_CALLER = "RobustEvaluationHook"


class RobustEvaluationHook(Hook):  # type: ignore[misc]
    """Adds ``robust/apgd-ce``, AutoAttack's first attack, to the metrics of the validation.

    The metric is one like any other: the log shows it, and a ``CheckpointHook`` keeps the best checkpoint by it, also
    over a resume. The weights are those that are validated, averaged ones under an ``EMAHook``; they compute in
    float32. A training is the same with the hook and without it.

    Args:
        eps: radius in pixel units, such as ``'8/255'``.
        norm: 'Linf', 'L2' or 'L1'.
        n_examples: number of images of ``val_dataloader``, spread over the classes.
        interval: evaluate in the validations behind every so many epochs (iterations of an ``IterBasedTrainLoop``), and
            in that behind the last.
        n_restarts: random restarts; None for those of standard AutoAttack.
        batch_size: images in a batch, part of the result.
        seed: of the random starts.
        pixel_range: value of a white pixel before the data preprocessor: 255, or 1 where the pipeline divides.

    Raises:
        TypeError, ValueError, ImportError: as :class:`ikl_plugins.adversarial.robust_evaluation.RobustEvaluation`.
        ValueError: before the training: no validation data, or data without single labels; a head without a softmax; a
            sharded model; images that are no pixels; an ``EMAHook`` that takes the average away too early.

    Example:
        In a config::

            custom_hooks = [dict(type='IKLHook'), dict(type='RobustEvaluationHook', eps='8/255', interval=5)]
            default_hooks = dict(
                checkpoint=dict(type='CheckpointHook', save_best='robust/apgd-ce', rule='greater'))
    """

    priority = "HIGH"  # behind RuntimeInfoHook, which logs every metric; before EMAHook and CheckpointHook
    metric = METRIC

    def __init__(
        self,
        *,
        eps: float | str,
        norm: str = "Linf",
        n_examples: int = 512,
        interval: int = 1,
        n_restarts: int | None = None,
        batch_size: int = 128,
        seed: int = 0,
        pixel_range: float = 255.0,
    ) -> None:
        self.evaluation = RobustEvaluation(
            eps=eps,
            norm=norm,
            n_examples=n_examples,
            interval=interval,
            n_restarts=n_restarts,
            batch_size=batch_size,
            seed=seed,
            caller=_CALLER,
        )
        self.pixel_range = pixel_range
        self._images: tuple[Tensor, Tensor] | None = None

    def before_train(self, runner: Any) -> None:
        """Reads the images, so that what is wrong is said before the first step."""
        model = _unwrapped(runner)
        if runner.val_loop is None:
            raise ValueError(f"{_CALLER}: the config must have a `val_dataloader`, got None. Hold images out.")
        fault = head_fault(model.head) if getattr(model, "with_head", False) else None
        if fault is not None or not hasattr(model, "head"):
            got = fault.got if fault is not None else type(model).__name__
            raise ValueError(
                f"{_CALLER}: the model must be an ImageClassifier with a softmax, got {got}. Take the hook out."
            )
        if is_sharded(runner.model):
            raise ValueError(f"{_CALLER}: each rank must have all weights, got FSDP. Use MMDistributedDataParallel.")
        before = runner.hooks[: runner.hooks.index(self)]
        if any(isinstance(hook, EMAHook) for hook in before):
            raise ValueError(
                f"{_CALLER}: EMAHook must come later, or its average is gone. Drop the `priority` of either."
            )
        _warn_of_test_data(runner.cfg)
        self._images = None
        self._read(runner)

    def after_val_epoch(self, runner: Any, metrics: dict[str, Any] | None = None) -> None:
        """Evaluates where it is time to, and adds the metric; None tells CheckpointHook that there is none."""
        if metrics is None:
            return
        metrics[METRIC] = None
        hub = runner.message_hub
        for known in (hub.log_scalars, hub._resumed_keys):
            known.pop(f"val/{METRIC}", None)  # or the log would show that of an earlier epoch
        loop = runner._train_loop  # not built where runner.val() is called alone
        if isinstance(loop, BaseLoop):
            by_iteration = isinstance(loop, IterBasedTrainLoop)
            done, end = (runner.iter, runner.max_iters) if by_iteration else (runner.epoch, runner.max_epochs)
            if not self.evaluation.due(done, end):
                return
        model = _unwrapped(runner)
        images, labels = self._read(runner)
        device = next(model.parameters()).device
        space = pixel_space(model.data_preprocessor, self.pixel_range, caller=_CALLER)

        def logits(pixels: Tensor) -> Tensor:
            scores: Tensor = model(space.to_inputs(pixels), mode="tensor").float()
            return scores

        found = self.evaluation.accuracies(model, logits, images.to(device), labels.to(device))
        metrics[METRIC] = found.robust
        hub.update_scalar(f"val/{METRIC}", found.robust)

    def _read(self, runner: Any) -> tuple[Tensor, Tensor]:
        """Pixels and labels, on the CPU."""
        if self._images is not None:
            return self._images
        loader, model = runner.val_loop.dataloader, _unwrapped(runner)
        dataset = loader.dataset
        space = pixel_space(model.data_preprocessor, self.pixel_range, caller=_CALLER)
        pixels, labels = [], []
        with kept_random_states(), torch.no_grad():
            known = dataset.get_gt_labels().tolist() if hasattr(dataset, "get_gt_labels") else None
            chosen = self.evaluation.chosen(known, len(dataset))
            for start in range(0, len(chosen), self.evaluation.batch_size):
                indices = chosen[start : start + self.evaluation.batch_size]
                batch = model.data_preprocessor(loader.collate_fn([dataset[index] for index in indices]), False)
                samples = batch["data_samples"]
                if not samples or any("gt_label" not in sample or sample.gt_label.numel() != 1 for sample in samples):
                    raise ValueError(
                        f"{_CALLER}: each validation image must have one `gt_label`. End its pipeline with PackInputs."
                    )
                pixels.append(space.to_pixels(batch["inputs"].float()).cpu())
                labels += [int(sample.gt_label) for sample in samples]
        read_value_checks()
        if not pixels:
            raise ValueError(f"{_CALLER}: `val_dataloader` must hold images, got none. Correct its `data_root`.")
        self._images = torch.cat(pixels), torch.tensor(labels)
        if get_rank() == 0:
            MMLogger.get_current_instance().info(
                "%s: %s on %d of %d validation images (%s).",
                _CALLER,
                METRIC,
                len(labels),
                len(dataset),
                self.evaluation.text,
            )
        return self._images


def _unwrapped(runner: Any) -> Any:
    model: nn.Module = runner.model
    return model.module if is_model_wrapper(model) else model


def _warn_of_test_data(config: Mapping[str, Any]) -> None:
    """Says so where a choice by this metric would be one on the test data."""
    held_out, test = (config.get(name) for name in ("val_dataloader", "test_dataloader"))
    if isinstance(held_out, Mapping) and isinstance(test, Mapping) and held_out.get("dataset") == test.get("dataset"):
        MMLogger.get_current_instance().warning(
            "%s: `val_dataloader` has the test images: a checkpoint that is chosen by them looks better than it is. "
            "Hold training images out.",
            _CALLER,
        )
