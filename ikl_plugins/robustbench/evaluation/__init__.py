"""Evaluations under attack and under corruptions, with a log from which an interrupted run goes on."""

from .checks import ATTACKS, VERSIONS, check_radii
from .corruptions import evaluate_corruptions
from .log import Evaluation
from .run import Progress, curve, evaluate

__all__ = ["ATTACKS", "VERSIONS", "Evaluation", "Progress", "check_radii", "curve", "evaluate", "evaluate_corruptions"]
