"""Rewrites the targets without their smallest components, and measures the bytes of the file.

A tensor on disk holds one matrix, rows of one, or the matrices of several experts. Each of these is a share.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from kasa_cli.checkpoint import TORCH_DTYPES, Checkpoint
from kasa_cli.files import Staging
from kasa_cli.linalg import Ends, Outcome, Sums, measured_sums, rounding
from kasa_cli.methods import kasa
from kasa_cli.pipeline.base_writer import RowReader, WrittenBase, require_finite
from kasa_cli.pipeline.truncating.factors import MeasuredTarget, read_factors


@dataclass(frozen=True)
class Share:
    """Rows [start, stop), as stored, of a target. `index` is the number of its matrix in a tensor of several."""

    measured: MeasuredTarget
    index: int | None
    start: int
    stop: int

    def stored(self, rows: RowReader) -> RowReader:
        """The rows of the share alone, from those of the tensor that holds it."""
        if self.index is None:
            return rows
        matrix = rows(self.index, self.index + 1)[0]
        return lambda start, stop: matrix[start:stop]


class Exact(NamedTuple):
    """The exact new value of a matrix, and the factors that it is computed from."""

    value: rounding.ExactSum
    factors: Ends


SumsByTarget = Mapping[str, Sums]


@dataclass(frozen=True)
class Truncated:
    """The measured targets, and the base that was written."""

    measured: list[MeasuredTarget]
    base: WrittenBase[SumsByTarget]

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """The figures of each target, from all tensors that hold a share of it."""
        sums: dict[str, Sums] = {}
        for tensor in self.base.tensors:
            for name, own in (tensor.checks or {}).items():
                sums[name] = sums[name] + own if name in sums else own
        return {name: total.outcome for name, total in sums.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype of each tensor of the new base."""
        return {tensor.name: tensor.dtype for tensor in self.base.tensors}


def shares_of(checkpoint: Checkpoint, measured: Iterable[MeasuredTarget]) -> dict[str, list[Share]]:
    """The shares that each tensor on disk holds, in the order of its bytes."""
    shares: defaultdict[str, list[Share]] = defaultdict(list)
    for measurement in measured:
        for piece, start, stop in measurement.target.matrix.spans(checkpoint.tensors):
            shares[piece.name].append(Share(measurement, piece.index, start, stop))
    return {name: sorted(own, key=lambda share: share.index or 0) for name, own in shares.items()}


@dataclass(frozen=True)
class Truncation:
    """Decides which tensors are rewritten: those that hold a share of a target."""

    checkpoint: Checkpoint
    staging: Staging
    shares: Mapping[str, list[Share]]
    round_off: rounding.Rounding

    def rewrites(self, name: str) -> bool:
        """Whether a tensor holds a share of a target."""
        return name in self.shares

    def prepare(self, name: str) -> "TruncatedTensor":
        """The rewrite of a tensor; it reads one matrix at a time."""
        return TruncatedTensor(name, self, self.shares[name])

    def exact(self, measured: MeasuredTarget) -> Exact:
        """Read a target and its factors."""
        factors = read_factors(self.staging, measured)
        W = measured.target.matrix.read(self.checkpoint)
        return Exact(rounding.ExactSum(W, *kasa.truncation(factors)), factors)


class TruncatedTensor:
    """The new values of a tensor, one share after the other, and the checks on its stored bytes."""

    def __init__(self, name: str, truncation: Truncation, shares: list[Share]) -> None:
        self.name, self.truncation, self.shares = name, truncation, shares
        self._last: tuple[Share, Exact] | None = None

    def pieces(self, dtype: str) -> Iterator[Tensor]:
        """The new value, W plus its terms, rounded once to `dtype`, in the layout of the file."""
        for share in self.shares:
            value, factors = self._exact(share)
            Q = self.truncation.round_off(value, factors.V, TORCH_DTYPES[dtype])
            require_finite(Q, self.name, dtype)
            stored = share.measured.target.matrix.orientation.turn(Q)
            yield stored[share.start : share.stop].contiguous()

    def check(self, rows: RowReader) -> SumsByTarget:
        """Compare each stored share with its exact value."""
        return {share.measured.target.name: self._sums(share, share.stored(rows)) for share in self.shares}

    def _sums(self, share: Share, stored: RowReader) -> Sums:
        exact, factors = self._exact(share)
        if share.measured.target.matrix.is_transposed:
            turned = stored(share.start, share.stop).T
            return measured_sums(lambda start, stop: turned[start:stop], exact, factors.V, factors.S)
        part = slice(share.start, share.stop)
        value = rounding.ExactSum(exact.W[part], exact.L[part], exact.R)
        return measured_sums(stored, value, factors.V, factors.S)

    def _exact(self, share: Share) -> Exact:
        """The exact value of a matrix. The last one is cached: a tensor of one share uses it twice."""
        if self._last is None or self._last[0] is not share:
            self._last = None
            self._last = (share, self.truncation.exact(share.measured))
        return self._last[1]
