"""The store through the command line: weights are measured once, and bytes do not depend on order or other runs."""

import csv
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from kasa_cli.errors import ExitCode, ResourceError
from kasa_cli.files import store as storing
from kasa_cli.files.durable import TEMPORARY
from kasa_cli.files.store import Store
from kasa_cli.pipeline import store_contents as verb
from kasa_cli.pipeline.measuring.facts import Extremes, pack
from tests.builders.checkpoints import changed, plain_model, save_plain
from tests.builders.folders import tree_hash
from tests.builders.runs import ROOT, Ran, environment, finished, forked, inside

RANKS = (4, 20, 80)
SHAPES = {"q_proj": (640, 640), "k_proj": (96, 640), "v_proj": (101, 97)}
PAUSE = 0.03


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store-runs")


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    """Eight weights of 24 x 24."""
    return plain_model(place / "small", dim=24)


@pytest.fixture(scope="module")
def linear(place: Path) -> Path:
    """Weights smaller and larger than those that LAPACK decomposes completely, in half precision."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.0.mlp.{module}.weight": torch.randn(shape, generator=generator).bfloat16()
        for module, shape in SHAPES.items()
    }
    return save_plain(weights, place / "linear")


@pytest.fixture(scope="module")
def conv(place: Path) -> Path:
    """A GPT-2, whose weights are stored as (in, out)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=96, n_positions=8, n_embd=96, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(place / "conv")
    return place / "conv"


def truncate(capsys: pytest.CaptureFixture[str], model: Path, output: Path, rank: int, *more: object) -> Ran:
    done = inside(capsys, "truncate", model, "-o", output, "-r", rank, "--json", *more)
    assert done.code == 0, done.err
    return done


def counts(ran: Ran) -> tuple[int, int]:
    totals = ran.json["totals"]
    return totals["decompositions"], totals["decompositions_reused"]


def facts(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if not path.is_dir() and TEMPORARY not in path.name)


def beside_facts(store: Path) -> list[Path]:
    return list(store.rglob(f"*{TEMPORARY}"))


def state(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes()) for path in facts(root)}


# --- which commands decompose ---


