"""The store of facts serves several processes at once, checks what it reads, and can be pruned to a size."""

import errno
import hashlib
import os
import random
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kasa_cli.errors import ResourceError, UnsafeInput, UsageError
from kasa_cli.files import durable
from kasa_cli.files import store as storing
from kasa_cli.files.durable import TEMPORARY
from kasa_cli.files.store import FACTS, STALE_SECONDS, Store, default_root, existing, open_store
from kasa_cli.pipeline import store_contents as verb
from tests.builders.runs import forks

KEY, OTHER_KEY = "0" * 16, "f" * 16
PAYLOAD = b"what is known of a tensor"
DAY = 24 * 3600


def content(number: int) -> str:
    """The hash of some tensor."""
    return hashlib.sha256(str(number).encode()).hexdigest()


A, B = content(0), content(1)


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    return Store(tmp_path / "STORE")


@pytest.fixture
def fact(kept: Store) -> Path:
    """The file of one fact in the store."""
    kept.put(A, "ends-16", KEY, PAYLOAD)
    return only(kept)


def folder(kept: Store, tensor: str) -> Path:
    return kept.root / FACTS / tensor[:2] / tensor


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if not path.is_dir() or path.is_symlink())


def only(kept: Store) -> Path:
    (path,) = files(kept.root)
    return path


def state(root: Path) -> dict[str, tuple[int, bytes]]:
    """Content and modification time of every file, to the nanosecond."""
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes()) for path in files(root)}


def fill(kept: Store, ages: dict[int, float], num_bytes: int = 100) -> None:
    """Put facts of `num_bytes` bytes, each last used the given number of days ago."""
    for number, age in ages.items():
        kept.put(content(number), "values", KEY, bytes([number]) * num_bytes)
        then = time.time() - age * DAY
        for path in files(folder(kept, content(number))):
            os.utime(path, (then, then))


# --- questions and answers ---


def test_an_answer_comes_back_and_only_to_its_own_question(kept: Store) -> None:
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert kept.get(A, "ends-16", KEY) == PAYLOAD
    others = [(B, "ends-16", KEY), (A, "ends-1", KEY), (A, "ends-64", KEY), (A, "ends-16", OTHER_KEY)]
    assert [kept.get(*other) for other in others] == [None] * 4
    assert kept.trouble is None


def test_a_store_that_is_not_there_knows_nothing_and_is_not_made_by_asking(kept: Store) -> None:
    assert kept.get(A, "ends-16", KEY) is None
    assert (kept.entries(), kept.sweep(), kept.any_fact(A, "ends-16")) == ([], 0, None)
    kept.remove(A)
    assert not kept.root.exists()


def test_a_fact_kept_twice_is_one_file(kept: Store) -> None:
    kept.put(A, "ends-16", KEY, PAYLOAD)
    before = only(kept).name
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert only(kept).name == before
    assert before == f"ends-16.{KEY}.{hashlib.sha256(PAYLOAD).hexdigest()}"


@pytest.mark.parametrize("tensor", ["", "..", "../" * 21 + "x", "a" * 63, "A" * 64, f"{'a' * 64}\n"])
def test_what_is_no_hash_is_no_path(kept: Store, tensor: str) -> None:
    with pytest.raises(ValueError, match="not the hash"):
        kept.put(tensor, "ends-16", KEY, PAYLOAD)
    with pytest.raises(ValueError, match="not the hash"):
        kept.get(tensor, "ends-16", KEY)


# --- facts that were altered ---


@pytest.mark.parametrize("position", range(len(PAYLOAD)))
def test_a_fact_with_any_flipped_bit_is_removed_and_can_be_kept_again(
    kept: Store, fact: Path, position: int
) -> None:
    damaged = bytearray(PAYLOAD)
    damaged[position] ^= 1 << position % 8
    fact.write_bytes(damaged)
    assert kept.get(A, "ends-16", KEY) is None
    assert not fact.exists()
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert kept.get(A, "ends-16", KEY) == PAYLOAD


@pytest.mark.parametrize("damage", [b"", PAYLOAD[:-1], PAYLOAD + b"\0", b"\0" * len(PAYLOAD)])
def test_a_fact_that_was_cut_or_grew_is_not_trusted(kept: Store, fact: Path, damage: bytes) -> None:
    fact.write_bytes(damage)
    assert kept.any_fact(A, "ends-16") is None
    assert kept.get(A, "ends-16", KEY) is None


def _socket(path: Path) -> None:
    short = os.open(path.parent, os.O_RDONLY)  # the path of a socket may have about a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{short}/s")
            Path(f"/proc/self/fd/{short}/s").rename(path)
    finally:
        os.close(short)


