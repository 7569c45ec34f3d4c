"""The papers of an output: model cards, and the manifest, which is written last."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kasa_cli.checkpoint import card, manifest
from kasa_cli.checkpoint.durable import sha256_file, write_file
from kasa_cli.checkpoint.sheets import CARD
from kasa_cli.checkpoint.staging import MANIFEST, Staging
from kasa_cli.linalg.outcome import Outcome
from kasa_cli.pipeline.job import Options, recorded
from kasa_cli.pipeline.measure import Measured
from kasa_cli.pipeline.operate import NewBase, Written
from kasa_cli.pipeline.planning import Plan
from kasa_cli.pipeline.workers import run


def write_papers(
    made: Plan,
    options: Options,
    staging: Staging,
    environment: Mapping[str, Any],
    done: tuple[list[Measured], NewBase[Outcome]],
) -> bytes:
    """Cards, then the manifest, which is last: whoever finds it finds all else."""
    carried = card.source_facts(made.checkpoint.root, made.checkpoint.companions)
    text = card.card(made.source.repo, carried, "A KaSA starting point", _card_body(made, options))
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


def file_records(
    folder: Path, num_workers: int, headers: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by relative POSIX path.

    Of a file in `headers` it is that of its header, which is here already: the other bytes are those of tensors, each
    of which has a hash of its own.
    """
    headers = headers or {}
    files = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    others = [name for name in files if name not in headers]
    whole = dict(
        zip(
            others,
            run(lambda name: sha256_file(files[name]), others, num_workers, lambda _: None),
            strict=True,
        )
    )
    return {
        name: {
            "size": path.stat().st_size,
            **({"header_sha256": headers[name]} if name in headers else {"sha256": whole[name]}),
        }
        for name, path in files.items()
    }


def _tensor_records(made: Plan, measured: list[Measured], written: list[Written[Outcome]]) -> dict[str, Any]:
    records: dict[str, dict[str, Any]] = {
        one.name: {"file": one.file, "dtype": one.dtype, "blake3": one.blake3, "role": "copied"}
        for one in written
    }
    for one in measured:
        record = records.setdefault(one.target.name, {"dtype": one.target.dtype, "role": "reference"})
        record |= {"input_blake3": one.blake3, "module": one.target.module, **asdict(one.facts)}
        record |= {"truncation_rank": one.target.dropped, "is_transposed": one.target.is_transposed}
    for one_written in written:
        if one_written.outcome:
            records[one_written.name] |= {"role": "truncated", **asdict(one_written.outcome)}
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
