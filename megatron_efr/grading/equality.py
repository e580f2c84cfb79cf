"""Tells which responses to a problem give equal answers, for votes: by the verifier, not by
spelling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_efr.grading.groups import judging_of
from megatron_efr.grading.judging import Judgings
from megatron_efr.grading.pool import Grader
from megatron_efr.grading.verdict import CORRECT, WRONG, Question, Verifier
from megatron_efr.types import Graded

_GOLDS_ARE_ANSWERS = ("math", "exact", "choice", "numeric")
"""Verifiers whose right answers all equal the gold, hence each other."""


def equal_answers(
    grader: Grader, groups: Sequence[Graded], judgings: Judgings | None = None
) -> list[list[int | None]]:
    """Number the answers of each graded group: equal numbers are equal answers, None is no answer
    or cut off.

    Right answers are equal if the verifier compares with a gold that is an answer itself. The
    others go one spelling after the other to the first class whose first spelling they equal,
    whichever of the two is taken as the gold.
    """
    judgings = judgings or Judgings()
    classes = [_Classes(group, judgings) for group in groups]
    known: dict[Question, bool] = {}
    while pending := [one for one in classes if one.waiting]:
        asked = dict.fromkeys(
            question for one in pending for question in one.questions() if question not in known
        )
        known.update(zip(asked, (grade.correct for grade in grader.ask(list(asked))), strict=True))
        for one in pending:
            one.place(known)
    return [one.numbers() for one in classes]


class _Classes:
    """The answers of one group, and the classes found among them; spellings are placed one at a
    time.
    """

    def __init__(self, graded: Graded, judgings: Judgings) -> None:
        group = graded.group
        part = judging_of(group, judgings).main
        self._verifier: Verifier = part.verifier
        # a response that was cut off votes for nothing
        answers = [
            None if r.truncated else part.extractor(r.text, group.prompt.gold)
            for r in group.responses
        ]
        self._spellings = [
            None if answer is None else " ".join(answer.split()) for answer in answers
        ]
        # answers that are right by the gold are class 0 without a question
        by_status = list(
            zip(self._spellings, (grade.status for grade in graded.grades), strict=True)
        )
        united = (
            {text for text, status in by_status if status == CORRECT}
            if self._golds_are_answers
            else set()
        )
        self._judged = {text for text, status in by_status if status in (CORRECT, WRONG)}
        self._class: dict[str | None, int] = dict.fromkeys(united, 0)
        # the first spelling of each class that others are compared with
        self._heads: dict[int, str] = {}
        self._next = 1
        # each other spelling is placed once, however many responses have it
        self.waiting = [
            text
            for text in dict.fromkeys(self._spellings)
            if text is not None and text not in united
        ]

    @property
    def _golds_are_answers(self) -> bool:
        return self._verifier.name in _GOLDS_ARE_ANSWERS

    def questions(self) -> Iterable[Question]:
        """The comparisons that are still needed to place the next spelling."""
        text = self.waiting[0]
        # unreadable, or too long to judge: it equals its own spelling alone
        if text not in self._judged:
            return
        for head in self._heads.values():
            yield Question(self._verifier, head, text, "equal")
            yield Question(self._verifier, text, head, "equal")

    def place(self, known: dict[Question, bool]) -> None:
        """Put the next spelling into the first class whose head it equals, or into one of its
        own.
        """
        text = self.waiting.pop(0)
        for number, head in self._heads.items():
            both = (
                Question(self._verifier, head, text, "equal"),
                Question(self._verifier, text, head, "equal"),
            )
            if text in self._judged and all(known[question] for question in both):
                self._class[text] = number
                return
        self._class[text] = self._next
        if text in self._judged:
            self._heads[self._next] = text
        self._next += 1

    def numbers(self) -> list[int | None]:
        return [None if text is None else self._class[text] for text in self._spellings]
