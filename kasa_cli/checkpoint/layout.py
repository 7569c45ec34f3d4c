"""Opens a model folder as one checkpoint: the safetensors files that hold the weights, and the other files.

The index is untrusted: its file names reach no path before `check_shard_name`, and what it says must agree
with the headers of the shards in both directions. Where a folder could be read in two ways, kasa asks: it
never picks.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any

from torch import Tensor

from kasa_cli.checkpoint.folder import (
    LeftOut,
    Listing,
    foreign_weights,
    list_folder,
    reason_to_leave,
    require_inside,
)
from kasa_cli.checkpoint.safetensors_file import CHUNK, Container, TensorEntry, read_header
from kasa_cli.errors import InvalidInput, UnsafeInput
from kasa_cli.files import (
    MAX_CONFIG,
    MAX_CONFIG_DEPTH,
    depth_exceeds,
    enumerated,
    parse_json,
    quote,
    read_small,
    require_regular,
)

__all__ = ["Checkpoint", "LeftOut", "open_checkpoint"]

SINGLE = "model.safetensors"
MAX_INDEX = 100_000_000  # like a header: very large mixtures pass the Hub's own 10 MB
MAX_SIDE = 1 << 31
MAX_LAYERS = 100_000
CONFIG_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), MAX_LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), MAX_SIDE),
}


@dataclass(frozen=True)
class Checkpoint:
    """A model folder with every header checked. It is a `TensorSource`."""

    root: Path
    shards: Mapping[str, Container]
    index_name: str | None
    config: Mapping[str, Any]
    companions: tuple[str, ...]
    left_out: tuple[LeftOut, ...]

    def shard_of(self, tensor: str) -> str:
        """The file name of the shard that holds a tensor."""
        return self._owners[tensor]

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.shards[self.shard_of(name)].tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries [start, stop) along the first side of a tensor; no other byte of it is read."""
        return self.shards[self.shard_of(name)].rows(name, start, stop)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """The raw bytes of one tensor, each chunk in the same memory: use it before the next."""
        return self.shards[self.shard_of(name)].chunks(name, size)

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor, in the order of shards and of offsets."""
        return MappingProxyType(
            {name: entry for shard in self.shards.values() for name, entry in shard.tensors.items()}
        )

    @cached_property
    def _owners(self) -> dict[str, str]:
        return {name: file for file, shard in self.shards.items() for name in shard.tensors}


def open_checkpoint(root: Path, *, hub_cache: Path | None = None) -> Checkpoint:
    """Read a folder's index, headers and config, and check that they agree.

    `hub_cache` is the cache that kasa itself resolved a Hub id into; links that stay inside it are trusted.
    """
    if not root.is_dir():
        raise InvalidInput("not a directory", str(root))
    listing = list_folder(root)
    config = read_config(root, hub_cache) if "config.json" in listing.files else {}
    chosen = choose_weights(root, listing.top, config)
    index_name = None if chosen.endswith(".safetensors") else chosen
    weight_map = read_index(root, index_name, hub_cache) if index_name else None
    files = sorted(set(weight_map.values())) if weight_map else [chosen]
    require_present(root, files, listing.top)
    companions, left_out = sort_out(listing, files, index_name)
    for name in (*files, *companions):
        require_inside(root, name, hub_cache)
        require_regular(root / name)
    shards = {name: read_header(root / name) for name in files}
    if weight_map is not None:
        check_agreement(root, weight_map, shards)
    return Checkpoint(
        root, MappingProxyType(shards), index_name, MappingProxyType(config), companions, left_out
    )


def read_config(root: Path, hub_cache: Path | None) -> dict[str, Any]:
    """config.json as plain data. It is advisory: sizes come from the headers."""
    path = root / "config.json"
    require_inside(root, "config.json", hub_cache)
    config = parse_json(read_small(path, MAX_CONFIG), path, unique_keys=False)
    if not isinstance(config, dict):
        raise InvalidInput("not a JSON object", str(path))
    if depth_exceeds(config, MAX_CONFIG_DEPTH):
        raise InvalidInput("JSON nested too deep", str(path))
    check_sizes(path, config)
    return config


def check_sizes(path: Path, config: dict[str, Any]) -> None:
    """Refuse sizes that no model has: a model built from them, even without weights, would fill the memory."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, limit in CONFIG_SIZES.items():
            size = part.get(key)
            if isinstance(size, int | float) and (size != size // 1 or not 0 <= size <= limit):
                raise InvalidInput(f"{key} is {size}", str(path))


def choose_weights(root: Path, top: Iterable[str], config: Mapping[str, Any]) -> str:
    """The file that locates the weights: an index, or the weights themselves."""
    explicit = config.get("transformers_weights")
    if explicit is not None:
        return named_by_config(root, explicit, top)
    candidates = [name for name in top if reason_to_leave(name) is None]
    named = [name for name in candidates if is_index(name) or name == SINGLE]
    variants = [name for name in candidates if fnmatchcase(name, "model.*.safetensors")]
    for choice in (named, variants):
        if len(choice) > 1 and not is_index_of_single(root, choice):
            raise InvalidInput(
                f"{' and '.join(choice)} both claim the weights", str(root), "remove the stale one"
            )
        if choice:
            return min(choice, key=lambda name: not is_index(name))
    raise weightless(str(root), top)


def is_index_of_single(root: Path, choice: list[str]) -> bool:
    """Whether the two files are the weights and an index that names nothing else, as some converters write."""
    indexes = [name for name in choice if is_index(name)]
    if len(choice) != 2 or len(indexes) != 1:
        return False
    return set(read_index(root, indexes[0], None).values()) == {SINGLE}


def is_index(name: str) -> bool:
    """Whether a file name is that of a safetensors index, with or without a variant (`…index.fp16.json`)."""
    return re.search(r"\.safetensors\.index(\.[^.]+)?\.json$", name) is not None


def named_by_config(root: Path, name: Any, top: Iterable[str]) -> str:
    """The file that `transformers_weights` names, under the same rule as a shard."""
    where = str(root / "config.json")
    if not isinstance(name, str):
        raise InvalidInput("transformers_weights is not a file name", where)
    check_shard_name(name.removesuffix(".index.json"), where)
    if name not in top:
        raise InvalidInput(f"transformers_weights names {quote(name)}, which is absent", where)
    return name


def weightless(where: str, top: Iterable[str]) -> InvalidInput | UnsafeInput:
    """The error for a folder without weights; it names the files that the folder holds instead."""
    weights = [name for name in top if name.endswith(".safetensors")]
    if any(name.startswith("adapter_") for name in top):
        return InvalidInput("an adapter, not a checkpoint", where, "name the model it was made for")
    if not weights:
        nothing = InvalidInput(f"no weights: neither {SINGLE} nor an index of shards", where)
        return foreign_weights(top, where) or nothing
    missing = "shards without their index" if len(weights) > 1 else f"{weights[0]} but no {SINGLE}"
    return InvalidInput(f"no weights in a known layout: {missing}", where)


def read_index(root: Path, name: str, hub_cache: Path | None) -> dict[str, str]:
    """The map from tensors to shards; refused if a name leads out of the folder."""
    path = root / name
    require_inside(root, name, hub_cache)
    index = parse_json(read_small(path, MAX_INDEX), path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidInput("no weight_map in the index", str(path))
    for shard in dict.fromkeys(file for file in weight_map.values() if isinstance(file, str)):
        check_shard_name(shard, str(path))
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise InvalidInput(f"the shard of tensor {quote(tensor)} is not a file name", str(path))
    return weight_map


def check_shard_name(name: str, where: str) -> None:
    """The rule of huggingface_hub: one plain file name, on any system, ending in `.safetensors`."""
    path = PureWindowsPath(name)
    escapes = path.drive or path.root or ".." in path.parts or len(path.parts) != 1
    if escapes or not name.endswith(".safetensors") or not name.isprintable():
        raise UnsafeInput(f"shard name {quote(name)} is not a plain .safetensors file name", where)


def require_present(root: Path, files: Iterable[str], top: Iterable[str]) -> None:
    """Refuse missing shards and name all of them, so that one download completes the folder."""
    missing = sorted(set(files) - set(top))
    if missing:
        raise InvalidInput(f"missing shards: {enumerated(missing, len(missing))}", str(root), "download them")


def sort_out(
    listing: Listing, weights: Iterable[str], index_name: str | None
) -> tuple[tuple[str, ...], tuple[LeftOut, ...]]:
    """Divide the files beside the weights into those that belong to the model and those that are not copied."""
    companions, left_out = [], list(listing.not_entered)
    for name in sorted(set(listing.files) - {*weights, index_name}):
        reason = reason_to_leave(name)
        if reason is None and "/" not in name and (name.endswith(".safetensors") or is_index(name)):
            reason = f"weights that {index_name or 'the checkpoint'} does not name"
        if reason is None:
            companions.append(name)
        else:
            left_out.append(LeftOut(name, reason))
    return tuple(companions), tuple(sorted(left_out, key=lambda left: left.name))


def check_agreement(root: Path, weight_map: Mapping[str, str], shards: Mapping[str, Container]) -> None:
    """The index and the headers name the same tensors in the same shards, each once."""
    owners: dict[str, str] = {}
    twice, unlisted, misplaced = [], [], []
    for file, shard in shards.items():
        for tensor in shard.tensors:
            if tensor in owners:
                twice.append(tensor)
            elif tensor not in weight_map:
                unlisted.append(tensor)
            owners.setdefault(tensor, file)
    misplaced = [tensor for tensor, file in weight_map.items() if owners.get(tensor, file) != file]
    absent = [tensor for tensor in weight_map if tensor not in owners]
    for problems, problem in (
        (twice, "tensors in two shards"),
        (unlisted, "tensors in a shard but not in the index"),
        (absent, "tensors in the index but not in its shard"),
        (misplaced, "tensors in another shard than the index says"),
    ):
        if problems:
            raise InvalidInput(f"{problem}: {enumerated(problems)}", str(root))
