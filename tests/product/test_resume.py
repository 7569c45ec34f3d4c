"""The same command finishes a killed run, with the same bytes and without leftovers beside the output."""

import json
import os
import random
import time

import pytest

from kasa_cli.errors import ExitCode
from tests.builders.checkpoints import plain_model
from tests.builders.folders import tree_hash
from tests.builders.runs import finished, forked, inside

NUM_KILLS = int(os.environ.get("KASA_KILLS", "20"))
PAUSE = 0.04
RUN = ("-r", 4, "--workers", 2, "--json", "--no-store")
STORED = RUN[:-1]


@pytest.fixture(scope="module")
def undisturbed(model):
    """The hashes of an undisturbed run, and the duration of a slowed one."""
    output = model.parent / "undisturbed" / "OUT"
    log = model.parent / "log"
    assert finished(log, "truncate", model, "-o", output, *RUN).code == 0
    begun = time.monotonic()
    assert finished(log, "truncate", model, "-o", model.parent / "slow", *RUN, pause=PAUSE).code == 0
    return tree_hash(output), time.monotonic() - begun


def beside(output):
    return sorted(path.name for path in output.parent.iterdir())


def kill_after(seconds, log, *arguments):
    process = forked(log, *arguments, pause=PAUSE)
    process.join(seconds)
    process.kill()
    process.join()


def test_a_run_killed_at_any_time_is_finished_by_the_same_command(model, undisturbed, tmp_path, monkeypatch):
    """With a store, whose writes are killed too, and without."""
    complete, whole = undisturbed
    dice = random.Random(20260)
    stages = []
    for number in range(NUM_KILLS):
        output = tmp_path / str(number) / "OUT"
        output.parent.mkdir()
        monkeypatch.setenv("KASA_STORE", str(tmp_path / f"store-{number}"))
        command = ("truncate", model, "-o", output, *(STORED if number % 4 < 2 else RUN))
        for _ in range(1 + number % 2):  # every other time, the continued run is killed as well
            kill_after(dice.uniform(0, whole), tmp_path / "log", *command)
            assert not output.exists() or tree_hash(output) == complete
        done = finished(tmp_path / "log", *command)
        published = done.code == ExitCode.EXISTS
        assert published or done.code == 0, done.err
        assert tree_hash(output) == complete
        assert beside(output) == ["OUT"]
        stages.append(None if published else json.loads(done.out)["totals"]["decompositions_reused"])
    assert any(stages), "no kill came after a finished decomposition"
    assert len(set(stages)) > 2, f"all kills came at the same stage: {stages}"


@pytest.fixture
def stopped(model, undisturbed, tmp_path):
    """The staging folder of a killed run: some decompositions are done, and there is no output."""
    output = tmp_path / "work" / "OUT"
    output.parent.mkdir()
    process = forked(tmp_path / "log", "truncate", model, "-o", output, *RUN, pause=0.2)
    parts = output.with_name("OUT.kasa-partial") / "parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("*.safetensors"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not output.exists()
    return output


def test_finished_decompositions_are_not_done_again(stopped, model, capsys):
    totals = inside(capsys, "truncate", model, "-o", stopped, *RUN).json["totals"]
    assert totals["decompositions_reused"] >= 3
    assert totals["decompositions"] == 8 - totals["decompositions_reused"]


def test_another_number_of_workers_may_go_on(stopped, model, undisturbed, capsys):
    done = inside(capsys, "truncate", model, "-o", stopped, *RUN, "--workers", 1)
    assert done.json["totals"]["decompositions_reused"] >= 3
    assert tree_hash(stopped) == undisturbed[0]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("-r", 5), "options"),
        (("-r", 4, "--seed", 1), "options"),
        (("-r", 4, "--exclude", "q_proj"), "targets"),
        (("-r", 4, "--threads-per-worker", 2), "environment"),
    ],
)
def test_another_job_does_not_go_on_and_says_in_what_it_differs(stopped, model, capsys, options, field):
    before = tree_hash(stopped.parent)
    done = inside(capsys, "truncate", model, "-o", stopped, *options)
    assert (done.code, done.out) == (ExitCode.INTEGRITY, "")
    assert field in done.err and "--restart" in done.err
    after = tree_hash(stopped.parent)
    assert {name: after[name] for name in before if ".lock" not in name} == {
        name: state for name, state in before.items() if ".lock" not in name
    }


