"""The papers of an output: model cards, and the manifest, which is written last."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kasa_cli.adapters.fused_experts import wrapper_names
from kasa_cli.checkpoint import manifest, model_card
from kasa_cli.checkpoint.hashing import hash_tensor
from kasa_cli.checkpoint.shard_plan import CARD
from kasa_cli.files.durable import write_file
from kasa_cli.files.staging import MANIFEST, Staging
from kasa_cli.pipeline.file_records import file_records
from kasa_cli.pipeline.truncating.factors import Measured
from kasa_cli.pipeline.truncating.options import Options, recorded
from kasa_cli.pipeline.truncating.plan import Plan
from kasa_cli.pipeline.truncating.rewrite import Truncated


def write_papers(
    made: Plan,
    options: Options,
    staging: Staging,
    environment: Mapping[str, Any],
    done: Truncated,
) -> bytes:
    """Cards, then the manifest, which is last: whoever finds it finds all else."""
    carried = model_card.source_facts(made.checkpoint.root, made.checkpoint.companions)
    text = model_card.card(made.source.repo, carried, "A KaSA starting point", _card_body(made, options))
    write_file(staging.out / CARD, [text])
    if "base" in options.emit:
        write_file(staging.out / "base" / CARD, [text])
    records, experts = _tensor_records(made, done), _expert_records(made, done)
    headers = {f"base/{name}": sha256 for name, sha256 in done.base.header_sha256.items()}
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
        **({"experts": experts} if experts else {}),
    }
    sealed = manifest.seal(_finite(content))
    write_file(staging.out / MANIFEST, [sealed])
    return sealed


def _tensor_records(made: Plan, done: Truncated) -> dict[str, Any]:
    records: dict[str, dict[str, Any]] = {
        one.name: {"file": one.file, "dtype": one.dtype, "blake3": one.blake3, "role": "copied"}
        for one in done.base.tensors
    }
    for one in done.measured:
        if one.target.expert is None:
            record = records.setdefault(one.target.name, {"dtype": one.target.matrix.dtype})
            record |= _facts(one, done)
    for name in _tensors_of_experts(made):
        record = records.setdefault(name, {"dtype": made.checkpoint.tensors[name].dtype})
        record["input_blake3"] = hash_tensor(made.checkpoint, name)
    for name, record in records.items():
        if "input_blake3" in record:
            record["role"] = "truncated" if "blake3" in record else "reference"
        record["shape"] = list(made.checkpoint.tensors[name].shape)
    return records


def _facts(one: Measured, done: Truncated) -> dict[str, Any]:
    """The record of a target: where it comes from, what was dropped, and what was measured on the result."""
    outcome = done.outcomes.get(one.target.name)
    return {
        "input_blake3": one.blake3,
        "module": one.target.module,
        "truncation_rank": one.target.dropped,
        "is_transposed": one.target.matrix.is_transposed,
        **asdict(one.facts),
        **(asdict(outcome) if outcome else {}),
    }


def _tensors_of_experts(made: Plan) -> list[str]:
    """The tensors on disk that hold experts which are targets."""
    return sorted({piece.name for target in made.selection.experts for piece in target.matrix.pieces})


def _expert_records(made: Plan, done: Truncated) -> dict[str, Any]:
    """The record of every matrix of an expert; `wrapper` is the name of its parameter in the tail."""
    experts = [one for one in done.measured if one.target.expert is not None]
    wrappers = wrapper_names(list(dict.fromkeys(one.target.module for one in experts if one.target.dropped)))
    return {
        one.target.name: {
            **_facts(one, done),
            "dtype": one.target.matrix.dtype,
            "expert": one.target.expert,
            "pieces": [[piece.name, piece.index] for piece in one.target.matrix.pieces],
            "shape": list(one.target.shape),
            "wrapper": wrappers.get(one.target.module),
        }
        for one in experts
    }


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
    if not made.selection.modules:
        del parts["adapter"]
    lines = [
        f"Made by kasa: the {options.dropped} smallest singular components of "
        f"{len(made.selection.targets)} weights were dropped (KaSA, arXiv 2412.06071).",
        "",
        *(line for part, line in parts.items() if part in options.emit),
        f"- `{MANIFEST}`: what was done to every tensor, with hashes; `kasa verify` checks it.",
    ]
    return "\n".join(lines)
