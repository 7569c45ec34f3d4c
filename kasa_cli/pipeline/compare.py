"""VERIFY: read an output back, against its manifest, and against the base it was made from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kasa_cli.checkpoint import peft
from kasa_cli.checkpoint.container import Container, Reader, read_header
from kasa_cli.checkpoint.durable import sha256_file
from kasa_cli.checkpoint.layout import Checkpoint, open_checkpoint
from kasa_cli.checkpoint.staging import MANIFEST
from kasa_cli.errors import IntegrityError, InvalidInput
from kasa_cli.linalg.ends import Ends, ends
from kasa_cli.linalg.rounding import Target as Sum
from kasa_cli.linalg.rounding import blocks, other_neighbour
from kasa_cli.methods import kasa
from kasa_cli.pipeline.measure import as_weight
from kasa_cli.pipeline.workers import Watcher, run
from kasa_cli.report import Target

SLACK = 1e-9
"""Of the largest entry: two machines agree on the exact target to far better than this."""
TAIL_TOLERANCE = 1e-6
Manifest = Mapping[str, Any]


def check_files(output: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there with its size, and no other.

    Raises:
        IntegrityError: naming every missing, extra or resized file.
    """
    expected = manifest["files"]
    found = {p.relative_to(output).as_posix(): p for p in sorted(output.rglob("*")) if not p.is_dir()}
    found.pop(MANIFEST, None)
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"extra {name}" for name in found if name not in expected]
    problems += [
        f"resized {name}"
        for name, path in found.items()
        if name in expected and (path.is_symlink() or path.stat().st_size != expected[name]["size"])
    ]
    if problems:
        raise IntegrityError(", ".join(problems[:8]), str(output), "make it again, or fetch it again")


def check_structure(output: Path, manifest: Manifest) -> None:
    """Headers, index and shapes are what the manifest says, without reading a weight.

    Raises:
        IntegrityError: naming the first tensor that is not.
    """
    tensors = manifest["tensors"]
    if (output / "base").is_dir():
        base = _opened(output / "base")
        present = {name: (entry.dtype, list(entry.shape)) for name, entry in base.tensors.items()}
        recorded = {name: (one["dtype"], one["shape"]) for name, one in tensors.items()}
        _require_equal(present, recorded, "base")
    for folder, rank_key in (("adapter", "rank"), ("tail", None)):
        if (output / folder).is_dir():
            rank = manifest["options"][rank_key] if rank_key else None
            _check_adapter(output / folder / peft.WEIGHTS, tensors, rank)


def check_hashes(output: Path, manifest: Manifest, num_workers: int, watcher: Watcher) -> int:
    """Hash every byte; the number of bytes hashed.

    Raises:
        IntegrityError: naming the file, and in a shard of the base the tensor.
    """
    records = manifest["files"]
    total: int = sum(record["size"] for record in records.values())
    watcher.stage("hash", len(records), total)
    run(
        partial(_check_hash, output, manifest),
        sorted(records, key=lambda name: -records[name]["size"]),
        num_workers,
        lambda name: watcher.finished(name, records[name]["size"]),
    )
    return total


@dataclass(frozen=True)
class Comparison:
    """One target recomputed from the base: the largest distance from the exact result, in units in the last
    place of the stored dtype, and that of the tail's product in units of σ_max; None for what was not written."""

    name: str
    ulps: float | None
    tail_error: float | None


