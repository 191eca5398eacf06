"""The adversarial images of an evaluation as one file, for other programs and other models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._files import written_aside
from .data import Images, content_sha256

if TYPE_CHECKING:
    from .evaluation.log import Evaluation

__all__ = ["check_export_path", "export"]

_SUFFIXES = (".npz", ".pt")
_FACTS = ("model", "weights_sha256", "threat_model", "eps", "version", "attacks")


def check_export_path(caller: str, path: str | Path) -> Path:
    """The path, or a ValueError where its ending is neither .npz nor .pt."""
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{caller}: the file must end with {' or '.join(_SUFFIXES)}, got {path}.")
    return path


def export(evaluation: Evaluation, path: str | Path, images: Images | Tensor) -> Path:
    """See :meth:`~ikl_plugins.robustbench.evaluation.Evaluation.export`."""
    caller, log = "Evaluation.export", evaluation.log
    path = check_export_path(caller, path)
    if not log["finished"] or evaluation.adversarial is None:
        what = "its images were not kept" if log["finished"] else "it was interrupted"
        raise ValueError(f"{caller}: the evaluation must have all adversarial images, but {what}. Evaluate again.")
    natural = images.images if isinstance(images, Images) else images
    labels = torch.tensor(log["labels"])
    if len(natural) != len(labels) or content_sha256(natural, labels) != log["data"]["sha256"]:
        raise ValueError(
            f"{caller}: `images` must be the {len(labels)} that were evaluated, but have another checksum. "
            "Load the same."
        )
    content: dict[str, Any] = {
        "image": evaluation.adversarial_images(natural.detach().cpu().float()),
        "label": labels,
        "prediction": torch.tensor(log["predictions"]),
        "natural_prediction": torch.tensor(log["natural_predictions"]),
        "fell_to": [attack or "" for attack in log["fell_to"]],
        "classes": log["classes"] or [],
        "data": log["data"]["name"] or "",
        **{name: log[name] for name in _FACTS},
    }
    with written_aside(path) as aside:
        if path.suffix == ".pt":
            torch.save({**content, "adv_complete": content["image"]}, aside)
        else:
            arrays: dict[str, Any] = {
                name: value.numpy() if isinstance(value, Tensor) else np.array(value, dtype=str)
                for name, value in content.items()
            }
            np.savez(aside, **arrays)
    return path
