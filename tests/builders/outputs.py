"""Outputs that a command publishes."""

from pathlib import Path
from typing import Any

from kasa_cli.files.durable import write_file
from kasa_cli.files.staging import MANIFEST, Staging

JOB: dict[str, Any] = {"rank": 8, "inputs": {"a": "00"}, "seed": None}


def build(output: Path, content: bytes = b"{}", **options: Any) -> None:
    with Staging(output, fingerprint=JOB, **options) as staging:
        write_file(staging.out / MANIFEST, [content])
        write_file(staging.out / "model.safetensors", [b"weights"])
        staging.publish()
