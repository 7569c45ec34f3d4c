"""Plans a truncation from headers, names and options; no weight is read."""

from dataclasses import dataclass
from pathlib import Path

from kasa_cli.checkpoint import Checkpoint, Source
from kasa_cli.errors import UsageError
from kasa_cli.model_names import NameMap
from kasa_cli.pipeline.measuring import Facts
from kasa_cli.pipeline.opening import ModelLocation, survey
from kasa_cli.targets import Patterns, RankRule, Selection, Target, select
from kasa_cli.targets import patterns as combined_patterns


@dataclass(frozen=True)
class Plan:
    """A checkpoint, the names of its modules, and the targets."""

    source: Source
    checkpoint: Checkpoint
    names: NameMap
    selection: Selection


def make_plan(
    where: ModelLocation,
    patterns: Patterns,
    from_file: Path | None,
    rank_rule: RankRule,
    facts: Facts | None = None,
) -> Plan:
    """Find the model, check every header, map the names and choose the targets."""
    source, checkpoint, names = survey(where, facts.store if facts else None)
    patterns = combined_patterns(patterns.targets, patterns.excludes, from_file)
    return Plan(source, checkpoint, names, select(checkpoint.tensors, names, patterns, rank_rule))


def require_rank(targets: tuple[Target, ...], rank: int, label: str) -> None:
    """Refuse a rank that is too large for a target.

    Raises:
        UsageError: naming the first such target.
    """
    for target in targets:
        if rank >= min(target.shape):
            raise UsageError(
                f"{label} {rank} is not below the smaller side of {target.shape[0]} x {target.shape[1]}",
                target.name,
                f"lower it, or --exclude {target.module}",
            )
