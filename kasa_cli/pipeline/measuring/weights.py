"""Hashes a matrix: the store finds its facts by its content."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kasa_cli.checkpoint import Matrix, TensorSource, digest_of, raw_bytes
from kasa_cli.linalg import StreamedWeight
from kasa_cli.pipeline.measuring.facts import HashedMatrix, content_hash


def weigh(source: TensorSource, matrix: Matrix, device: torch.device) -> HashedMatrix:
    """Read and hash a matrix. A very large one is read by rows, again whenever it is needed."""
    if matrix.is_streamed:
        return _hashed(matrix, matrix.digest(source), partial(_rows, source, matrix, device))
    stored = matrix.stored(source)
    W = matrix.orientation.turn(stored)
    return _hashed(matrix, digest_of([raw_bytes(stored)]), lambda: W.to(device))


def _hashed(matrix: Matrix, digest: str, read: Callable[[], Tensor | StreamedWeight]) -> HashedMatrix:
    is_transposed = matrix.is_transposed
    content = content_hash(matrix.dtype, matrix.stored_shape, digest, is_transposed=is_transposed)
    return HashedMatrix(matrix.name, content, matrix.shape, matrix.dtype, digest, read)


def _rows(source: TensorSource, matrix: Matrix, device: torch.device) -> StreamedWeight:
    name = matrix.pieces[0].name
    return StreamedWeight(matrix.shape, lambda start, stop: source.rows(name, start, stop).to(device), device)
