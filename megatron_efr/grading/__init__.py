"""Is the answer right? Verifiers in processes that can be killed; texts in, verdicts out, order
kept.
"""

from megatron_efr.grading.golds import GoldError, check_golds
from megatron_efr.grading.pool import Grader, GraderError, count_statuses, grade
from megatron_efr.grading.verdict import STATUSES, Verifier
from megatron_efr.types import Grade

__all__ = [
    "STATUSES",
    "GoldError",
    "Grade",
    "Grader",
    "GraderError",
    "Verifier",
    "check_golds",
    "count_statuses",
    "grade",
]
