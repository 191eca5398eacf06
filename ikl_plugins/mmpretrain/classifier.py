"""What the classifiers of this package share: epochs, class priors, labels, logits and the names in the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.models.heads import ClsHead
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ..mmengine.epochs import EpochModel
from ..mmengine.heads import head_fault
from ..mmengine.losses import LOSSES

__all__ = ["EpochClassifier", "term_scalars"]

_CE_KEY = "loss_ce"
_PLAIN_KEYS = ("backbone", "neck", "head", "pretrained", "data_preprocessor", "init_cfg")


class EpochClassifier(EpochModel, ImageClassifier):  # type: ignore[misc]  # the base class has no types
    """An ``ImageClassifier`` that knows the epoch and rolls its class priors; base of the classifiers here.

    It is an ``ImageClassifier`` in every other respect: the same backbone, neck and head under the same names in the
    checkpoint, the same predictions.

    Args:
        *args: those of ``ImageClassifier``.
        **kwargs: those of ``ImageClassifier``; ``head`` must be given.

    Raises:
        ValueError: there is no head, or one with several labels or sets of logits, or with a sigmoid in its loss.
    """

    # The base class has no types.
    head: Any
    data_preprocessor: Any
    extract_feat: Any
    parse_losses: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.with_head:
            raise ValueError(
                f"{self._name}: `head` must be given, got None. "
                f"Write head=dict(type='LinearClsHead', num_classes=..., in_channels=...)."
            )
        fault = head_fault(self.head)
        if fault is not None:
            raise ValueError(
                f"{self._name}: `head` must give one set of softmax logits for one label of each image, got "
                f"{fault.got}. Use a LinearClsHead with CrossEntropyLoss."
            )

    @staticmethod
    def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """Of such a classifier's config that of the ``ImageClassifier`` into which its checkpoints load."""
        return {"type": "ImageClassifier", **{key: config[key] for key in _PLAIN_KEYS if key in config}}

    def logits(self, inputs: Tensor) -> Tensor:
        """Class scores (N, C) of what the data preprocessor hands on."""
        return self.head_logits(self.extract_feat(inputs))

    def head_logits(self, feats: Any) -> Tensor:
        """Class scores (N, C) of features that :meth:`extract_feat` has given."""
        logits = self.head(feats)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{self._name}: `head` must give one tensor of logits, got a {type(logits).__name__}. "
                f"Use LinearClsHead."
            )
        return logits

    def head_losses(
        self, feats: Any, logits: Tensor, data_samples: Sequence[Any], weight: float = 1.0
    ) -> dict[str, Any]:
        """The head's own losses, times ``weight``, and accuracies; its key ``loss`` becomes ``loss_ce``.

        They come from logits that are already there wherever the head allows that.
        """
        # A head with its own way from features to a loss, one with margins for example, is asked for the whole way.
        if type(self.head).loss is ClsHead.loss:
            losses = self.head._get_loss(logits, data_samples)
        else:
            losses = self.head.loss(feats, data_samples)
        return {
            _CE_KEY if name == "loss" else name: _scaled(value, weight) if "loss" in name else value
            for name, value in losses.items()
        }

    def hard_labels(
        self, data_samples: Sequence[Any] | None, needed_by: str, instead: str = "set global_info=False"
    ) -> Tensor:
        """The class index (N,) of every sample, for what needs exactly one; messages name it and how to do without."""
        if not data_samples or any("gt_label" not in sample for sample in data_samples):
            raise ValueError(
                f"{self._name}: every data sample must have a `gt_label`, which {needed_by} needs. "
                f"End the pipeline with PackInputs, or {instead}."
            )
        # In validation images are not mixed, and scores that are there are the labels in another form.
        if self.training and any("gt_score" in sample for sample in data_samples):
            raise ValueError(
                f"{self._name}: {needed_by} needs one class per sample, got a `gt_score`. "
                f"Drop `augments` and `to_onehot`, or {instead}."
            )
        labels = [sample.gt_label for sample in data_samples]
        if any(label.numel() != 1 for label in labels):
            raise ValueError(
                f"{self._name}: {needed_by} needs one class per sample, but some have none or several. "
                f"Use other data, or {instead}."
            )
        return torch.cat([label.reshape(1) for label in labels])

    def build_loss(self, key: str, loss: Mapping[str, Any] | nn.Module) -> Any:
        """The loss between two sets of logits of the config's ``key``, with the head's class count filled in."""
        classes = getattr(self.head, "num_classes", None)
        if isinstance(loss, Mapping):
            config = dict(loss)
            if "preset" in config and classes is not None:
                config.setdefault("num_classes", classes)  # not that of the published experiment
            if config.get("global_info") and config.get("num_classes") is None:
                if classes is None:
                    raise ValueError(
                        f"{self._name}: `{key}` must give `num_classes` with global_info=True, as "
                        f"{type(self.head).__name__} has none. Add num_classes=...."
                    )
                config["num_classes"] = classes
            loss = MODELS.build(config)
        if not isinstance(loss, nn.Module):
            raise TypeError(
                f"{self._name}: `{key}` must be a config dict or a module, got {type(loss).__name__}. "
                f"Write {key}=dict(type='IKLLoss')."
            )
        if not all(hasattr(loss, name) for name in ("class_prior", "last_terms", "end_epoch")):
            raise ValueError(
                f"{self._name}: `{key}` must be a loss between logits, got {type(loss).__name__}. "
                f"Use one of {', '.join(LOSSES)}, KLLoss."
            )
        if loss.class_prior is not None:
            self._check_labels_stay_hard(key)
        own = getattr(loss, "num_classes", None)
        if own is not None and classes is not None and own != classes:
            raise ValueError(
                f"{self._name}: `{key}` must have the class count of the head, {classes}, got num_classes={own}. "
                f"Drop it from `{key}`."
            )
        return loss

    def _check_labels_stay_hard(self, key: str) -> None:
        """Refuses a data preprocessor that gives training images no single label."""
        for name in ("batch_augments", "to_onehot"):
            if getattr(self.data_preprocessor, name, None):
                where = "`augments` of `train_cfg`" if name == "batch_augments" else "`to_onehot`"
                raise ValueError(
                    f"{self._name}: the class prior of `{key}` needs one class per image, got {where}. "
                    f"Drop it, or set global_info=False."
                )

    @property
    def _name(self) -> str:
        return type(self).__name__


def term_scalars(loss: Any, scale: float = 1.0) -> dict[str, Tensor]:
    """``weighted_mse`` and ``soft_cross_entropy`` of a loss's last value, as they enter the total times ``scale``.

    MMEngine adds up every entry whose name contains "loss", so these names do not.
    """
    terms = loss.last_terms
    return {} if terms is None else {name: scale * term.detach().mean() for name, term in terms._asdict().items()}


def _scaled(value: Any, weight: float) -> Any:
    """A loss entry, a tensor or a list of tensors, times ``weight``."""
    if weight == 1.0:
        return value
    return [weight * entry for entry in value] if isinstance(value, (list, tuple)) else weight * value
