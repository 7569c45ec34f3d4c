"""Measures the targets. Their spectral facts and bottom factors are kept as parts as soon as they are computed."""

import hashlib
from dataclasses import dataclass
from functools import partial

import torch

from kasa_cli.checkpoint import Checkpoint
from kasa_cli.errors import IntegrityError
from kasa_cli.files import Staging
from kasa_cli.linalg import Ends
from kasa_cli.pipeline.measuring import SOLVER_EDITION, Facts, HashedMatrix, pack, room, unpack, weigh
from kasa_cli.pipeline.workers import Task, Watcher, run_stage
from kasa_cli.report import SpectralFacts
from kasa_cli.targets import Target


@dataclass(frozen=True)
class MeasuredTarget:
    """A measured target: the key of its factors, the hash of its bytes, and its facts."""

    target: Target
    key: str
    blake3: str
    facts: SpectralFacts
    is_new: bool


@dataclass(frozen=True)
class Measurer:
    """Everything that one measurement needs."""

    checkpoint: Checkpoint
    staging: Staging
    facts: Facts
    device: torch.device


def measure(
    measurer: Measurer, targets: tuple[Target, ...], num_workers: int, watcher: Watcher
) -> list[MeasuredTarget]:
    """Decompose every target that has neither a part nor facts in the store; results are in the given order."""
    task = Task(
        partial(_measure_one, measurer),
        name=lambda target: target.name,
        work=lambda target: target.matrix.work,
        memory=lambda target: room(target.matrix),
    )
    return run_stage("measure", task, targets, num_workers, watcher)


def read_factors(staging: Staging, measured: MeasuredTarget) -> Ends:
    """The factors of a target, from its part.

    Raises:
        IntegrityError: the part differs from the one that was written.
    """
    path = staging.part(measured.key)
    if path is None:
        raise IntegrityError("a finished part is altered", measured.target.name, "run the command again")
    return unpack(Ends, path.read_bytes())


def spectral_facts(ends: Ends) -> SpectralFacts:
    """The figures of a decomposition, as plain data."""
    return SpectralFacts(
        sigma_max=ends.sigma_max,
        sigma_min=ends.sigma_min,
        kappa=ends.kappa,
        sigma_cut=ends.sigma_cut,
        sigma_next=ends.sigma_next,
        dropped_energy=ends.dropped_energy,
        solver=ends.solver,
        residual=ends.residual,
        angle=ends.angle,
        is_tied=ends.is_tied,
    )


def _measure_one(measurer: Measurer, target: Target) -> MeasuredTarget:
    hashed = weigh(measurer.checkpoint, target.matrix, measurer.device)
    key = _part_key(target, hashed)
    path = measurer.staging.part(key)
    if path is not None:
        ends = unpack(Ends, path.read_bytes())
        return MeasuredTarget(target, key, hashed.digest, spectral_facts(ends), is_new=False)
    bench = measurer.facts.bench(hashed)
    ends = bench.bottom(target.dropped)
    measurer.staging.keep_part(key, pack(ends, {"name": target.name}))
    return MeasuredTarget(target, key, hashed.digest, spectral_facts(ends), bench.is_new)


def _part_key(target: Target, hashed: HashedMatrix) -> str:
    """The key of the factors: the content of the matrix, the number of components, the solvers."""
    text = f"{SOLVER_EDITION} {hashed.content} {target.dropped}"
    return hashlib.sha256(text.encode()).hexdigest()