REPLACED: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "link": lambda path: path.symlink_to(path.parents[4] / "same"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "socket": _socket,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("how", REPLACED)
def test_what_is_no_file_is_never_waited_for_nor_followed_and_is_replaced(
    kept: Store, fact: Path, how: str
) -> None:
    same = fact.parents[4] / "same"
    same.write_bytes(PAYLOAD)
    fact.unlink()
    REPLACED[how](fact)
    assert (kept.get(A, "ends-16", KEY), kept.any_fact(A, "ends-16")) == (None, None)
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert kept.trouble is None
    assert fact.is_file() and not fact.is_symlink()
    assert kept.get(A, "ends-16", KEY) == same.read_bytes() == PAYLOAD


@pytest.mark.parametrize("how", REPLACED)
def test_what_is_no_file_can_be_pruned(kept: Store, fact: Path, how: str) -> None:
    fact.unlink()
    REPLACED[how](fact)
    assert verb.prune(kept.root, everything=True).totals["removed"] == 1
    assert files(kept.root) == []


def test_a_folder_in_place_of_a_fact_stays_where_it_is_and_is_told(kept: Store, fact: Path) -> None:
    fact.unlink()
    fact.mkdir()
    (fact / "mine").write_bytes(b"mine")
    assert kept.get(A, "ends-16", KEY) is None
    assert kept.entries() == []
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert kept.trouble and "directory" in str(kept.trouble)
    kept.put(B, "ends-16", KEY, PAYLOAD)
    other = Store(kept.root)
    other.put(B, "ends-16", KEY, PAYLOAD)
    other.remove(A)
    assert verb.prune(kept.root, everything=True).totals["removed"] == 1
    assert files(kept.root) == [fact / "mine"]


def test_a_fact_that_cannot_be_read_just_now_is_not_thrown_away(
    kept: Store, fact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many_open(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(storing.os, "open", too_many_open)
    assert kept.get(A, "ends-16", KEY) is None
    monkeypatch.undo()
    assert kept.get(A, "ends-16", KEY) == PAYLOAD


def test_a_whole_fact_answers_beside_an_altered_one(kept: Store, fact: Path) -> None:
    """Two names of the same tensor that are put at once are two files."""
    fact.with_name(f"ends-16.{KEY}.{'0' * 64}").write_bytes(b"altered")
    fact.with_name(f"ends-16.{KEY}.{'f' * 64}").write_bytes(b"altered")
    assert kept.any_fact(A, "ends-16") == PAYLOAD
    assert kept.get(A, "ends-16", KEY) == PAYLOAD


# --- untrusted files ---


def test_files_of_others_are_left_alone(kept: Store, fact: Path) -> None:
    strangers = [
        kept.root / "notes.txt",
        kept.root / "facts-2" / "future",
        kept.root / FACTS / "README",
        kept.root / FACTS / A[:2] / "thesis.tex",
        kept.root / FACTS / "ab" / "cd" / f"ends-16.{KEY}.{'0' * 64}",
        kept.root / FACTS / "00" / A / f"ends-16.{KEY}.{'0' * 64}",
        *(
            fact.parent / name
            for name in (f"ends-16.{KEY}.backup", "ends-16", f"ends-16.{KEY}.{'0' * 64}~", ".hidden")
        ),
    ]
    for path in strangers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"years of work")
        os.utime(path, (0, 0))
    assert kept.get(A, "ends-16", KEY) == PAYLOAD
    fact.write_bytes(b"altered")
    assert kept.get(A, "ends-16", KEY) is None
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert [entry.num_bytes for entry in kept.entries()] == [len(PAYLOAD)]
    verb.prune(kept.root, everything=True)
    assert files(kept.root) == sorted(strangers)


# --- time of last use ---


def test_a_fact_that_is_used_becomes_recent_and_one_that_is_looked_at_does_not(kept: Store) -> None:
    fill(kept, {0: 30, 1: 20})
    before = state(kept.root)
    assert [entry.content for entry in kept.entries()] == [B, A]
    assert kept.any_fact(A, "values") is not None
    verb.ls(kept.root)
    verb.prune(kept.root, everything=True, dry_run=True)
    assert state(kept.root) == before
    assert kept.get(A, "values", KEY) is not None
    assert [entry.content for entry in kept.entries()] == [A, B]
    assert time.time() - kept.entries()[0].last_used < 60


def test_a_fact_of_someone_else_is_used_though_its_time_cannot_be_set(
    kept: Store, fact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(storing.os, "utime", refuse)
    assert kept.get(A, "ends-16", KEY) == PAYLOAD


def test_an_entry_adds_up_all_facts_of_a_tensor(kept: Store) -> None:
    kept.put(A, "values", OTHER_KEY, PAYLOAD)
    kept.put(A, "values", KEY, PAYLOAD)
    kept.put(A, "ends-64", KEY, PAYLOAD + PAYLOAD)
    for number, path in enumerate(files(kept.root)):
        os.utime(path, (1000 + number, 1000 + number))
    (entry,) = kept.entries()
    assert (entry.content, entry.questions) == (A, ("ends-64", "values"))
    assert (entry.num_bytes, entry.last_used) == (4 * len(PAYLOAD), 1002)
    assert kept.any_fact(A, "values") == PAYLOAD


# --- prune ---


def test_the_longest_unused_go_until_the_rest_fits_exactly(kept: Store) -> None:
    fill(kept, {number: 10 - number for number in range(5)})
    for max_bytes, left in ((1000, 5), (500, 5), (499, 4), (400, 4), (100, 1), (99, 0)):
        report = verb.prune(kept.root, max_bytes=max_bytes, dry_run=True)
        assert report.totals == {
            "removed": 5 - left,
            "models_removed": 0,
            "bytes_removed": 100 * (5 - left),
            "kept": left,
            "models_kept": 0,
            "bytes_kept": 100 * left,
            "dry_run": True,
        }
        gone = [content(number) for number in range(5 - left)]
        assert sorted(row["content"] for row in report.tensors) == sorted(gone)
    before = files(kept.root)
    verb.prune(kept.root, max_bytes=300)
    assert [entry.content for entry in kept.entries()] == [content(4), content(3), content(2)]
    assert set(before) - set(files(kept.root)) == {
        path for path in before if path.parent.name in (content(0), content(1))
    }
    assert verb.prune(kept.root, max_bytes=300).totals["removed"] == 0


def test_a_large_old_fact_does_not_let_a_small_older_one_stay(kept: Store) -> None:
    fill(kept, {0: 1})
    fill(kept, {1: 2}, num_bytes=1000)
    fill(kept, {2: 3}, num_bytes=10)
    verb.prune(kept.root, max_bytes=200)
    assert [entry.content for entry in kept.entries()] == [content(0)]


def test_what_was_not_used_for_long_goes(kept: Store) -> None:
    fill(kept, {0: 5.1, 1: 4.9, 2: 0})
    assert verb.prune(kept.root, max_days=5, dry_run=True).totals["removed"] == 1
    assert verb.prune(kept.root, max_days=5).totals["bytes_removed"] == 100
    assert [entry.content for entry in kept.entries()] == [content(2), content(1)]


def test_age_and_size_together(kept: Store) -> None:
    fill(kept, {0: 9, 1: 3, 2: 2, 3: 1})
    report = verb.prune(kept.root, max_days=5, max_bytes=200)
    assert (report.totals["removed"], report.totals["bytes_kept"]) == (2, 200)
    assert [entry.content for entry in kept.entries()] == [content(3), content(2)]


def test_prune_must_be_told_what_to_forget(kept: Store, fact: Path) -> None:
    with pytest.raises(UsageError, match="--older-than"):
        verb.prune(kept.root)
    assert only(kept) == fact


def test_emptied_folders_go_and_others_stay(kept: Store) -> None:
    sibling = A[:2] + B[2:]
    for tensor in (A, B, sibling):
        kept.put(tensor, "values", KEY, PAYLOAD)
    kept.remove(A)
    assert not folder(kept, A).exists() and folder(kept, sibling).exists()
    kept.remove(sibling)
    kept.remove(B)
    assert list((kept.root / FACTS).iterdir()) == []


def test_only_what_killed_runs_left_long_ago_is_swept(kept: Store, fact: Path) -> None:
    now = time.time()
    for name, age in (("old", STALE_SECONDS + 60), ("new", STALE_SECONDS - 60)):
        litter = fact.with_name(f".{name}{TEMPORARY}")
        litter.write_bytes(b"half")
        os.utime(litter, (now - age, now - age))
    alone = folder(kept, B)
    alone.mkdir(parents=True)
    (alone / f".old{TEMPORARY}").write_bytes(b"half")
    os.utime(alone / f".old{TEMPORARY}", (0, 0))
    for number, age in ((2, STALE_SECONDS + 60), (3, 0)):  # a new one is about to be filled
        empty = folder(kept, content(number))
        empty.mkdir(parents=True)
        os.utime(empty, (now - age, now - age))
    assert kept.sweep() == 2
    assert files(kept.root) == sorted([fact, fact.with_name(f".new{TEMPORARY}")])
    assert {path.name for path in (kept.root / FACTS).glob("*/*")} == {A, content(3)}


def test_a_run_killed_between_two_folders_leaves_none_for_good(kept: Store, fact: Path) -> None:
    for name in ("00", "ab", "notes"):
        (kept.root / FACTS / name).mkdir()
    for name in ("00", "notes"):
        os.utime(kept.root / FACTS / name, (0, 0))
    kept.sweep()
    assert {path.name for path in (kept.root / FACTS).iterdir()} == {"ab", "notes", A[:2]}


def test_pruning_sweeps_and_leaves_no_empty_folder(kept: Store, fact: Path) -> None:
    litter = fact.with_name(f".old{TEMPORARY}")
    litter.write_bytes(b"half")
    os.utime(litter, (0, 0))
    verb.prune(kept.root, everything=True, dry_run=True)
    assert litter.exists()
    verb.prune(kept.root, everything=True)
    assert list((kept.root / FACTS).iterdir()) == []


def test_what_another_run_renames_while_we_look_is_no_trouble(
    kept: Store, fact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = storing._names
    ghosts = [f".gone{TEMPORARY}", f"ends-16.{KEY}.{'0' * 64}"]
    monkeypatch.setattr(storing, "_names", lambda place: [*names(place), *ghosts * (place == fact.parent)])
    assert kept.sweep() == 0
    assert [entry.num_bytes for entry in kept.entries()] == [len(PAYLOAD)]
    assert kept.get(A, "ends-16", KEY) == PAYLOAD
    kept.remove(A)
    assert files(kept.root) == []


# --- several at once ---


def test_a_folder_pruned_under_a_writer_is_made_again(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    make, pruned = storing.make_folder, []

    def made_and_pruned(path: Path) -> None:
        make(path)
        if len(pruned) < 2:
            shutil.rmtree(kept.root / FACTS)
            pruned.append(path)

    monkeypatch.setattr(storing, "make_folder", made_and_pruned)
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert (kept.trouble, len(pruned)) == (None, 2)
    assert kept.get(A, "ends-16", KEY) == PAYLOAD


def test_threads_keep_read_and_prune_at_once(kept: Store) -> None:
    wrong: list[object] = []

    def work(number: int) -> None:
        tensor, payload = content(number % 5), b"%d" % (number % 5) * 1000
        kept.put(tensor, "values", KEY, payload)
        found = kept.get(tensor, "values", KEY)
        if found not in (None, payload):
            wrong.append(found)
        if number % 7 == 0:
            kept.remove(tensor)
            kept.sweep()
            kept.entries()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    assert (wrong, kept.trouble) == ([], None)
    assert not list(kept.root.rglob(f"*{TEMPORARY}"))


def _hammer(root: str, seed: int, rounds: int) -> None:
    """A process that puts, reads and prunes facts; its exit code names the failure."""
    kept, dice = Store(Path(root)), random.Random(seed)
    for _ in range(rounds):
        number = dice.randrange(3)
        payload = b"%d" % number * 5000
        kept.put(content(number), "values", KEY, payload)
        if kept.get(content(number), "values", KEY) not in (None, payload):
            os._exit(2)
        if dice.random() < 0.3:
            verb.prune(kept.root, max_bytes=dice.choice([0, 6000]))
    os._exit(3 if kept.trouble else 0)


def test_processes_keep_read_and_prune_at_once_and_a_kill_leaves_whole_facts(kept: Store) -> None:
    workers = [forks.Process(target=_hammer, args=(str(kept.root), seed, 60)) for seed in range(3)]
    doomed = [forks.Process(target=_hammer, args=(str(kept.root), 9 + seed, 100_000)) for seed in range(3)]
    for process in (*workers, *doomed):
        process.start()
    for process in doomed:
        process.join(0.4)
        process.kill()
    for process in (*workers, *doomed):
        process.join(60)
    assert [process.exitcode for process in workers] == [0, 0, 0]
    facts = [path for path in files(kept.root) if not path.name.endswith(TEMPORARY)]
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name.split(".")[2] for path in facts)
    for litter in (path for path in kept.root.rglob("*") if path.is_dir() or path.name.endswith(TEMPORARY)):
        os.utime(litter, (0, 0))  # files and folders of a killed run are removed once they are old
    verb.prune(kept.root, everything=True)
    for folder in (path for path in kept.root.rglob("*") if path.is_dir() and path.name != FACTS):
        os.utime(folder, (0, 0))  # emptied a moment ago
    verb.prune(kept.root, everything=True)
    assert list((kept.root / FACTS).iterdir()) == []


# --- disks that fail ---


@pytest.mark.parametrize("call", ["pwrite", "fsync", "mkdir"])
def test_a_disk_that_takes_nothing_costs_nothing_and_is_asked_once(
    kept: Store, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    calls = []

    def full(*arguments: object, **options: object) -> None:
        calls.append(arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, call, full)
    kept.put(A, "ends-16", KEY, PAYLOAD)
    num_calls = len(calls)
    kept.put(B, "ends-16", KEY, PAYLOAD)
    assert len(calls) == num_calls >= 1
    assert isinstance(kept.trouble, ResourceError) and "No space left" in str(kept.trouble)
    monkeypatch.undo()
    assert kept.get(A, "ends-16", KEY) is None
    assert files(kept.root) == []


def test_a_file_where_the_store_should_be_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        kept = Store(root)
        assert (kept.get(A, "ends-16", KEY), kept.entries()) == (None, [])
        kept.put(A, "ends-16", KEY, PAYLOAD)
        assert kept.trouble and "Not a directory" in str(kept.trouble)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_facts_of_a_store_that_cannot_be_written_to_are_read(
    kept: Store, fact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("mkdir", "unlink", "utime"):
        monkeypatch.setattr(storing.os, name, read_only)
    shared = Store(kept.root)
    assert shared.get(A, "ends-16", KEY) == PAYLOAD
    shared.put(B, "ends-16", KEY, PAYLOAD)
    assert "Read-only" in str(shared.trouble)
    with pytest.raises(ResourceError, match="Read-only"):
        shared.remove(A)


# --- which folder ---


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("KASA_STORE", str(tmp_path / "own"))
    assert default_root() == tmp_path / "own"
    for empty in (lambda: monkeypatch.setenv("KASA_STORE", ""), lambda: monkeypatch.delenv("KASA_STORE")):
        empty()
        assert default_root() == tmp_path / "xdg" / "kasa"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_root() == tmp_path / ".cache" / "kasa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_root() == tmp_path / ".cache" / "kasa"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of a container for whom the system has a number and no name."""
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("KASA_STORE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_has_a_store_that_knows_nothing(tmp_path: Path) -> None:
    kept = open_store(None)
    assert kept.get(A, "ends-16", KEY) is None
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert kept.trouble and "KASA_STORE" in str(kept.trouble)
    with pytest.raises(ResourceError, match="KASA_STORE"):
        verb.ls()
    named = open_store(tmp_path / "named")
    named.put(A, "ends-16", KEY, PAYLOAD)
    assert named.trouble is None


def test_the_default_store_is_made_when_it_has_something_to_keep(store: Path) -> None:
    store.rmdir()
    kept = open_store(None)
    assert not store.exists()
    kept.put(A, "ends-16", KEY, PAYLOAD)
    assert Store(store).get(A, "ends-16", KEY) == PAYLOAD


def test_a_named_store_must_be_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for place in (tmp_path / "file", tmp_path / "link-to-file"):
        if place.name.startswith("link"):
            place.symlink_to(tmp_path / "file")
        for how in (open_store, existing, verb.ls):
            with pytest.raises(UnsafeInput, match="not a folder"):
                how(place)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "file" / "below", tmp_path / "dangling"):
        with pytest.raises(ResourceError):
            open_store(place)
    monkeypatch.setattr(storing.os, "access", lambda *_: False)
    with pytest.raises(ResourceError, match="--no-store"):
        open_store(tmp_path)


def test_a_link_to_a_folder_is_a_store(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    open_store(tmp_path / "link").put(A, "ends-16", KEY, PAYLOAD)
    assert Store(tmp_path / "real").get(A, "ends-16", KEY) == PAYLOAD
    assert len(verb.ls(tmp_path / "link").tensors) == 1


# --- tables ---


def test_a_tensor_whose_facts_cannot_be_read_is_listed_without_a_name(kept: Store) -> None:
    kept.put(A, "values", KEY, PAYLOAD)
    kept.put(B, "extremes", KEY, (2).to_bytes(8, "little") + b"{}")
    rows = verb.ls(kept.root).tensors
    assert [(row["name"], row["dtype"], row["shape"]) for row in rows] == [("?", "?", [0, 0])] * 2
    assert {row["content"]: (row["facts"], row["bytes"]) for row in rows} == {
        A: (["values"], len(PAYLOAD)),
        B: (["extremes"], 10),
    }
