"""Kill a small run, or let the disk fail it, at its system calls: the output is absent, old or complete.

The loop is SQLite's: fail at the n-th operation, for every n, and check one invariant each time. Set
KASA_ALL_CRASH_POINTS=1 to visit all the points and not a sample, and to kill the run after next as well.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from kasa_cli.errors import ExitCode, OutputExists
from tests.builders.runs import ROOT

PROGRAM = """
import sys
from pathlib import Path
from kasa_cli.files.durable import (
    canonical_json, copy_file, make_folder, new_file, pwrite_all, sha256_file, write_file
)
from kasa_cli.files.staging import Staging
from kasa_cli.errors import KasaError

PARTS = {"one": b"1" * 300, "two": b"2" * 500}

def finished(staging, key):
    if staging.part(key) is None:
        staging.keep_part(key, PARTS[key])
    return staging.part(key)

def build(output, overwrite=False):
    with Staging(output, fingerprint={"job": 1}, overwrite=overwrite) as staging:
        one, two = (finished(staging, key) for key in PARTS)
        copied = copy_file(one, staging.out / "model-1.safetensors")
        with new_file(staging.out / "model-2.safetensors", 500) as file:
            pwrite_all(file, memoryview(two.read_bytes()), 0)
        make_folder(staging.out / "adapter")
        write_file(staging.out / "adapter" / "config.json", [b"{", b"}"])
        manifest = {"one": copied, "two": sha256_file(staging.out / "model-2.safetensors")}
        write_file(staging.out / "kasa.manifest.json", [canonical_json(manifest)])
        staging.publish()

if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), "overwrite" in sys.argv)
    except KasaError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""
CHANGES = (
    "openat,write,pwrite64,fallocate,ftruncate,copy_file_range,fsync,"
    "rename,renameat,unlink,unlinkat,mkdir,rmdir"
)
STRACE = ["strace", "-f"]
FAST = "--seccomp-bpf"  # stops only at the calls of interest; but a signal is not injected in this mode
OLD = {"kasa.manifest.json": b"old", "model.safetensors": b"old weights"}
ALL = bool(os.environ.get("KASA_ALL_CRASH_POINTS"))
BUDGET = 10_000 if ALL else 12

namespace: dict[str, object] = {"__name__": "program"}
exec(PROGRAM, namespace)
build = namespace["build"]


@cache
def why_not_traced():
    if not shutil.which("strace"):
        return "strace is not installed"
    done = subprocess.run([*STRACE, FAST, "-e", "trace=fsync", "true"], capture_output=True, text=True)
    return f"strace may not trace: {done.stderr.strip()[:200]}" if done.returncode else ""


@pytest.fixture
def output(tmp_path):
    if why_not_traced():
        pytest.skip(why_not_traced())
    return tmp_path / "work" / "OUT"


