"""From pieces on disk to weights to ask about: read, put together, hashed; the very large ones a block at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kasa_cli.checkpoint.dtypes import DTYPE_NAMES, TORCH_DTYPES
from kasa_cli.checkpoint.hashing import digest_of
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.safetensors_file import Container, Reader, TensorEntry
from kasa_cli.checkpoint.safetensors_writer import raw_bytes
from kasa_cli.linalg.frame import Rows
from kasa_cli.pipeline.measuring.facts import Weight, content_hash
from kasa_cli.report import Piece

STREAMED_BYTES = 256 << 20
"""A tall weight above that is never in memory as a whole."""
BLOCK_ENTRIES = 1 << 22
"""Of a weight that is compared with another, read together."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model: its pieces stacked by rows; `is_transposed` where files have it (in, out)."""

    name: str
    pieces: tuple[Piece, ...]
    is_transposed: bool = False


def weigh(checkpoint: Checkpoint, matrix: Matrix, device: torch.device) -> Weight:
    """Read and hash a matrix: what the store knows of it is found by its content."""
    entry = checkpoint.tensors[matrix.pieces[0].name]
    if is_streamed(entry, matrix):
        return _streamed(checkpoint, matrix, entry, device)
    stored = read_pieces(checkpoint, matrix.pieces)
    digest = digest_of([raw_bytes(stored)])
    dtype = DTYPE_NAMES[stored.dtype]  # of pieces that differ the wider, as transformers stacks them
    content = content_hash(dtype, tuple(stored.shape), digest, is_transposed=matrix.is_transposed)
    W = stored.T if matrix.is_transposed else stored
    return Weight(matrix.name, content, (W.shape[0], W.shape[1]), dtype, lambda: W.to(device))


def stored_shape(checkpoint: Checkpoint, matrix: Matrix) -> tuple[int, int]:
    """Rows and columns of a matrix as its pieces lie on disk, stacked."""
    shapes = [checkpoint.tensors[piece.name].shape[-2:] for piece in matrix.pieces]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def read_pieces(checkpoint: Checkpoint, pieces: Iterable[Piece]) -> Tensor:
    """The pieces of a matrix, stacked by rows, as stored."""
    read = [_read(checkpoint, piece) for piece in pieces]
    return read[0] if len(read) == 1 else torch.cat(read)


def read_target(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of a checkpoint, as stored."""
    return _read(checkpoint, Piece(name))


def row_blocks(checkpoint: Checkpoint, matrix: Matrix) -> Iterator[Tensor]:
    """The rows of a matrix as stored, so many at a time whatever its pieces are; a whole tensor is never held."""
    first = matrix.pieces[0]
    entry = checkpoint.tensors[first.name]
    step = max(1, BLOCK_ENTRIES // entry.shape[-1])
    if len(matrix.pieces) > 1 or first.index is not None:
        yield from torch.split(read_pieces(checkpoint, matrix.pieces), step)
        return
    shard, num_rows = checkpoint.shards[checkpoint.shard_of(entry.name)], entry.shape[0]
    for start in range(0, num_rows, step):
        yield _rows(shard, entry, start, min(start + step, num_rows))


def working_set(shape: tuple[int, int], num_bytes: int) -> int:
    """Bytes that a measurement of a weight occupies: itself, its Gram matrix, and half of that again in float32."""
    short = min(shape)
    held = 0 if shape[0] > shape[1] and num_bytes > STREAMED_BYTES else num_bytes
    return held + 12 * short * short + (64 << 20)


def _read(checkpoint: Checkpoint, piece: Piece) -> Tensor:
    shard = checkpoint.shards[checkpoint.shard_of(piece.name)]
    if piece.index is not None:
        return _rows(shard, shard.tensors[piece.name], piece.index, piece.index + 1)[0]
    with Reader(shard) as reader:
        return reader.tensor(piece.name)


def _rows(shard: Container, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Entries [start, stop) along the first side of a tensor, and no other byte of it."""
    rows = torch.empty((stop - start, *entry.shape[1:]), dtype=TORCH_DTYPES[entry.dtype])
    with Reader(shard) as reader:
        reader.rows(entry.name, start, stop, rows)
    return rows


def is_streamed(entry: TensorEntry, matrix: Matrix) -> bool:
    """Whether a matrix is too large to be held."""
    is_whole = len(matrix.pieces) == 1 and matrix.pieces[0].index is None and len(entry.shape) == 2
    is_tall = is_whole and entry.shape[0] > entry.shape[1]
    return is_tall and not matrix.is_transposed and entry.num_bytes > STREAMED_BYTES


def _streamed(checkpoint: Checkpoint, matrix: Matrix, entry: TensorEntry, device: torch.device) -> Weight:
    """A weight that is read again, some rows at a time, whenever it is needed."""
    shard = checkpoint.shards[checkpoint.shard_of(entry.name)]
    with Reader(shard) as reader:
        digest = digest_of(reader.chunks(entry.name))

    def read(start: int, stop: int) -> Tensor:
        return _rows(shard, entry, start, stop).to(device)

    shape = (entry.shape[0], entry.shape[1])
    content = content_hash(entry.dtype, shape, digest, is_transposed=False)
    return Weight(matrix.name, content, shape, entry.dtype, partial(Rows, shape, read, device))
