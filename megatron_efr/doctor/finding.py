"""One thing that was looked at: how it stands, what was found, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`problem` is what the run needs and has not; `note` what costs speed, or something that this
    run does not use.
    """

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""


def missing(subject: str, found: str, advice: str, needed: bool) -> Finding:
    """Something that is not as it should be: a problem if it is needed, else a note."""
    return Finding(subject, "problem" if needed else "note", found, advice)
