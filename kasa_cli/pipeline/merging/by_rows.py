"""A tensor that is changed while it is copied, some rows at a time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from kasa_cli.checkpoint import TORCH_DTYPES, Container, Merged, Reader, blake3, raw_bytes
from kasa_cli.errors import InvalidInput
from kasa_cli.linalg import Sum
from kasa_cli.methods.adapter_kinds import Change, applied_to, factors, grain_of
from kasa_cli.pipeline.base_writer import RowReader, too_large

BLOCK_ENTRIES = 1 << 18
"""Entries added and rounded in one go: enough for the product to be fast, few enough to stay in the cache."""
LEAST_ROWS = 16


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file as a matrix, whose rows have the length of its last side."""

    container: Container
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        *sides, width = self.container.tensors[self.name].shape or (1,)
        return (prod(sides), width) if sides else (width, 1)

    @contextmanager
    def open(self, step: int) -> Iterator[RowReader]:
        """A reader of its rows, up to `step` at a time; every call reuses the same memory."""
        flat = replace(self.container.tensors[self.name], shape=self.shape)
        room = torch.empty(min(step, self.shape[0]), self.shape[1], dtype=TORCH_DTYPES[flat.dtype])
        with Reader(replace(self.container, tensors={self.name: flat})) as reader:
            reader.expect(self.name)

            def rows(start: int, stop: int) -> Tensor:
                X = room[: max(0, min(stop, self.shape[0]) - start)]
                if len(X):
                    reader.rows(self.name, start, start + len(X), X)
                return X

            yield rows


@dataclass(frozen=True)
class TrainedRows:
    """Rows, of shape (n, columns), that replace those at `indices`, of shape (n,)."""

    indices: Tensor
    rows: Tensor

    def put_into(self, X: Tensor, first: int) -> Tensor:
        """The rows X, the first of which is row `first`, with the trained rows among them inserted."""
        here = (self.indices >= first) & (self.indices < first + len(X))
        if not here.any():
            return X
        X = X.to(torch.float64, copy=True)  # rounded only once, together with the changes
        X[self.indices[here] - first] = self.rows[here].to(torch.float64)
        return X


@dataclass
class StreamedTensor:
    """A tensor of the base, `num_matrices` matrices stacked along the rows, and its changes as stored in the file.

    `value` replaces the tensor, and `trained` replaces some rows; the keys of `changes` are matrix numbers. The
    returned values are measured: the writer checks that it reads back the same bytes.
    """

    name: str
    before: StoredTensor
    num_matrices: int = 1
    value: StoredTensor | None = None
    trained: Sequence[TrainedRows] = ()
    changes: Mapping[int, Sequence[Change]] = field(default_factory=dict)
    _sums: list[Sum] = field(default_factory=list)
    _digest: blake3 = field(default_factory=blake3)

    def pieces(self, dtype: str) -> Iterator[Tensor]:
        """The new value, rounded once to `dtype`, some rows at a time."""
        num_rows, width = (self.value or self.before).shape
        each, step = num_rows // self.num_matrices, self._step(width)
        with ExitStack() as files:
            before = files.enter_context(self.before.open(step))
            value = files.enter_context(self.value.open(step)) if self.value else None
            for number in range(self.num_matrices):
                total = _sum(self.changes.get(number, ()), width, TORCH_DTYPES[dtype], min(step, each))
                self._sums.append(total)
                for start in range(0, each, step):
                    first, stop = number * each + start, number * each + min(start + step, each)
                    W = self._hashed(before(first, stop))
                    Q = total.block(self._with_values(W, value, first, stop), start, W)
                    if not math.isfinite(total.off):  # an entry that is not finite makes it infinite or NaN
                        raise too_large(self.name, dtype)
                    yield Q
            for start in range(num_rows, self.before.shape[0], step):  # rows that a smaller vocabulary drops
                self._hashed(before(start, start + step))

    def check(self, rows: RowReader) -> Merged:
        """The measurements of the pieces."""
        whole = sum(total.whole for total in self._sums)
        off = sum(total.off for total in self._sums)
        change = max((total.max_abs_change for total in self._sums), default=0.0)
        return Merged(change, (off / whole) ** 0.5 if whole else 0.0, self._digest.hexdigest())

    def _hashed(self, W: Tensor) -> Tensor:
        """Add rows of the base to its hash; every row is read once and in order."""
        if len(W):
            self._digest.update(raw_bytes(W))
        return W

    def _step(self, width: int) -> int:
        """Number of rows of a block, a multiple of every grain."""
        grain = math.lcm(*map(grain_of, self.changes.values()))
        return max(1, LEAST_ROWS // grain, BLOCK_ENTRIES // (grain * max(width, 1))) * grain

    def _with_values(self, W: Tensor, value: RowReader | None, first: int, stop: int) -> Tensor:
        """The rows before any change: those of the base or of its replacement, with the trained rows inserted."""
        X = W if value is None else value(first, stop)
        if self.value is not None and not torch.isfinite(X).all():
            raise InvalidInput("a number in this tensor is not finite", self.value.name)
        for trained_rows in self.trained:
            X = trained_rows.put_into(X, first)
        return X


def _sum(changes: Sequence[Change], width: int, dtype: torch.dtype, num_rows: int) -> Sum:
    """All changes as one term if they are low-rank; otherwise they are applied one after another."""
    nothing = torch.empty(0, width, dtype=torch.float64)
    if not all(change.is_low_rank for change in changes):
        return Sum(nothing.T, nothing, dtype, num_rows, lambda T, start: applied_to(changes, T, start))
    term = factors(changes)
    L, R = (term.L, term.R) if term else (nothing.T, nothing)
    return Sum(L, R, dtype, num_rows)
