"""Where a base comes from: is it the one an adapter was made for, truncated or not, and what was merged into it?

Manifests and hashes answer, never names. What they do not answer is not guessed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa_cli.adapters import peft
from kasa_cli.checkpoint import manifest
from kasa_cli.checkpoint.hashing import hash_tensor
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.errors import IntegrityError, InvalidInput
from kasa_cli.files.durable import sha256_file
from kasa_cli.files.staging import MANIFEST

ORIGINAL, TRUNCATED = "original", "truncated"
BASES = ("auto", ORIGINAL, TRUNCATED)
MAKERS = ("truncate", "convert")
"""Commands that make adapters, and know for which base."""
REMEDY = "say --base-is original or --base-is truncated"


@dataclass(frozen=True)
class Origin:
    """What is known of a base: its hashes as they were asked for, and the manifest that wrote it, if any."""

    checkpoint: Checkpoint
    manifest: Mapping[str, Any] | None

    def digest(self, name: str) -> str:
        """The hash of a tensor of the base."""
        return hash_tensor(self.checkpoint.shards[self.checkpoint.shard_of(name)], name)


def origin(checkpoint: Checkpoint) -> Origin:
    """A base with the manifest in it, or beside it where it is the `base` of an output."""
    return Origin(checkpoint, _manifest_of(checkpoint.root, "base"))


def adapter_manifest(path: Path) -> Mapping[str, Any] | None:
    """The manifest of the output that an adapter is part of."""
    folder = path if path.is_dir() else path.parent
    return _manifest_of(folder, "adapter", "tail")


def base_is(asked: str, base: Origin, made_by: Mapping[str, Any] | None, names: Iterable[str]) -> str:
    """Whether the tensors that a KaSA adapter is about are truncated already.

    Raises:
        IntegrityError: nothing says it, or the base is neither of the two that the adapter's manifest knows.
    """
    if asked != "auto":
        return asked
    targets = list(names)
    for known in (base.manifest, made_by):
        if known and known.get("command") == "truncate":
            fitting = [_states(known["tensors"].get(name, {}), base.digest(name)) for name in targets]
            common = {TRUNCATED, ORIGINAL}.intersection(*fitting)
            if common:
                return TRUNCATED if TRUNCATED in common else ORIGINAL
            raise IntegrityError(
                "the base is not the one that its adapter was made for", str(base.checkpoint.root), REMEDY
            )
    if (
        base.manifest
        and base.manifest.get("command") == "merge"
        and base.manifest.get("base_is") == TRUNCATED
    ):
        return TRUNCATED
    raise IntegrityError(
        "nothing says whether the base of a KaSA adapter is truncated already",
        str(base.checkpoint.root),
        REMEDY,
    )


def require_fit(base: Origin, made_by: Mapping[str, Any] | None, names: Iterable[str], adapter: Path) -> None:
    """Refuse a base that an adapter with a manifest was not made for.

    Raises:
        IntegrityError: naming the first tensor that is another.
    """
    if not made_by or made_by.get("command") not in MAKERS:
        return
    for name in names:
        known = made_by["tensors"].get(name, {})
        if known.get("input_blake3") and not _states(known, base.digest(name)):
            what = f"not the base that {adapter.name} was made for"
            raise IntegrityError(what, name, "take that one, or insist with --force-base")


def digest(path: Path, weights: Path) -> str:
    """One hash of an adapter's files: the same adapter is the same wherever it lies."""
    config = path / peft.CONFIG if path.is_dir() else None
    hashes = [sha256_file(file) for file in (weights, config) if file is not None]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def merged_before(base: Origin) -> set[str]:
    """The hashes of the adapters that are in a base already, merged into it or into what it was made from."""
    if not base.manifest or base.manifest.get("command") != "merge":
        return set()
    known = {str(one.get("sha256")) for one in base.manifest.get("adapters", []) if isinstance(one, dict)}
    return known | {str(one) for one in base.manifest.get("merged_before", [])}


def _states(known: Mapping[str, Any], digest: str) -> set[str]:
    """Which of a manifest's tensors this is: both, where rounding brought a whole cut back."""
    hashes = {ORIGINAL: known.get("input_blake3")}
    if known.get("role") == "truncated":
        hashes[TRUNCATED] = known.get("blake3")
    return {state for state, known_digest in hashes.items() if known_digest == digest}


def _manifest_of(folder: Path, *parts: str) -> Mapping[str, Any] | None:
    """The manifest in a folder, or above it where the folder is one of these parts of an output."""
    for place in (folder, folder.parent if folder.name in parts else folder):
        if (place / MANIFEST).is_file():
            try:
                return manifest.load(place)
            except InvalidInput as error:
                raise IntegrityError(
                    "a manifest that this kasa cannot read", str(place / MANIFEST)
                ) from error
    return None
