"""MEASURE: targets in, spectral facts and bottom factors out, each kept as a part as soon as it is known."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kasa_cli.checkpoint.container import Reader
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.staging import Staging
from kasa_cli.checkpoint.streaming import raw_bytes
from kasa_cli.errors import IntegrityError, NumericalError
from kasa_cli.linalg.ends import Ends, ends
from kasa_cli.pipeline.workers import Watcher, run
from kasa_cli.report import Facts, Target

SOLVER_EDITION = 1
"""Raise it when the solvers change: parts of another edition are not taken up."""


@dataclass(frozen=True)
class Measured:
    """One target measured: where its factors are kept, the hash of its bytes, and its facts."""

    target: Target
    key: str
    sha256: str
    facts: Facts
    is_new: bool


def measure(
    checkpoint: Checkpoint,
    targets: tuple[Target, ...],
    staging: Staging,
    num_workers: int,
    device: torch.device,
    watcher: Watcher,
) -> list[Measured]:
    """Decompose every target that no finished part answers for, the largest first; in the order of `targets`."""
    watcher.stage("measure", len(targets), sum(target.work for target in targets))
    ordered = sorted(targets, key=lambda target: -target.work)
    found = run(
        lambda target: _measure_one(checkpoint, target, staging, device),
        ordered,
        num_workers,
        lambda target: watcher.finished(target.name, target.work),
    )
    by_name = {measured.target.name: measured for measured in found}
    return [by_name[target.name] for target in targets]


def read_target(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of a checkpoint, as stored."""
    with Reader(checkpoint.shards[checkpoint.shard_of(name)]) as reader:
        return reader.tensor(name)


def read_factors(staging: Staging, measured: Measured) -> Ends:
    """The factors of a target, from its part.

    Raises:
        IntegrityError: the part was altered since it was written.
    """
    path = staging.part(measured.key)
    if path is None:
        raise IntegrityError("a finished part was altered", measured.target.name, "run the command again")
    return _unpack(path)


def as_weight(stored: Tensor, target: Target) -> Tensor:
    """The weight as (out_features, in_features): a Conv1D is stored transposed."""
    return stored.T if target.is_transposed else stored


def _measure_one(checkpoint: Checkpoint, target: Target, staging: Staging, device: torch.device) -> Measured:
    stored = read_target(checkpoint, target.name)
    digest = hashlib.sha256(raw_bytes(stored)).hexdigest()
    key = _part_key(target, digest)
    path = staging.part(key)
    if path is None:
        try:
            found = ends(as_weight(stored, target).to(device), target.dropped)
        except NumericalError as error:
            raise NumericalError(str(error), target.name) from error
        staging.keep_part(key, _pack(found))
        return Measured(target, key, digest, facts(found), is_new=True)
    return Measured(target, key, digest, facts(_unpack(path)), is_new=False)


def facts(found: Ends) -> Facts:
    """The plain-data side of a decomposition."""
    return Facts(
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


def _part_key(target: Target, digest: str) -> str:
    """What the factors depend on: the bytes of the tensor, how it is read, how many are wanted, the solvers."""
    text = f"{SOLVER_EDITION} {digest} {target.dtype} {target.shape} {target.is_transposed} {target.dropped}"
    return hashlib.sha256(text.encode()).hexdigest()


def _pack(found: Ends) -> bytes:
    """A safetensors file; one metadata key, for with two its bytes would change from run to run."""
    scalars = {name: value for name, value in vars(found).items() if not isinstance(value, Tensor)}
    tensors = {
        name: value.cpu().contiguous() for name, value in vars(found).items() if isinstance(value, Tensor)
    }
    return save(tensors, {"scalars": json.dumps(scalars, sort_keys=True)})


def _unpack(path: Path) -> Ends:
    with safe_open(path, framework="pt", backend="pread") as part:
        scalars = json.loads(part.metadata()["scalars"])
        return Ends(**scalars, **{name: part.get_tensor(name) for name in ("U", "S", "V")})
