"""The papers of an output: model cards, and the manifest, which is written last."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kasa_cli.checkpoint import manifest, model_card
from kasa_cli.checkpoint.shard_plan import CARD
from kasa_cli.files.durable import write_file
from kasa_cli.files.staging import MANIFEST, Staging
from kasa_cli.linalg.realised import Outcome
from kasa_cli.pipeline.base_writer import WrittenBase, WrittenTensor
from kasa_cli.pipeline.file_records import file_records
from kasa_cli.pipeline.truncating.factors import Measured
from kasa_cli.pipeline.truncating.options import Options, recorded
from kasa_cli.pipeline.truncating.plan import Plan


def write_papers(
    made: Plan,
    options: Options,
    staging: Staging,
    environment: Mapping[str, Any],
    done: tuple[list[Measured], WrittenBase[Outcome]],
) -> bytes:
    """Cards, then the manifest, which is last: whoever finds it finds all else."""
    carried = model_card.source_facts(made.checkpoint.root, made.checkpoint.companions)
    text = model_card.card(made.source.repo, carried, "A KaSA starting point", _card_body(made, options))
    write_file(staging.out / CARD, [text])
    if "base" in options.emit:
        write_file(staging.out / "base" / CARD, [text])
    measured, base = done
    records = _tensor_records(made, measured, base.tensors)
    headers = {f"base/{name}": sha256 for name, sha256 in base.header_sha256.items()}
    content = {
        "base_fingerprint": manifest.fingerprint(records),
        "schema": manifest.SCHEMA,
        "command": "truncate",
        "environment": dict(environment),
        "files": file_records(staging.out, options.num_workers, headers),
        "left_out": {left.name: left.reason for left in made.checkpoint.left_out},
        "model_class": made.names.model_class,
        "options": recorded(options),
        "source": {"commit": made.source.commit, "repo": made.source.repo},
        "tensors": records,
    }
    sealed = manifest.seal(_finite(content))
    write_file(staging.out / MANIFEST, [sealed])
    return sealed


def _tensor_records(
    made: Plan, measured: list[Measured], written: list[WrittenTensor[Outcome]]
) -> dict[str, Any]:
    records: dict[str, dict[str, Any]] = {
        one.name: {"file": one.file, "dtype": one.dtype, "blake3": one.blake3, "role": "copied"}
        for one in written
    }
    for one in measured:
        record = records.setdefault(one.target.name, {"dtype": one.target.matrix.dtype, "role": "reference"})
        record |= {"input_blake3": one.blake3, "module": one.target.module, **asdict(one.facts)}
        record |= {
            "truncation_rank": one.target.dropped,
            "is_transposed": one.target.matrix.is_transposed,
        }
    for one_written in written:
        if one_written.checks:
            records[one_written.name] |= {"role": "truncated", **asdict(one_written.checks)}
    for name, record in records.items():
        record["shape"] = list(made.checkpoint.tensors[name].shape)
    return records


def _finite(value: Any) -> Any:
    """JSON has no infinity: κ of a singular weight is null, which σ_min = 0 beside it explains."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _card_body(made: Plan, options: Options) -> str:
    parts = {
        "base": "- `base/`: the truncated model, loaded like the original.",
        "adapter": f"- `adapter/`: a fresh KaSA adapter of rank {options.rank} for PEFT.",
        "tail": "- `tail/`: a plain LoRA that turns the original model into the truncated one.",
    }
    lines = [
        f"Made by kasa: the {options.dropped} smallest singular components of "
        f"{len(made.selection.targets)} weights were dropped (KaSA, arXiv 2412.06071).",
        "",
        *(line for part, line in parts.items() if part in options.emit),
        f"- `{MANIFEST}`: what was done to every tensor, with hashes; `kasa verify` checks it.",
    ]
    return "\n".join(lines)
