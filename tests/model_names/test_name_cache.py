"""Names from the store are those of transformers, and a command that reads them from there does not import it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kasa_cli.checkpoint.layout import open_checkpoint
from kasa_cli.errors import InvalidInput
from kasa_cli.files.store import NAMES, Store
from kasa_cli.model_names import name_cache, name_map
from kasa_cli.model_names.name_cache import QUESTION, names_of, packed, unpacked
from kasa_cli.pipeline import store_contents as verb
from tests.builders import tiny_models
from tests.builders.adapters import saved
from tests.builders.folders import tree_hash
from tests.builders.runs import environment, inside


def asked(folder: Path):
    """The config of a checkpoint, and the shapes of its tensors by name."""
    checkpoint = open_checkpoint(folder)
    return checkpoint.config, {name: entry.shape for name, entry in checkpoint.tensors.items()}


@pytest.fixture
def llama(tmp_path):
    return asked(tiny_models.save("llama", tmp_path / "llama"))


@pytest.fixture
def kept(tmp_path):
    return Store(tmp_path / "STORE")


@pytest.fixture
def count(monkeypatch):
    """How often transformers is used for names."""
    calls = []
    real = name_map.map_names
    monkeypatch.setattr(name_map, "map_names", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_what_is_kept_of_every_family_is_all_of_it(family, tmp_path, kept, count):
    config, shapes = asked(tiny_models.save(family, tmp_path / family))
    found = names_of(config, shapes, kept)
    assert unpacked(packed(found)) == found
    again = names_of(config, shapes, kept)
    assert (again, list(again.slots), len(count)) == (found, list(found.slots), 1)


def test_without_a_store_transformers_is_asked_each_time(llama, count):
    assert names_of(*llama, None) == names_of(*llama, None)
    assert len(count) == 2


def test_another_config_other_shapes_and_another_order_are_other_questions(llama, kept, count):
    config, shapes = llama
    names_of(config, shapes, kept)
    names_of({**config, "rope_theta": 5.0}, shapes, kept)
    names_of(config, dict(reversed(shapes.items())), kept)
    fewer = dict(list(shapes.items())[:-1])
    assert list(names_of(config, fewer, kept).slots) == list(fewer)
    assert len(count) == 4


def test_another_version_of_transformers_is_asked_itself(llama, kept, count, monkeypatch):
    names_of(*llama, kept)
    monkeypatch.setattr(name_cache, "version", lambda name: "99.0")
    names_of(*llama, kept)
    assert len(count) == 2


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"{}", b'["X",null,[["a",1]],[],[]]', b"\xff", b"[1,2,3,4,5]"]
)
def test_what_is_no_map_of_names_is_asked_for_anew(payload, llama, kept, count, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(name_cache, "packed", lambda names: payload)
        found = names_of(*llama, kept)
    assert names_of(*llama, kept) == found and len(count) == 2


def test_a_family_that_is_not_known_today_is_asked_for_tomorrow(llama, kept, count):
    config, shapes = llama
    assert names_of({**config, "model_type": "unheard"}, shapes, kept).note
    assert not kept.shelf(NAMES).entries() and len(count) == 1


def test_a_config_that_does_not_fit_is_refused_each_time(llama, kept, count):
    config, shapes = llama
    for _ in range(2):
        with pytest.raises(InvalidInput):
            names_of({**config, "hidden_size": 48}, shapes, kept)
    assert not kept.shelf(NAMES).entries()


COMMANDS = {
    "merge": ("merge", "ADAPTER", "--into", "BASE", "-o", "OUT"),
    "spectrum": ("inspect", "spectrum", "BASE"),
    "select": ("select-targets", "BASE"),
    "diff": ("inspect", "diff", "BASE", "BASE"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_command_on_a_model_does_without_transformers(name, tmp_path, store):
    """The whole command runs in a new process and gives the same results."""
    places = {"BASE": tiny_models.save("llama", tmp_path / "base"), "ADAPTER": saved("lora")}
    said = []
    for number, has_it in enumerate((True, False)):
        words = [str(places.get(word, word)) for word in COMMANDS[name]]
        words = [str(tmp_path / f"OUT{number}") if word == "OUT" else word for word in words]
        code = (
            "import os, sys; from kasa_cli.cli import app as cli; leave = cli._leave\n"
            "cli._leave = lambda code: (print('transformers' in sys.modules), leave(code))\n"
            f"cli.main({words!r} + ['--json', '-q'])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
        )
        *lines, imported = done.stdout.splitlines()
        assert imported == str(has_it)
        said.append(json.loads("\n".join(lines)))
    if name == "merge":
        assert tree_hash(tmp_path / "OUT0") == tree_hash(tmp_path / "OUT1")
    else:
        assert said[0].get("tensors") == said[1].get("tensors")
        assert said[0].get("candidates") == said[1].get("candidates")


@pytest.mark.parametrize("name", ["merge", "spectrum", "select"])
def test_a_dry_run_keeps_nothing(name, tmp_path, store, capsys):
    places = {"BASE": tiny_models.save("llama", tmp_path / "base"), "ADAPTER": saved("lora")}
    places["OUT"] = tmp_path / "OUT"
    assert inside(capsys, *(places.get(word, word) for word in COMMANDS[name]), "--dry-run").code == 0
    assert list(store.iterdir()) == []


def test_known_models_are_counted_and_forgotten(llama, kept):
    names_of(*llama, kept)
    [entry] = kept.shelf(NAMES).entries()
    assert entry.questions == (QUESTION,)
    assert verb.ls(kept.root).totals == {"tensors": 0, "models": 1, "bytes": entry.num_bytes}
    assert verb.prune(kept.root, max_bytes=entry.num_bytes).totals["models_kept"] == 1
    gone = verb.prune(kept.root, max_bytes=entry.num_bytes - 1).totals
    assert (gone["models_removed"], gone["bytes_removed"], gone["models_kept"]) == (1, entry.num_bytes, 0)
    assert not kept.shelf(NAMES).entries()
