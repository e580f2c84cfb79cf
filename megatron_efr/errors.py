"""The one exception that a person is meant to read; here alone, so that a grading process need not import torch."""

from __future__ import annotations


class UserError(Exception):
    """Something a person can put right. The message says what is wrong, where, and what would be right."""
