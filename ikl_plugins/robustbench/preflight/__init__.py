"""What RobustBench asks of a model, checked before an evaluation is paid for or a submission is written.

The rules are RobustBench's: input gradients that are not zero in general, a deterministic forward pass, no optimisation
in it (https://github.com/RobustBench/robustbench, "Main idea"). The other checks are for the mistakes that make an
evaluation wrong without a word: images in the wrong range, normalised twice, a model in training mode, a radius that
was rounded.
"""

from .result import Check, Preflight
from .run import CHECKS, preflight

__all__ = ["CHECKS", "Check", "Preflight", "preflight"]