def compare(
    output: Path, manifest: Manifest, base: Checkpoint, num_workers: int, watcher: Watcher
) -> list[Comparison]:
    """Recompute everything from the base.

    Raises:
        IntegrityError: naming the first tensor that differs from what the base gives.
    """
    tensors = manifest["tensors"]
    missing = [name for name in tensors if name not in base.tensors]
    if missing:
        raise IntegrityError("not a tensor of the base", missing[0], "is this the base it was made from?")
    targets = [_target(name, one) for name, one in tensors.items() if one["role"] != "copied"]
    copied = [name for name, one in tensors.items() if one["role"] == "copied"]
    watcher.stage("compare", len(tensors), sum(target.work for target in targets))
    run(partial(_check_copied, tensors, base), copied, num_workers, lambda name: watcher.finished(name, 0))
    return run(
        partial(_compare_one, _Output(output, manifest), base),
        sorted(targets, key=lambda target: -target.work),
        num_workers,
        lambda target: watcher.finished(target.name, target.work),
    )


class _Output:
    """An output being read: its base and its small files."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.options = manifest["options"]
        self.base = open_checkpoint(folder / "base") if (folder / "base").is_dir() else None
        self.small = {
            name: read_header(folder / name / peft.WEIGHTS)
            for name in ("adapter", "tail")
            if (folder / name).is_dir()
        }

    def stored(self, name: str) -> Tensor | None:
        """A tensor of the base; None if there is no base."""
        return _read(self.base.shards[self.base.shard_of(name)], name) if self.base else None

    def small_tensors(self, folder: str, module: str) -> dict[str, Tensor]:
        """The tensors of one module in `adapter` or `tail`; {} if there is none."""
        container = self.small.get(folder)
        if container is None:
            return {}
        names = peft.tensor_names(module)
        return {key: _read(container, name) for key, name in names.items() if name in container.tensors}


def _compare_one(output: _Output, base: Checkpoint, target: Target) -> Comparison:
    original = _read(base.shards[base.shard_of(target.name)], target.name)
    found = ends(as_weight(original, target), target.dropped)
    _check_start(output, found, target)
    return Comparison(target.name, _ulps(output, found, original, target), _tail_error(output, found, target))


def _ulps(output: _Output, found: Ends, original: Tensor, target: Target) -> float | None:
    """How far the stored base is from the exact result, in units in the last place."""
    stored = output.stored(target.name)
    if stored is None:
        return None
    L, R = kasa.cut(found)
    exact = Sum(as_weight(original, target), L, R)
    Q = as_weight(stored, target)
    allowed = 0.5 if output.options["rounding"] == "nearest" else 1.0
    slack = SLACK * float(original.abs().max())
    # A cast of float64 to half precision goes through float32: at a tie it may end one float32 step off.
    doubt = torch.finfo(torch.float32).eps if stored.element_size() == 2 else 0.0
    worst = 0.0
    for start, stop in blocks(*Q.shape):
        T, rows = exact.rows(start, stop), Q[start:stop].contiguous()
        distance = (rows.to(torch.float64) - T).abs()
        step = (other_neighbour(rows, T).to(torch.float64) - rows.to(torch.float64)).abs()
        if bool((distance > allowed * step + doubt * T.abs() + slack).any()):
            raise IntegrityError("not what its base gives", target.name, "is this the base it was made from?")
        worst = max(worst, float((distance / step.clamp_min(slack or 1.0)).max()))
    return worst


def _tail_error(output: _Output, found: Ends, target: Target) -> float | None:
    """Distance of the tail's product from the exact one, in the dropped directions, over σ_max."""
    tensors = output.small_tensors("tail", target.module)
    if not tensors:
        return None
    L, R = kasa.cut(found)
    A, B = tensors["A"].to(torch.float64), tensors["B"].to(torch.float64)
    error = float(torch.linalg.matrix_norm(B @ (A @ R.T) - L)) / (found.sigma_max or 1.0)
    if error > TAIL_TOLERANCE:
        raise IntegrityError("the tail is not what its base gives", target.name)
    return error


