"""Recomputes every number of an output from its base and compares."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kasa_cli.adapters import expert_factors, peft
from kasa_cli.checkpoint import (
    CARD,
    Checkpoint,
    ExpertRecord,
    Matrix,
    Orientation,
    Piece,
    TensorRecord,
    TruncateManifest,
    TruncationRecord,
    hash_tensor,
    open_checkpoint,
    read_header,
)
from kasa_cli.errors import IntegrityError
from kasa_cli.files import sha256_file
from kasa_cli.linalg import Ends, ExactSum, blocks, ends, other_neighbour
from kasa_cli.methods import kasa
from kasa_cli.pipeline.verifying.integrity import expert_entries
from kasa_cli.pipeline.workers import Task, Watcher, run_stage
from kasa_cli.report import Compared
from kasa_cli.targets import Target

SLACK = 1e-9
"""Tolerance relative to the largest entry; exact values from two machines differ by far less."""
TAIL_TOLERANCE = 1e-6
REMEDY = "give the base that the output was made from"


def compare(
    output: Path, manifest: TruncateManifest, base: Checkpoint, num_workers: int, watcher: Watcher
) -> list[Compared]:
    """Recompute everything from the base; the largest target first.

    Raises:
        IntegrityError: a tensor differs from the value recomputed from the base; it is named.
    """
    tensors = manifest.tensors
    written = _Output(output, manifest)
    _check_names(written, tensors, base)
    _check_companions(written, base)
    targets = [_target(name, tensors[name], *target) for name, target in manifest.truncations.items()]
    targets += [_expert(name, record) for name, record in written.experts.items()]
    targets.sort(key=lambda target: -target.matrix.work)
    copied = [name for name, record in tensors.items() if record.role == "copied"]
    run_stage("copies", Task(partial(_check_copied, written, base), name=str), copied, num_workers, watcher)
    task = Task(
        partial(_compare_target, written, base),
        name=lambda target: target.name,
        work=lambda target: target.matrix.work,
    )
    return run_stage("compare", task, targets, num_workers, watcher)


class _Output:
    """An opened output: its base and its small files."""

    def __init__(self, folder: Path, manifest: TruncateManifest) -> None:
        self.options, self.tensors = manifest.options, manifest.tensors
        self.experts = manifest.experts
        self.stacks = expert_entries(manifest)
        self.base = open_checkpoint(folder / "base") if (folder / "base").is_dir() else None
        self.small = {
            name: read_header(folder / name / peft.WEIGHTS)
            for name in ("adapter", "tail")
            if (folder / name).is_dir()
        }

    def input_blake3(self, name: str) -> str:
        """The hash of the original of a target."""
        record = self.experts[name] if name in self.experts else self.tensors[name]
        return str(record.input_blake3)

    def tail_factors(self, target: Target) -> tuple[Tensor, Tensor] | None:
        """The factors of a target in the tail, (left, right); None if there are none."""
        if target.expert is None:
            tensors = self.small_tensors("tail", target.module)
            return (tensors["B"], tensors["A"]) if tensors else None
        entry, container = self.stacks.get(target.module), self.small.get("tail")
        if entry is None or container is None:
            return None
        factor_tensors = {name: container.tensor(name) for name in (entry.A, entry.B)}
        return expert_factors(entry, factor_tensors, target.expert)

    def small_tensors(self, folder: str, module: str) -> dict[str, Tensor]:
        """The tensors of one module in `adapter` or `tail`; {} if there is none."""
        container = self.small.get(folder)
        if container is None:
            return {}
        names = peft.tensor_names(module)
        return {key: container.tensor(name) for key, name in names.items() if name in container.tensors}


def _check_names(output: _Output, tensors: Mapping[str, TensorRecord], base: Checkpoint) -> None:
    """Check that both bases have the same tensors of the same shapes; an output without a base holds some only."""
    for name, record in tensors.items():
        if name not in base.tensors:
            raise IntegrityError("not a tensor of the base", name, REMEDY)
        if base.tensors[name].shape != record.shape:
            raise IntegrityError(
                f"has shape {list(record.shape)}, but {list(base.tensors[name].shape)} in the base",
                name,
                REMEDY,
            )
    absent = [name for name in base.tensors if name not in tensors]
    if output.base and absent:
        raise IntegrityError("the output lacks this tensor of the base", absent[0], REMEDY)


def _check_companions(output: _Output, base: Checkpoint) -> None:
    """Check that the other files equal those of the base, except the card, and config.json if --dtype changed it."""
    if output.base is None:
        return
    for name in base.companions:
        theirs, ours = base.root / name, output.base.root / name
        if name == CARD or (name == "config.json" and output.options.dtype != "auto"):
            continue
        if not ours.is_file() or sha256_file(ours) != sha256_file(theirs):
            raise IntegrityError("differs from the base", f"{ours}", REMEDY)


def _compare_target(output: _Output, base: Checkpoint, target: Target) -> Compared:
    if target.matrix.digest(base) != output.input_blake3(target.name):
        raise IntegrityError("the input on record differs from this tensor of the base", target.name, REMEDY)
    W = target.matrix.read(base)
    factors = ends(W, target.dropped)
    if target.expert is None:
        _check_initialisation(output, factors, target)
    return {
        "name": target.name,
        "ulps": _ulps(output, factors, W, target),
        "tail_error": _tail_error(output, factors, target),
    }


def _ulps(output: _Output, bottom: Ends, W: Tensor, target: Target) -> float | None:
    """Largest distance of the stored base from the exact result, in units in the last place."""
    if output.base is None:
        return None
    L, R = kasa.truncation(bottom)
    exact = ExactSum(W, L, R)
    Q = target.matrix.read(output.base)
    allowed = 0.5 if output.options.rounding == "nearest" else 1.0
    slack = SLACK * float(W.abs().max())
    worst = 0.0
    for start, stop in blocks(*Q.shape):
        T, rows = exact.rows(start, stop), Q[start:stop].contiguous()
        distance = (rows.to(torch.float64) - T).abs()
        step = (other_neighbour(rows, T).to(torch.float64) - rows.to(torch.float64)).abs()
        if bool((distance > allowed * step + slack).any()):
            problem = "differs from the value recomputed from its base"
            raise IntegrityError(problem, target.name, "make the output again")
        worst = max(worst, float((distance / step.clamp_min(slack or 1.0)).max()))
    return worst


def _tail_error(output: _Output, bottom: Ends, target: Target) -> float | None:
    """Distance of the tail's product from the exact one in the dropped directions, relative to σ_max."""
    factors = output.tail_factors(target)
    if factors is None:
        return None
    L, R = kasa.truncation(bottom)
    left, right = (factor.to(torch.float64) for factor in factors)
    error = float(torch.linalg.matrix_norm(left @ (right @ R.T) - L)) / (bottom.sigma_max or 1.0)
    if error > TAIL_TOLERANCE:
        raise IntegrityError("the tail differs from the value recomputed from its base", target.name)
    return error


