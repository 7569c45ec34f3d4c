"""VERIFY: is an output what its manifest says? Files, hashes, and the shapes in every header."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kasa_cli.adapters import peft
from kasa_cli.adapters.fused_experts import stack_entry
from kasa_cli.adapters.writing import Entry
from kasa_cli.checkpoint.hashing import hash_tensor
from kasa_cli.checkpoint.layout import open_checkpoint
from kasa_cli.checkpoint.safetensors_file import Container, read_header
from kasa_cli.errors import IntegrityError, InvalidInput, UnsafeInput
from kasa_cli.files.durable import sha256_file
from kasa_cli.files.staging import MANIFEST
from kasa_cli.files.untrusted import open_regular, read_exactly
from kasa_cli.pipeline.workers import Task, Watcher, run_stage

Manifest = Mapping[str, Any]
Form = tuple[str, list[int]]
"""Dtype and shape of a tensor on disk."""
HEADER = " (its header)"


def check_files(output: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there with its size, and no other.

    Raises:
        IntegrityError: naming every missing, extra, resized or replaced file.
    """
    expected = manifest["files"]
    found = {
        path.relative_to(output).as_posix(): path.lstat()
        for path in sorted(output.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }
    found.pop(MANIFEST, None)
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"extra {name}" for name in found if name not in expected]
    for name, state in found.items():
        if name in expected and not _fits(state, expected[name]["size"]):
            problems.append(f"{'resized' if stat.S_ISREG(state.st_mode) else 'not a regular file'} {name}")
    if problems:
        rest = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        remedy = "make it again, or fetch it again"
        raise IntegrityError(f"{', '.join(problems[:8])}{rest}", str(output), remedy)


def check_hashes(output: Path, manifest: Manifest, num_workers: int, watcher: Watcher) -> int:
    """Hash every byte; the number of bytes hashed.

    Raises:
        IntegrityError: naming the file, and in a shard of the base the tensor.
    """
    records = manifest["files"]
    task = Task(partial(_check_hash, output, manifest), name=str, work=lambda name: records[name]["size"])
    run_stage("hash", task, list(records), num_workers, watcher)
    return sum(record["size"] for record in records.values())


def check_structure(output: Path, manifest: Manifest) -> None:
    """Headers, index and shapes are what the manifest says, without reading a weight.

    Raises:
        IntegrityError: naming the first tensor that is not.
    """
    tensors, base = manifest["tensors"], base_of(output, manifest)
    if base.is_dir():
        recorded = {name: (one["dtype"], one["shape"]) for name, one in tensors.items()}
        _require_equal(_base_forms(base), recorded, str(base))
    targets = [one for one in tensors.values() if "module" in one]
    if manifest["command"] == "convert":
        _check_converted(output / manifest["adapter"]["file"], manifest["adapter"]["tensors"])
    if (output / "adapter").is_dir():
        rank = manifest["options"]["rank"]
        _check_small(output / "adapter", targets, rank, with_diag=True)
    if (output / "tail").is_dir():
        cut = [one for one in targets if one["truncation_rank"]]
        stacks = expert_entries(manifest)
        ranks = [one["truncation_rank"] for one in (*cut, *manifest.get("experts", {}).values())]
        _check_small(
            output / "tail", cut, max(ranks, default=0), with_diag=False, stacks=tuple(stacks.values())
        )


def expert_entries(manifest: Manifest) -> dict[str, Entry]:
    """The tensors in the tail of each parameter of fused experts."""
    experts = [one for one in manifest.get("experts", {}).values() if one["wrapper"] is not None]
    counts = Counter(one["module"] for one in experts)
    first = {one["module"]: one for one in experts}
    return {
        name: stack_entry(name, one["wrapper"], counts[name], tuple(one["shape"]), manifest["model_class"])
        for name, one in first.items()
    }


def base_of(output: Path, manifest: Manifest) -> Path:
    """Where the checkpoint of an output is: a merged model is the output itself."""
    return output if manifest["command"] == "merge" else output / "base"


def _fits(state: os.stat_result, size: int) -> bool:
    return stat.S_ISREG(state.st_mode) and state.st_size == size


def _check_hash(output: Path, manifest: Manifest, name: str) -> None:
    """A file by its hash, or by that of its header and those of its tensors."""
    record, path = manifest["files"][name], output / name
    if "header_sha256" in record:
        altered = _altered_part(path, record["header_sha256"], manifest["tensors"])
    elif sha256_file(path) == record["sha256"]:
        altered = None
    else:
        altered = _altered_tensor(output, manifest, name)
    if altered is not None:
        raise IntegrityError("altered", f"{path}{altered}")


def _altered_part(path: Path, header_sha256: str, tensors: Mapping[str, Any]) -> str | None:
    """What is not as recorded in a shard, whose bytes are those of header and tensors; None if all is."""
    try:
        container = read_header(path)
    except (InvalidInput, UnsafeInput):
        return HEADER
    with open_regular(path) as file:
        header = read_exactly(file, path, container.data_start, 0)
    if hashlib.sha256(header).hexdigest() != header_sha256:
        return HEADER
    return _first_other(container, tensors)


def _altered_tensor(output: Path, manifest: Manifest, name: str) -> str:
    """Where a file is altered, for the message, if more than that is known of it."""
    if manifest["command"] != "convert" or name != manifest["adapter"]["file"]:
        return ""
    try:
        container = read_header(output / name)
    except (InvalidInput, UnsafeInput):
        return HEADER
    return _first_other(container, manifest["adapter"]["tensors"]) or HEADER


def _first_other(container: Container, tensors: Mapping[str, Any]) -> str | None:
    """The first tensor whose bytes are not those recorded."""
    for tensor in container.tensors:
        if hash_tensor(container, tensor) != tensors.get(tensor, {}).get("blake3"):
            return f" (tensor {tensor})"
    return None


def _check_converted(path: Path, tensors: Mapping[str, Any]) -> None:
    """The header of a converted adapter is the one that was written."""
    recorded = {name: (one["dtype"], one["shape"]) for name, one in tensors.items()}
    _require_equal(_small_forms(path), recorded, str(path))


def _check_small(
    folder: Path, targets: list[dict[str, Any]], rank: int, *, with_diag: bool, stacks: Sequence[Entry] = ()
) -> None:
    """The small tensors are those of the targets, and fit the weights they belong to."""
    expected: dict[str, Form] = {}
    for one in targets:
        outs, ins = reversed(one["shape"]) if one["is_transposed"] else one["shape"]
        names = peft.tensor_names(one["module"])
        expected |= {names["A"]: ("F32", [rank, ins]), names["B"]: ("F32", [outs, rank])}
        expected |= {names["diag"]: ("F32", [rank])} if with_diag else {}
    for stack in stacks:
        expected |= {name: (dtype, list(shape)) for name, dtype, shape in stack.shapes(rank)}
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
            raise IntegrityError(f"is {present[name]}, was {recorded[name]}", f"{where}: {name}")
