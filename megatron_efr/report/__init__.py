"""What came of it: statistics of graded groups, evaluation records, plots, and one self-contained page."""

from megatron_efr.report.page import write_report
from megatron_efr.report.records import build_summary, over_seeds, summarise, summary_markdown

__all__ = ["build_summary", "over_seeds", "summarise", "summary_markdown", "write_report"]
