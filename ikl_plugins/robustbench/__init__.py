"""The RobustBench adapter: from a checkpoint of any host to an evaluation and a submission.

Importing this package imports RobustBench. Where ``autoattack`` is not installed, which is not on PyPI, pyautoattack
answers to that name from then on, in this process alone; where it is installed, nothing is changed.
"""

from .._robustbench_import import import_robustbench

import_robustbench()

from .compare import Comparison, compare  # noqa: E402
from .data import Images, load_images  # noqa: E402
from .eps import Eps, parse_eps  # noqa: E402
from .evaluation import Evaluation, Verified, curve, evaluate, evaluate_corruptions, verify  # noqa: E402
from .host_data import (  # noqa: E402
    HostImages,
    NaturalCheck,
    check_natural,
    images_of_mmpretrain,
    images_of_torchdistill,
    in_class_order,
)
from .image_models import from_huggingface, from_timm, from_torchvision, images_for  # noqa: E402
from .leaderboard import Ranking, rank  # noqa: E402
from .loading import HostClassifier, Normalised, from_mmpretrain, from_torchdistill, load_checkpoint  # noqa: E402
from .preflight import Preflight, preflight  # noqa: E402
from .report import write_report  # noqa: E402
from .submission import write_submission  # noqa: E402
from .submittable import submission_obstacles  # noqa: E402

__all__ = [
    "Comparison",
    "Eps",
    "Evaluation",
    "HostClassifier",
    "HostImages",
    "Images",
    "NaturalCheck",
    "Normalised",
    "Preflight",
    "Ranking",
    "Verified",
    "check_natural",
    "compare",
    "curve",
    "evaluate",
    "evaluate_corruptions",
    "from_huggingface",
    "from_mmpretrain",
    "from_timm",
    "from_torchdistill",
    "from_torchvision",
    "images_for",
    "images_of_mmpretrain",
    "images_of_torchdistill",
    "in_class_order",
    "load_checkpoint",
    "load_images",
    "parse_eps",
    "preflight",
    "rank",
    "submission_obstacles",
    "verify",
    "write_report",
    "write_submission",
]
