"""The page of configuration says what the fields say, and every field says something."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, PositiveInt

from megatron_efr.config import RunConfig, Section
from megatron_efr.config.page import PROGRAMS, page, section_of, undescribed, values

pytestmark = pytest.mark.alike

PAGE = Path(__file__).parents[3] / "docs/configuration.md"


class Inner(Section):
    """A section within."""

    ratio: float = Field(default=0.5, ge=0, lt=1, description="a share")


class Outer(Section):
    """Fields of every kind."""

    count: PositiveInt = 3
    limit: PositiveInt | None = None
    shares: dict[str, float] = Field(default_factory=dict)
    names: list[str] = Field(default_factory=list)
    inner: list[Inner] | None = None
    passed: dict[str, int | str] = Field(default_factory=dict)


def test_every_field_has_a_description_and_every_section_a_docstring() -> None:
    assert undescribed() == []


def test_every_program_that_reads_a_configuration_is_on_the_page() -> None:
    assert set(RunConfig.__subclasses__()) <= set(PROGRAMS.values())


def test_the_page_is_up_to_date() -> None:
    behind = (
        "a field changed: run `python -m megatron_efr.config > docs/configuration.md` and commit "
        "the page"
    )
    assert PAGE.read_text(encoding="utf-8") == page(), behind


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("count", "integer from 1"),
        ("limit", "integer from 1"),
        ("shares", "mapping to number"),
        ("names", "list of text"),
        ("passed", "mapping to integer or text"),
    ],
)
def test_values_are_named_as_a_writer_of_yaml_names_them(key: str, said: str) -> None:
    assert values(Outer.model_json_schema()["properties"][key]) == said


def test_a_range_is_said_with_the_ends_that_belong_to_it() -> None:
    assert values(Inner.model_json_schema()["properties"]["ratio"]) == "number from 0 below 1"


def test_a_section_is_found_in_a_list_and_behind_null() -> None:
    assert section_of(Outer.model_fields["inner"].annotation) is Inner
    assert section_of(Outer.model_fields["shares"].annotation) is None


def test_the_page_has_a_row_for_every_key_and_says_what_sections_have_in_common() -> None:
    text = page()
    assert "| `lr` | number above 0 | required | learning rate after the warm-up |" in text
    assert "| `async` | `true` `false` | `false` |" in text
    assert "As in [`efr train`](#efr-train): `name`, `runs`, `seed`, `model`" in text
    assert text.count("| `timeout_s` |") == 1
