"""Judgings of each data set's answers, as configured: extractors, verifiers, their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_efr.config import ConfigError, JudgingConfig, VerifierConfig
from megatron_efr.grading.extract import LAST_BOX, Extractor
from megatron_efr.grading.verdict import MATH, Verifier


@dataclass(frozen=True, slots=True)
class Part:
    """One verifier, where it finds the answer, and its share of the score."""

    verifier: Verifier = MATH
    extractor: Extractor = LAST_BOX
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Judging:
    """The verifiers of one data set. The first says what is correct; all of them make the score."""

    parts: tuple[Part, ...] = (Part(),)

    @classmethod
    def of(cls, config: JudgingConfig) -> Judging:
        return cls(
            (
                Part(_verifier(config, config.threshold), _extractor(config), config.weight),
                *(
                    Part(_verifier(part, 1.0), _extractor(part), part.weight)
                    for part in config.parts
                ),
            )
        )

    @property
    def main(self) -> Part:
        return self.parts[0]


def _verifier(config: VerifierConfig, threshold: float) -> Verifier:
    return Verifier.of(config.verifier, config.options, threshold)


def _extractor(config: VerifierConfig) -> Extractor:
    return Extractor(config.answer, config.marker or "")


@dataclass(frozen=True, slots=True)
class Judgings:
    """The judging of every data set by name, and of all others."""

    default: Judging = Judging()
    by_dataset: Mapping[str, Judging] = field(default_factory=dict)

    @classmethod
    def of(
        cls, default: JudgingConfig, datasets: Sequence[tuple[str, JudgingConfig | None]]
    ) -> Judgings:
        """From the section `grading` and each data set's name and own `grading`.

        ConfigError if two data sets of one name are judged differently: their problems could not be
        told apart.
        """
        found: dict[str, Judging] = {}
        for name, own in datasets:
            judging = Judging.of(own or default)
            if found.setdefault(name, judging) != judging:
                raise ConfigError(
                    f"two data sets are called {name} and have another `grading`; give each its "
                    "`name`"
                )
        return cls(Judging.of(default), found)

    def of_dataset(self, name: object) -> Judging:
        return self.by_dataset.get(str(name), self.default)

    @property
    def verifiers(self) -> list[Verifier]:
        """Every verifier that is asked, once each."""
        judgings = tuple(self.by_dataset.values()) or (self.default,)
        return list(dict.fromkeys(part.verifier for judging in judgings for part in judging.parts))
