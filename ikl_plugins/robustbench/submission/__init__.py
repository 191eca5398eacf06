"""A folder with everything that RobustBench asks for when a model is submitted, checked before it is written."""

from .entry import model_info
from .name import check_name
from .write import DEMONSTRATION, alone, check_statements, write_submission

__all__ = ["DEMONSTRATION", "alone", "check_name", "check_statements", "model_info", "write_submission"]
