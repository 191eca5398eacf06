"""Adversarial training for any classifier on pixels in [0, 1]: the inner maximisation, its schedules, AWP.

Nothing here knows a host library. The losses of :mod:`ikl_plugins` take what comes out: the logits of the adversarial
images are the student's, those of the natural images the teacher's.
"""

from .attack import MODEL_MODES, NORMS, OBJECTIVES, PGD, RANDOM_STARTS
from .modes import frozen_statistics, model_mode
from .pixels import PixelSpace
from .schedule import BUDGETS, BudgetRow, Strength
from .weight_perturbation import UNDO, AdversarialWeightPerturbation

__all__ = [
    "BUDGETS",
    "MODEL_MODES",
    "NORMS",
    "OBJECTIVES",
    "PGD",
    "RANDOM_STARTS",
    "UNDO",
    "AdversarialWeightPerturbation",
    "BudgetRow",
    "PixelSpace",
    "Strength",
    "frozen_statistics",
    "model_mode",
]
