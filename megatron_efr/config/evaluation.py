"""Held-out problems, and how they are sampled."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from megatron_efr.config.data import DatasetConfig, check_names
from megatron_efr.config.section import Section


class ScriptConfig(BaseModel):
    """The script that makes a response; the other keys are the script's own, checked by it."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str = Field(default="plain", description="name of the script; `plain` draws to the end")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class EvaluationConfig(Section):
    """Held-out problems, graded during training (`every`) or by `efr evaluate`."""

    datasets: list[DatasetConfig] = Field(
        default_factory=list, description="each is reported by its name"
    )
    every: PositiveInt | None = Field(
        default=None, description="iterations between evaluations inside a training run"
    )
    preset: Literal["paper", "r1", "custom"] = Field(
        default="paper",
        description=(
            "paper: temperature 0.6, top-p 1; r1: temperature 0.6, top-p 0.95; custom: as given "
            "here"
        ),
    )
    temperature: float | None = Field(
        default=None, ge=0, description="custom preset only; 0 is greedy"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="custom preset only; 1 when left out"
    )
    samples: PositiveInt = Field(default=1, description="responses per problem")
    samples_by_dataset: dict[str, PositiveInt] = Field(
        default_factory=dict,
        description="responses per problem of single data sets, by their names",
    )
    max_new_tokens: PositiveInt = Field(default=32768, description="the longest response")
    script: ScriptConfig = Field(
        default_factory=ScriptConfig,
        description=(
            "how a response is made, by a name of docs/scripts.md, with the options of that script"
        ),
    )

    keep: bool = Field(
        default=False,
        description="efr evaluate keeps the judged answers too, as eval/RECORD.jsonl.zst",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluationConfig:
        check_names(self.datasets, "evaluation.datasets")
        return self

    @model_validator(mode="after")
    def _sampling_belongs_to_custom(self) -> EvaluationConfig:
        if self.preset == "custom" and self.temperature is None:
            raise ValueError("preset custom needs a temperature")
        if self.preset != "custom" and (self.temperature is not None or self.top_p is not None):
            raise ValueError(
                f"preset {self.preset} fixes temperature and top_p; set preset: custom to choose "
                "them"
            )
        return self

    @property
    def sampling(self) -> tuple[float, float]:
        """(temperature, top_p)."""
        if self.preset == "custom":
            assert self.temperature is not None
            return self.temperature, 1.0 if self.top_p is None else self.top_p
        return 0.6, 1.0 if self.preset == "paper" else 0.95
