"""A weight: its pieces on disk, its shape and how the files store it; with reading, hashing and cost in one place."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from math import prod

import torch
from torch import Tensor

from kasa_cli.checkpoint.dtypes import BITS, DTYPE_NAMES, TORCH_DTYPES
from kasa_cli.checkpoint.hashing import digest_of
from kasa_cli.checkpoint.safetensors_file import TensorEntry
from kasa_cli.checkpoint.safetensors_writer import raw_bytes
from kasa_cli.checkpoint.tensor_source import TensorSource

STREAMED_BYTES = 256 << 20
"""A tall matrix of more bytes is read by rows and never held as a whole."""
BLOCK_ENTRIES = 1 << 22
"""Entries of one block of rows."""


class Orientation(StrEnum):
    """How files store a matrix: as it is read, or its transpose.

    A Conv1D is computed as (out, in) and stored as (in, out); some layouts store experts transposed.
    """

    AS_READ = "as read"
    TRANSPOSED = "transposed"

    @classmethod
    def of(cls, is_transposed: bool) -> "Orientation":
        """The orientation of a matrix that is stored transposed, or is not."""
        return cls.TRANSPOSED if is_transposed else cls.AS_READ

    @property
    def is_transposed(self) -> bool:
        """Whether the file holds the transpose."""
        return self is Orientation.TRANSPOSED

    def sides(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape as stored of a matrix of this shape, and the other way round."""
        return (shape[1], shape[0]) if self.is_transposed else shape

    def turn(self, matrix: Tensor) -> Tensor:
        """A stored matrix as it is read, and the other way round: a view."""
        return matrix.T if self.is_transposed else matrix


@dataclass(frozen=True)
class Piece:
    """A tensor on disk, or one matrix of a three-dimensional one."""

    name: str
    index: int | None = None


@dataclass(frozen=True)
class Matrix:
    """One weight. Its pieces are stacked by rows as they are stored.

    `shape` is (out, in) for a module, and for an expert that of the matrix in memory. `dtype` is the one that holds
    all pieces.
    """

    name: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, int]
    dtype: str
    orientation: Orientation = Orientation.AS_READ

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, TensorEntry],
        name: str,
        pieces: tuple[Piece, ...],
        orientation: Orientation = Orientation.AS_READ,
    ) -> "Matrix":
        """The matrix of these pieces, its shape and dtype from the headers."""
        entries = [tensors[piece.name] for piece in pieces]
        stored = (sum(entry.shape[-2] for entry in entries), entries[0].shape[-1])
        return cls(
            name, pieces, orientation.sides(stored), common_dtype([e.dtype for e in entries]), orientation
        )

    def within(self, tensors: Mapping[str, TensorEntry]) -> "Matrix":
        """The same matrix in another checkpoint, which may have it in another shape or dtype."""
        return Matrix.of(tensors, self.name, self.pieces, self.orientation)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns as the pieces lie on disk, stacked."""
        return self.orientation.sides(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return prod(self.shape) * BITS[self.dtype] // 8

    @property
    def work(self) -> float:
        """Multiplications of the Gram matrix and its factorisation, to which the time is proportional."""
        return decomposition_work(self.shape)

    @property
    def memory(self) -> int:
        """Bytes that a measurement occupies."""
        return measuring_bytes(self.shape, 0 if self.is_streamed else self.num_bytes)

    @property
    def is_streamed(self) -> bool:
        """Whether the matrix is read by rows, because it is too large to be held."""
        is_tall = self.shape[0] > self.shape[1] and not self.orientation.is_transposed
        return self.is_one_tensor and is_tall and self.num_bytes > STREAMED_BYTES

    @property
    def is_transposed(self) -> bool:
        """Whether the files hold the transpose."""
        return self.orientation.is_transposed

    @property
    def is_one_tensor(self) -> bool:
        """Whether one tensor on disk is the whole matrix, and holds nothing else."""
        return len(self.pieces) == 1 and self.pieces[0].index is None

    def read(self, source: TensorSource) -> Tensor:
        """The matrix in memory."""
        return self.orientation.turn(self.stored(source))

    def stored(self, source: TensorSource) -> Tensor:
        """The pieces, stacked by rows, as stored."""
        tensors = [read_piece(source, piece) for piece in self.pieces]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def spans(self, tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[Piece, int, int]]:
        """The pieces, each with the rows [start, stop) that it is of the stacked whole."""
        start = 0
        for piece in self.pieces:
            stop = start + tensors[piece.name].shape[-2]
            yield piece, start, stop
            start = stop

    def row_blocks(self, source: TensorSource) -> Iterator[Tensor]:
        """The rows as stored, a block at a time; the blocks are the same however the pieces lie."""
        num_rows, width = self.stored_shape
        step = max(1, BLOCK_ENTRIES // width)
        if not self.is_one_tensor:
            yield from torch.split(self.stored(source), step)
            return
        for start in range(0, num_rows, step):
            yield source.rows(self.pieces[0].name, start, min(start + step, num_rows))

    def chunks(self, source: TensorSource) -> Iterator[memoryview]:
        """The bytes as stored, one piece after the other."""
        if self.is_one_tensor:
            yield from source.chunks(self.pieces[0].name)
        else:
            yield raw_bytes(self.stored(source))

    def digest(self, source: TensorSource) -> str:
        """BLAKE3 of the bytes as stored."""
        return digest_of(self.chunks(source))


def read_piece(source: TensorSource, piece: Piece) -> Tensor:
    """A piece as stored; no other byte of its tensor is read."""
    if piece.index is None:
        return source.tensor(piece.name)
    return source.rows(piece.name, piece.index, piece.index + 1)[0]


def decomposition_work(shape: tuple[int, int]) -> float:
    """Multiplications of a Gram matrix and its factorisation."""
    return min(shape) ** 2 * sum(shape)


def measuring_bytes(shape: tuple[int, int], num_bytes_held: int) -> int:
    """Bytes that a measurement occupies: the weight, its Gram matrix, and half of that again in float32."""
    return num_bytes_held + 12 * min(shape) ** 2 + (64 << 20)


def common_dtype(dtypes: list[str]) -> str:
    """The dtype that tensors of these have when they are stacked.

    >>> common_dtype(["BF16", "F32"]), common_dtype(["F8_E4M3"])
    ('F32', 'F8_E4M3')
    """
    if len({*dtypes}) == 1:
        return dtypes[0]
    return DTYPE_NAMES[reduce(torch.promote_types, (TORCH_DTYPES[dtype] for dtype in dtypes))]
