"""Checks an output against its manifest: files, hashes, and the shapes in every header."""

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from kasa_cli.adapters import FactorEntry, peft, stack_entry
from kasa_cli.checkpoint import (
    Container,
    ConvertManifest,
    ExpertRecord,
    FactorRecord,
    Manifest,
    TensorRecord,
    TruncateManifest,
    TruncationRecord,
    hash_tensor,
    open_checkpoint,
    read_header,
)
from kasa_cli.errors import IntegrityError, InvalidInput, UnsafeInput
from kasa_cli.files import MANIFEST, open_regular, read_exactly, sha256_file
from kasa_cli.pipeline.workers import Task, Watcher, run_stage

Form = tuple[str, list[int]]
"""Dtype and shape of a tensor on disk."""
SmallTarget = tuple[tuple[int, ...], str, TruncationRecord]
"""Shape, module and truncation of a weight that adapter and tail target."""
HEADER = " (its header)"


def check_files(output: Path, manifest: Manifest) -> None:
    """Check that the output holds the files of the manifest at their sizes, and no others.

    Raises:
        IntegrityError: a file is missing, extra, resized or not a regular file; all are named.
    """
    expected = manifest.files
    present = {
        path.relative_to(output).as_posix(): path.lstat()
        for path in sorted(output.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }
    present.pop(MANIFEST, None)
    problems = [f"missing {name}" for name in expected if name not in present]
    problems += [f"extra {name}" for name in present if name not in expected]
    for name, state in present.items():
        if name in expected and not _fits(state, expected[name].size):
            problems.append(f"{'resized' if stat.S_ISREG(state.st_mode) else 'not a regular file'} {name}")
    if problems:
        rest = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        remedy = "repeat the run or the download"
        raise IntegrityError(f"{', '.join(problems[:8])}{rest}", str(output), remedy)


def check_hashes(output: Path, manifest: Manifest, num_workers: int, watcher: Watcher) -> int:
    """Hash every byte; returns the number of bytes.

    Raises:
        IntegrityError: naming the altered file and, in a shard of the base, the tensor.
    """
    records = manifest.files
    check = partial(_check_hash, output, manifest)
    task: Task[str, None] = Task(check, name=str, work=lambda name: records[name].size)
    run_stage("hash", task, list(records), num_workers, watcher)
    return sum(record.size for record in records.values())


def check_structure(output: Path, manifest: Manifest) -> None:
    """Check that headers, index and shapes agree with the manifest. No weight is read.

    Raises:
        IntegrityError: a tensor differs; it is named.
    """
    base = manifest.checkpoint(output)
    if base.is_dir():
        _require_equal(_base_forms(base), _recorded(manifest.tensors), str(base))
    if isinstance(manifest, ConvertManifest):
        path = output / manifest.adapter.file
        _require_equal(_small_forms(path), _recorded(manifest.adapter.tensors), str(path))
    if isinstance(manifest, TruncateManifest):
        _check_parts(output, manifest)


def _recorded(tensors: Mapping[str, TensorRecord] | Mapping[str, FactorRecord]) -> dict[str, Form]:
    return {name: (record.dtype, list(record.shape)) for name, record in tensors.items()}


def _check_parts(output: Path, manifest: TruncateManifest) -> None:
    """Check that adapter and tail hold the tensors of the targets."""
    targets = [(manifest.tensors[name].shape, *target) for name, target in manifest.truncations.items()]
    if (output / "adapter").is_dir():
        rank = manifest.options.rank
        _require_small(output / "adapter", _small_tensors(targets, rank, with_diag=True))
    if (output / "tail").is_dir():
        truncated = [target for target in targets if target[2].truncation_rank]
        ranks = [truncation.truncation_rank for *_, truncation in truncated]
        ranks += [record.truncation.truncation_rank for record in manifest.experts.values()]
        rank = max(ranks, default=0)
        stacks = [shapes for entry in expert_entries(manifest).values() for shapes in entry.shapes(rank)]
        experts = {name: (dtype, list(shape)) for name, dtype, shape in stacks}
        _require_small(output / "tail", _small_tensors(truncated, rank, with_diag=False) | experts)


def expert_entries(manifest: TruncateManifest) -> dict[str, FactorEntry]:
    """The tensors in the tail of each parameter of fused experts."""
    stacks: dict[str, list[ExpertRecord]] = {}
    for record in manifest.experts.values():
        stacks.setdefault(record.module, []).append(record)
    return {
        name: stack_entry(name, first.wrapper, len(stack), first.shape, manifest.model_class)
        for name, stack in stacks.items()
        if (first := stack[0]).wrapper is not None
    }


def _fits(state: os.stat_result, size: int) -> bool:
    return stat.S_ISREG(state.st_mode) and state.st_size == size


def _check_hash(output: Path, manifest: Manifest, name: str) -> None:
    """Compare the hash of a file, or the hashes of its header and its tensors."""
    record, path = manifest.files[name], output / name
    if record.header_sha256 is not None:
        altered = _altered_part(path, record.header_sha256, _hashes(manifest.tensors))
    elif sha256_file(path) == record.sha256:
        altered = None
    else:
        altered = _altered_tensor(output, manifest, name)
    if altered is not None:
        raise IntegrityError("altered", f"{path}{altered}")


def _altered_part(path: Path, header_sha256: str, hashes: Mapping[str, str | None]) -> str | None:
    """The altered part of a shard, its header or a tensor; None if none is."""
    try:
        container = read_header(path)
    except (InvalidInput, UnsafeInput):
        return HEADER
    with open_regular(path) as file:
        header = read_exactly(file, path, container.data_start, 0)
    if hashlib.sha256(header).hexdigest() != header_sha256:
        return HEADER
    return _first_altered(container, hashes)


def _altered_tensor(output: Path, manifest: Manifest, name: str) -> str:
    """The altered part of a file, for the message; empty if the manifest has only the hash of the whole file."""
    if not isinstance(manifest, ConvertManifest) or name != manifest.adapter.file:
        return ""
    try:
        container = read_header(output / name)
    except (InvalidInput, UnsafeInput):
        return HEADER
    return _first_altered(container, _hashes(manifest.adapter.tensors)) or HEADER


def _hashes(tensors: Mapping[str, TensorRecord] | Mapping[str, FactorRecord]) -> dict[str, str | None]:
    return {name: record.blake3 for name, record in tensors.items()}


def _first_altered(container: Container, hashes: Mapping[str, str | None]) -> str | None:
    """The first tensor whose hash differs from the one recorded."""
    for tensor in container.tensors:
        if hash_tensor(container, tensor) != hashes.get(tensor):
            return f" (tensor {tensor})"
    return None


def _small_tensors(targets: Sequence[SmallTarget], rank: int, *, with_diag: bool) -> dict[str, Form]:
    """The tensors of an adapter on these targets."""
    expected: dict[str, Form] = {}
    for shape, module, truncation in targets:
        outs, ins = reversed(shape) if truncation.is_transposed else shape
        names = peft.tensor_names(module)
        expected |= {names["A"]: ("F32", [rank, ins]), names["B"]: ("F32", [outs, rank])}
        expected |= {names["diag"]: ("F32", [rank])} if with_diag else {}
    return expected


def _require_small(folder: Path, expected: Mapping[str, Form]) -> None:
    path = folder / peft.WEIGHTS
    _require_equal(_small_forms(path), expected, str(path))


def _small_forms(path: Path) -> dict[str, Form]:
    try:
        return _forms(read_header(path))
    except (InvalidInput, UnsafeInput) as error:
        raise IntegrityError(f"altered ({error})", str(path)) from error


def _base_forms(folder: Path) -> dict[str, Form]:
    try:
        shards = open_checkpoint(folder).shards
    except (InvalidInput, UnsafeInput) as error:
        raise IntegrityError(f"altered ({error})", str(folder)) from error
    return {name: form for shard in shards.values() for name, form in _forms(shard).items()}


def _forms(container: Container) -> dict[str, Form]:
    return {name: (entry.dtype, list(entry.shape)) for name, entry in container.tensors.items()}


def _require_equal(present: Mapping[str, Form], recorded: Mapping[str, Form], where: str) -> None:
    for name in sorted({*present, *recorded}):
        if name not in present:
            raise IntegrityError("missing tensor", f"{where}: {name}")
        if name not in recorded:
            raise IntegrityError("extra tensor", f"{where}: {name}")
        if present[name] != recorded[name]:
            raise IntegrityError(
                f"is {present[name]}, but {recorded[name]} in the manifest", f"{where}: {name}"
            )
