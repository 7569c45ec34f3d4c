"""`kasa.manifest.json`: what a command did, with a hash of every byte it wrote. No time, host or local path."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import safetensors
import scipy
import torch

from kasa_cli import __version__
from kasa_cli.errors import IntegrityError, InvalidInput
from kasa_cli.files import (
    INLINE,
    MANIFEST,
    OPTIONAL,
    Malformed,
    canonical_json,
    from_json,
    parse_json,
    read_small,
    to_json,
)
from kasa_cli.linalg import Outcome
from kasa_cli.report import ConvertedRow, SpectralFacts

SCHEMA = 2
SECTIONS = ("environment", "files", "options", "source", "tensors")
MAX_MANIFEST = 1_000_000_000
ORIGINAL, TRUNCATED, MERGED = "original", "truncated", "merged"
"""The states of a tensor that a manifest knows by their hashes."""


@dataclass(frozen=True)
class Environment:
    """Everything besides input and options that the bytes of a decomposition depend on."""

    blas: str
    cpu_capability: str
    device: str
    kasa: str
    machine: str
    numpy: str
    safetensors: str
    scipy: str
    threads_per_worker: int
    torch: str


@dataclass(frozen=True)
class SourceRecord:
    """Hub id and commit of the model that a command read; None for a local directory."""

    commit: str | None
    repo: str | None


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file. A file of a base has a hash of its header; its tensors have hashes of their own."""

    size: int
    sha256: str | None = field(default=None, metadata=OPTIONAL)
    header_sha256: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class StoredTensor:
    """Where a written tensor is, its hash, and the tensor of the source that it copies under another name."""

    file: str
    blake3: str
    made_from: str | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class InputTensor:
    """Hash of a tensor before the change; None where no manifest knows it."""

    input_blake3: str | None


@dataclass(frozen=True)
class TruncationRecord:
    """How many singular components of a tensor are dropped, and its spectral facts."""

    truncation_rank: int
    is_transposed: bool
    facts: SpectralFacts = field(metadata=INLINE)


@dataclass(frozen=True)
class Merged:
    """Checks on a merged tensor as stored.

    `max_abs_change` covers the rows that the tensor has before and after: a vocabulary may be resized. `input_blake3`
    is the hash of the tensor of the base.
    """

    max_abs_change: float
    rounding_error: float
    input_blake3: str


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: its `role` (copied, truncated, merged, reference), and what was done to it.

    A reference is a tensor that an adapter needs and that the output does not hold. `module` is that of a target.
    """

    role: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    stored: StoredTensor | None = field(default=None, metadata=INLINE)
    before: InputTensor | None = field(default=None, metadata=INLINE)
    module: str | None = field(default=None, metadata=OPTIONAL)
    truncation: TruncationRecord | None = field(default=None, metadata=INLINE)
    truncated: Outcome | None = field(default=None, metadata=INLINE)
    merged: Merged | None = field(default=None, metadata=INLINE)

    @property
    def blake3(self) -> str | None:
        """Hash of the tensor in the output."""
        return self.stored.blake3 if self.stored else None

    @property
    def input_blake3(self) -> str | None:
        """Hash of the tensor before the change."""
        return self.before.input_blake3 if self.before else None

    def states(self, digest: str) -> frozenset[str]:
        """The states of this tensor that have this hash: several where a change left the bytes as they were."""
        hashes = {ORIGINAL: self.input_blake3}
        if self.role in (TRUNCATED, MERGED):
            hashes[self.role] = self.blake3
        return frozenset(state for state, known in hashes.items() if known == digest)


@dataclass(frozen=True)
class ExpertRecord:
    """One truncated matrix of a fused expert. `wrapper` is the name of its parameter in the tail.

    `pieces` are the tensors on disk that hold it, each with the index of the matrix in it, if it is a stack.
    """

    expert: int
    dtype: str
    shape: tuple[int, int]
    pieces: tuple[tuple[str, int | None], ...]
    wrapper: str | None
    module: str
    input_blake3: str
    truncation: TruncationRecord = field(metadata=INLINE)
    truncated: Outcome | None = field(default=None, metadata=INLINE)


@dataclass(frozen=True)
class TruncateOptions:
    """The options of `truncate` that bytes depend on."""

    alpha: float
    beta: float
    compat: str
    diag_init: str
    dtype: str
    emit: tuple[str, ...]
    gamma: float
    max_shard_size: str | None
    rank: int
    rounding: str
    seed: int
    truncation_rank: int
    use_rslora: bool


@dataclass(frozen=True)
class MergeOptions:
    """The options of `merge` that bytes depend on."""

    dtype: str
    max_shard_size: str | None
    rounding: str
    untie: bool


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `convert` that bytes depend on."""

    to: str
    names: str
    rank: int | None
    energy: float | None
    pad_rank: bool
    on: str | None


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that is part of a merged model. `sha256` is over its files; see `provenance.digest`."""

    kind: str
    weight: float
    sha256: str
    tensors_consumed: int
    tensors_total: int


@dataclass(frozen=True)
class FactorRecord:
    """A tensor of a converted adapter."""

    dtype: str
    shape: tuple[int, ...]
    blake3: str


@dataclass(frozen=True)
class ConvertedAdapter:
    """The adapter that was converted, and the file that holds the result."""

    kind: str
    sha256: str
    file: str = ""
    tensors: Mapping[str, FactorRecord] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of an output, and what is known of any: its files and tensors. One subclass for each command."""

    command: str
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)

    def states(self, name: str, digest: str) -> frozenset[str]:
        """The states of a tensor that have this hash; none for another tensor, or an unknown one."""
        record = self.tensors.get(name)
        return record.states(digest) if record else frozenset()

    def checkpoint(self, output: Path) -> Path:
        """The folder of the checkpoint in an output."""
        return output / "base"

    def content(self) -> dict[str, Any]:
        """The manifest as JSON data, without its digest."""
        return {"schema": SCHEMA, **to_json(self)}

    def sealed(self) -> bytes:
        """The bytes of the file."""
        return seal(self.content())


