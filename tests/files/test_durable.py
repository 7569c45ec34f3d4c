"""Files are whole or absent, whatever the disk, the writer or the umask does."""

import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from kasa_cli.errors import ExitCode, IntegrityError, InvalidInput, ResourceError
from kasa_cli.files import durable
from tests.builders.folders import names
from tests.builders.runs import ROOT

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()


def write(path):
    return durable.write_file(path, [DATA[:100], memoryview(DATA)[100:]], size=len(DATA))


def write_unsized(path):
    return durable.write_file(path, iter([DATA]))


def fill(path):
    with durable.new_file(path, len(DATA)) as file:
        durable.pwrite_all(file, memoryview(DATA), 0)
    return DIGEST


def copy(path):
    source = path.with_name("source")
    if not source.exists():
        source.write_bytes(DATA)
    digest = durable.copy_file(source, path)
    source.unlink()
    return digest


WRITERS = pytest.mark.parametrize("writer", [write, write_unsized, fill, copy])


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def unprivileged():
    """Become the user `nobody` if this is root, in a folder that `nobody` can reach."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        os.seteuid(65534 if user == 0 else user)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


@WRITERS
def test_the_file_holds_the_bytes_and_nothing_is_left_beside_it(tmp_path, writer):
    assert writer(tmp_path / "file") == DIGEST
    assert (tmp_path / "file").read_bytes() == DATA
    assert names(tmp_path) == ["file"]


@WRITERS
def test_a_file_that_was_there_is_replaced(tmp_path, writer):
    (tmp_path / "file").write_bytes(b"old" * 9999)
    writer(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


@WRITERS
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, writer, mask, mode):
    with umask(mask):
        writer(tmp_path / "file")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


@WRITERS
def test_an_empty_file_is_a_file(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DATA", b"")
    writer(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b""


@WRITERS
def test_a_file_over_the_limit_on_sizes_is_a_resource_error_and_leaves_nothing(tmp_path, writer):
    (tmp_path / "source").write_bytes(DATA)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) // 2, hard))
    try:
        with pytest.raises(ResourceError, match=r"File too large: .*file: raise the limit"):
            writer(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["source"]


@WRITERS
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_failing_disk_is_named_with_its_cause_and_no_file_appears(
    tmp_path, monkeypatch, writer, call, code
):
    (tmp_path / "source").write_bytes(DATA)

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    if call == "posix_fallocate" and writer is write_unsized:
        pytest.skip("no size, no reservation")
    if call == "pwrite" and writer is copy:
        monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ResourceError) as caught:
        writer(tmp_path / "file")
    assert os.strerror(code) in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert durable.TEMPORARY not in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == ["source"]


@WRITERS
def test_a_folder_that_cannot_be_synced_has_lost_the_file(tmp_path, monkeypatch, writer):
    sync = os.fsync

    def fail_on_folders(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EIO, "injected")
        sync(file)

    monkeypatch.setattr(os, "fsync", fail_on_folders)
    with pytest.raises(ResourceError):
        writer(tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_filesystem_without_sync_of_folders_is_no_failure(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse_folders(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "injected")
        sync(file)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert write(tmp_path / "file") == DIGEST


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS, errno.EINVAL])
def test_a_filesystem_without_the_fast_calls_gets_the_same_bytes(tmp_path, monkeypatch, code):
    def refuse(*arguments):
        raise OSError(code, "injected")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert copy(tmp_path / "file") == DIGEST
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("agreed", [0, 1, 100, 7000])
def test_a_copy_that_the_kernel_leaves_unfinished_is_finished(tmp_path, monkeypatch, agreed):
    clone = os.copy_file_range
    answers = iter([agreed, 0] * 100)
    monkeypatch.setattr(durable, "CHUNK", 8000)
    monkeypatch.setattr(
        os, "copy_file_range", lambda s, t, n, *at: clone(s, t, k, *at) if (k := min(n, next(answers))) else 0
    )
    assert copy(tmp_path / "file") == DIGEST
    assert (tmp_path / "file").read_bytes() == DATA


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:1000], offset))
    assert write(tmp_path / "file") == DIGEST
    assert (tmp_path / "file").read_bytes() == DATA


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
def test_a_size_other_than_promised_is_an_integrity_error_and_leaves_nothing(tmp_path, size):
    with pytest.raises(IntegrityError, match=f"{len(DATA)} bytes written, {size} expected"):
        durable.write_file(tmp_path / "file", [DATA], size=size)
    with pytest.raises(IntegrityError), durable.new_file(tmp_path / "file", 10) as file:
        os.pwrite(file, b"far out", 100)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, IntegrityError("no")])
def test_a_writer_that_stops_midway_leaves_nothing_and_its_error_passes(tmp_path, error):
    def chunks():
        yield DATA
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        durable.write_file(tmp_path / "file", chunks())
    with pytest.raises(ValueError, match="mine"), durable.new_file(tmp_path / "file", 10):
        raise ValueError("mine")
    assert names(tmp_path) == []


def test_threads_fill_one_file_in_any_order(tmp_path):
    with durable.new_file(tmp_path / "file", len(DATA)) as file, ThreadPoolExecutor(4) as pool:
        ranges = [slice(start, start + 97) for start in reversed(range(0, len(DATA), 97))]
        list(pool.map(lambda r: durable.pwrite_all(file, memoryview(DATA)[r], r.start), ranges))
    assert durable.sha256_file(tmp_path / "file") == DIGEST


def test_a_source_that_shrinks_is_an_integrity_error_that_names_it(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(DATA)
    reserve = os.posix_fallocate

    def shrink(*arguments):
        os.truncate(source, 10)
        reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", shrink)
    with pytest.raises(IntegrityError, match=r"became shorter.*source"):
        durable.copy_file(source, tmp_path / "file")
    assert names(tmp_path) == ["source"]


def test_a_source_that_cannot_be_read_is_the_one_that_is_named(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(DATA)

    def fail(*arguments):
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, "copy_file_range", lambda *arguments: 0)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ResourceError, match=r"Input/output error: .*source"):
        durable.copy_file(tmp_path / "source", tmp_path / "file")


def test_a_pipe_is_refused_at_once_and_a_link_to_a_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "blob").write_bytes(DATA)
    (tmp_path / "link").symlink_to("blob")
    for read in (durable.sha256_file, lambda path: durable.copy_file(path, tmp_path / "copy")):
        with pytest.raises(InvalidInput, match="not a regular file"):
            read(tmp_path / "pipe")
        assert read(tmp_path / "link") == DIGEST
    assert not (tmp_path / "copy").is_symlink()


def test_a_folder_without_permission_is_a_resource_error():
    with unprivileged() as folder:
        write(folder / "file")
        folder.joinpath("closed").mkdir(mode=0o555)
        with pytest.raises(
            ResourceError, match=r"Permission denied: .*file: check the permissions"
        ) as caught:
            write(folder / "closed" / "file")
        assert caught.value.exit_code == ExitCode.RESOURCE
        with pytest.raises(ResourceError, match="Permission denied"):
            durable.make_folder(folder / "closed" / "deeper" / "still")


def test_folders_are_made_with_their_parents_and_may_exist(tmp_path):
    for _ in range(2):
        durable.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_equal_values_are_equal_json_and_what_json_lacks_is_refused():
    assert durable.canonical_json({"b": [1, 2.5], "a": None}) == durable.canonical_json(
        {"a": None, "b": [1, 2.5]}
    )
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            durable.canonical_json({"x": value})


@pytest.mark.parametrize("module", ["durable", "staging", "lock"])
def test_torch_is_not_needed(module):
    code = f"import sys, kasa_cli.files.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
