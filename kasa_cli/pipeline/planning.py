"""DECIDE: from headers, names and options to a plan; no weight is read."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kasa_cli.checkpoint.layout import Checkpoint, open_checkpoint
from kasa_cli.checkpoint.names import NameMap, map_names
from kasa_cli.checkpoint.quantized import refuse_quantised
from kasa_cli.checkpoint.source import Source, resolve
from kasa_cli.checkpoint.targets import Patterns, RankRule, select, targets_from
from kasa_cli.errors import UsageError
from kasa_cli.linalg.subspace import DENSE_SIDE
from kasa_cli.pipeline.job import Where
from kasa_cli.report import Selection, Target

RUNTIME_BYTES = 400 << 20
"""What torch and transformers occupy before the first tensor."""
GRAM_FLOPS_PER_SECOND = 4e10
"""A rank-k update of float64 on one core of a server of 2023: an estimate is all that a plan asks of it."""


@dataclass(frozen=True)
class Plan:
    """A checkpoint, its names, and what is to be done to it."""

    source: Source
    checkpoint: Checkpoint
    names: NameMap
    selection: Selection


def make_plan(where: Where, patterns: Patterns, from_file: Path | None, rank_rule: RankRule) -> Plan:
    """Find the model, check every header, map the names and choose the targets."""
    source, checkpoint, names = survey(where)
    chosen = targets_from(from_file) if from_file else ()
    patterns = Patterns((*patterns.targets, *chosen), patterns.excludes)
    return Plan(source, checkpoint, names, select(checkpoint.tensors, names.slots, patterns, rank_rule))


def survey(where: Where) -> tuple[Source, Checkpoint, NameMap]:
    """The model behind a name: its files, checked, and the modules its tensors belong to."""
    source, checkpoint = find(where)
    refuse_quantised(checkpoint.config, checkpoint.tensors, where.model)
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    return source, checkpoint, map_names(checkpoint.config, shapes)


def find(where: Where) -> tuple[Source, Checkpoint]:
    """The model's files, every header checked."""
    source = resolve(
        where.model,
        revision=where.revision,
        cache_dir=where.cache_dir,
        local_files_only=where.local_files_only,
    )
    return source, open_checkpoint(source.root, hub_cache=source.hub_cache)


def require_rank(targets: tuple[Target, ...], rank: int, what: str) -> None:
    """Refuse a rank that some target cannot have.

    Raises:
        UsageError: naming the first such target.
    """
    for target in targets:
        if rank >= min(target.shape):
            raise UsageError(
                f"{what} {rank} is not below the smaller side of {target.shape[0]} x {target.shape[1]}",
                target.name,
                f"lower it, or --exclude {target.module}",
            )


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError("no such device here", name, "use --device cpu")
    return torch.device(name)


def memory_needed(targets: tuple[Target, ...], num_workers: int) -> int:
    """Peak bytes expected: the runtime, and for each worker its weight twice, two Gram matrices and panels."""
    largest = max((_working_set(target) for target in targets), default=0)
    return RUNTIME_BYTES + num_workers * largest


def seconds_needed(targets: tuple[Target, ...], num_workers: int) -> float:
    """Wall seconds expected, from the multiplications alone; within a factor of a few."""
    return 2.5 * sum(target.work for target in targets) / GRAM_FLOPS_PER_SECOND / num_workers


def _working_set(target: Target) -> int:
    short, long = sorted(target.shape)
    element = 4 if target.dtype == "F32" else 2
    return 2 * element * short * long + 2 * 8 * max(short, DENSE_SIDE) ** 2 + (64 << 20)
