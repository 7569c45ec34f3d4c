"""`import kasa_cli as kasa`: every verb is a function that takes the flags of its command."""

import doctest
import gc
import inspect
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from enum import Enum
from importlib import import_module
from pathlib import Path

import pytest
import torch

import kasa_cli as kasa
from kasa_cli.cli.output import ONLY_OF_COMMANDS
from kasa_cli.errors import ExitCode
from tests.builders.checkpoints import plain_model
from tests.builders.runs import ROOT, environment, inside

ONLY_OF_FUNCTIONS = {"progress"}
HEAVY = {
    "torch",
    "transformers",
    "typer",
    "rich",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "scipy",
    "altair",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return plain_model(tmp_path_factory.mktemp("door") / "model")


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("KASA_STORE", str(tmp_path / "store"))


def function_and_command(verb):
    name = kasa.function_name(verb)
    function, command = getattr(kasa, name), getattr(import_module(f"kasa_cli.cli.{name}"), name)
    return inspect.signature(function).parameters, inspect.signature(command).parameters


def plain(value):
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("verb", kasa.VERBS)
def test_the_keywords_of_a_function_are_the_flags_of_its_command(verb):
    function, command = function_and_command(verb)
    keywords = {name: plain(one.default) for name, one in function.items() if name not in ONLY_OF_FUNCTIONS}
    flags = {name: plain(one.default) for name, one in command.items() if name not in ONLY_OF_COMMANDS}
    assert keywords == flags


@pytest.mark.parametrize("verb", kasa.VERBS)
def test_paths_come_first_and_all_else_is_a_keyword(verb):
    function, _ = function_and_command(verb)
    positional = [name for name, one in function.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert set(positional) <= {"model", "output", "adapter", "adapters", "first", "second"}
    assert positional == list(function)[: len(positional)]


def test_the_names_of_flags_are_those_of_the_keywords():
    """A repeatable flag has a plural keyword, and a few keywords are shorter than their flags."""
    renamed = {"output_dir": "output", "target": "targets", "exclude": "excludes", "weight": "weights"}
    for verb in kasa.VERBS:
        _, command = function_and_command(verb)
        for name, parameter in command.items():
            option = parameter.annotation.__metadata__[0]
            if name in ONLY_OF_COMMANDS or not hasattr(option, "is_flag"):
                continue
            declared = [one for one in option.param_decls or () if one.startswith("--")]
            flag = declared[0][2:].replace("-", "_") if declared else name
            assert renamed.get(flag, flag) == name, (verb, flag)


def test_to_import_kasa_imports_nothing_heavy():
    code = "import sys, kasa_cli; kasa_cli.KasaError; print(sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(done.stdout.replace("'", '"')))


def test_every_public_name_is_listed_and_a_wrong_one_is_an_attribute_error():
    names = dir(kasa)
    for name in (
        "truncate",
        "inspect_diff",
        "to_json",
        "spectrum_page",
        "KasaError",
        "UsageError",
        "MergeReport",
    ):
        assert name in names and getattr(kasa, name)
    with pytest.raises(AttributeError, match="sweeep"):
        _ = kasa.sweeep


def test_truncate_gives_the_report_of_the_command(model, tmp_path, capsys):
    seen = []
    report = kasa.truncate(str(model), tmp_path / "out", rank=2, emit=["base", "tail"], progress=seen.append)
    assert capsys.readouterr() == ("", "")
    done = inside(
        capsys, "truncate", model, "-o", tmp_path / "again", "-r", 2, "--emit", "base,tail", "--json"
    )
    ours, theirs = json.loads(kasa.to_json(report)), done.json
    for one in (ours, theirs):
        one.pop("output"), one["totals"].pop("decompositions"), one["totals"].pop("decompositions_reused")
    assert ours == theirs
    stages = list(dict.fromkeys(event.stage for event in seen))
    assert stages == ["measure", "write", "tail"]
    last = [event for event in seen if event.stage == "measure"][-1]
    assert (last.num_done, last.fraction) == (last.num_items, pytest.approx(1))


def test_a_plan_writes_nothing(model, tmp_path):
    plan = kasa.truncate(model, tmp_path / "out", rank=2, dry_run=True)
    assert isinstance(plan, kasa.PlanReport) and plan.dry_run
    assert isinstance(kasa.select_targets(model, dry_run=True), kasa.MeasurePlan)
    assert not list(tmp_path.iterdir())


def test_the_path_of_a_user(model, tmp_path):
    out = tmp_path / "out"
    kasa.truncate(model, out, rank=2)
    merged = kasa.merge([out / "tail"], into=model, output=tmp_path / "merged", weights=[1.0])
    assert merged.adapters[0].tensors_consumed == merged.adapters[0].tensors_total
    single = kasa.merge(str(out / "tail"), into=str(model), output=str(tmp_path / "single"))
    assert single.tensors == merged.tensors
    lora = kasa.convert(out / "adapter", base=model, output=tmp_path / "lora", to="lora")
    assert lora.kind == "kasa"
    assert kasa.inspect_adapter(out / "tail", base=None).modules
    assert kasa.inspect_diff(model, out / "base", rank=2, targets="q_proj").tensors
    assert kasa.verify(out, against=model).compared
    chosen = kasa.select_targets(model, top_p=0.2, targets=["q_proj", "k_proj"], rule="strict")
    assert chosen.target_modules
    assert kasa.spectrum_page(kasa.inspect_spectrum(model)).startswith("<!doctype html>")
    assert kasa.store_ls().tensors
    assert kasa.store_prune(max_size="1kB", dry_run=True).totals["dry_run"]


def test_files_are_written_where_they_are_named(model, tmp_path):
    files = {name: tmp_path / name for name in ("html", "values")}
    kasa.inspect_spectrum(model, **files)
    assert all(file.stat().st_size for file in files.values())
    with pytest.raises(kasa.OutputExists):
        kasa.inspect_spectrum(model, html=files["html"])
    kasa.inspect_spectrum(model, html=files["html"], overwrite=True)
    chosen = kasa.select_targets(model, output=tmp_path / "chosen.json")
    assert (tmp_path / "chosen.json").read_text() == kasa.to_json(chosen) + "\n"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rounding": "up"}, "'up'.*nearest"),
        ({"emit": "base,tall"}, "'tall'.*base, adapter, tail"),
        ({"min_realised": 2.0}, "2.0"),
        ({"targets": "q_prj"}, "q_proj"),
        ({"device": "abacus"}, "abacus"),
        ({"workers": -1}, "workers"),
    ],
)
def test_a_wrong_value_is_a_usage_error(model, tmp_path, keywords, message):
    with pytest.raises(kasa.UsageError, match=message) as caught:
        kasa.truncate(model, tmp_path / "out", **{"rank": 2, **keywords})
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 1.5), ("rank", True), ("truncation_rank", 1.5), ("workers", float("nan")), ("workers", "2")],
)
def test_a_number_that_is_not_whole_is_a_usage_error(model, tmp_path, name, value):
    with pytest.raises(kasa.UsageError, match=re.escape(repr(value))):
        kasa.truncate(model, tmp_path / "OUT", **{"rank": 2, name: value})
    assert not list(tmp_path.glob("OUT*"))


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(kasa.BelowStandard("a", "b", "c", {"weak": 1})))
    assert (str(error), error.where, error.report) == ("a: b: c", "b", {"weak": 1})