def _check_initialisation(output: _Output, bottom: Ends, target: Target) -> None:
    """Check that the adapter is the freshly initialised one of these options and this seed."""
    tensors = output.small_tensors("adapter", target.module)
    if not tensors:
        return
    options = output.options
    scaling = kasa.scaling(float(options.alpha), options.rank, options.use_rslora)
    recipe = kasa.Recipe(options.rank, scaling, options.seed)
    initial = kasa.initialise(bottom, recipe, options.diag_init, target.module)
    stored = (tensors["B"] * tensors["diag"]) @ tensors["A"]
    expected = (initial.B * initial.diag) @ initial.A
    is_random = options.diag_init != "residual"
    is_same = torch.equal(tensors["A"], initial.A) and torch.equal(tensors["diag"], initial.diag)
    is_close = bool(((stored - expected).abs() <= TAIL_TOLERANCE * (bottom.sigma_max or 1.0)).all())
    if not is_close or (is_random and not is_same):
        raise IntegrityError("the adapter differs from the fresh one of its options and seed", target.module)


def _check_copied(output: _Output, base: Checkpoint, name: str) -> None:
    copies = [checkpoint for checkpoint in (base, output.base) if checkpoint]
    hashes = {hash_tensor(copy, name) for copy in copies}
    if hashes != {output.tensors[name].blake3}:
        raise IntegrityError("differs from the base", name, REMEDY)


def _target(name: str, record: TensorRecord, module: str, truncation: TruncationRecord) -> Target:
    rows, columns = record.shape
    orientation = Orientation.of(truncation.is_transposed)
    matrix = Matrix(name, (Piece(name),), orientation.sides((rows, columns)), record.dtype, orientation)
    return Target(matrix, module, (rows, columns), truncation.truncation_rank)


def _expert(name: str, record: ExpertRecord) -> Target:
    pieces = tuple(Piece(tensor, index) for tensor, index in record.pieces)
    orientation = Orientation.of(record.truncation.is_transposed)
    matrix = Matrix(name, pieces, record.shape, record.dtype, orientation)
    return Target(matrix, record.module, record.shape, record.truncation.truncation_rank, record.expert)
