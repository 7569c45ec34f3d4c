"""The same command writes the same bytes in any environment, and nothing of the machine is in them."""

import getpass
import json
import os
import re
import socket
from pathlib import Path

import pytest
import torch

from kasa_cli.checkpoint.safetensors_file import read_header
from tests.builders.checkpoints import save_plain
from tests.builders.folders import tree_hash
from tests.builders.runs import TOKEN, finished, outside

RUN = ("-r", 8, "--rounding", "preserve", "--max-shard-size", "2MB")
USER, HOME = "kasacanaryuser", "kasacanaryhome"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Sides on both sides of 512, where Lanczos takes over, wide and tall, in half precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q_proj": (640, 640), "k_proj": (64, 640), "up_proj": (704, 640), "down_proj": (640, 704)}
    weights = {
        f"model.layers.{layer}.mlp.{module}.weight": torch.randn(shape, generator=generator).bfloat16()
        for layer in range(2)
        for module, shape in shapes.items()
    }
    weights["model.embed_tokens.weight"] = torch.randn(32, 640, generator=generator)
    return save_plain(weights, tmp_path_factory.mktemp("same") / "model")


@pytest.fixture(scope="module")
def reference(model):
    """An output made with umask 022 by one worker."""
    output = model.parent / "reference"
    command = ("truncate", model, "-o", output, *RUN, "--workers", 1, "--json")
    done = outside(*command, env={"PYTHONHASHSEED": "0"}, umask=0o022)
    assert done.code == 0, done.err
    return output, done.json


def contents(folder):
    return {name: digest for name, (_, digest) in tree_hash(folder).items()}


def modes(folder):
    return {oct(path.lstat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()}, {
        oct(path.lstat().st_mode & 0o777) for path in (folder, *folder.rglob("*")) if path.is_dir()
    }


def test_the_model_is_large_enough_for_lanczos_and_several_shards(reference):
    output, report = reference
    assert len({row["solver"] for row in report["tensors"]}) > 1
    assert len(list((output / "base").glob("*.safetensors"))) > 2


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_changes_nothing(model, reference, tmp_path, workers):
    done = finished(tmp_path / "log", "truncate", model, "-o", tmp_path / "OUT", *RUN, "--workers", workers)
    assert done.code == 0, done.err
    assert contents(tmp_path / "OUT") == contents(reference[0])


def test_hash_seed_locale_directory_and_home_change_nothing_and_modes_follow_the_umask(
    model, reference, tmp_path
):
    place = tmp_path / "elsewhere" / "ünter"
    place.mkdir(parents=True)
    done = outside(
        *("truncate", os.path.relpath(model, place), "-o", "OUT", *RUN),
        cwd=place,
        umask=0o077,
        env={
            "PYTHONHASHSEED": "1",
            "LC_ALL": "C",
            "TZ": "Pacific/Kiritimati",
            "HOME": str(tmp_path / HOME),
            "USER": USER,
            "LOGNAME": USER,
            "OMP_NUM_THREADS": "2",
            "MKL_NUM_THREADS": "2",
        },
    )
    assert done.code == 0, done.err
    assert contents(place / "OUT") == contents(reference[0])
    assert modes(reference[0]) == ({"0o644"}, {"0o755"})
    assert modes(place / "OUT") == ({"0o600"}, {"0o700"})
    assert [path.name for path in place.iterdir()] == ["OUT"]
    assert not (tmp_path / HOME).exists()


def test_another_seed_changes_the_adapter_alone(model, reference, tmp_path):
    done = finished(tmp_path / "log", "truncate", model, "-o", tmp_path / "OUT", *RUN, "--seed", 1)
    assert done.code == 0, done.err
    ours, theirs = contents(tmp_path / "OUT"), contents(reference[0])
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing == {"adapter/adapter_model.safetensors", "kasa.manifest.json"}


def test_selecting_fewer_targets_leaves_the_others_as_they_were(model, reference, tmp_path):
    few = ("--target", "layers.1.mlp.q_proj", "--emit", "adapter,tail")
    assert finished(tmp_path / "log", "truncate", model, "-o", tmp_path / "OUT", *RUN, *few).code == 0
    for folder in ("adapter", "tail"):
        whole = (reference[0] / folder / "adapter_model.safetensors").read_bytes()
        path = tmp_path / "OUT" / folder / "adapter_model.safetensors"
        found = read_header(path).tensors
        assert {name.split(".")[4] + "." + name.split(".")[6] for name in found} == {"1.q_proj"}
        assert all(path.read_bytes()[one.begin : one.end] in whole for one in found.values())


def test_nothing_of_the_machine_is_in_a_file(model, reference, tmp_path):
    output, _ = reference
    names = {str(model), str(model.parent), str(tmp_path.parent), str(Path.cwd()), TOKEN, USER, HOME}
    names |= {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for name in names:
            assert name.encode() not in content, (path, name)
        if path.suffix in {".json", ".md"}:
            assert not re.search(rb"20[2-9]\d-[01]\d-[0-3]\d|\d\d:\d\d:\d\d|/(?:home|tmp|root)/", content), (
                path
            )


def test_the_papers_are_canonical(reference):
    manifest = (reference[0] / "kasa.manifest.json").read_text()
    assert json.dumps(json.loads(manifest), sort_keys=True, indent=1) + "\n" == manifest
    for path in reference[0].rglob("*.safetensors"):
        assert dict(read_header(path).metadata) == {"format": "pt"}
