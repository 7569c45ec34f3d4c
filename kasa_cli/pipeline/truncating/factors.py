"""MEASURE: targets in, spectral facts and bottom factors out, each kept as a part as soon as it is known."""

import hashlib
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kasa_cli.checkpoint.dtypes import BITS
from kasa_cli.checkpoint.hashing import digest_of
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.safetensors_writer import raw_bytes
from kasa_cli.errors import IntegrityError
from kasa_cli.files.staging import Staging
from kasa_cli.linalg.bottom import Ends
from kasa_cli.pipeline.measuring.facts import SOLVER_EDITION, Facts, Weight, content_hash, pack, unpack
from kasa_cli.pipeline.measuring.weights import read_target, working_set
from kasa_cli.pipeline.workers import Watcher, run
from kasa_cli.report import SpectralFacts, Target


@dataclass(frozen=True)
class Measured:
    """One target measured: where its factors are kept, the hash of its bytes, and its facts."""

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
) -> list[Measured]:
    """Decompose every target that neither part nor store answers for, the largest first; in the order given."""
    watcher.stage("measure", len(targets), sum(target.work for target in targets))
    found = run(
        lambda target: _measure_one(measurer, target),
        sorted(targets, key=lambda target: -target.work),
        num_workers,
        lambda target: watcher.finished(target.name, target.work),
        lambda target: working_set(target.shape, prod(target.shape) * BITS[target.dtype] // 8),
    )
    by_name = {measured.target.name: measured for measured in found}
    return [by_name[target.name] for target in targets]


def read_factors(staging: Staging, measured: Measured) -> Ends:
    """The factors of a target, from its part.

    Raises:
        IntegrityError: the part was altered since it was written.
    """
    path = staging.part(measured.key)
    if path is None:
        raise IntegrityError("a finished part was altered", measured.target.name, "run the command again")
    return unpack(Ends, path.read_bytes())


def as_weight(stored: Tensor, target: Target) -> Tensor:
    """The weight as (out_features, in_features): a Conv1D is stored transposed."""
    return stored.T if target.is_transposed else stored


def spectral_facts(found: Ends) -> SpectralFacts:
    """The plain-data side of a decomposition."""
    return SpectralFacts(
        sigma_max=found.sigma_max,
        sigma_min=found.sigma_min,
        kappa=found.kappa,
        sigma_cut=found.sigma_cut,
        sigma_next=found.sigma_next,
        dropped_energy=found.dropped_energy,
        solver=found.solver,
        residual=found.residual,
        angle=found.angle,
        is_tied=found.is_tied,
    )


def _measure_one(measurer: Measurer, target: Target) -> Measured:
    stored = read_target(measurer.checkpoint, target.name)
    digest = digest_of([raw_bytes(stored)])
    key = _part_key(target, digest)
    path = measurer.staging.part(key)
    if path is not None:
        return Measured(target, key, digest, spectral_facts(unpack(Ends, path.read_bytes())), is_new=False)
    W = as_weight(stored, target)
    content = content_hash(target.dtype, target.shape, digest, is_transposed=target.is_transposed)
    shape = (target.out_features, target.in_features)
    weight = Weight(target.name, content, shape, target.dtype, lambda: W.to(measurer.device))
    bench = measurer.facts.bench(weight)
    found = bench.bottom(target.dropped)
    measurer.staging.keep_part(key, pack(found, {"name": target.name}))
    return Measured(target, key, digest, spectral_facts(found), bench.is_new)


def _part_key(target: Target, digest: str) -> str:
    """What the factors depend on: the bytes of the tensor, how it is read, how many are wanted, the solvers."""
    text = f"{SOLVER_EDITION} {digest} {target.dtype} {target.shape} {target.is_transposed} {target.dropped}"
    return hashlib.sha256(text.encode()).hexdigest()
