"""Plans the files of a new base from headers alone: the old layout, or a new one.

A shard in which every tensor keeps its dtype and shape keeps its name, its header and the place of every tensor;
where one changes or comes to it, or a shard size is asked for, headers are made anew.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.model_config import encoded, retyped
from kasa_cli.checkpoint.safetensors_writer import FileLayout, lay_out
from kasa_cli.errors import UsageError
from kasa_cli.files import copy_file, make_folder, write_file

CARD = "README.md"
Triples = Mapping[str, tuple[str, str, tuple[int, ...]]]
"""Name, dtype and shape of every new tensor, by name."""


@dataclass(frozen=True)
class Sheet:
    """One file of the new base: its header bytes, where its tensors go, and its size.

    `sources` names the tensor of the old base that each new one is made from.
    """

    name: str
    layout: FileLayout
    sources: Mapping[str, str] = field(default_factory=dict)


def base_sheets(
    checkpoint: Checkpoint,
    dtypes: Mapping[str, str],
    max_shard_size: str | None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    sources: Mapping[str, str] | None = None,
) -> list[Sheet]:
    """The files of the new base.

    `dtypes` and `shapes` name what changes; `sources` the new tensors, each with the one that it is made from, whose
    dtype and shape it has if nothing else is said, and beside which it is put.

    Raises:
        UsageError: a shard size is asked for, but config.json names the files.
    """
    named = checkpoint.config.get("transformers_weights")
    if max_shard_size is not None and named is not None:
        raise UsageError(
            "config.json names the files of the weights", str(named), "leave out --max-shard-size"
        )
    shapes, sources = shapes or {}, sources or {}
    changed = {*dtypes, *shapes, *sources}
    triples = {name: _triple(checkpoint, name, name, dtypes, shapes) for name in checkpoint.tensors}
    triples |= {new: _triple(checkpoint, new, old, dtypes, shapes) for new, old in sources.items()}
    if max_shard_size:
        files = _split(triples, max_shard_size)
    else:
        files = {file: [*shard.tensors] for file, shard in checkpoint.shards.items()}
        for new, old in sources.items():
            files[checkpoint.shard_of(old)].append(new)
    return [
        _unchanged(checkpoint, file)
        if max_shard_size is None and changed.isdisjoint(names)
        else Sheet(file, lay_out(triples[name] for name in names), sources)
        for file, names in files.items()
    ]


def _triple(
    checkpoint: Checkpoint,
    name: str,
    source: str,
    dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[str, str, tuple[int, ...]]:
    entry = checkpoint.tensors[source]
    return name, dtypes.get(name, entry.dtype), shapes.get(name, entry.shape)


def _unchanged(checkpoint: Checkpoint, file: str) -> Sheet:
    shard = checkpoint.shards[file]
    return Sheet(file, FileLayout(_header(shard.path, shard.data_start), shard.tensors, shard.identity.size))


def copy_companions(
    checkpoint: Checkpoint, folder: Path, dtype: str, config: Mapping[str, Any] | None = None
) -> None:
    """Copy every non-weight file of the model except its model card, which describes the original.

    config.json is written anew where it changes: where a target becomes wider than the dtype that it names, and where
    `config` says more.
    """
    for name in checkpoint.companions:
        make_folder((folder / name).parent)
        if name == "config.json":
            old = json.loads((checkpoint.root / name).read_text(encoding="utf-8"))
            new = retyped(old if config is None else config, dtype)
            if new != old:
                write_file(folder / name, [encoded(new)])
                continue
        if name != CARD:
            copy_file(checkpoint.root / name, folder / name)


def write_index(checkpoint: Checkpoint, sheets: Sequence[Sheet], folder: Path) -> None:
    """Copy the index where the layout is unchanged, else write a new one; none for a single file that had none."""
    is_as_before = all(
        checkpoint.shards.get(sheet.name) and sheet.layout.tensors is checkpoint.shards[sheet.name].tensors
        for sheet in sheets
    )
    if is_as_before and checkpoint.index_name:
        copy_file(checkpoint.root / checkpoint.index_name, folder / checkpoint.index_name)
    elif len(sheets) > 1 or (checkpoint.index_name and checkpoint.shards.get(sheets[0].name)):
        name = checkpoint.index_name or "model.safetensors.index.json"
        write_file(folder / name, [(json.dumps(new_index(sheets), indent=2) + "\n").encode()])


def new_index(sheets: Iterable[Sheet]) -> dict[str, Any]:
    """The index of a base with a new layout."""
    entries = [(sheet.name, entry) for sheet in sheets for entry in sheet.layout.tensors.values()]
    return {
        "metadata": {"total_size": sum(entry.num_bytes for _, entry in entries)},
        "weight_map": {entry.name: file for file, entry in sorted(entries, key=lambda pair: pair[1].name)},
    }


def _header(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _split(triples: Triples, max_shard_size: str) -> dict[str, list[str]]:
    """The Hub's own plan of shards, from sizes alone."""
    sizes = {name: lay_out([triple]).size - lay_out([]).size for name, triple in triples.items()}
    plan = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return plan.filename_to_tensors