def traced(output, *options, overwrite=False):
    environment = os.environ | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", PROGRAM, str(output), *(["overwrite"] if overwrite else [])]
    return subprocess.run(
        [*STRACE, *options, *command], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def fault(call, number, what):
    speed = [] if "signal" in what else [FAST]
    return [*speed, "-e", f"trace={call}", "-e", f"inject={call}:{what}:when={number}"]


def lay_out(output, overwrite):
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir()
    if overwrite:
        output.mkdir()
        for name, content in OLD.items():
            (output / name).write_bytes(content)


def calls(output, overwrite=False):
    """The system calls of an undisturbed run that concern the output: name, number and line of each."""
    lay_out(output, overwrite)
    log = output.parent.parent / "strace.log"
    options = (FAST, "-y", "-s", "300", "-o", str(log), "-e", f"trace={CHANGES}")
    done = traced(output, *options, overwrite=overwrite)
    assert done.returncode == 0, done.stderr
    seen = Counter()
    found = []
    for line in log.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if call:
            seen[call[1]] += 1
            if str(output.parent) in line:
                found.append((call[1], seen[call[1]], line))
    return found


def tree(folder):
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture
def complete(tmp_path):
    build(tmp_path / "undisturbed")
    return tree(tmp_path / "undisturbed")


def sample(points):
    """All renames, at which the state changes, and some of the other calls."""
    others = [point for point in points if point[0] != "rename"]
    step = max(1, len(others) // BUDGET)
    return [point for point in points if point[0] == "rename"] + others[step // 2 :: step]


def finish_undisturbed(output, overwrite):
    """Run once more without a fault; the run is refused if the output was already published."""
    try:
        build(output, overwrite)
    except OutputExists:
        assert not overwrite


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_a_run_killed_at_any_call_is_finished_by_the_next_with_the_same_bytes(output, complete, overwrite):
    allowed = [complete, OLD if overwrite else {}]
    for name, number, line in sample(calls(output, overwrite)):
        lay_out(output, overwrite)
        killed = traced(output, *fault(name, number, "signal=KILL"), overwrite=overwrite)
        assert killed.returncode in (-9, 137), f"not killed at {line}"
        # An output that is replaced is absent only between two renames, and then the old one is beside it.
        if ALL:
            traced(output, *fault(name, number, "signal=KILL"), overwrite=overwrite)
        there = output if output.exists() else output.with_name("OUT.kasa-old")
        assert tree(there) in allowed, line
        finish_undisturbed(output, overwrite)
        assert tree(output) == complete, line
        assert [path.name for path in output.parent.iterdir()] == ["OUT"], line


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_at_any_call_is_reported_and_the_run_can_be_repeated(
    output, complete, overwrite, error
):
    allowed = [complete, OLD if overwrite else {}]
    for name, number, line in sample(calls(output, overwrite)):
        lay_out(output, overwrite)
        failed = traced(output, *fault(name, number, f"error={error}"), overwrite=overwrite)
        assert "INJECTED" in failed.stderr, line
        assert failed.returncode in (ExitCode.DONE, ExitCode.RESOURCE), f"{line}\n{failed.stderr}"
        assert tree(output) in allowed, line
        assert failed.returncode or tree(output) == complete, line
        finish_undisturbed(output, overwrite)
        assert tree(output) == complete, line
        assert [path.name for path in output.parent.iterdir()] == ["OUT"], line


def index_of(found, name, *words):
    return next(
        i for i, (call, _, line) in enumerate(found) if call == name and all(w in line for w in words)
    )


@pytest.mark.parametrize(
    "path",
    ["parts/one.", "job.json", "out/model-1.safetensors", "out/model-2.safetensors", "out/kasa.manifest"],
)
def test_a_file_is_synced_before_it_is_named_and_its_folder_after(output, path):
    found = calls(output)
    named = index_of(found, "rename", ".kasa-tmp", f"OUT.kasa-partial/{path}")
    temporary = re.search(r'"([^"]*\.kasa-tmp)"', found[named][2])[1]
    created = index_of(found, "openat", temporary, "O_EXCL")
    synced = index_of(found, "fsync", temporary)
    writes = [i for i, (call, _, line) in enumerate(found) if temporary in line and call != "unlink"][1:-2]
    assert created < min(writes) <= max(writes) < synced < named
    assert (found[named + 1][0], found[named + 2][0]) == ("openat", "fsync")
    assert f"<{Path(temporary).parent}>" in found[named + 2][2]


def test_every_file_of_the_tree_is_synced_before_the_tree_is_published(output, complete):
    found = calls(output)
    published = index_of(found, "rename", 'OUT.kasa-partial/out"', f'{output}"')
    synced = [line for call, _, line in found[:published] if call == "fsync"]
    for path in ["", "/adapter", *(f"/{name}" for name in complete)]:
        assert any(f"OUT.kasa-partial/out{path}>" in line for line in synced), path


def test_the_old_output_is_removed_only_when_the_new_one_is_safe(output):
    found = calls(output, overwrite=True)
    aside = index_of(found, "rename", f'{output}"', "OUT.kasa-old")
    published = index_of(found, "rename", 'OUT.kasa-partial/out"', f'{output}"')
    safe = published + index_of(found[published:], "fsync", f"<{output.parent}>")
    removed = index_of(found, "openat", "OUT.kasa-old")
    assert aside < published < safe < removed
