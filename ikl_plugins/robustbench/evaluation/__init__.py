"""Evaluations under attack and under corruptions, with a log from which an interrupted run goes on."""

from .checks import ATTACKS, VERSIONS, check_radii
from .corruptions import evaluate_corruptions
from .curves import curve
from .log import Evaluation
from .merge import merge
from .run import Progress, evaluate
from .shards import Unfinished
from .verify import Verified, verify

__all__ = ["ATTACKS", "VERSIONS", "Evaluation", "Progress", "Unfinished", "Verified", "check_radii", "curve"]
__all__ += ["evaluate", "evaluate_corruptions", "merge", "verify"]
