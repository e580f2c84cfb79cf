"""The report: summaries of evaluations, plots, and one self-contained page."""

from megatron_efr.report.page import write_report
from megatron_efr.report.records import build_summary, over_seeds, summary_markdown

__all__ = ["build_summary", "over_seeds", "summary_markdown", "write_report"]