def test_a_wrong_keyword_is_a_type_error(model, tmp_path):
    with pytest.raises(TypeError, match="rnak"):
        kasa.truncate(model, tmp_path / "out", rnak=2)


def test_strict_raises_and_holds_the_report(tmp_path):
    model = plain_model(tmp_path / "model", dim=64, dtype=torch.bfloat16)
    with pytest.raises(kasa.BelowStandard, match=r"0\.999") as caught:
        kasa.truncate(model, tmp_path / "out", rank=1, strict=True, min_realised=0.999)
    assert caught.value.exit_code == 11
    assert caught.value.report.totals["below_min_realised"] and (tmp_path / "out" / "base").is_dir()


def test_the_examples_of_the_docs_run(tmp_path, monkeypatch):
    plain_model(tmp_path / "org" / "model", dim=64)
    plain_model(tmp_path / "org" / "chat", dim=64, seed=1)
    monkeypatch.chdir(tmp_path)
    kasa.truncate("org/model", "first", rank=8)
    shutil.copytree("first/adapter", "my-adapter")
    blocks = re.findall(r"^```python\n(>>>.*?)^```", (ROOT / "docs" / "cli.md").read_text(), re.M | re.S)
    documented = doctest.DocTestParser().get_doctest("".join(blocks), {}, "cli.md", "cli.md", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(documented) == (0, len(documented.examples))
    shown = {kasa.function_name(verb) for verb in kasa.VERBS} - {"demo"}
    assert shown <= set(re.findall(r"kasa\.(\w+)\(", "".join(blocks)))


def test_a_report_prints_as_its_table(model):
    report = kasa.inspect_spectrum(model, targets="q_proj")
    assert "q_proj" in str(report) and "╭" not in repr(report)
    assert report._repr_html_().startswith("<table><caption>") and "q_proj" in report._repr_html_()
    assert repr(report).startswith("SpectrumReport(command='inspect spectrum'")


def test_names_in_a_notebook_are_text():
    row = {
        "name": "<script>",
        "shape": [1, 1],
        "dtype": "F32",
        "facts": [],
        "bytes": 1,
        "last_used": "",
        "content": "",
    }
    report = kasa.StoreReport("store ls", "x", (row,), {"tensors": 1, "models": 0, "bytes": 1})
    assert "<script>" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()


def global_state():
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        gc.get_threshold(),
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        list(warnings.filters),
        {name: value for name, value in environment().items() if name.startswith(("OMP", "HF", "KASA"))},
    )


def test_no_call_changes_the_state_of_the_process(model, tmp_path):
    kasa.truncate(model, tmp_path / "first", rank=2)
    before = global_state()
    kasa.truncate(model, tmp_path / "out", rank=2, threads_per_worker=3)
    kasa.verify(tmp_path / "out", against=model)
    with pytest.raises(kasa.KasaError):
        kasa.truncate(model, tmp_path / "out", rank=2, threads_per_worker=3)
    assert global_state() == before


def test_an_interrupted_call_stops_its_threads_and_resumes(model, tmp_path):
    def interrupt(event):
        if event.stage == "write" and event.num_done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kasa.truncate(model, tmp_path / "out", rank=2, no_store=True, progress=interrupt)
    assert not [one for one in threading.enumerate() if one.name.startswith("kasa")]
    assert not (tmp_path / "out").exists()
    report = kasa.truncate(model, tmp_path / "out", rank=2, no_store=True)
    assert report.totals["decompositions"] == 0 and report.totals["decompositions_reused"]
