"""Writing a safetensors file tensor by tensor, in any order: the header comes first, from shapes alone.

The library writes a file only from tensors that are all in memory. Order and alignment follow it: wider dtypes
first, then by name. One metadata key: with two, the library's own bytes change from run to run.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kasa_cli.checkpoint.dtypes import BITS, DTYPE_NAMES
from kasa_cli.checkpoint.safetensors_file import TensorEntry
from kasa_cli.files import new_file, pwrite_all


@dataclass(frozen=True)
class FileLayout:
    """The layout of a new file: its header, and the absolute offsets of each tensor."""

    header: bytes
    tensors: Mapping[str, TensorEntry]
    size: int


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: tuple[str, str] = ("format", "pt")
) -> FileLayout:
    """Lay out (name, dtype, shape) triples as the library would, with one (key, value) of metadata."""
    ordered = sorted(tensors, key=lambda item: (-BITS[item[1]], item[0]))
    offset, fields, places = 0, {}, []
    for name, dtype, shape in ordered:
        end = offset + prod(shape) * BITS[dtype] // 8
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        places.append((name, dtype, shape, offset, end))
        offset = end
    text = json.dumps({"__metadata__": dict([metadata]), **fields}, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    start = 8 + len(raw)
    entries = {
        name: TensorEntry(name, dtype, shape, start + begin, start + end)
        for name, dtype, shape, begin, end in places
    }
    return FileLayout(len(raw).to_bytes(8, "little") + raw, entries, start + offset)


@contextmanager
def filling(path: Path, layout: FileLayout) -> Iterator["Filling"]:
    """A new file of this layout, to be filled from several threads; durable when the block ends."""
    with new_file(path, layout.size) as descriptor:
        pwrite_all(descriptor, memoryview(layout.header), 0)
        yield Filling(descriptor, layout.tensors)


@dataclass(frozen=True)
class Filling:
    """The open file of `filling`."""

    descriptor: int
    tensors: Mapping[str, TensorEntry]

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the dtype and shape in the layout."""
        entry = self.tensors[name]
        if (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(
                f"{name}: announced {entry.dtype} {entry.shape}, given {tensor.dtype} {tensor.shape}"
            )
        pwrite_all(self.descriptor, raw_bytes(tensor), entry.begin)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they are stored, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