def test_another_model_of_the_same_shapes_shares_no_decomposition(stopped, model, tmp_path, capsys):
    other = plain_model(tmp_path / "other", seed=1)
    totals = inside(capsys, "truncate", other, "-o", stopped, *RUN).json["totals"]
    assert totals["decompositions_reused"] == 0


def test_restart_throws_the_work_away(stopped, model, undisturbed, capsys):
    done = inside(capsys, "truncate", model, "-o", stopped, *RUN, "--restart")
    assert done.json["totals"]["decompositions_reused"] == 0
    assert tree_hash(stopped) == undisturbed[0]
    assert beside(stopped) == ["OUT"]


def test_a_part_that_was_altered_is_computed_again(stopped, model, undisturbed, capsys):
    part = next((stopped.with_name("OUT.kasa-partial") / "parts").glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert inside(capsys, "truncate", model, "-o", stopped, *RUN).code == 0
    assert tree_hash(stopped) == undisturbed[0]


# --- outputs in the way ---


@pytest.fixture
def finished_output(model, tmp_path, capsys):
    output = tmp_path / "OUT"
    assert inside(capsys, "truncate", model, "-o", output, "-r", 4).code == 0
    return output


def test_a_second_run_is_refused_and_changes_nothing(finished_output, model, capsys):
    before = tree_hash(finished_output)
    done = inside(capsys, "truncate", model, "-o", finished_output, "-r", 5)
    assert (done.code, done.out) == (ExitCode.EXISTS, "")
    assert "--overwrite" in done.err
    assert tree_hash(finished_output) == before
    assert beside(finished_output) == ["OUT"]


def test_overwrite_replaces_an_output_of_kasa(finished_output, model, undisturbed, capsys):
    assert inside(capsys, "truncate", model, "-o", finished_output, "-r", 5, "--overwrite").code == 0
    assert tree_hash(finished_output) != undisturbed[0]
    assert inside(capsys, "truncate", model, "-o", finished_output, "-r", 4, "--overwrite").code == 0
    assert tree_hash(finished_output) == undisturbed[0]
    assert beside(finished_output) == ["OUT"]


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_overwrite_replaces_nothing_else(model, tmp_path, capsys, what):
    output = tmp_path / "OUT"
    if what == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    elif what == "file":
        output.write_text("years of work")
    else:
        output.symlink_to(tmp_path / "nowhere")
    before = tree_hash(tmp_path)
    for flags in ((), ("--overwrite",), ("--overwrite", "--restart")):
        assert inside(capsys, "truncate", model, "-o", output, "-r", 4, *flags).code == ExitCode.EXISTS
        assert tree_hash(tmp_path) == before
        assert beside(output) == ["OUT"]


def test_an_empty_folder_is_filled(model, tmp_path, undisturbed, capsys):
    (tmp_path / "OUT").mkdir()
    assert inside(capsys, "truncate", model, "-o", tmp_path / "OUT", "-r", 4).code == 0
    assert tree_hash(tmp_path / "OUT") == undisturbed[0]


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("/", ExitCode.EXISTS),
        ("home/model", ExitCode.EXISTS),
        ("home", ExitCode.EXISTS),
        ("home/other/../model", ExitCode.EXISTS),
        ("link", ExitCode.EXISTS),
        ("home/model/out", ExitCode.USAGE),
        ("link/deep/out", ExitCode.USAGE),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--overwrite", "--restart")], ids=["plain", "overwrite"])
def test_an_output_at_in_or_around_its_input_is_refused(tmp_path, capsys, place, code, flags):
    model = plain_model(tmp_path / "home" / "model", layers=1)
    (tmp_path / "home" / "other").mkdir()
    (tmp_path / "link").symlink_to(model)
    before = tree_hash(tmp_path)
    done = inside(capsys, "truncate", model, "-o", tmp_path / place, "-r", 4, *flags)
    assert (done.code, done.out) == (code, "")
    assert tree_hash(tmp_path) == before
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["model", "other"]
