"""Is the answer right? math-verify in processes that can be killed; texts in, verdicts out, order kept."""

from megatron_efr.grading.golds import GoldError, check_golds
from megatron_efr.grading.pool import STATUSES, Grade, Grader, GraderError, count_statuses, grade

__all__ = ["STATUSES", "GoldError", "Grade", "Grader", "GraderError", "check_golds", "count_statuses", "grade"]