def test_a_second_question_decomposes_only_what_is_not_known(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions: list[tuple[tuple[object, ...], tuple[int, int]]] = [
        (("truncate", small, "-o", tmp_path / "a", "-r", 4), (8, 0)),
        (("truncate", small, "-o", tmp_path / "b", "-r", 16), (0, 8)),
        (("select-targets", small, "--criterion", "kappa"), (0, 8)),
        (("select-targets", small, "--criterion", "stable-rank"), (0, 8)),
        (("inspect", "spectrum", small), (8, 0)),
        (("truncate", small, "-o", tmp_path / "c", "-r", 8), (0, 8)),
        (("truncate", small, "-o", tmp_path / "d", "-r", 20), (8, 0)),
        (("truncate", small, "-o", tmp_path / "e", "-r", 22), (0, 8)),
        (("select-targets", small, "--criterion", "alpha", "--compare", "snr,kappa"), (0, 8)),
        (("inspect", "spectrum", small, "--target", "q_proj"), (0, 2)),
        (("truncate", small, "-o", tmp_path / "f", "-r", 3, "--rounding", "preserve"), (0, 8)),
    ]
    for number, (question, expected) in enumerate(questions):
        done = inside(capsys, *question, "--json", "--workers", 1 + number % 2)
        assert done.code == 0, done.err
        assert counts(done) == expected, question


def test_the_ends_are_known_after_all_values_are(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert counts(inside(capsys, "inspect", "spectrum", small, "--json")) == (8, 0)
    assert counts(inside(capsys, "inspect", "spectrum", small, "--json")) == (0, 8)
    assert counts(inside(capsys, "select-targets", small, "--json")) == (0, 8)
    assert counts(truncate(capsys, small, tmp_path / "OUT", 16)) == (0, 8)


def test_figures_are_the_same_from_the_store(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for question in (("inspect", "spectrum", small), ("select-targets", small)):
        cold, warm = (inside(capsys, *question, "--json").json for _ in range(2))
        fresh = inside(capsys, *question, "--json", "--no-store").json
        for report in (cold, warm, fresh):
            report["totals"] = {k: v for k, v in report["totals"].items() if "decomp" not in k}
        assert cold == warm == fresh


def test_another_model_that_shares_tensors_shares_what_is_known_of_them(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(capsys, small, tmp_path / "first", 4)
    name = "model__layers__1__mlp__up_proj"
    other = changed(small, tmp_path / "revision", **{name: lambda W: W * 2})
    assert counts(truncate(capsys, other, tmp_path / "second", 4)) == (1, 7)
    truncate(capsys, other, tmp_path / "alone", 4, "--no-store")
    assert tree_hash(tmp_path / "second") == tree_hash(tmp_path / "alone")


def test_two_tensors_of_one_content_are_measured_once(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    W = torch.randn(20, 24, generator=torch.Generator().manual_seed(3))
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    model = save_plain({name: W.clone() for name in names}, tmp_path / "model")
    assert counts(inside(capsys, "select-targets", model, "--json", "--workers", 1)) == (1, 2)
    for number, more in enumerate((("--workers", 1), ("--workers", 3, "--no-store"), ("--workers", 3))):
        truncate(capsys, model, tmp_path / str(number), 4, *more)
        assert tree_hash(tmp_path / str(number)) == tree_hash(tmp_path / "0")
    assert len({path.parent for path in facts(store)}) == 1


def test_two_checkpoints_are_compared_twice_and_decomposed_once(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model__layers__1__mlp__up_proj"
    other = changed(small, tmp_path / "other", **{name: lambda W: W + torch.eye(24)})
    first, second = (inside(capsys, "inspect", "diff", small, other, "--json") for _ in range(2))
    assert (first.code, counts(first), counts(second)) == (0, (2, 0), (0, 2))
    assert first.json["tensors"] == second.json["tensors"]


def test_another_number_of_threads_measures_for_itself(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(capsys, small, tmp_path / "one", 4)
    two = ("--threads-per-worker", 2)
    assert counts(truncate(capsys, small, tmp_path / "two", 4, *two)) == (8, 0)
    assert counts(truncate(capsys, small, tmp_path / "again", 4, *two)) == (0, 8)
    assert counts(truncate(capsys, small, tmp_path / "back", 4)) == (0, 8)


def test_the_same_bits_in_another_dtype_are_another_weight(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = torch.randn(20, 24, generator=torch.Generator().manual_seed(3)).bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.bfloat16, torch.float16):
        model = save_plain({name: bits.view(dtype)}, tmp_path / str(dtype))
        assert counts(truncate(capsys, model, tmp_path / f"{dtype}-out", 4)) == (1, 0)
        truncate(capsys, model, tmp_path / f"{dtype}-alone", 4, "--no-store")
        assert tree_hash(tmp_path / f"{dtype}-out") == tree_hash(tmp_path / f"{dtype}-alone")


def test_a_conv1d_and_a_linear_weight_of_the_same_bytes_share_no_factors(
    conv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    stored = load_file(conv / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    twin = save_plain({"model.layers.0.mlp.up_proj.weight": stored}, tmp_path / "twin")
    new, _ = counts(truncate(capsys, conv, tmp_path / "conv", 4))
    assert new == 4
    assert counts(truncate(capsys, twin, tmp_path / "warm", 4)) == (1, 0)
    truncate(capsys, twin, tmp_path / "alone", 4, "--no-store")
    assert tree_hash(tmp_path / "warm") == tree_hash(tmp_path / "alone")


# --- the same bytes ---


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_bytes_do_not_depend_on_what_the_store_knows(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Increasing ranks meet a poorer store, decreasing ranks a richer one, and the first of each an empty one."""
    model = request.getfixturevalue(kind)
    expected = {}
    for rank in RANKS:
        truncate(capsys, model, tmp_path / f"alone-{rank}", rank, "--no-store")
        expected[rank] = tree_hash(tmp_path / f"alone-{rank}")
    found = {}
    for name, order in (("poorer", RANKS), ("richer", RANKS[::-1])):
        monkeypatch.setenv("KASA_STORE", str(tmp_path / name))
        for rank in order:
            output = tmp_path / f"{name}-{rank}"
            found[name, rank] = counts(truncate(capsys, model, output, rank))
            assert tree_hash(output) == expected[rank], (name, rank)
    every = 4 if kind == "conv" else len(SHAPES)
    assert found == {
        **{("poorer", rank): (every, 0) for rank in RANKS},
        **{("richer", rank): (0, every) for rank in RANKS[:-1]},
        ("richer", RANKS[-1]): (every, 0),
    }


# --- which store ---


def test_no_store_leaves_nothing_and_knows_nothing(
    small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(capsys, small, tmp_path / "b", 4, "--no-store")
    for question in (("inspect", "spectrum", small), ("select-targets", small)):
        assert inside(capsys, *question, "--no-store").code == 0
    assert list(store.iterdir()) == []
    truncate(capsys, small, tmp_path / "c", 4)
    before = state(store)
    assert counts(truncate(capsys, small, tmp_path / "d", 4, "--no-store")) == (8, 0)
    assert state(store) == before


def test_a_named_store_is_used_instead_of_the_default_one(
    small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "deep" / "er"
    assert counts(truncate(capsys, small, tmp_path / "a", 4, "--store", named)) == (8, 0)
    assert facts(named) and not facts(store)
    assert counts(truncate(capsys, small, tmp_path / "b", 4)) == (8, 0)
    for path in facts(store):
        path.unlink()
    assert counts(truncate(capsys, small, tmp_path / "c", 4, "--store", named)) == (0, 8)
    assert not facts(store)
    assert len(inside(capsys, "store", "ls", "--store", named, "--json").json["tensors"]) == 8
    assert inside(capsys, "store", "ls", "--json").json["tensors"] == []


def test_a_dry_run_leaves_nothing(
    small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ("--store", tmp_path / "new")
    for more in ((), named):
        assert inside(capsys, "truncate", small, "-o", tmp_path / "a", "-r", 4, "--dry-run", *more).code == 0
    assert list(store.iterdir()) == [] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("where", "code"),
    [("file", ExitCode.UNSAFE), ("file/below", ExitCode.RESOURCE), ("link", ExitCode.RESOURCE)],
)
def test_a_named_store_that_cannot_be_is_refused_before_the_work(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, code: ExitCode
) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    output = tmp_path / "work" / "OUT"
    for question in (("truncate", small, "-o", output, "-r", 4), ("inspect", "spectrum", small)):
        done = inside(capsys, *question, "--store", tmp_path / where)
        assert (done.code, done.out) == (code, "")
        assert "--store" in done.err or "directory" in done.err or "cannot" in done.err
    assert not output.parent.exists()
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.fixture(params=["file", "full", "no home"])
def unusable(request: pytest.FixtureRequest, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default store that cannot be written."""
    if request.param == "file":
        store.rmdir()
        store.write_bytes(b"mine")
    elif request.param == "full":

        def full(path: Path, *_: object) -> None:
            raise ResourceError("No space left on device", str(path))

        monkeypatch.setattr(storing, "write_file", full)
    else:
        monkeypatch.delenv("KASA_STORE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def nobody() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", nobody)


@pytest.mark.usefixtures("unusable")
def test_a_default_store_that_takes_nothing_costs_a_note(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(capsys, small, tmp_path / "alone", 4, "--no-store")
    for number in range(2):
        done = truncate(capsys, small, tmp_path / f"{number}", 4)
        assert counts(done) == (8, 0)
        assert tree_hash(tmp_path / f"{number}") == tree_hash(tmp_path / "alone")
        assert done.err.count("note: the store could not keep every fact") == 1
    for question in (("inspect", "spectrum", small), ("select-targets", small)):
        done = inside(capsys, *question, "--json")
        assert (done.code, done.err.count("note: the store could not keep every fact")) == (0, 1)


# --- facts that were altered, runs that were killed, runs at once ---


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "damage", [flip, lambda path: os.truncate(path, 9), pipe, link, make_folder, Path.unlink]
)
def test_altered_facts_are_measured_again(
    small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage
) -> None:
    truncate(capsys, small, tmp_path / "first", 4)
    before = {path.name for path in facts(store)}
    for path in facts(store):
        damage(path)
    assert counts(truncate(capsys, small, tmp_path / "second", 4)) == (8, 0)
    assert tree_hash(tmp_path / "second") == tree_hash(tmp_path / "first")
    if damage is not make_folder:
        assert {path.name for path in facts(store)} == before
        assert counts(truncate(capsys, small, tmp_path / "third", 4)) == (0, 8)


def test_two_runs_at_once_find_the_same_and_leave_no_litter(
    small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(capsys, small, tmp_path / "alone", 4, "--no-store")
    runs = [
        forked(tmp_path / f"log-{n}", "truncate", small, "-o", tmp_path / f"{n}", "-r", 4, pause=PAUSE)
        for n in range(3)
    ]
    for process in runs:
        process.join(60)
    assert [process.exitcode for process in runs] == [0, 0, 0]
    for number in range(3):
        assert tree_hash(tmp_path / f"{number}") == tree_hash(tmp_path / "alone")
        assert "note: the store" not in (tmp_path / f"log-{number}.err").read_text()
    assert len(facts(store)) == 16 and not beside_facts(store)
    assert counts(truncate(capsys, small, tmp_path / "after", 4)) == (0, 8)


def test_pruning_all_the_while_changes_no_byte_and_troubles_no_run(
    small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(capsys, small, tmp_path / "alone", 20, "--no-store")
    truncate(capsys, small, tmp_path / "warm", 20)
    process = forked(tmp_path / "log", "truncate", small, "-o", tmp_path / "OUT", "-r", 20, pause=PAUSE)
    num_removed = 0
    while process.is_alive():
        num_removed += verb.prune(store, everything=True).totals["removed"]
    assert process.exitcode == 0, (tmp_path / "log.err").read_text()
    assert num_removed >= 8
    assert tree_hash(tmp_path / "OUT") == tree_hash(tmp_path / "alone")
    assert "note: the store" not in (tmp_path / "log.err").read_text()


def test_runs_killed_at_any_time_leave_whole_facts_and_litter_that_prune_takes(
    small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = time.monotonic()
    done = finished(
        tmp_path / "log", "truncate", small, "-o", tmp_path / "whole", "-r", 4, "--no-store", pause=PAUSE
    )
    assert done.code == 0, done.err
    lasts, dice, known = time.monotonic() - begun, random.Random(7), []
    for number in range(6):
        output = tmp_path / str(number)
        process = forked(tmp_path / "log", "truncate", small, "-o", output, "-r", 4, pause=PAUSE)
        process.join(dice.uniform(0.1, 0.5) * lasts)
        process.kill()
        process.join()
        for path in facts(store):
            content = path.name.split(".")
            assert Store(store).get(path.parent.name, content[0], content[1]), path
        known.append(len(facts(store)))
        if number == 2:
            verb.prune(store, everything=True)
    assert len(set(known)) > 1
    done = truncate(capsys, small, tmp_path / "last", 4)
    assert tree_hash(tmp_path / "last") == tree_hash(tmp_path / "whole")
    for path in beside_facts(store):
        os.utime(path, (0, 0))
    assert inside(capsys, "store", "prune", "--older-than", "30d", "-q").code == 0
    assert not beside_facts(store)
    assert len(facts(store)) == 16


# --- kasa store ls and prune ---


@pytest.fixture
def measured(small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A store that knows eight weights, each last used a day before the one of the next name."""
    truncate(capsys, small, tmp_path / "measured", 4)
    rows = sorted(verb.ls(store).tensors, key=lambda row: row["name"])
    for age, row in enumerate(reversed(rows)):
        then = time.time() - age * 86400 - 60
        for path in (store / "facts-1" / row["content"][:2] / row["content"]).iterdir():
            os.utime(path, (then, then))
    return store


def test_a_tensor_is_recognised_in_every_format(
    measured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    report = inside(capsys, "store", "ls", "--json").json
    names = [row["name"] for row in report["tensors"]]
    assert names == sorted(names, reverse=True) and len(set(names)) == 8
    num_bytes = sum(path.stat().st_size for path in facts(measured))
    assert report["totals"] == {"tensors": 8, "models": 0, "bytes": num_bytes}
    assert sum(row["bytes"] for row in report["tensors"]) == report["totals"]["bytes"]
    for row in report["tensors"]:
        assert (row["shape"], row["dtype"], row["facts"]) == ([24, 24], "F32", ["ends-16", "extremes"])
        assert time.strptime(row["last_used"], "%Y-%m-%d %H:%M")
    rows = list(csv.DictReader(io.StringIO(inside(capsys, "store", "ls", "--format", "csv").out)))
    assert [(row["name"], row["shape"], row["dtype"]) for row in rows] == [(n, "24x24", "F32") for n in names]
    for spelling in ("md", "table"):
        text = inside(capsys, "store", "ls", "--format", spelling).out
        lines = [next(line for line in text.splitlines() if name in line) for name in names]
        assert all("24×24" in line and "F32" in line for line in lines)


def test_an_empty_store_is_listed_in_every_format(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.rmdir()
    for spelling in ("table", "json", "csv", "md"):
        done = inside(capsys, "store", "ls", "--format", spelling)
        assert (done.code, done.err) == (0, "")
    assert inside(capsys, "store", "ls", "--json").json["tensors"] == []
    assert inside(capsys, "store", "prune", "--all", "--json").json["totals"]["removed"] == 0
    assert not store.exists()


@pytest.mark.parametrize("spelling", ["table", "json", "csv", "md"])
def test_no_name_of_a_strangers_tensor_is_obeyed_by_the_terminal(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """kasa refuses such a checkpoint, but a store may be untrusted."""
    monkeypatch.setenv("COLUMNS", "200")
    about = {"name": "evil\x1b[2J\x1b]0;title\x07\nrow", "dtype": "F32\x1b[1m", "shape": [3, 4]}
    Store(store).put("ab" * 32, "extremes", "0" * 16, pack(Extremes(2, 1, 3, "svd", 0), about))
    done = inside(capsys, "store", "ls", "--format", spelling)
    assert done.code == 0
    assert "evil" in done.out
    assert "\x1b" not in done.out and "\x07" not in done.out


def test_prune_says_what_goes_and_takes_exactly_that(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = inside(capsys, "store", "ls", "--json").json
    sizes = [row["bytes"] for row in report["tensors"]]
    for options, left in (
        (("--older-than", "4d"), 4),
        (("--older-than", "96h"), 4),
        (("--older-than", "1w"), 7),
        (("--max-size", sum(sizes)), 8),
        (("--max-size", sum(sizes) - 1), 7),
        (("--max-size", sum(sizes[:3])), 3),
        (("--max-size", f"{(sum(sizes[:2]) + 5) / 1000:.3f} kB"), 2),
        (("--max-size", "1TB"), 8),
        (("--max-size", 0), 0),
        (("--older-than", "3d", "--max-size", sum(sizes[:2])), 2),
        (("--older-than", "2d", "--max-size", sum(sizes[:5])), 2),
        (("--all",), 0),
    ):
        before = state(measured)
        done = inside(capsys, "store", "prune", *options, "--dry-run", "--json").json
        assert [row["name"] for row in done["tensors"]] == [row["name"] for row in report["tensors"][left:]]
        assert done["totals"] == {
            "removed": 8 - left,
            "models_removed": 0,
            "bytes_removed": sum(sizes[left:]),
            "kept": left,
            "models_kept": 0,
            "bytes_kept": sum(sizes[:left]),
            "dry_run": True,
        }, options
        assert state(measured) == before
    assert inside(capsys, "store", "prune", "--max-size", sum(sizes[:3]), "-q").code == 0
    assert inside(capsys, "store", "ls", "--json").json["tensors"] == report["tensors"][:3]
    assert sum(path.stat().st_size for path in facts(measured)) == sum(sizes[:3])


def test_a_weight_that_is_used_stays_longest(
    measured: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oldest = inside(capsys, "store", "ls", "--json").json["tensors"][-1]
    module = oldest["name"].removesuffix(".weight")
    assert counts(inside(capsys, "select-targets", small, "--target", module, "--json")) == (0, 1)
    inside(capsys, "store", "prune", "--max-size", oldest["bytes"], "-q")
    assert [row["name"] for row in inside(capsys, "store", "ls", "--json").json["tensors"]] == [
        oldest["name"]
    ]
    assert counts(truncate(capsys, small, tmp_path / "again", 4)) == (7, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        (),
        *[
            ("--max-size", text)
            for text in ("", "5 gigs", "-1", "nan", "inf", "1e3", "GB", "5GBB", "1,5GB", "0x5")
        ],
        *[("--older-than", text) for text in ("", "5", "d", "-1d", "5y", "1.d", "nand", "1d12h")],
    ],
)
def test_what_is_no_size_and_no_time_is_refused(
    measured: Path, capsys: pytest.CaptureFixture[str], wrong: tuple[str, ...]
) -> None:
    before = state(measured)
    done = inside(capsys, "store", "prune", *wrong)
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert len(done.err.splitlines()) == 1
    assert state(measured) == before


def test_help_on_the_store_imports_no_torch() -> None:
    code = (
        "import sys; from kasa_cli.cli import app as cli; code = cli._guarded(['store', 'ls', '--help']); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--store" in done.stdout


def test_the_store_is_in_no_file_of_the_output(
    small: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(capsys, small, tmp_path / "OUT", 4, "--store", store)
    manifest = json.loads((tmp_path / "OUT" / "kasa.manifest.json").read_text())
    assert str(store) not in json.dumps(manifest)
    assert "decompositions" not in json.dumps(manifest)