def _check_start(output: _Output, found: Ends, target: Target) -> None:
    """The adapter is the one that seed and options give."""
    tensors = output.small_tensors("adapter", target.module)
    if not tensors:
        return
    options = output.options
    scaling = kasa.scaling(options["alpha"], options["rank"], options["use_rslora"])
    recipe = kasa.Recipe(options["rank"], scaling, options["seed"])
    start = kasa.start(found, recipe, options["diag_init"], target.module)
    given = (tensors["B"] * tensors["diag"]) @ tensors["A"]
    wanted = (start.B * start.diag) @ start.A
    is_random = options["diag_init"] != "residual"
    is_same = torch.equal(tensors["A"], start.A) and torch.equal(tensors["diag"], start.diag)
    is_close = bool(((given - wanted).abs() <= TAIL_TOLERANCE * (found.sigma_max or 1.0)).all())
    if not is_close or (is_random and not is_same):
        raise IntegrityError("the adapter is not what seed and options give", target.module)


def _check_copied(tensors: Mapping[str, Any], base: Checkpoint, name: str) -> None:
    if _hash(base.shards[base.shard_of(name)], name) != tensors[name]["sha256"]:
        raise IntegrityError("not the bytes of the base", name, "is this the base it was made from?")


def _check_hash(output: Path, manifest: Manifest, name: str) -> None:
    if sha256_file(output / name) != manifest["files"][name]["sha256"]:
        raise IntegrityError("altered", f"{output / name}{_altered_tensor(output, manifest, name)}")


def _altered_tensor(output: Path, manifest: Manifest, name: str) -> str:
    """The first tensor of a shard whose bytes are not those recorded, for the message."""
    if not name.startswith("base/") or not name.endswith(".safetensors"):
        return ""
    try:
        container = read_header(output / name)
    except InvalidInput:
        return " (its header)"
    for tensor in container.tensors:
        if _hash(container, tensor) != manifest["tensors"].get(tensor, {}).get("sha256"):
            return f" (tensor {tensor})"
    return " (its header)"


def _check_adapter(path: Path, tensors: Mapping[str, Any], rank: int | None) -> None:
    """The small tensors fit the weights they belong to."""
    by_module = {one["module"]: one for one in tensors.values() if "module" in one}
    entries = _header(path).tensors
    for module, one in by_module.items():
        outs, ins = reversed(one["shape"]) if one["is_transposed"] else one["shape"]
        names = peft.tensor_names(module)
        A, B = entries.get(names["A"]), entries.get(names["B"])
        if A is None and B is None and rank is None and not one["truncation_rank"]:
            continue
        if A is None or B is None:
            raise IntegrityError("no tensors for a module", f"{path}: {module}")
        if (
            (A.shape[1], B.shape[0]) != (ins, outs)
            or A.shape[0] != B.shape[1]
            or rank not in (None, A.shape[0])
        ):
            raise IntegrityError(f"shapes {A.shape} and {B.shape} do not fit", f"{path}: {module}")


def _require_equal(present: Mapping[str, Any], recorded: Mapping[str, Any], where: str) -> None:
    for name in (*recorded, *present):
        if present.get(name) != recorded.get(name):
            raise IntegrityError("missing, extra or of another shape", f"{where}: {name}")


def _opened(folder: Path) -> Checkpoint:
    try:
        return open_checkpoint(folder)
    except InvalidInput as error:
        raise IntegrityError(f"altered ({error})", str(folder)) from error


def _header(path: Path) -> Container:
    try:
        return read_header(path)
    except InvalidInput as error:
        raise IntegrityError(f"altered ({error})", str(path)) from error


def _target(name: str, one: Mapping[str, Any]) -> Target:
    rows, columns = one["shape"]
    return Target(
        name, one["module"], (rows, columns), one["dtype"], one["is_transposed"], one["truncation_rank"]
    )


def _read(container: Container, name: str) -> Tensor:
    with Reader(container) as reader:
        return reader.tensor(name)


def _hash(container: Container, name: str) -> str:
    digest = hashlib.sha256()
    with Reader(container) as reader:
        for chunk in reader.chunks(name):
            digest.update(chunk)
    return digest.hexdigest()
