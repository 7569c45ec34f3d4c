"""The share of an update in the truncated directions of its base, known from the tail or from the original base."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kasa_cli.checkpoint import Checkpoint, Manifest, Matrix, TruncateManifest
from kasa_cli.errors import IntegrityError
from kasa_cli.linalg import Shares, random_shares, shares, spaces
from kasa_cli.methods.adapter_kinds import Svd, Term
from kasa_cli.pipeline.adapter_on_base import Origin, Truncations, provenance
from kasa_cli.pipeline.measuring import Facts
from kasa_cli.report import InCut

IN_TAIL, IN_BASE = "tail", "base"
NO_BASE = "the truncated directions of its base are unknown: give the original base with --base"
TRUNCATED_ALREADY = (
    "this base is truncated already and has no tail beside it: give the original base with --base"
)
NOT_RECORDED = (
    "no manifest records whether this base is truncated already: give --base-is original if it is not"
)
FULL_RANK = "the truncation rank is the full rank of the weight"
ZERO_PART = "the truncated part is zero and has no direction"
ZERO_UPDATE = "the update is zero"


@dataclass(frozen=True)
class TruncatedWeight:
    """A weight that may be truncated: its module, the rank of the adapter on it, and the weight in the base.

    `is_kasa`: the adapter truncates its base, and the base is not in its own file.
    """

    module: str
    is_kasa: bool
    rank: int
    shape: tuple[int, int]
    matrix: Matrix | None


@dataclass(frozen=True)
class TruncatedDirections:
    """The known truncations under an adapter. `original` is the original base; without it, `why` is the reason.

    `names` maps modules to tensors on disk where no base is given.
    """

    truncations: Truncations = field(default_factory=Truncations)
    names: Mapping[str, str] = field(default_factory=dict)
    original: tuple[Checkpoint, Facts] | None = None
    why: str = NO_BASE

    def share(self, weight: TruncatedWeight, update: Svd) -> tuple[InCut | None, str | None]:
        """The share of an update in the truncated directions, or None with the reason why it is unknown.

        Both are None if the adapter's kind does not truncate and no truncation of the base is known.

        Raises:
            NumericalError: no solver converges.
        """
        name = weight.matrix.pieces[0].name if weight.matrix else self.names.get(weight.module, "")
        if not (weight.is_kasa or name in self.truncations.ranks):
            return None, None
        rank = self.truncations.rank(name, weight.rank)
        if not rank:
            return _in_cut(Shares(0.0, 0.0, 0.0), weight.shape, 0, IN_TAIL), None
        term = self.truncations.from_tail(name, weight.module, rank)
        if term is not None:
            return _measured(term, weight.shape, update, IN_TAIL)
        if not weight.is_kasa:
            return None, None
        if rank >= min(weight.shape):
            return None, FULL_RANK
        if self.original is None or weight.matrix is None:
            return None, self.why
        checkpoint, facts = self.original
        term = self.truncations.term(checkpoint, facts, weight.matrix, weight.module, rank)
        return _measured(term, weight.shape, update, IN_BASE) if term else (None, ZERO_PART)


def state_of_base(requested: str, base: Origin, made_by: Manifest | None, names: list[str]) -> str | None:
    """Whether a base is the original or truncated; None if that is unknown.

    Raises:
        IntegrityError: a manifest records the adapter's base, and this one differs.
    """
    is_recorded = any(isinstance(known, TruncateManifest) for known in (base.manifest, made_by))
    try:
        return provenance.base_is(requested, base, made_by, names)
    except IntegrityError:
        if is_recorded:
            raise
        return None


def _measured(
    term: Term, shape: tuple[int, int], update: Svd, source: str
) -> tuple[InCut | None, str | None]:
    within = spaces(term.L, term.R)
    if within is None:
        return None, ZERO_PART
    energy_shares = shares(update, within)
    return (
        (_in_cut(energy_shares, shape, term.R.shape[0], source), None)
        if energy_shares
        else (None, ZERO_UPDATE)
    )


def _in_cut(of_update: Shares, shape: tuple[int, int], rank: int, source: str) -> InCut:
    chance = random_shares(*shape, rank)
    return InCut(
        rank,
        of_update.both,
        of_update.left,
        of_update.right,
        chance.both,
        chance.left,
        chance.right,
        source,
    )
