"""An adapter's file is opened once, however many patches it holds: each opening reads its whole header."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_cli.checkpoint import safetensors_file
from kasa_cli.checkpoint.open_files import OpenFiles
from kasa_cli.checkpoint.safetensors_file import read_header
from kasa_cli.errors import IntegrityError
from kasa_cli.pipeline.converting.run import ModelLocation, RunOptions, convert
from kasa_cli.pipeline.inspecting.run_adapter import adapter as look
from kasa_cli.pipeline.merging.run import merge
from tests.builders import tiny_models
from tests.builders.adapters import CASES, WEIGHTS, saved

HERE = RunOptions(2, use_store=False)


@pytest.fixture
def opened(monkeypatch):
    """The paths that safetensors opens."""
    paths, safe_open = [], safetensors_file.safe_open

    def counted(path, *args, **kwargs):
        paths.append(path)
        return safe_open(path, *args, **kwargs)

    monkeypatch.setattr(safetensors_file, "safe_open", counted)
    return paths


@pytest.mark.parametrize("name", ["lora", "experts"])
@pytest.mark.parametrize("verb", ["merge", "convert", "look"])
def test_a_command_opens_an_adapter_once(name, verb, tmp_path, opened):
    base, adapter = tiny_models.save(CASES[name].family, tmp_path / "base"), saved(name)
    if verb == "merge":
        merge([adapter], ModelLocation(str(base)), tmp_path / "OUT", running=HERE)
    elif verb == "convert":
        convert(adapter, ModelLocation(str(base)), tmp_path / "OUT", running=HERE)
    else:
        look(adapter, ModelLocation(str(base)), running=HERE)
    assert CASES[name].num_patches > 1
    assert opened.count(adapter / WEIGHTS) == 1


def test_threads_share_a_file(tmp_path):
    tensors = {f"t{i}": torch.full((64, 64), float(i)) for i in range(40)}
    save_file(tensors, tmp_path / "a.safetensors")
    held = read_header(tmp_path / "a.safetensors")
    with OpenFiles() as files, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: files.tensors(held, {"short": name})["short"], 5 * list(tensors)))
    for name, tensor in zip(5 * list(tensors), found, strict=True):
        assert torch.equal(tensor, load_file(tmp_path / "a.safetensors")[name])


def test_a_file_that_changes_while_it_is_open_is_not_read_on(tmp_path):
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "a.safetensors")
    held = read_header(tmp_path / "a.safetensors")
    with OpenFiles() as files:
        files.tensor(held, "a")
        save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "a.safetensors")
        with pytest.raises(IntegrityError, match="changed"):
            files.tensor(held, "b")
