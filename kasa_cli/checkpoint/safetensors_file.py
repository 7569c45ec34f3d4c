"""One safetensors file: a strict look at its header, and a reader that notices when the file changes.

The library accepts what the format forbids (two tensors of one name, a header that starts with a space)
and what no name should hold (NUL, escape codes). It would also wait for ever on a FIFO. So kasa checks the
header itself and rejects; it never repairs. Values are not looked at here: NaN is a value.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from kasa_cli.checkpoint.dtypes import BITS, TORCH_DTYPES
from kasa_cli.errors import IntegrityError, InvalidInput, ResourceError, UnsafeInput
from kasa_cli.files import open_regular, parse_json, quote, read_exactly, read_into, refuse_unreadable

MAX_HEADER = 100_000_000  # the format's own limit
MAX_NAME = 4096  # bytes of UTF-8
MAX_RANK = 64  # what numpy can hold
CHUNK = 1 << 24
"""Bytes of a tensor read in one go by default."""
MAX_ELEMENTS = 1 << 60  # also for a shape that has a zero in it: every product of sides stays in 64 bits


ENTRY_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. `begin` and `end` are offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Identity:
    """Distinguishes one version of a file from another without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Container:
    """A checked safetensors file. `tensors` is in the order of the offsets."""

    path: Path
    identity: Identity
    data_start: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    unknown_fields: tuple[str, ...] = ()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        with Reader(self) as reader:
            return reader.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) along the first side of a tensor; no other byte of it is read."""
        entry = self.tensors[name]
        room = torch.empty((stop - start, *entry.shape[1:]), dtype=TORCH_DTYPES[entry.dtype])
        with Reader(self) as reader:
            reader.rows(name, start, stop, room)
        return room

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """The raw bytes of one tensor, each chunk in the same memory: use it before the next."""
        with Reader(self) as reader:
            yield from reader.chunks(name, size)


def identity_of(status: os.stat_result) -> Identity:
    """The identity of an open file."""
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def read_header(path: Path) -> Container:
    """Check a safetensors file against the format, every rule of it, without reading a weight."""
    with open_regular(path) as file:
        identity = identity_of(os.fstat(file.fileno()))
        raw = header_bytes(file, path, identity.size)
    header = parse_json(raw, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidInput("__metadata__ is not a map of strings", str(path))
    data_start = 8 + len(raw)
    entries = sorted(
        (entry(path, name, fields, data_start) for name, fields in header.items()),
        key=lambda item: (item.begin, item.end, item.name),
    )
    check_coverage(path, entries, data_start, identity.size)
    unknown = sorted({key for fields in header.values() for key in fields.keys() - ENTRY_FIELDS})
    tensors = MappingProxyType({item.name: item for item in entries})
    return Container(path, identity, data_start, MappingProxyType(metadata), tensors, tuple(unknown))


def header_bytes(file: FileIO, path: Path, size: int) -> bytes:
    """The JSON of the header, after the checks that need no parser."""
    if size < 8:
        raise InvalidInput(f"truncated: {size} bytes cannot hold a safetensors header", str(path))
    prefix = read_exactly(file, path, 8, 0)
    if prefix == b"version ":
        raise InvalidInput("a Git LFS pointer, not the weights", str(path), "run `git lfs pull`")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise InvalidInput(f"header too large ({length} bytes): not a safetensors file", str(path))
    if 8 + length > size:
        raise InvalidInput(f"truncated: expected at least {8 + length} bytes, have {size}", str(path))
    raw = read_exactly(file, path, length, 8)
    if not raw.startswith(b"{"):
        raise InvalidInput("header does not begin with '{': not a safetensors file", str(path))
    return raw


def entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    """One line of the header, checked."""
    check_name(path, name)
    try:
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (TypeError, KeyError, IndexError) as error:
        raise InvalidInput(f"tensor {quote(name)} lacks dtype, shape or data_offsets", str(path)) from error
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InvalidInput(f"tensor {quote(name)} has the unknown dtype {quote(str(dtype))}", str(path))
    if not are_counts(shape) or not are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidInput(f"tensor {quote(name)} has an impossible shape or data_offsets", str(path))
    begin, end = offsets
    if not fits(shape) or prod(shape) * BITS[dtype] != 8 * (end - begin):
        described = f"{dtype} of shape {quote(str(shape))} on {end - begin} bytes"
        raise InvalidInput(f"tensor {quote(name)} does not fit its bytes: {described}", str(path))
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, data_start + end)


def check_name(path: Path, name: str) -> None:
    """A name is data, never a path: it may hold dots and slashes, but nothing that a terminal obeys."""
    if not name or not name.isprintable():
        raise UnsafeInput(f"tensor name {quote(name)} is empty or not printable", str(path))
    if len(name.encode()) >= MAX_NAME:
        raise UnsafeInput(f"tensor name {quote(name)} is {MAX_NAME} bytes or longer", str(path))


def are_counts(value: Any) -> bool:
    """Whether a JSON value is a list of whole numbers, none negative. `true` is not a number."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def fits(shape: list[int]) -> bool:
    """Whether every product of sides stays a sane number."""
    return len(shape) <= MAX_RANK and prod(max(side, 1) for side in shape) <= MAX_ELEMENTS