@dataclass(frozen=True, kw_only=True)
class TruncateManifest(Manifest):
    """Written by `truncate`. `left_out` holds reasons by file of the source."""

    command: str = "truncate"
    base_fingerprint: str
    environment: Environment
    left_out: Mapping[str, str]
    model_class: str | None
    options: TruncateOptions
    source: SourceRecord
    experts: Mapping[str, ExpertRecord] = field(default_factory=dict, metadata=OPTIONAL)

    @property
    def truncations(self) -> dict[str, tuple[str, TruncationRecord]]:
        """The modules that are targets and their truncations, by tensor."""
        return {
            name: (record.module, record.truncation)
            for name, record in self.tensors.items()
            if record.module is not None and record.truncation
        }


@dataclass(frozen=True, kw_only=True)
class MergeManifest(Manifest):
    """Written by `merge`. `base_is` says whether a KaSA adapter's base was truncated; None without one.

    `merged_before` are the hashes of adapters that the base already contained.
    """

    command: str = "merge"
    adapters: tuple[MergedAdapter, ...]
    base_is: str | None
    environment: Environment
    left_out: Mapping[str, str] = field(default_factory=dict)
    merged_before: tuple[str, ...]
    model_class: str | None
    options: MergeOptions
    source: SourceRecord

    @property
    def all_merged(self) -> set[str]:
        """The hashes of all adapters in the model."""
        return {adapter.sha256 for adapter in self.adapters}.union(self.merged_before)

    def checkpoint(self, output: Path) -> Path:
        """The output itself is the merged model."""
        return output


@dataclass(frozen=True, kw_only=True)
class ConvertManifest(Manifest):
    """Written by `convert`. `tail_sha256` is the hash of the file that the truncated components come from."""

    command: str = "convert"
    adapter: ConvertedAdapter
    base_fingerprint: str = ""
    base_is: str | None
    environment: Environment
    model_class: str | None
    options: ConvertOptions
    source: SourceRecord
    tail_sha256: str | None
    weights: tuple[ConvertedRow, ...] = ()


KINDS: dict[str, type[Manifest]] = {
    "truncate": TruncateManifest,
    "merge": MergeManifest,
    "convert": ConvertManifest,
}
"""The commands that write outputs with a manifest."""


def numeric_environment(threads_per_worker: int, device: str) -> Environment:
    """The environment of this process."""
    return Environment(
        blas="mkl" if torch._C.has_mkl else "other",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        device=device,
        kasa=__version__,
        machine=platform.machine(),
        numpy=numpy.__version__,
        safetensors=safetensors.__version__,
        scipy=scipy.__version__,
        threads_per_worker=threads_per_worker,
        torch=torch.__version__,
    )


def seal(content: Mapping[str, Any]) -> bytes:
    """The canonical JSON of a manifest, with a digest over all other fields."""
    digest = hashlib.sha256(canonical_json(dict(content))).hexdigest()
    return canonical_json({**content, "digest": digest})


def load(output: Path) -> Manifest:
    """The manifest of an output, unaltered; of a command that this kasa does not know, only files and tensors.

    Raises:
        InvalidInput: it was written by a later kasa, or by one before the first release.
        IntegrityError: there is none, or it is not as it was written.
    """
    path = output / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise IntegrityError(f"no {MANIFEST}", str(output), "this is no complete output of kasa")
    try:
        raw = read_small(path, MAX_MANIFEST)
        content = parse_json(raw, path)
    except InvalidInput as error:
        raise IntegrityError("altered: no longer JSON", str(path)) from error
    if not isinstance(content, dict) or "digest" not in content:
        raise IntegrityError("altered: no digest in it", str(path))
    if not _is_sealed(content, raw):
        raise IntegrityError("altered: its digest does not fit", str(path))
    if content.get("schema") != SCHEMA:
        problem = f"schema {content.get('schema')} is not known to this kasa"
        raise InvalidInput(problem, str(path), "use the version of kasa that made it, or make it again")
    if not all(isinstance(content.get(section), dict) for section in SECTIONS):
        raise IntegrityError("altered: a section is missing", str(path))
    try:
        return from_json(KINDS.get(str(content.get("command")), Manifest), content)
    except Malformed as error:
        raise IntegrityError(f"altered: {error}", str(path)) from error


def _is_sealed(content: Mapping[str, Any], raw: bytes) -> bool:
    try:
        return seal({key: value for key, value in content.items() if key != "digest"}) == raw
    except ValueError:  # an infinity, which kasa never writes
        return False


def fingerprint(tensors: Mapping[str, TensorRecord]) -> str:
    """One hash of the originals of the targets: a base must have it to fit the adapter."""
    lines = [
        [name, record.dtype, list(record.shape), record.before.input_blake3]
        for name, record in sorted(tensors.items())
        if record.before
    ]
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()
