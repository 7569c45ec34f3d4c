"""Size and hash of every file of an output, for the manifest."""

from collections.abc import Mapping
from pathlib import Path

from kasa_cli.checkpoint import FileRecord
from kasa_cli.files import sha256_file
from kasa_cli.pipeline.workers import run


def file_records(
    folder: Path, num_workers: int, headers: Mapping[str, str] | None = None
) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file below a folder, by relative POSIX path.

    `headers` holds the hash of the header of each file of a base. The other bytes of such a file are tensors, each
    with a hash of its own, so the file is not read again.
    """
    headers = headers or {}

    def record(path: Path) -> tuple[str, FileRecord]:
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        if name in headers:
            return name, FileRecord(size, header_sha256=headers[name])
        return name, FileRecord(size, sha256_file(path))

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return dict(run(record, paths, num_workers, lambda _: None))
