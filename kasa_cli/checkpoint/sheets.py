"""The files of a new base, planned from headers alone: as they were, or laid out anew.

Where every dtype stays, a shard keeps its name, its header and the place of every tensor; where one changes, or a
shard size is asked for, headers are made anew.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from kasa_cli.checkpoint.durable import copy_file, make_folder, write_file
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.streaming import Form, form
from kasa_cli.errors import UsageError

CARD = "README.md"
HALVES = ("float16", "bfloat16")
WIDE = "float32"


@dataclass(frozen=True)
class Sheet:
    """One file of the new base: its header bytes, where its tensors go, and its size."""

    name: str
    form: Form


def base_sheets(checkpoint: Checkpoint, dtypes: Mapping[str, str], max_shard_size: str | None) -> list[Sheet]:
    """The files of the new base. `dtypes` names the stored dtype of every target that changes its own.

    Raises:
        UsageError: a shard size is asked for, but config.json names the files.
    """
    named = checkpoint.config.get("transformers_weights")
    if max_shard_size is not None and named is not None:
        raise UsageError(
            "config.json names the files of the weights", str(named), "leave out --max-shard-size"
        )
    if not dtypes and max_shard_size is None:
        return [
            Sheet(file, Form(_header(shard.path, shard.data_start), shard.tensors, shard.identity.size))
            for file, shard in checkpoint.shards.items()
        ]
    triples = {
        name: (name, dtypes.get(name, entry.dtype), entry.shape) for name, entry in checkpoint.tensors.items()
    }
    files = _split(triples, max_shard_size) if max_shard_size else _as_before(checkpoint)
    return [Sheet(file, form(triples[name] for name in names)) for file, names in files.items()]


def copy_companions(checkpoint: Checkpoint, folder: Path, dtype: str) -> None:
    """Copy every non-weight file of the model but its card, which speaks of the original.

    Where a target becomes wider than the dtype that config.json names, it names a wide enough one: loaders would
    else round the new tensors again.
    """
    for name in checkpoint.companions:
        make_folder((folder / name).parent)
        if name == "config.json" and (retyped := _retyped(checkpoint, dtype)):
            write_file(folder / name, [retyped])
        elif name != CARD:
            copy_file(checkpoint.root / name, folder / name)


def write_index(checkpoint: Checkpoint, sheets: Sequence[Sheet], folder: Path) -> None:
    """The index as it was where the layout is, else a new one; none for a single file that had none."""
    is_as_before = all(
        checkpoint.shards.get(sheet.name) and sheet.form.tensors is checkpoint.shards[sheet.name].tensors
        for sheet in sheets
    )
    if is_as_before and checkpoint.index_name:
        copy_file(checkpoint.root / checkpoint.index_name, folder / checkpoint.index_name)
    elif len(sheets) > 1 or (checkpoint.index_name and checkpoint.shards.get(sheets[0].name)):
        name = checkpoint.index_name or "model.safetensors.index.json"
        write_file(folder / name, [(json.dumps(new_index(sheets), indent=2) + "\n").encode()])


def new_index(sheets: Iterable[Sheet]) -> dict[str, Any]:
    """The index of a base whose layout was written anew."""
    entries = [(sheet.name, entry) for sheet in sheets for entry in sheet.form.tensors.values()]
    return {
        "metadata": {"total_size": sum(entry.num_bytes for _, entry in entries)},
        "weight_map": {entry.name: file for file, entry in sorted(entries, key=lambda pair: pair[1].name)},
    }


def _retyped(checkpoint: Checkpoint, dtype: str) -> bytes | None:
    """config.json with a dtype that holds old and new tensors; None where the one it names does."""
    config = json.loads((checkpoint.root / "config.json").read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    named = config.get(key)
    if dtype == "auto" or named == dtype or (named not in HALVES and dtype in HALVES):
        return None
    return (json.dumps({**config, key: WIDE}, indent=2, ensure_ascii=False) + "\n").encode()


def _header(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _as_before(checkpoint: Checkpoint) -> dict[str, list[str]]:
    return {file: list(shard.tensors) for file, shard in checkpoint.shards.items()}


def _split(
    triples: Mapping[str, tuple[str, str, tuple[int, ...]]], max_shard_size: str
) -> dict[str, list[str]]:
    """The Hub's own plan of shards, from sizes alone."""
    sizes = {name: form([triple]).size - form([]).size for name, triple in triples.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return plan.filename_to_tensors
