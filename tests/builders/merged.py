"""Merges by kasa, and assertions that hold for every merge."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from kasa_cli.pipeline.merging.run import MergeRequest, ModelLocation, RunOptions, merge
from kasa_cli.report import MergeReport
from tests.builders.adapters import WEIGHTS
from tests.builders.checkpoints import tensors_of

HERE = RunOptions(1, use_store=False)


def merged(adapter: Path | list[Path], base: Path, out: Path, **options: Any) -> MergeReport:
    paths = adapter if isinstance(adapter, list) else [adapter]
    return merge(paths, ModelLocation(str(base)), out, MergeRequest(**options), HERE)


def loaded(folder: Path, caplog) -> transformers.PreTrainedModel:
    """The model; transformers loads it without a warning and finds no key missing, unexpected or mismatched."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        caplog.clear()
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    finally:
        logger.removeHandler(caplog.handler)
    return model.eval()


def assert_accounted(report: MergeReport, base: Path, out: Path) -> None:
    """Every tensor of the output is merged or an exact copy, and every tensor of the adapters is used."""
    before, after = tensors_of(base), tensors_of(out)
    merged_names = {row.name for row in report.tensors}
    records = json.loads((out / "kasa.manifest.json").read_text())["tensors"]
    assert records.keys() == after.keys() and merged_names <= after.keys()
    assert report.totals["tensors_merged"] == len(merged_names)
    assert report.totals["tensors_copied"] == len(after) - len(merged_names)
    for name in after.keys() - merged_names:
        assert torch.equal(after[name], before[records[name].get("made_from", name)]), name
    assert all(row.tensors_consumed == row.tensors_total for row in report.adapters)
    for row in report.adapters:
        assert row.tensors_total == len(load_file(Path(row.path) / WEIGHTS))
