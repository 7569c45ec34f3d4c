"""Resolves a model to a folder on this disk: a directory as it is, or a Hub id at one pinned commit.

The branch is asked once, so a model that moves during a download is never a mixture of two. What only other
formats need, pickles among it, is not downloaded. A snapshot that kasa had to complete is hashed against the Hub
before anything reads it; one that was complete already is checked by size.
"""

import errno
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kasa_cli.checkpoint.folder import LEFT_DIRECTORIES, LEFT_FILES, foreign_weights
from kasa_cli.errors import (
    IntegrityError,
    InvalidInput,
    KasaError,
    NetworkError,
    ResourceError,
    UsageError,
)
from kasa_cli.files import quote

if TYPE_CHECKING:
    from huggingface_hub import ResolvedRevision
    from huggingface_hub.hf_api import RepoFile

NOT_DOWNLOADED = [
    *(
        pattern for pattern in LEFT_FILES if pattern != "kasa.manifest.json"
    ),  # says whether a base is truncated
    *(f"{pattern}/*" for pattern in LEFT_DIRECTORIES),
]


@dataclass(frozen=True)
class Source:
    """The folder of a model; for a Hub model also its id, the pinned commit and the cache whose links are trusted."""

    root: Path
    repo: str | None
    commit: str | None
    hub_cache: Path | None


@dataclass(frozen=True)
class Wanted:
    """A repository of the Hub: id, revision and cache."""

    repo: str
    revision: str | None
    cache_dir: Path
    local_files_only: bool


def resolve(
    model: str, *, revision: str | None = None, cache_dir: Path | None = None, local_files_only: bool = False
) -> Source:
    """The folder of a model. A directory wins over a Hub id of the same name, and has no revision.

    Nothing of the network is touched for a directory, with `local_files_only`, or with `HF_HUB_OFFLINE=1`.
    """
    if is_directory(model):
        if revision is not None:
            raise UsageError("a directory has no revision", model, "leave out --revision, or name a Hub id")
        return Source(Path(model), None, None, None)
    require_repo_id(model)
    from huggingface_hub import constants

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    offline = local_files_only or constants.is_offline_mode()
    return from_hub(Wanted(model, revision, cache, offline))


def is_directory(model: str) -> bool:
    """Whether the user named a directory. A file or a dangling link is an error."""
    path = Path(model)
    try:
        if model and path.is_dir():
            return True
        is_local = bool(model) and (path.exists() or path.is_symlink())
    except PermissionError as error:
        raise ResourceError("no permission to look", model) from error
    except (OSError, ValueError):  # longer than any name, or with a NUL: nothing is called that
        return False
    if is_local:
        raise InvalidInput("not a directory", model, "name the folder that holds the weights")
    return False


def require_repo_id(model: str) -> None:
    """Refuse what cannot be a Hub id, before any request is made."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        problem = f"no such directory, and not a Hub id: {quote(model)}"
        raise UsageError(problem, remedy="give a folder, or an id such as org/name") from error


def from_hub(request: Wanted) -> Source:
    """The snapshot of a repository at one commit, complete and as the Hub has it."""
    try:
        with quiet_off_terminal():
            return pinned(request)
    except hub_errors() as error:
        raise explained(error, request) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """What a download can raise. ValueError: a proxy or an answer that is garbage. RuntimeError: hf-xet's own."""
    import httpx2
    from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError, XetDownloadError

    transport = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError)
    return (*transport, EntryNotFoundError, RevisionResolutionError, XetDownloadError)


def quiet_off_terminal() -> AbstractContextManager[object]:
    """Progress bars only where somebody watches, unless the user's environment decides."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        return nullcontext()
    return disable_progress_bars()


def pinned(request: Wanted) -> Source:
    """Resolve the commit once, then download every file of that commit."""
    from huggingface_hub import HfApi

    commit = HfApi().resolve_revision(
        request.repo,
        revision=request.revision,
        cache_dir=request.cache_dir,
        local_files_only=request.local_files_only,
    )
    root = cached_snapshot(request, commit)
    if root is None:
        root = snapshot(request, commit, local_files_only=False)
        require_hub_bytes(request, commit, root)
    listing = cached_listing(request, commit)
    require_hub_sizes(root, listing)
    require_readable_weights(request, [file.path for file in listing])
    return Source(root, request.repo, commit.resolved, request.cache_dir)


def cached_snapshot(request: Wanted, commit: "ResolvedRevision") -> Path | None:
    """The snapshot in the cache, or None where it has to be completed first.

    Without the Hub's listing nobody can tell a complete snapshot; offline, what is there has to do.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        root = snapshot(request, commit, local_files_only=True)
    except LocalEntryNotFoundError:
        if request.local_files_only:
            raise
        return None
    return root if request.local_files_only or cached_listing(request, commit) else None


