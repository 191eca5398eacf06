"""Accuracy on adversarial images, beside the natural one in the ordinary validation loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmpretrain.evaluation import Accuracy

__all__ = ["RobustAccuracy"]

ROBUST_SCORE = "robust_pred_score"  # where AdversarialClassifier leaves the prediction of the adversarial image


class RobustAccuracy(Accuracy):  # type: ignore[misc]
    """MMPretrain's ``Accuracy`` of the predictions under the model's ``val_attack``: ``robust/top1``.

    Args:
        **kwargs: those of ``Accuracy``.

    Raises:
        ValueError: the model leaves no prediction under attack; test-time augmentation, as each view is attacked alone
            and the merged prediction never is.

    Note:
        The number belongs to the attack of the config. It is an upper bound of the robust accuracy, no substitute for
        AutoAttack.

    Example:
        In a config::

            val_evaluator = [dict(type='Accuracy'), dict(type='RobustAccuracy')]
            default_hooks = dict(checkpoint=dict(type='CheckpointHook', save_best='robust/top1', rule='greater'))
    """

    default_prefix = "robust"

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Collects one batch of predictions, with 'robust_pred_score' and 'gt_label'."""
        views = data_batch.get("data_samples") if isinstance(data_batch, Mapping) else None
        if views and isinstance(views[0], (list, tuple)):
            raise ValueError(
                "RobustAccuracy: test-time augmentation must be off, as each view is attacked alone. "
                "Test without --tta, or take RobustAccuracy out of `test_evaluator`."
            )
        if any(ROBUST_SCORE not in sample for sample in data_samples):
            raise ValueError(
                "RobustAccuracy: the predictions must hold adversarial images. "
                "Use model=dict(type='AdversarialClassifier', val_attack=dict(...), ...)."
            )
        super().process(
            data_batch,
            [{"pred_score": sample[ROBUST_SCORE], "gt_label": sample["gt_label"]} for sample in data_samples],
        )
