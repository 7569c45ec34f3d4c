"""The documentation agrees with the code: verbs, exit codes, presets, pins; and things that the code never does."""

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain

import pytest
from typer.main import get_command

from kasa_cli.cli.app import app
from kasa_cli.errors import ExitCode
from tests.builders.runs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = sorted((ROOT / "kasa_cli").rglob("*.py"))


def test_every_verb_is_in_the_readme():
    for verb in get_command(app).commands:
        assert f"`kasa {verb}" in README


def test_the_documented_exit_codes_are_those_of_the_code():
    rows = re.findall(r"^\| (\d+) \| ", CLI, re.MULTILINE)
    assert [int(code) for code in rows] == [int(code) for code in ExitCode]


def test_every_field_of_a_tensor_is_documented():
    from dataclasses import fields

    from kasa_cli.report import TensorRow

    for field in fields(TensorRow):
        assert f"`{field.name}`" in CLI


def test_every_package_has_a_face_in_the_contract():
    """But for the three at the top, of which nobody imports but the door and the command line."""
    folders = {path.parent for path in SOURCES if path.name == "__init__.py"} - {ROOT / "kasa_cli"}
    packages = {path.relative_to(ROOT).as_posix().replace("/", ".") for path in folders}
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    protected = {one["allowed_importers"][0] for one in contracts if one["type"] == "protected"}
    assert packages - {"kasa_cli.cli", "kasa_cli.commands", "kasa_cli.render"} == protected


def test_the_picture_names_every_package_and_no_other():
    picture = ARCHITECTURE.split("```")[3]
    packages = {path.name for path in (ROOT / "kasa_cli").rglob("*") if (path / "__init__.py").is_file()}
    assert set(re.findall(r"\b(\w+)/", picture)) == packages


def test_every_path_on_the_page_of_the_architecture_exists():
    for path in re.findall(r"`([\w/]+(?:/|\.py))`", ARCHITECTURE):
        assert (ROOT / "kasa_cli" / path).exists() or (ROOT / path).exists(), path


def test_the_readme_holds_both_commands_and_ci_runs_the_second():
    assert "pip install -c configs/constraints.txt '.[demo]' && kasa demo" in README
    assert "pip install -c configs/constraints.txt -e '.[dev]' && python -m tests" in README
    assert "python -m tests" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_preset_but_the_default_is_in_the_readme():
    for preset in (ROOT / "configs").glob("kasa-*.yaml"):
        assert preset.name in README


def test_every_dependency_is_pinned():
    pins = (ROOT / "configs" / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins.splitlines() if "==" in line}
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.split(r"[\[>=<]", one)[0].lower().replace("_", "-") for one in wanted} - {"kasa-cli"}
    assert names <= pinned


FORBIDDEN = {"eval", "exec", "load_module", "system", "popen"}
LOADERS = {"from_pretrained"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_code_or_pickle_of_a_stranger_is_run(path):
    """Only the demo loads a model; no code evaluates, unpickles or trusts remote code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    }
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not called & FORBIDDEN
    assert not imported & {"pickle", "marshal", "shelve", "subprocess"}
    assert path.stem == "demo" or not called & LOADERS
    trusting = [k for node in ast.walk(tree) if isinstance(node, ast.Call) for k in node.keywords]
    assert not [k for k in trusting if k.arg == "trust_remote_code" and getattr(k.value, "value", True)]


@pytest.mark.parametrize("script", ["select", "truncate", "realised"])
def test_every_benchmark_of_the_readme_starts(script):
    """One of them has the same name as a module of the standard library that all of them import."""
    assert f"python benchmarks/{script}.py" in README
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
