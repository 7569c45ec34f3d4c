"""A tensor that a merge changes in memory: its new value, rounded once, and the measurements of it as stored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kasa_cli.checkpoint import TORCH_DTYPES, Merged, digest_of, raw_bytes
from kasa_cli.linalg import ROUNDINGS, ExactSum, rounded
from kasa_cli.methods.adapter_kinds import Change, apply, apply_bias, factors, row_blocks, rows
from kasa_cli.pipeline.base_writer import RowReader, require_finite

PART = 1 << 20
"""Entries measured in one go."""


@dataclass(frozen=True)
class View:
    """One matrix of a tensor, and its changes in the orientation (out, in)."""

    index: int | None
    is_turned: bool
    changes: tuple[Change, ...]

    def of(self, X: Tensor) -> Tensor:
        """The matrix as (out, in)."""
        matrix = X if self.index is None else X[self.index]
        return matrix.T if self.is_turned else matrix


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of the base, its value X after replacements, and the changes of X."""

    name: str
    before: Tensor
    X: Tensor
    views: Sequence[View]
    biases: Sequence[Change]
    round_off: str

    def pieces(self, dtype: str) -> Iterator[Tensor]:
        """The new value, rounded once, in the layout of the file."""
        target_dtype = TORCH_DTYPES[dtype]
        if self.biases:
            Q = apply_bias(self.X, self.biases, target_dtype)
        else:
            Q = (
                rounded(self.X.to(torch.float64), target_dtype)
                if self.X.dtype != target_dtype
                else self.X.clone()
            )
            for view in self.views:
                view.of(Q).copy_(_rounded(view.of(self.X), view.changes, target_dtype, self.round_off))
        require_finite(Q, self.name, dtype)
        yield Q

    def check(self, rows_of: RowReader) -> Merged:
        """Compare the stored tensor with the exact result and with the tensor of the base."""
        stored = rows_of(0, len(self.X))
        both = min(len(stored), len(self.before))
        change = max((_largest(Q, W) for Q, W in _in_parts(stored[:both], self.before[:both])), default=0.0)
        error = norm = 0.0
        for Q, T in self._exact(stored):
            error += float((Q.to(torch.float64) - T).square().sum())
            norm += float(T.square().sum())
        return Merged(change, (error / norm) ** 0.5 if norm else 0.0, digest_of([raw_bytes(self.before)]))

    def _exact(self, stored: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of stored and exact values, a block at a time."""
        if self.biases:
            yield stored, apply_bias(self.X, self.biases, torch.float64)
            return
        if not self.views:
            yield from ((Q, X.to(torch.float64)) for Q, X in _in_parts(stored, self.X))
            return
        for view in self.views:
            W, Q = view.of(self.X), view.of(stored)
            for start, stop in row_blocks(W.shape, view.changes):
                yield Q[start:stop], rows(W, view.changes, start, stop)


def _in_parts(first: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of equal parts of two tensors, each small enough to be converted to float64."""
    return zip(*(torch.split(X.reshape(-1), PART) for X in (first, other)), strict=True)


def _largest(Q: Tensor, W: Tensor) -> float:
    return float((Q.to(torch.float64) - W.to(torch.float64)).abs().max()) if len(Q) else 0.0


def _rounded(W: Tensor, changes: Sequence[Change], dtype: torch.dtype, round_off: str) -> Tensor:
    """The changed weight; `preserve` keeps rounding errors out of the input directions of the update."""
    term = factors(changes) if round_off != "nearest" else None
    if term is None or not term.R.shape[0] or dtype.itemsize > 2:
        return apply(W, changes, dtype)
    V = torch.linalg.qr(term.R.T)[0]
    return ROUNDINGS[round_off](ExactSum(W, term.L, term.R), V, dtype)
