"""From the argument to a folder: directories, Hub ids, and every way the Hub can fail."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kasa_cli.checkpoint.source import Source, resolve
from kasa_cli.errors import InvalidInput, UsageError
from tests.builders.faults import tiny_model
from tests.builders.hub import COMMIT, FakeHub
from tests.builders.runs import ROOT

CANARY = "hf_CANARYcanaryCANARYcanaryCANARY"

CHILD = """
import json, sys
from pathlib import Path
from kasa_cli.checkpoint.source import resolve
from kasa_cli.errors import KasaError
model, options = sys.argv[1], json.loads(sys.argv[2])
try:
    source = resolve(model, **options)
    from kasa_cli.checkpoint.layout import open_checkpoint  # and with it torch
    tensors = len(open_checkpoint(source.root, hub_cache=source.hub_cache).tensors)
    files = sorted(p.relative_to(source.root).as_posix() for p in source.root.rglob("*") if p.is_file())
    print(json.dumps({"commit": source.commit, "repo": source.repo, "tensors": tensors, "files": files}))
except KasaError as error:
    print(f"kasa: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def ask(
    hub: FakeHub,
    home: Path,
    model: str = "someone/tiny",
    env: dict[str, str] | None = None,
    **options: object,
):
    """Resolve a model in a new process; its output must not hold the token."""
    environment = hub.environment(home, HF_TOKEN=CANARY, PYTHONPATH=str(ROOT), **(env or {}))
    command = [sys.executable, "-W", "error::UserWarning", "-c", CHILD, model, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert CANARY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def answer(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path / "served"
    tiny_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
    with FakeHub(folder).serving() as hub:
        yield hub


def test_a_directory_is_taken_as_it_is(tmp_path):
    assert resolve(str(tmp_path)) == Source(tmp_path, None, None, None)


def test_a_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").repo is None


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_exists_but_is_no_directory_is_invalid(tmp_path, kind):
    path = tmp_path / "model"
    path.write_text("") if kind == "file" else path.symlink_to("nowhere")
    with pytest.raises(InvalidInput, match="not a directory"):
        resolve(str(path))


@pytest.mark.parametrize(
    "model",
    [
        "",
        "../../x",
        "a/b/c",
        "/no/such/folder",
        "org/na\x1b[2Jme",
        "-x",
        "x" * 300,
        "x" * 5000,
        "оrg/name",
        "a\0b",
    ],
)
def test_what_is_neither_directory_nor_hub_id_is_a_usage_error(model, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative path of two levels must not lead to an existing folder
    with pytest.raises(UsageError, match="no such directory, and not a Hub id") as caught:
        resolve(model)
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


def test_a_hub_model_is_pinned_and_its_second_use_downloads_nothing(hub, tmp_path):
    found = answer(ask(hub, tmp_path / "home"))
    assert (found["commit"], found["repo"], found["tensors"] > 0) == (COMMIT, "someone/tiny", True)
    assert {"config.json", "model.safetensors.index.json"} <= set(found["files"])
    assert not {"pytorch_model.bin", "onnx/model.onnx"} & set(found["files"])
    assert not any("pytorch_model" in path or "onnx" in path for path in hub.paths("GET") + hub.paths("HEAD"))
    hub.requests.clear()
    assert answer(ask(hub, tmp_path / "home")) == found
    assert hub.paths("GET") == ["/api/models/someone/tiny"]


def test_quiet_when_stderr_is_no_terminal(hub, tmp_path):
    assert ask(hub, tmp_path / "home").stderr == ""


def test_a_branch_that_moves_during_the_download_changes_nothing(hub, tmp_path):
    ask(hub, tmp_path / "home", revision="main")
    used = [path.split("/resolve/")[1].split("/")[0] for path in hub.paths("GET") if "/resolve/" in path]
    assert set(used) == {COMMIT}


def test_an_explicit_cache_directory_is_used_and_its_links_are_trusted(hub, tmp_path):
    cache = tmp_path / "elsewhere"
    assert answer(ask(hub, tmp_path / "home", env={}, cache_dir=str(cache)))["commit"] == COMMIT
    assert (cache / "models--someone--tiny").is_dir()


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_works_from_a_warm_cache_and_asks_nobody(hub, tmp_path, how):
    found = answer(ask(hub, tmp_path / "home"))
    hub.requests.clear()
    options = {"local_files_only": True} if how == "flag" else {}
    env = {"HF_HUB_OFFLINE": "1"} if how == "variable" else {}
    assert answer(ask(hub, tmp_path / "home", env=env, **options)) == found
    assert hub.requests == []


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_with_a_cold_cache_fails_fast(hub, tmp_path, how):
    options = {"local_files_only": True} if how == "flag" else {}
    env = {"HF_HUB_OFFLINE": "1"} if how == "variable" else {}
    start = time.monotonic()
    done = ask(hub, tmp_path / "home", env=env, **options)
    assert done.returncode == 10 and "not cached" in done.stderr
    assert hub.requests == []
    assert time.monotonic() - start < 5


UNREACHABLE = {
    "unknown repository": ({"model": "someone/else"}, {}, "no such model"),
    "unknown revision": ({"revision": "v9"}, {}, "no revision 'v9'"),
    "nobody listens": ({"env": {"HF_ENDPOINT": "http://127.0.0.1:9"}}, {}, "out of reach"),
    "proxy garbage": ({"env": {"http_proxy": "gar bage://x", "no_proxy": ""}}, {}, "reach"),
    "gated": ({}, {"gated": True}, "gated"),
    "down": ({}, {"down": True}, "out of reach"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_every_refusal_of_the_hub_is_one_line_and_exit_10(hub, tmp_path, case):
    call, faults, word = UNREACHABLE[case]
    for name, value in faults.items():
        setattr(hub, name, value)
    done = ask(hub, tmp_path / "home", **call)
    assert done.returncode == 10, done.stderr
    assert word in done.stderr and done.stderr.count("\n") == 1


def first_shard(hub: FakeHub) -> str:
    return min(name for name in hub.files() if name.endswith(".safetensors"))


def cached_files(home: Path) -> list[str]:
    return [path.name for path in home.rglob("*") if path.is_file() and "snapshots" in path.parts]


def test_a_connection_dropped_once_is_taken_up_again(hub, tmp_path):
    hub.drops = {first_shard(hub): 1}
    assert answer(ask(hub, tmp_path / "home"))["commit"] == COMMIT


def test_a_connection_that_always_drops_leaves_no_half_file(hub, tmp_path):
    hub.refuses = frozenset({first_shard(hub)})
    done = ask(hub, tmp_path / "home")
    assert done.returncode == 10 and "kasa: " in done.stderr.splitlines()[-1]
    assert first_shard(hub) not in cached_files(tmp_path / "home")
    assert not list((tmp_path / "home").rglob("*.incomplete"))


def test_wrong_bytes_of_the_right_size_are_found_and_forgotten(hub, tmp_path):
    name = first_shard(hub)
    content = hub.files()[name]
    hub.swapped = {name: content[:-1] + bytes([content[-1] ^ 1])}
    done = ask(hub, tmp_path / "home")
    assert done.returncode == 5 and name in done.stderr
    hub.swapped = {}
    assert answer(ask(hub, tmp_path / "home"))["commit"] == COMMIT


def test_a_file_cut_short_in_the_cache_is_found(hub, tmp_path):
    ask(hub, tmp_path / "home")
    [path] = [p for p in (tmp_path / "home").rglob(first_shard(hub)) if "snapshots" in p.parts]
    os.truncate(path.resolve(), 100)
    assert ask(hub, tmp_path / "home").returncode == 5
    assert answer(ask(hub, tmp_path / "home"))["commit"] == COMMIT


def test_a_snapshot_another_program_left_incomplete_is_completed(hub, tmp_path):
    child = "from huggingface_hub import hf_hub_download as d; d('someone/tiny', 'config.json')"
    subprocess.run([sys.executable, "-c", child], env=hub.environment(tmp_path / "home"), check=True)
    assert answer(ask(hub, tmp_path / "home"))["tensors"] > 0


def test_a_repository_of_pickles_is_refused_without_downloading_one(hub, tmp_path):
    for path in hub.folder.glob("*.safetensors*"):
        path.unlink()
    done = ask(hub, tmp_path / "home")
    assert done.returncode == 4 and "only pickle weights" in done.stderr
    assert not any("pytorch_model" in path for path in hub.paths("GET"))


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path):
    ask(hub, tmp_path / "home")
    assert {token for _, _, token in hub.requests} == {f"Bearer {CANARY}"}
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert kept and not [path for path in kept if CANARY.encode() in path.read_bytes()]


def test_a_directory_has_no_revision(tmp_path):
    with pytest.raises(UsageError, match="has no revision"):
        resolve(str(tmp_path), revision="main")