def snapshot(request: Wanted, commit: "ResolvedRevision", *, local_files_only: bool) -> Path:
    """The library's own download, without what kasa does not read."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            request.repo,
            revision=commit,
            cache_dir=request.cache_dir,
            ignore_patterns=NOT_DOWNLOADED,
            local_files_only=local_files_only,
        )
    )


def cached_listing(request: Wanted, commit: "ResolvedRevision") -> list["RepoFile"]:
    """The files of the commit by the Hub; empty if the cache has no list of them."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return get_cached_repo_tree(request.repo, revision=commit, cache_dir=request.cache_dir)
    except CachedRepoTreeNotFoundError:
        return []


def require_hub_bytes(request: Wanted, commit: "ResolvedRevision", root: Path) -> None:
    """Hash what was downloaded: the library compares sizes only. A wrong file leaves the cache."""
    from huggingface_hub import HfApi

    checked = HfApi().verify_repo_checksums(
        request.repo, revision=commit.resolved, cache_dir=request.cache_dir
    )
    for mismatch in checked.mismatches:
        forget(root / mismatch["path"])
    if checked.mismatches:
        names = ", ".join(sorted(mismatch["path"] for mismatch in checked.mismatches))
        raise IntegrityError(
            f"downloaded bytes differ from the Hub's: {names}", request.repo, "run the command again"
        )


def require_hub_sizes(root: Path, listing: list["RepoFile"]) -> None:
    """Compare the sizes of cached files with the Hub's: catches a cache that was cut short."""
    for file in listing:
        path = root / file.path
        if path.is_file() and path.stat().st_size != file.size:
            have = path.stat().st_size
            forget(path)
            raise IntegrityError(
                f"cached file has {have} bytes, the Hub's {file.size}", file.path, "run again"
            )


def forget(path: Path) -> None:
    """Take a damaged file, and the blob its link leads to, out of the cache."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def require_readable_weights(request: Wanted, names: list[str]) -> None:
    """Refuse a repository that holds weights in other formats only: they are not downloaded."""
    if any(name.endswith(".safetensors") for name in names):
        return
    refusal = foreign_weights((name for name in names if "/" not in name), request.repo)
    if refusal:
        raise refusal


def explained(error: Exception, request: Wanted) -> KasaError:
    """An error of the Hub, the network or the disk as one of kasa's."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return ResourceError(f"cannot write the Hub cache ({error.strerror})", str(request.cache_dir))
    for kind, problem, remedy in known_errors(request):
        if isinstance(error, kind):
            return NetworkError(problem, request.repo, remedy)
    status = getattr(getattr(error, "response", None), "status_code", None)
    first_line = next(iter(str(error).splitlines()), "")[:200]
    cause = (
        f"the Hub answered {status}"
        if status
        else f"cannot reach the Hub ({type(error).__name__} {first_line})"
    )
    return NetworkError(cause, request.repo, "--local-files-only uses what is cached")


def known_errors(request: Wanted) -> list[tuple[type[Exception], str, str]]:
    """Kinds of error with their meaning and remedy: the first match counts."""
    from huggingface_hub import errors

    revision = quote(request.revision or "main")
    absent = (
        "not completely in the cache, and offline" if request.local_files_only else "cannot be downloaded now"
    )
    return [
        (
            errors.GatedRepoError,
            "a gated model",
            "ask for access on its page, then log in with `hf auth login`",
        ),
        (
            errors.RepositoryNotFoundError,
            "no such directory, and no such model on the Hub",
            "private? log in",
        ),
        (errors.RevisionNotFoundError, f"no revision {revision}", "see the branches and tags on its page"),
        (errors.DisabledRepoError, "the Hub has disabled this model", ""),
        (
            errors.RevisionResolutionError,
            f"revision {revision} is not cached, and the Hub is out of reach",
            "connect",
        ),
        (errors.OfflineModeIsEnabled, "offline, and not in the cache", "unset HF_HUB_OFFLINE to download"),
        (errors.LocalEntryNotFoundError, absent, "run once with a connection"),
    ]
