"""KaSA's cut as part of an update: a LoRA for the original base holds what was cut off that too."""

from collections.abc import Sequence
from dataclasses import dataclass

from kasa_cli.checkpoint.adapter_places import Placed
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.errors import UsageError
from kasa_cli.methods.terms import Term
from kasa_cli.pipeline.cuts import Cuts
from kasa_cli.pipeline.facts import Facts
from kasa_cli.pipeline.patches import IN_FILE, matrix_of


@dataclass(frozen=True)
class Cutting:
    """What is known of the cuts, and whether the base at hand lacks them already."""

    cuts: Cuts
    is_made: bool

    def require_known(self, places: Sequence[Placed]) -> None:
        """Refuse, before the work, a base that lacks its cuts where no tail says what they were.

        Raises:
            UsageError: naming the first module without.
        """
        if self.is_made:
            for place in places:
                self._in_tail(place)

    def terms(self, checkpoint: Checkpoint, facts: Facts, place: Placed) -> tuple[Term, ...]:
        """What was cut, or is to be, off the weight under a patch."""
        settings = place.patch.settings
        if settings.get("base_start") == IN_FILE:
            return ()
        if self.is_made:
            return self._in_tail(place)
        matrix = matrix_of(place)
        rank = self.cuts.rank(matrix.name, int(settings["r"]))
        term = self.cuts.term(checkpoint, facts, matrix, place.patch.module, rank)
        return () if term is None else (term,)

    def _in_tail(self, place: Placed) -> tuple[Term, ...]:
        """The cut of a base that lacks it already: only the tail knows what it was."""
        name, module = place.matrices[0][0].piece.name, place.patch.module
        rank = self.cuts.rank(name, int(place.patch.settings["r"]))
        if not rank:
            return ()
        term = self.cuts.from_tail(name, module, rank)
        if term is None:
            what = "what was cut off this base is in no tail beside it"
            raise UsageError(what, module, "give the original base, or convert --on truncated")
        return (term,)
