"""An output is built beside its final name, is continued after a stop, and appears complete."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kasa_cli.errors import IntegrityError, OutputExists, ResourceError, UnsafeInput, UsageError
from kasa_cli.files.durable import TEMPORARY, write_file
from kasa_cli.files.staging import MANIFEST, Staging, check_apart, require_space
from tests.builders.folders import names
from tests.builders.outputs import JOB, build

PAYLOAD = b"\x08\0\0\0\0\0\0\0{}      "


def partial(output):
    return output.with_name("OUT.kasa-partial")


def stop_midway(output, **options):
    with pytest.raises(KeyboardInterrupt), Staging(output, fingerprint=JOB, **options) as staging:
        staging.keep_part("one", PAYLOAD)
        raise KeyboardInterrupt


def test_the_output_appears_whole_and_nothing_else_remains(output):
    build(output)
    assert names(output) == [MANIFEST, "model.safetensors"]
    assert names(output.parent) == ["OUT"]


def test_nothing_has_the_name_of_the_output_before_it_is_published(output):
    with Staging(output, fingerprint=JOB) as staging:
        write_file(staging.out / "model.safetensors", [b"weights"])
        assert not output.exists()
    assert not output.exists()


def test_parents_of_the_output_are_made(output):
    build(output / "deep" / "er")
    assert names(output / "deep") == ["er"]


def test_a_stopped_run_is_continued_with_its_parts_and_a_fresh_tree(output):
    with Staging(output, fingerprint=JOB) as staging:
        assert (staging.resumed, staging.part("one")) == (False, None)
        write_file(staging.out / "half", [b"half"])
    stop_midway(output)
    with Staging(output, fingerprint=dict(reversed(JOB.items()))) as staging:
        assert staging.resumed
        assert staging.part("one").read_bytes() == PAYLOAD
        assert staging.part("one").suffix == ".safetensors"
        assert names(staging.out) == []


def test_litter_of_a_killed_run_is_swept_and_the_files_of_others_are_not(output):
    stop_midway(output)
    for folder in (partial(output), partial(output) / "parts"):
        (folder / f".0123{TEMPORARY}").write_bytes(b"half")
    (partial(output) / "notes.txt").write_bytes(b"mine")
    with Staging(output, fingerprint=JOB) as staging:
        assert not list(partial(output).rglob(f"*{TEMPORARY}"))
        write_file(staging.out / "model.safetensors", [b"weights"])
        staging.publish()
    assert names(partial(output)) == ["notes.txt"]


@pytest.mark.parametrize("position", range(len(PAYLOAD)))
def test_a_part_with_any_flipped_bit_is_removed(output, position):
    with Staging(output, fingerprint=JOB) as staging:
        staging.keep_part("one", PAYLOAD)
        path = staging.part("one")
        damaged = bytearray(PAYLOAD)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert staging.part("one") is None
        assert not path.exists()
        staging.keep_part("one", PAYLOAD)
        assert staging.part("one") == path


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 3), lambda p: p.write_bytes(b""), Path.unlink])
def test_a_part_that_was_cut_or_deleted_is_computed_again(output, damage):
    stop_midway(output)
    with Staging(output, fingerprint=JOB) as staging:
        damage(staging.part("one"))
        assert staging.part("one") is None


def test_a_link_or_a_pipe_in_place_of_a_part_is_unsafe(output, tmp_path):
    stop_midway(output)
    (tmp_path / "same").write_bytes(PAYLOAD)
    for replace in (lambda path: path.symlink_to(tmp_path / "same"), os.mkfifo):
        with Staging(output, fingerprint=JOB) as staging:
            path = next((partial(output) / "parts").iterdir())
            path.unlink()
            replace(path)
            with pytest.raises(UnsafeInput):
                staging.part("one")


@pytest.mark.parametrize("name", ["", "out", "parts", "job.json", ".lock", "publishing"])
def test_a_link_in_the_staging_is_unsafe_and_its_target_is_not_touched(output, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_bytes(b"mine")
    link = partial(output) / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeInput), Staging(output, fingerprint=JOB):
        pass
    assert names(tmp_path / "elsewhere") == ["mine"]


@pytest.mark.parametrize("key", ["", "../up", "a/b", "a.b", "*", "é", "a" * 129])
def test_a_key_is_no_path(output, key):
    with Staging(output, fingerprint=JOB) as staging, pytest.raises(ValueError, match="not a key"):
        staging.keep_part(key, PAYLOAD)


def test_threads_keep_parts_at_once_even_the_same_one(output):
    keys = [f"key-{number % 20}" for number in range(60)]
    with Staging(output, fingerprint=JOB) as staging:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda key: staging.keep_part(key, key.encode()), keys))
        assert [staging.part(key).read_bytes() for key in keys] == [key.encode() for key in keys]
        assert len(names(partial(output) / "parts")) == 20


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"rank": 9}, "rank"),
        ({"seed": 0, "rank": 8.0}, "rank, seed"),
        ({"new": None}, "new"),
        ({"rank": True}, "rank"),
    ],
)
def test_another_job_is_refused_with_the_fields_that_differ_and_replaced_on_restart(output, change, fields):
    stop_midway(output)
    with (
        pytest.raises(IntegrityError, match=rf"\({fields}\).*--restart"),
        Staging(output, fingerprint=JOB | change),
    ):
        pass
    with Staging(output, fingerprint=JOB) as staging:
        assert staging.resumed
    with Staging(output, fingerprint=JOB | change, restart=True) as staging:
        assert (staging.resumed, staging.part("one")) == (False, None)


@pytest.mark.parametrize("record", [b"", b"[]", b"{", b"\xff", b'{"rank": NaN}'])
def test_a_record_that_cannot_be_read_is_refused(output, record):
    stop_midway(output)
    (partial(output) / "job.json").write_bytes(record)
    with pytest.raises(IntegrityError), Staging(output, fingerprint=JOB):
        pass


def test_parts_without_a_record_are_not_trusted(output):
    stop_midway(output)
    (partial(output) / "job.json").unlink()
    with Staging(output, fingerprint=JOB) as staging:
        assert (staging.resumed, staging.part("one")) == (False, None)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_modes_of_the_output_follow_the_umask(output, mask, mode):
    before = os.umask(mask)
    try:
        build(output)
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.stat().st_mode) == mode


def test_an_output_whose_name_cannot_be_created_is_refused_before_the_work(output, monkeypatch):
    stop_midway(output)
    mkdir = Path.mkdir

    def read_only(path, *arguments, **options):
        if path.parent == output.parent and path != partial(output):
            raise OSError(30, os.strerror(30))
        return mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ResourceError, match="Read-only"):
        build(output)
    monkeypatch.undo()
    with Staging(output, fingerprint=JOB) as staging:
        assert staging.part("one")


def test_an_output_is_apart_from_its_inputs_by_any_name(tmp_path):
    base = tmp_path / "base"
    (base / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    for output in (base, tmp_path / "link", base / "inner" / "..", tmp_path):
        with pytest.raises(OutputExists):
            check_apart(output, [base])
    for output in (base / "new", tmp_path / "link" / "new" / "er", base / "inner" / ".." / "new"):
        with pytest.raises(UsageError):
            check_apart(output, [tmp_path / "other", base])
    check_apart(tmp_path / "base-2", [base, tmp_path / "link"])
    check_apart(base / ".." / "new", [base])


def test_a_lack_of_space_is_told_in_numbers_before_the_work(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(
        ResourceError, match=r"needs 1,152,921,504,606,846,976 bytes and [\d,]+ are available"
    ):
        require_space(tmp_path / "not" / "yet", 1 << 60)


def test_a_model_where_the_staging_would_be_is_refused(tmp_path):
    model = tmp_path / "X.kasa-partial"
    model.mkdir()
    with pytest.raises(OutputExists, match="input"):
        check_apart(tmp_path / "X", [model])
