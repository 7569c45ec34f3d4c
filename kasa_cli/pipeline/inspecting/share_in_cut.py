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
CUT_ALREADY = "this base is truncated already and has no tail beside it: give the original base with --base"
NOT_SAID = "no manifest says whether this base is truncated already: give --base-is original if it is not"
NO_CUT = "the truncation rank is the full rank of the weight"
ZERO_CUT = "the truncated part is zero and has no direction"
ZERO_UPDATE = "the update is zero"


@dataclass(frozen=True)
class Cut:
    """A weight that may be truncated in the base: its module, the adapter's rank, and the weight in the base.

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

    cuts: Truncations = field(default_factory=Truncations)
    names: Mapping[str, str] = field(default_factory=dict)
    original: tuple[Checkpoint, Facts] | None = None
    why: str = NO_BASE

    def share(self, cut: Cut, update: Svd) -> tuple[InCut | None, str | None]:
        """The share of an update in the truncated directions; or None and the reason why it is unknown.

        Both are None for a kind of adapter that truncates nothing, on a base without known truncations.

        Raises:
            NumericalError: no solver converges.
        """
        name = cut.matrix.pieces[0].name if cut.matrix else self.names.get(cut.module, "")
        if not (cut.is_kasa or name in self.cuts.ranks):
            return None, None
        rank = self.cuts.rank(name, cut.rank)
        if not rank:
            return _in_cut(Shares(0.0, 0.0, 0.0), cut.shape, 0, IN_TAIL), None
        term = self.cuts.from_tail(name, cut.module, rank)
        if term is not None:
            return _measured(term, cut.shape, update, IN_TAIL)
        if not cut.is_kasa:
            return None, None
        if rank >= min(cut.shape):
            return None, NO_CUT
        if self.original is None or cut.matrix is None:
            return None, self.why
        checkpoint, facts = self.original
        term = self.cuts.term(checkpoint, facts, cut.matrix, cut.module, rank)
        return _measured(term, cut.shape, update, IN_BASE) if term else (None, ZERO_CUT)


def what_base_is(requested: str, base: Origin, made_by: Manifest | None, names: list[str]) -> str | None:
    """Whether a base is truncated already; None where nothing says so.

    Raises:
        IntegrityError: a manifest knows the adapter's base, and this is another.
    """
    knows = any(isinstance(known, TruncateManifest) for known in (base.manifest, made_by))
    try:
        return provenance.base_is(requested, base, made_by, names)
    except IntegrityError:
        if knows:
            raise
        return None


def _measured(
    term: Term, shape: tuple[int, int], update: Svd, source: str
) -> tuple[InCut | None, str | None]:
    within = spaces(term.L, term.R)
    if within is None:
        return None, ZERO_CUT
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
