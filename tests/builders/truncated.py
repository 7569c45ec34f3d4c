"""Truncated checkpoints, loaded by transformers and adapted by PEFT."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from kasa_cli.errors import UsageError
from kasa_cli.pipeline.truncating.run import ModelLocation, Patterns, TruncateRequest, plan, truncate
from kasa_cli.report import TruncateReport
from tests.builders import tiny_models
from tests.builders.checkpoints import load

RANK = 3  # below the smallest side of any target: Jamba's dt_proj is 64 x 4
EXPERTS = ("gate_proj", "up_proj", "down_proj")
REWRITTEN = {"deepseek-v2", "deepseek-v3"}
"""Families where PEFT takes these default targets for routed experts."""


@dataclass(frozen=True)
class Truncated:
    family: str
    model: Path
    out: Path
    report: TruncateReport

    @property
    def base(self) -> Path:
        return self.out / "base"

    @property
    def modules(self) -> list[str]:
        return sorted(row.module for row in self.report.tensors)

    def original(self) -> PreTrainedModel:
        return load(self.model)

    def truncated(self) -> PreTrainedModel:
        return load(self.base)


def made(family: str, folder: Path, **options: Any) -> Truncated:
    model = tiny_models.save(family, folder / "model")
    report = truncate(
        ModelLocation(str(model)), folder / "out", TruncateRequest(rank=RANK, workers=1, **options)
    )
    return Truncated(family, model, folder / "out", report)


def cut(model: Path, out: Path, *targets: str, excludes: tuple[str, ...] = (), **options: Any) -> Truncated:
    """Truncate a model at the modules that the patterns match."""
    patterns = Patterns(targets, excludes)
    report = truncate(
        ModelLocation(str(model)), out, TruncateRequest(**{"rank": RANK, "patterns": patterns, **options})
    )
    return Truncated("", model, out, report)


def chosen(model: Path, *targets: str, excludes: tuple[str, ...] = (), **options: Any) -> list[str]:
    """The modules that a plan takes."""
    options = {"rank": RANK, "patterns": Patterns(targets, excludes), **options}
    return sorted(
        target.module for target in plan(ModelLocation(str(model)), TruncateRequest(**options)).tensors
    )


def refused(model: Path, *targets: str, **options: Any) -> str:
    """The error of both the plan and the truncation."""
    with pytest.raises(UsageError) as caught:
        chosen(model, *targets, **options)
    with pytest.raises(UsageError) as again:
        cut(model, model.parent / "never", *targets, **options)
    assert str(again.value) == str(caught.value) and not (model.parent / "never").exists()
    return str(caught.value)
