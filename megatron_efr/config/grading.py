"""Keys of grading: how answers are found and judged, for a run or for one data set."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from megatron_efr.config.section import Section


class ExactOptions(Section):
    """Options of the verifier `exact`."""

    ignore_case: bool = Field(default=False, description="upper and lower case are the same")


class NumericOptions(Section):
    """Options of the verifier `numeric`: how far an answer may lie from the gold; the wider of the
    two counts.
    """

    relative: float = Field(
        default=1e-6, ge=0, description="largest difference, as a share of the gold's size"
    )
    absolute: float = Field(default=0.0, ge=0, description="in the gold's unit")


class RegexOptions(Section):
    """Options of the verifier `regex`."""

    search: bool = Field(
        default=False, description="the pattern may match anywhere, not only the whole answer"
    )
    ignore_case: bool = Field(default=False, description="upper and lower case are the same")


OPTIONS: dict[str, type[Section]] = {
    "math": Section,
    "exact": ExactOptions,
    "choice": Section,
    "numeric": NumericOptions,
    "regex": RegexOptions,
}
"""The built-in verifiers, and the options that each knows."""


class VerifierConfig(Section):
    """One verifier, and where in a response it finds the answer."""

    verifier: str = Field(
        default="math",
        min_length=1,
        description=(
            "math, exact, choice, numeric, regex; or a plug-in: a name registered under the entry "
            "point megatron_efr.verifiers, or module:function"
        ),
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="the verifier's own; a plug-in's keyword arguments"
    )
    answer: Literal["last_box", "boxes", "marker", "last_number", "whole"] = Field(
        default="last_box",
        description=(
            "last_box: the last \\boxed{}; boxes: those of the last statement, if the gold has as "
            "many parts; marker: what follows the last `marker` on its line; last_number: the "
            "last in digits; whole: all of it"
        ),
    )
    marker: str | None = Field(
        default=None, min_length=1, description="with answer: marker; such as 'Answer:'"
    )

    @model_validator(mode="after")
    def _a_marker_belongs_to_its_answer(self) -> Self:
        if self.answer == "marker" and self.marker is None:
            raise ValueError(
                "answer: marker needs `marker`, the text that an answer follows, such as 'Answer:'"
            )
        if self.answer != "marker" and self.marker is not None:
            raise ValueError(
                f"marker: {self.marker!r} is used only with answer: marker; here answer is "
                f"{self.answer}"
            )
        return self

    @model_validator(mode="after")
    def _options_are_the_verifiers(self) -> Self:
        kind = OPTIONS.get(self.verifier)
        if kind is None:  # a plug-in's, checked when it is loaded
            return self
        try:
            kind.model_validate(self.options)
        except ValidationError as error:
            [first, *_] = error.errors()
            known = ", ".join(kind.model_fields) or "none"
            key = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"options.{key}: {first['msg']}; options of {self.verifier}: {known}"
            ) from error
        return self


class PartConfig(VerifierConfig):
    """A further verifier, whose score counts beside the first one's."""

    weight: float = Field(gt=0, description="its weight in the score, relative to the others'")


class JudgingConfig(VerifierConfig):
    """Judges answers. The first verifier says which are correct; `parts` add to the score alone."""

    threshold: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="for a verifier that gives scores: the least score of a correct answer",
    )
    weight: float = Field(
        default=1.0,
        ge=0,
        description="the first verifier's weight in the score, relative to those of `parts`",
    )
    parts: list[PartConfig] = Field(
        default_factory=list,
        description="score: the mean of all verifiers' scores by weight, from 0 to 1",
    )

    @model_validator(mode="after")
    def _some_verifier_has_weight(self) -> Self:
        if self.weight == 0 and not self.parts:
            raise ValueError(
                "weight: 0 leaves no verifier that counts for the score; give it more, or add parts"
            )
        return self


class GradingConfig(JudgingConfig):
    """Judging, in processes that can be killed; a data set may have a `grading` of its own."""

    workers: PositiveInt = Field(default=1, description="grading processes")
    timeout_s: float = Field(default=5.0, gt=0, description="CPU seconds for one response")
    memory_mib: PositiveInt = Field(default=2048, description="memory of one grading process")
