"""The schemas in docs/schema follow the types, and real outputs follow the schemas."""

import copy
import json

import pytest
from jsonschema import Draft202012Validator, ValidationError

from kasa_cli.files.staging import MANIFEST
from tests import schema
from tests.builders import tiny_models
from tests.builders.runs import inside

PAGES = schema.pages()


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_up_to_date(name):
    text = (schema.FOLDER / name).read_text(encoding="utf-8")
    assert text == PAGES[name], "run `python -m tests.schema`"


def test_there_are_no_other_pages():
    assert {path.name for path in schema.FOLDER.iterdir()} == PAGES.keys()


@pytest.mark.parametrize("name", [name for name in PAGES if name.endswith(".json")])
def test_it_is_a_schema(name):
    Draft202012Validator.check_schema(json.loads(PAGES[name]))


COMMANDS = {
    "truncate": ("truncate", "model", "-r", 2, "-o", "cut"),
    "truncate of parts": ("truncate", "model", "-r", 2, "--emit", "adapter,tail", "-o", "parts"),
    "truncate-plan": ("truncate", "model", "-r", 2, "-o", "never", "--dry-run"),
    "merge": ("merge", "cut/tail", "--into", "model", "-o", "merged"),
    "merge-plan": ("merge", "cut/tail", "--into", "model", "-o", "never", "--dry-run"),
    "convert": ("convert", "cut/adapter", "--base", "model", "--to", "lora", "-o", "lora"),
    "convert-plan": ("convert", "cut/adapter", "--base", "model", "--to", "lora", "-o", "never", "--dry-run"),
    "inspect-spectrum": ("inspect", "spectrum", "model"),
    "inspect-diff": ("inspect", "diff", "model", "merged"),
    "inspect-adapter": ("inspect", "adapter", "cut/adapter", "--base", "model"),
    "select-targets": ("select-targets", "model", "--compare", "snr,stable-rank", "--emit", "peft"),
    "measure-plan": ("select-targets", "model", "--dry-run"),
    "verify": ("verify", "cut", "--read-data"),
    "verify against": ("verify", "cut", "--against", "model"),
    "store ls": ("store", "ls"),
    "store prune": ("store", "prune", "--all", "--dry-run"),
}


def validator(name):
    content = schema.manifest() if name == "manifest" else schema.of_report(name.split(" ")[0])
    return Draft202012Validator(content)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KASA_STORE", str(tmp_path / "store"))
    tiny_models.save("llama", tmp_path / "model")
    return tmp_path


def test_real_outputs_follow_the_schemas(place, capsys):
    for name, arguments in COMMANDS.items():
        done = inside(capsys, *arguments, "--json")
        assert done.code == 0, f"{name}: {done.err}"
        validator(name).validate(done.json)
    for folder in ("cut", "parts", "merged", "lora"):
        validator("manifest").validate(json.loads((place / folder / MANIFEST).read_text()))


def test_a_missing_a_further_and_a_mistyped_field_do_not_follow(place, capsys):
    done = inside(capsys, *COMMANDS["truncate"], "--json").json
    edits = (
        lambda content: content.pop("rank"),
        lambda content: content["totals"].pop("min_realised"),
        lambda content: content["tensors"][0].update(more=1),
        lambda content: content["tensors"][0].update(shape=[1, 2, 3]),
        lambda content: content.update(rank="2"),
    )
    for edit in edits:
        content = copy.deepcopy(done)
        edit(content)
        with pytest.raises(ValidationError):
            validator("truncate").validate(content)
