"""A tensor to which terms are added while it streams by: it is never in memory, but for some rows at a time."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kasa_cli.checkpoint.container import Reader
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.streaming import TORCH_DTYPES
from kasa_cli.linalg.sums import Sum
from kasa_cli.methods.terms import Term
from kasa_cli.pipeline.operate import Rows, too_large
from kasa_cli.pipeline.operation import Merged

BLOCK_ENTRIES = 1 << 18
"""Entries added and rounded in one go: enough for the product to be fast, few enough to stay in the cache."""
LEAST_ROWS = 16


@dataclass
class Streamed:
    """A tensor of the base and what is added to each of its matrices, in the layout of the file.

    `terms` is by the number of the matrix in a stack; a lone matrix is number 0. What was measured is of the bytes
    that were given away: whoever stores them sees to it that they are read back the same.
    """

    checkpoint: Checkpoint
    name: str
    terms: Mapping[int, Term]
    _sums: list[Sum] = field(default_factory=list)

    def pieces(self, dtype: str) -> Iterator[Tensor]:
        """The new value, rounded once to `dtype`, some rows at a time."""
        shard = self.checkpoint.shards[self.checkpoint.shard_of(self.name)]
        entry = shard.tensors[self.name]
        *stack, num_rows, num_columns = entry.shape
        flat = replace(entry, shape=(int(torch.Size(stack).numel()) * num_rows, num_columns))
        step = max(LEAST_ROWS, BLOCK_ENTRIES // max(num_columns, 1))
        room = torch.empty(min(step, num_rows), num_columns, dtype=TORCH_DTYPES[entry.dtype])
        with Reader(replace(shard, tensors={self.name: flat})) as reader:
            reader.expect(self.name)
            for first in range(0, flat.shape[0], num_rows):
                total = self._sum(first // num_rows, flat.shape[1], TORCH_DTYPES[dtype], len(room))
                for start in range(0, num_rows, step):
                    W = room[: num_rows - start]
                    reader.rows(self.name, first + start, first + start + len(W), W)
                    Q = total.block(W, start)
                    if not math.isfinite(
                        total.off
                    ):  # of an entry that is not, the rounding error is not either
                        raise too_large(self.name, dtype)
                    yield Q

    def examine(self, rows: Rows) -> Merged:
        """What was measured on the pieces."""
        whole = sum(total.whole for total in self._sums)
        off = sum(total.off for total in self._sums)
        change = max((total.max_abs_change for total in self._sums), default=0.0)
        return Merged(change, (off / whole) ** 0.5 if whole else 0.0)

    def _sum(self, number: int, num_columns: int, dtype: torch.dtype, num_rows: int) -> Sum:
        nothing = torch.empty(0, num_columns, dtype=torch.float64)
        term = self.terms.get(number, Term(nothing.T, nothing))
        self._sums.append(Sum(term.L, term.R, dtype, num_rows))
        return self._sums[-1]