def check_coverage(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    reached = data_start
    for item in entries:
        if item.begin != reached:
            problem = "overlaps the one before it" if item.begin < reached else "leaves a hole before it"
            raise InvalidInput(f"invalid offsets: tensor {quote(item.name)} {problem}", str(path))
        reached = item.end
    if size < reached:
        raise InvalidInput(
            f"truncated: expected {reached} bytes, have {size}", str(path), "download it again"
        )
    if size > reached:
        raise InvalidInput(f"trailing bytes: expected {reached} bytes, have {size}", str(path))


class Reader:
    """Tensors of one file, which must still be the file that was planned with. One thread to a reader."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self._gave_rows = False
        self._tensors: Any = None  # safe_open; it parses the header again, and `chunks` can do without
        with ExitStack() as stack:
            self._file = stack.enter_context(open_regular(container.path))
            self._check_unchanged()
            stack.pop_all()  # all is well: the file stays open until `close`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            if failed is None and self._gave_rows:
                self._check_unchanged()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._tensors = None
        self._file.close()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own. With `pread`: a mapped file that shrinks kills the process."""
        try:
            if self._tensors is None:
                self._tensors = safe_open(self.container.path, framework="pt", backend="pread")
            tensor: torch.Tensor = self._tensors.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            self._check_unchanged()
            raise self._explained(name, error) from error
        self._check_unchanged()
        return tensor

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """The raw bytes of one tensor, any dtype, piece by piece, each in the same memory: use it before the next."""
        entry, path = self.container.tensors[name], self.container.path
        room = memoryview(bytearray(min(size, entry.num_bytes)))
        self.expect(name)
        for offset in range(entry.begin, entry.end, size):
            piece = room[: entry.end - offset]
            read_into(self._file, path, piece, offset)
            yield piece
        self._check_unchanged()

    def expect(self, name: str) -> None:
        """Let the system fetch a tensor from the disk while this process does something else."""
        entry = self.container.tensors[name]
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), entry.begin, entry.num_bytes, os.POSIX_FADV_WILLNEED)

    def rows(self, name: str, start: int, stop: int, room: torch.Tensor) -> None:
        """Fill `room`, contiguous and of the dtype of the tensor, with its entries [start, stop) of the first side.

        Whether the file is still the same is asked when the reader's block ends.
        For a slice, safetensors 0.8 reads the whole tensor (with `pread`, see `tensor`), each time.
        """
        entry, path = self.container.tensors[name], self.container.path
        stride, self._gave_rows = entry.num_bytes // entry.shape[0], True
        into: memoryview = room.reshape(-1).view(torch.uint8).numpy().data
        read_into(self._file, path, into[: (stop - start) * stride], entry.begin + start * stride)

    def _explained(self, name: str, error: Exception) -> InvalidInput | ResourceError:
        """The library failed on a sound file: no memory, or a dtype torch cannot hold (F4, F6)."""
        entry, where = self.container.tensors[name], str(self.container.path)
        if "allocate memory" in str(error):
            return ResourceError(f"no memory for {quote(name)}, {entry.num_bytes} bytes", where)
        return InvalidInput(f"{quote(name)} of dtype {entry.dtype} cannot be read as a tensor", where)

    def _check_unchanged(self) -> None:
        """Both the open file and the name, which safe_open follows, still mean the planned file."""
        path, planned = self.container.path, self.container.identity
        current = identity_of(os.fstat(self._file.fileno()))
        if current.inode == planned.inode and current.size < planned.size:
            raise InvalidInput(f"truncated: expected {planned.size} bytes, have {current.size}", str(path))
        try:
            named = identity_of(path.stat())
        except OSError as error:
            refuse_unreadable(path, error)
        if not current == named == planned:
            raise IntegrityError("changed since it was planned with", str(path), "run the command again")
