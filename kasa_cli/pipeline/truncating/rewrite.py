"""OPERATE, for truncation: a target loses its smallest components, and is measured on what the file holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from kasa_cli.checkpoint.dtypes import TORCH_DTYPES
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.files.staging import Staging
from kasa_cli.linalg import rounding
from kasa_cli.linalg.bottom import Ends
from kasa_cli.linalg.realised import Outcome, outcome
from kasa_cli.methods import kasa
from kasa_cli.pipeline.base_writer import RowReader, require_finite
from kasa_cli.pipeline.truncating.factors import Measured, read_factors
from kasa_cli.targets.selection import Target


@dataclass(frozen=True)
class Truncation:
    """Every target that was measured, with what it takes to truncate it."""

    checkpoint: Checkpoint
    staging: Staging
    measured: Mapping[str, Measured]
    round_off: rounding.Rounding

    def rewrites(self, name: str) -> bool:
        """Whether it is a target."""
        return name in self.measured

    def prepare(self, name: str) -> "Truncated":
        """Read a target and its factors."""
        measured = self.measured[name]
        factors = read_factors(self.staging, measured)
        weight = measured.target.matrix.read(self.checkpoint)
        exact = rounding.ExactSum(weight, *kasa.cut(factors))
        return Truncated(measured.target, exact, factors, self.round_off)


@dataclass(frozen=True)
class Truncated:
    """A target on the table: its exact new value, not yet computed, and the factors it is made with."""

    target: Target
    exact: rounding.ExactSum
    factors: Ends
    round_off: rounding.Rounding

    def pieces(self, dtype: str) -> Iterator[Tensor]:
        """The new value, W plus its terms, rounded once to `dtype`, in the layout of the file."""
        Q = self.round_off(self.exact, self.factors.V, TORCH_DTYPES[dtype])
        require_finite(Q, self.target.name, dtype)
        yield self.target.matrix.orientation.turn(Q).contiguous()

    def check(self, rows: RowReader) -> Outcome:
        """Measure what was stored."""
        if self.target.matrix.is_transposed:
            whole = rows(0, self.target.matrix.shape[1]).T
            return outcome(lambda start, stop: whole[start:stop], self.exact, self.factors.V, self.factors.S)
        return outcome(rows, self.exact, self.factors.V, self.factors.S)
