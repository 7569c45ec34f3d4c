"""`kasa verify`: compares an output with its manifest and with its base. It never writes."""

from pathlib import Path

from kasa_cli.checkpoint import TruncateManifest, manifest
from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.pipeline.opening import ModelLocation, find
from kasa_cli.pipeline.verifying import integrity, recompute
from kasa_cli.pipeline.workers import Silent, Watcher, blas_threads, num_cores
from kasa_cli.report import Compared, VerifyReport

__all__ = ["ModelLocation", "verify"]


def verify(
    output: Path,
    *,
    read_data: bool = False,
    against: ModelLocation | None = None,
    workers: int = 0,
    watcher: Watcher | None = None,
) -> VerifyReport:
    """Check files, headers, index and shapes; with `read_data` every byte; with `against` every number.

    Raises:
        IntegrityError: naming everything that is missing, extra or altered.
    """
    if not output.is_dir():
        raise InvalidInput("no such directory", str(output))
    watcher, num_workers = watcher or Silent(), workers or num_cores()
    record = manifest.load(output)
    if against and not isinstance(record, TruncateManifest):
        raise UsageError("--against recomputes truncations only", str(output), "use --read-data")
    integrity.check_files(output, record)
    num_bytes = integrity.check_hashes(output, record, num_workers, watcher) if read_data else 0
    integrity.check_structure(output, record)
    compared: list[Compared] = []
    if against and isinstance(record, TruncateManifest):
        with blas_threads(record.environment.threads_per_worker):
            _, base = find(against)
            compared = recompute.compare(output, record, base, num_workers, watcher)
    return VerifyReport(
        command="verify",
        output=str(output),
        depth=("manifest", "files", "structure", *["data"] * read_data, *["base"] * bool(against)),
        files=len(record.files) + 1,
        tensors=len(record.tensors),
        bytes_hashed=num_bytes,
        compared=tuple(compared),
    )
