"""`kasa.manifest.json`: what was done, and the hash of every byte of it. No time, host or local path."""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import safetensors
import scipy
import torch

from kasa_cli import __version__
from kasa_cli.errors import IntegrityError, InvalidInput
from kasa_cli.files.durable import canonical_json
from kasa_cli.files.staging import MANIFEST
from kasa_cli.files.untrusted import parse_json, read_small

SCHEMA = 2
SECTIONS = ("environment", "files", "options", "source", "tensors")
MAX_MANIFEST = 1_000_000_000


def numeric_environment(threads_per_worker: int, device: str) -> dict[str, Any]:
    """Everything beside input and options that the bytes of a decomposition depend on."""
    return {
        "blas": "mkl" if torch._C.has_mkl else "other",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "kasa": __version__,
        "machine": platform.machine(),
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "scipy": scipy.__version__,
        "threads_per_worker": threads_per_worker,
        "torch": torch.__version__,
    }


def seal(content: Mapping[str, Any]) -> bytes:
    """The canonical JSON of a manifest, with a digest over the rest of itself."""
    digest = hashlib.sha256(canonical_json(dict(content))).hexdigest()
    return canonical_json({**content, "digest": digest})


def load(output: Path) -> dict[str, Any]:
    """The manifest of an output, itself unaltered.

    Raises:
        InvalidInput: it is of a later kasa, or of one before the first release.
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
        what = f"schema {content.get('schema')} is not known to this kasa"
        raise InvalidInput(what, str(path), "use the version of kasa that made it, or make it again")
    if not all(isinstance(content.get(section), dict) for section in SECTIONS):
        raise IntegrityError("altered: a section is missing", str(path))
    return content


def _is_sealed(content: Mapping[str, Any], raw: bytes) -> bool:
    try:
        return seal({key: value for key, value in content.items() if key != "digest"}) == raw
    except ValueError:  # an infinity, which kasa never writes
        return False


def fingerprint(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """One hash of the originals of the tensors operated on: what a base must be to fit an adapter."""
    lines = [
        [name, one["dtype"], list(one["shape"]), one["input_blake3"]]
        for name, one in sorted(tensors.items())
        if "input_blake3" in one
    ]
    return hashlib.sha256(json.dumps(lines, separators=(",", ":")).encode()).hexdigest()
