"""The origin of a base: whether an adapter was made for it, whether it is truncated, and which adapters it contains.

Manifests and hashes answer these questions, never names. Nothing is guessed.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kasa_cli.adapters import peft
from kasa_cli.checkpoint import (
    Checkpoint,
    ConvertManifest,
    Manifest,
    MergeManifest,
    TruncateManifest,
    hash_tensor,
    manifest,
)
from kasa_cli.errors import IntegrityError, InvalidInput
from kasa_cli.files import MANIFEST, sha256_file

ORIGINAL, TRUNCATED = manifest.ORIGINAL, manifest.TRUNCATED
BASES = ("auto", ORIGINAL, TRUNCATED)
REMEDY = "give --base-is original or --base-is truncated"


@dataclass(frozen=True)
class Origin:
    """A base and the manifest of the output that it is part of, if any."""

    checkpoint: Checkpoint
    manifest: Manifest | None

    def digest(self, name: str) -> str:
        """The hash of a tensor of the base."""
        return hash_tensor(self.checkpoint, name)


def origin(checkpoint: Checkpoint) -> Origin:
    """A base with the manifest in its folder, or in the folder above if it is the `base` of an output."""
    return Origin(checkpoint, _manifest_of(checkpoint.root, "base"))


def adapter_manifest(path: Path) -> Manifest | None:
    """The manifest of the output that an adapter is part of."""
    folder = path if path.is_dir() else path.parent
    return _manifest_of(folder, "adapter", "tail")


def base_is(requested: str, base: Origin, made_by: Manifest | None, names: Iterable[str]) -> str:
    """Whether the targets of a KaSA adapter are truncated in the base.

    Raises:
        IntegrityError: no manifest records it, or the base is neither of the two in the adapter's manifest.
    """
    if requested != "auto":
        return requested
    targets = list(names)
    for known in (base.manifest, made_by):
        if isinstance(known, TruncateManifest):
            fitting = [known.states(name, base.digest(name)) for name in targets]
            common = {TRUNCATED, ORIGINAL}.intersection(*fitting)
            if common:
                return TRUNCATED if TRUNCATED in common else ORIGINAL
            raise IntegrityError("the adapter was made for another base", str(base.checkpoint.root), REMEDY)
    if isinstance(base.manifest, MergeManifest) and base.manifest.base_is == TRUNCATED:
        return TRUNCATED
    raise IntegrityError(
        "no manifest records whether the base of this KaSA adapter is truncated",
        str(base.checkpoint.root),
        REMEDY,
    )


def require_fit(base: Origin, made_by: Manifest | None, names: Iterable[str], adapter: Path) -> None:
    """Refuse a base that differs from the one that the manifest of an adapter names.

    Raises:
        IntegrityError: a tensor differs; it is named.
    """
    if not isinstance(made_by, TruncateManifest | ConvertManifest):
        return
    for name in names:
        record = made_by.tensors.get(name)
        if record and record.input_blake3 and not record.states(base.digest(name)):
            problem = f"not the base that {adapter.name} was made for"
            raise IntegrityError(problem, name, "give that base, or use --force-base")


def digest(path: Path, weights: Path) -> str:
    """One hash of an adapter's files: equal adapters have equal hashes wherever they are stored."""
    config = path / peft.CONFIG if path.is_dir() else None
    hashes = [sha256_file(file) for file in (weights, config) if file is not None]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def merged_before(base: Origin) -> set[str]:
    """Hashes of the adapters that the base contains, merged into it or into its source."""
    return base.manifest.all_merged if isinstance(base.manifest, MergeManifest) else set()


def _manifest_of(folder: Path, *parts: str) -> Manifest | None:
    """The manifest in a folder, or above it if the folder is one of these parts of an output."""
    for place in (folder, folder.parent if folder.name in parts else folder):
        if (place / MANIFEST).is_file():
            try:
                return manifest.load(place)
            except InvalidInput as error:
                raise IntegrityError(
                    "this version of kasa cannot read the manifest", str(place / MANIFEST)
                ) from error
    return None
