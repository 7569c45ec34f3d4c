"""DECIDE: scores in, an order and a choice out; modules and the parameters of fused experts apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from kasa_cli.errors import UsageError
from kasa_cli.methods import selection
from kasa_cli.methods.criteria import CRITERIA, RULES, Score, Spectrum, expected
from kasa_cli.methods.selection import SIGNS, Amount
from kasa_cli.pipeline.measuring.facts import Bench
from kasa_cli.report import CandidateRow, Skipped, module_type
from kasa_cli.report.totals import CriterionComparison
from kasa_cli.targets.candidates import Candidate

KINDS = ("module", "parameter")


@dataclass(frozen=True)
class Ranking:
    """By what, and how much. `prefer` is the end of the criterion that is chosen.

    `fair`: the score over that of a random matrix of the same shape decides; `by_type`: each module type apart.
    """

    criterion: str
    rule: str | None
    prefer: str
    amount: Amount
    by_type: bool = False
    fair: bool = False
    compare: tuple[str, ...] = ()

    @property
    def scores(self) -> dict[str, Score]:
        """Every score that is asked for, by criterion."""
        own = RULES[self.rule] if self.rule else CRITERIA[self.criterion].score
        return {self.criterion: own, **{name: CRITERIA[name].score for name in self.compare}}

    @property
    def needs_values(self) -> bool:
        """Whether a score needs the whole spectrum."""
        return any(CRITERIA[name].needs_values for name in self.scores)


@dataclass(frozen=True)
class Judged:
    """The scores of one weight by criterion, and what chance would score, if that is what they are held against."""

    scores: Mapping[str, float]
    expected: float | None


@dataclass(frozen=True)
class Scored:
    """A candidate, and how each of its matrices was judged: one, or the experts."""

    candidate: Candidate
    judged: tuple[Judged, ...]

    def score(self, criterion: str) -> float:
        """The arithmetic mean over its matrices."""
        return fmean(self.each(criterion))

    def each(self, criterion: str) -> tuple[float, ...]:
        """The scores of its matrices."""
        return tuple(one.scores[criterion] for one in self.judged)

    @property
    def expected(self) -> float | None:
        """What chance would score, in the mean."""
        found = [one.expected for one in self.judged if one.expected is not None]
        return fmean(found) if found else None

    def decisive(self, criterion: str) -> float:
        """The score that orders: over what chance gives, where that was asked for."""
        expected = self.expected
        return self.score(criterion) if expected is None else self.score(criterion) / expected


def judge(bench: Bench, ranking: Ranking) -> Judged:
    """The scores of one weight.

    Raises:
        UsageError: the criterion gives a random matrix nothing to be held against.
    """
    values = bench.values().S if ranking.needs_values else None
    found = bench.extremes()
    spectrum = Spectrum(bench.weight.shape, found.sigma_max, found.sigma_min, found.frobenius, values)
    scores = {name: score(spectrum) for name, score in ranking.scores.items()}
    return Judged(scores, _chance(ranking, spectrum) if ranking.fair else None)


def _chance(ranking: Ranking, spectrum: Spectrum) -> float:
    """What a random matrix of that shape and norm scores."""
    found = expected(ranking.scores[ranking.criterion], spectrum.shape, spectrum.frobenius)
    if not 0 < found < math.inf:
        what = f"a random matrix of {spectrum.shape[0]} x {spectrum.shape[1]} scores {found}"
        raise UsageError(what, ranking.criterion, "--shape-fair needs another criterion")
    return found


def chosen(scored: Sequence[Scored], ranking: Ranking) -> list[Scored]:
    """The choice, best first: modules, then parameters, each by its own count."""
    return [
        members[index]
        for members in _by_kind(scored)
        for index in selection.choose(
            [one.decisive(ranking.criterion) for one in members],
            ranking.prefer,
            ranking.amount,
            _types(members) if ranking.by_type else None,
        )
    ]


def rows(scored: Sequence[Scored], best: Sequence[Scored], ranking: Ranking) -> tuple[CandidateRow, ...]:
    """Every candidate, in the order of the model, with its place in its order from 1."""
    places = _places(scored, ranking)
    selected = {one.candidate.module for one in best}
    return tuple(_row(one, places[one.candidate.module], selected, ranking) for one in scored)


def comparison(
    scored: Sequence[Scored], best: Sequence[Scored], ranking: Ranking
) -> tuple[CriterionComparison, ...]:
    """For each other criterion: how much of as large a choice by it is the same, and how alike the orders are."""
    return tuple(_compared(name, scored, best, ranking) for name in ranking.compare)


def without_nan(
    scored: Sequence[Scored], criteria: Sequence[str]
) -> tuple[list[Scored], tuple[Skipped, ...]]:
    """The candidates of whom every criterion has something to say, and the others with the one that has not."""
    silent = {
        one.candidate.module: name
        for one in scored
        for name in criteria
        if one.score(name) != one.score(name)
    }
    kept = [one for one in scored if one.candidate.module not in silent]
    return kept, tuple(Skipped(module, f"{name} has nothing to say of it") for module, name in silent.items())


def _compared(
    name: str, scored: Sequence[Scored], best: Sequence[Scored], ranking: Ranking
) -> CriterionComparison:
    """Orders are alike where they are of one kind; the mean over modules and parameters, by their number."""
    prefer, shared, total, correlations = CRITERIA[name].prefer, [], [], []
    for members in _by_kind(scored):
        ours = [one.candidate.module for one in best if one in members]
        theirs = selection.choose([one.score(name) for one in members], prefer, Amount(num_modules=len(ours)))
        shared += ours
        total += [members[index].candidate.module for index in theirs]
        x = [SIGNS[ranking.prefer] * one.decisive(ranking.criterion) for one in members]
        correlation = selection.rank_correlation(x, [SIGNS[prefer] * one.score(name) for one in members])
        correlations += [] if correlation is None else [(correlation, len(members))]
    weight = sum(count for _, count in correlations)
    return {
        "criterion": name,
        "prefer": prefer,
        "overlap": selection.overlap(shared, total),
        "rank_correlation": sum(c * count for c, count in correlations) / weight if weight else None,
    }


def _row(one: Scored, place: int, selected: set[str], ranking: Ranking) -> CandidateRow:
    candidate = one.candidate
    return CandidateRow(
        module=candidate.module,
        kind=candidate.kind,
        module_type=module_type(candidate.module),
        shape=candidate.shape,
        score=one.score(ranking.criterion),
        rank_in_order=place,
        selected=candidate.module in selected,
        expected=one.expected,
        experts=one.each(ranking.criterion) if candidate.kind == "parameter" else None,
        others={name: one.score(name) for name in ranking.compare} or None,
    )


def _places(scored: Sequence[Scored], ranking: Ranking) -> dict[str, int]:
    """The place of each candidate among its kind, or among its module type where types are apart."""
    places: dict[str, int] = {}
    for members in _by_kind(scored):
        labels = _types(members) if ranking.by_type else [""] * len(members)
        seen: dict[str, int] = {}
        for index in selection.order([one.decisive(ranking.criterion) for one in members], ranking.prefer):
            seen[labels[index]] = seen.get(labels[index], 0) + 1
            places[members[index].candidate.module] = seen[labels[index]]
    return places


def _by_kind(scored: Sequence[Scored]) -> list[list[Scored]]:
    groups = [[one for one in scored if one.candidate.kind == kind] for kind in KINDS]
    return [members for members in groups if members]


def _types(members: Sequence[Scored]) -> list[str]:
    return [module_type(one.candidate.module) for one in members]
