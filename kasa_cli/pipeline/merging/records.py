"""The papers of a merge: the card, and the manifest, which is written last."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kasa_cli.checkpoint import manifest, model_card
from kasa_cli.checkpoint.shard_plan import CARD, Sheet
from kasa_cli.files.durable import write_file
from kasa_cli.files.staging import MANIFEST
from kasa_cli.pipeline.adapter_on_base import provenance
from kasa_cli.pipeline.base_writer import WrittenBase, WrittenTensor
from kasa_cli.pipeline.file_records import file_records
from kasa_cli.pipeline.merging.case import Case
from kasa_cli.pipeline.merging.whole_tensor import Merged
from kasa_cli.pipeline.workers import Running
from kasa_cli.report import AdapterRow


def recorded(case: Case, running: Running) -> dict[str, Any]:
    """What the bytes depend on beside the base: no path."""
    options = ("dtype", "max_shard_size", "rounding", "untie")
    adapters = [
        {name: value for name, value in asdict(row).items() if name != "path"} for row in case.adapters
    ]
    return {
        "adapters": adapters,
        "base_is": case.told,
        "command": "merge",
        "environment": manifest.numeric_environment(running.threads_per_worker, "cpu"),
        "merged_before": sorted(provenance.merged_before(case.base)),
        "options": {name: getattr(case.options, name) for name in options},
        "source": {"commit": case.source.commit, "repo": case.source.repo},
    }


def write_papers(
    case: Case,
    folder: Path,
    record: Mapping[str, Any],
    sheets: Sequence[Sheet],
    written: WrittenBase[Merged],
    num_workers: int,
) -> bytes:
    """The card, then the manifest, which is last: whoever finds it finds all else."""
    base = case.checkpoint
    carried = model_card.source_facts(base.root, base.companions)
    text = model_card.card(case.source.repo, carried, "A merged model", _card_body(case.adapters))
    write_file(folder / CARD, [text])
    content = {
        **record,
        "files": file_records(folder, num_workers, written.header_sha256),
        "left_out": {left.name: left.reason for left in base.left_out},
        "model_class": case.names.model_class,
        "schema": manifest.SCHEMA,
        "tensors": _tensor_records(sheets, written.tensors),
    }
    sealed = manifest.seal(content)
    write_file(folder / MANIFEST, [sealed])
    return sealed


def _tensor_records(sheets: Sequence[Sheet], written: Sequence[WrittenTensor[Merged]]) -> dict[str, Any]:
    shapes = {name: entry.shape for sheet in sheets for name, entry in sheet.form.tensors.items()}
    sources = {name: source for sheet in sheets for name, source in sheet.sources.items()}
    return {
        one.name: {
            "file": one.file,
            "dtype": one.dtype,
            "blake3": one.blake3,
            "shape": list(shapes[one.name]),
            "role": "merged" if one.checks else "copied",
            **({"made_from": sources[one.name]} if one.name in sources else {}),
            **(asdict(one.checks) if one.checks else {}),
        }
        for one in written
    }


def _card_body(rows: Sequence[AdapterRow]) -> str:
    lines = [f"- {row.kind}, weight {row.weight:g}, {row.tensors_total} tensors" for row in rows]
    head = (
        f"Made by kasa: {len(rows)} adapter{'s' if len(rows) > 1 else ''} merged, every tensor rounded once."
    )
    tail = f"- `{MANIFEST}`: what was done to every tensor, with hashes; `kasa verify` checks it."
    return "\n".join([head, "", *lines, tail])
