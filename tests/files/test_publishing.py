"""An output takes its name in one step, and never replaces anything that kasa did not write."""

import os
from pathlib import Path

import pytest

from kasa_cli.errors import OutputExists, ResourceError
from kasa_cli.files.staging import MANIFEST, Staging
from tests.builders.folders import names
from tests.builders.outputs import JOB, build


def as_file(output):
    output.write_bytes(b"mine")


def as_dangling_link(output):
    output.symlink_to("nowhere")


def as_loop(output):
    output.symlink_to(output)


def as_folder_of_another(output):
    output.mkdir()
    (output / "mine").write_bytes(b"mine")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("occupy", [as_file, as_dangling_link, as_loop, as_folder_of_another])
def test_what_kasa_did_not_write_is_never_replaced(output, occupy, overwrite):
    occupy(output)
    before = os.lstat(output)
    with pytest.raises(OutputExists), Staging(output, fingerprint=JOB, overwrite=overwrite):
        pass
    assert os.path.samestat(before, os.lstat(output))
    assert names(output.parent) == ["OUT"]


def test_an_empty_folder_may_become_the_output_also_through_a_link(output, tmp_path):
    output.mkdir()
    build(output)
    (tmp_path / "elsewhere" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "real")
    build(tmp_path / "link")
    assert names(output) == names(tmp_path / "elsewhere" / "real")
    assert (tmp_path / "link").is_symlink()


def test_an_output_of_kasa_is_replaced_only_on_request(output):
    build(output)
    with pytest.raises(OutputExists, match="--overwrite"):
        build(output, b"new")
    build(output, b"new", overwrite=True)
    assert (output / MANIFEST).read_bytes() == b"new"
    assert names(output.parent) == ["OUT"]


def test_what_appears_during_the_run_is_not_replaced(output):
    with Staging(output, fingerprint=JOB) as staging:
        as_folder_of_another(output)
        with pytest.raises(OutputExists):
            staging.publish()
    assert names(output) == ["mine"]


def test_what_appears_at_the_last_moment_is_not_replaced(output, monkeypatch):
    monkeypatch.setattr(Staging, "_check_output", lambda staging: None)
    with Staging(output, fingerprint=JOB) as staging:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, to: (as_folder_of_another(output), rename(path, to)))
        with pytest.raises(OutputExists, match="appeared in the way"):
            staging.publish()
    assert names(output) == ["mine"]


def test_a_replacement_that_fails_leaves_the_old_output_in_place(output, monkeypatch):
    build(output, b"old")
    rename = Path.rename

    def fail_to_publish(path, to):
        if path.name == "out":
            raise OSError(5, "injected")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail_to_publish)
    with pytest.raises(ResourceError):
        build(output, b"new", overwrite=True)
    assert (output / MANIFEST).read_bytes() == b"old"
    monkeypatch.undo()
    build(output, b"new", overwrite=True)
    assert (output / MANIFEST).read_bytes() == b"new"


def test_an_old_output_that_no_run_put_aside_is_never_deleted(output):
    build(output)
    output.rename(output.with_name("OUT.kasa-old"))
    for overwrite in (False, True):
        with pytest.raises(OutputExists, match=r"OUT\.kasa-old"):
            build(output, overwrite=overwrite)
    assert names(output.parent) == ["OUT.kasa-old"]
