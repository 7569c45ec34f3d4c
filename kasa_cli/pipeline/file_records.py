"""Size and hash of every file of an output, for the manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kasa_cli.files.durable import sha256_file
from kasa_cli.pipeline.workers import run


def file_records(
    folder: Path, num_workers: int, headers: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder, by relative POSIX path.

    Of a file in `headers` it is that of its header, which is here already: the other bytes are those of tensors, each
    of which has a hash of its own.
    """
    headers = headers or {}
    files = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    others = [name for name in files if name not in headers]
    whole = dict(
        zip(
            others,
            run(lambda name: sha256_file(files[name]), others, num_workers, lambda _: None),
            strict=True,
        )
    )
    return {
        name: {
            "size": path.stat().st_size,
            **({"header_sha256": headers[name]} if name in headers else {"sha256": whole[name]}),
        }
        for name, path in files.items()
    }
