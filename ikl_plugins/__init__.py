"""Decoupled Kullback-Leibler losses (DKL, IKL, GKL) for existing PyTorch pipelines."""

from .class_prior import ClassPrior
from .functional import LossTerms, dkl_loss, gkl_loss, ikl_loss
from .losses import DKLLoss, GKLLoss, IKLLoss

__version__ = "0.1.0"

__all__ = [
    "ClassPrior",
    "DKLLoss",
    "GKLLoss",
    "IKLLoss",
    "LossTerms",
    "dkl_loss",
    "gkl_loss",
    "ikl_loss",
]
