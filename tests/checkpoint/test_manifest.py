"""Manifests as types: they are written back byte for byte, answer questions, and refuse malformed fields."""

import hashlib
import json
from dataclasses import asdict

import pytest

from kasa_cli.checkpoint.manifest import (
    MERGED,
    ORIGINAL,
    TRUNCATED,
    ConvertManifest,
    Manifest,
    MergeManifest,
    TruncateManifest,
    load,
    seal,
)
from kasa_cli.errors import IntegrityError
from kasa_cli.files.staging import MANIFEST
from tests.builders import tiny_models
from tests.builders.runs import finished

TARGET, COPIED = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """One output of every command that writes a manifest, and a truncation without a base."""
    folder = tmp_path_factory.mktemp("manifests")
    model = tiny_models.save("llama", folder / "model")
    cut, parts, merged, converted = (folder / name for name in ("cut", "parts", "merged", "converted"))
    for arguments in (
        ("truncate", model, "-r", 2, "-o", cut),
        ("truncate", model, "-r", 2, "--emit", "adapter,tail", "-o", parts),
        ("merge", cut / "tail", "--into", model, "-o", merged),
        ("convert", cut / "adapter", "--base", model, "--to", "lora", "-o", converted),
    ):
        done = finished(folder / "log", *arguments, "--no-store")
        assert done.code == 0, done.err
    return {"cut": cut, "parts": parts, "merged": merged, "converted": converted}


NAMES = ("cut", "parts", "merged", "converted")


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_was_read_is_written_as_the_same_bytes(name, outputs):
    assert load(outputs[name]).sealed() == (outputs[name] / MANIFEST).read_bytes()


def test_each_command_has_its_type(outputs):
    types = [type(load(outputs[name])) for name in NAMES]
    assert types == [TruncateManifest, TruncateManifest, MergeManifest, ConvertManifest]


def test_the_states_of_a_tensor_are_known_by_its_hashes(outputs):
    cut, merged = load(outputs["cut"]), load(outputs["merged"])
    target, joined = cut.tensors[TARGET], merged.tensors[TARGET]
    assert cut.states(TARGET, target.input_blake3) == {ORIGINAL}
    assert cut.states(TARGET, target.blake3) == {TRUNCATED}
    assert merged.states(TARGET, joined.blake3) == {MERGED}
    assert merged.states(TARGET, target.input_blake3) == {ORIGINAL}
    assert cut.states(TARGET, joined.blake3 + "0") == cut.states("nothing", target.blake3) == frozenset()
    assert load(outputs["parts"]).states(TARGET, target.blake3) == frozenset()


def test_only_targets_have_a_truncation(outputs):
    truncations = load(outputs["cut"]).truncations
    assert TARGET in truncations and COPIED not in truncations
    assert truncations.keys() == load(outputs["parts"]).truncations.keys()
    module, truncation = truncations[TARGET]
    assert (module, truncation.truncation_rank) == (TARGET.removesuffix(".weight"), 2)


def test_a_merge_knows_its_adapters_and_those_of_its_base(outputs):
    manifest = load(outputs["merged"])
    assert manifest.all_merged == {adapter.sha256 for adapter in manifest.adapters}
    assert len(manifest.all_merged) == 1


def test_the_checkpoint_of_a_merge_is_the_output_itself(outputs):
    places = [load(outputs[name]).checkpoint(outputs[name]) for name in ("cut", "merged")]
    assert places == [outputs["cut"] / "base", outputs["merged"]]


def forged(outputs, name, edit, place):
    """An edited manifest with a new seal, as a forger would make it."""
    content = json.loads((outputs[name] / MANIFEST).read_text())
    content.pop("digest")
    edit(content)
    place.mkdir()
    (place / MANIFEST).write_bytes(seal(content))
    return place


@pytest.mark.parametrize(
    ("edit", "path"),
    [
        (lambda content: content["files"].update(x={"size": "1"}), "files.x.size"),
        (lambda content: content["files"].update(x={}), "files.x.size"),
        (lambda content: content["tensors"].update(x={"role": 1}), "tensors.x.role"),
        (lambda content: content["tensors"].update(x=[]), "tensors.x"),
        (lambda content: content["tensors"][TARGET].update(shape="wide"), f"tensors.{TARGET}.shape"),
        (lambda content: content["tensors"][TARGET].pop("sigma_max"), f"tensors.{TARGET}.sigma_max"),
        (lambda content: content["options"].pop("rank"), "options.rank"),
        (lambda content: content["environment"].update(threads_per_worker=True), "threads_per_worker"),
        (lambda content: content["source"].update(repo=3), "source.repo"),
    ],
)
def test_a_malformed_field_is_refused_by_name(edit, path, outputs, tmp_path):
    with pytest.raises(IntegrityError) as caught:
        load(forged(outputs, "cut", edit, tmp_path / "out"))
    assert path in str(caught.value)


def test_of_an_unknown_command_files_and_tensors_are_read(outputs, tmp_path):
    manifest = load(forged(outputs, "cut", lambda content: content.update(command="init"), tmp_path / "out"))
    assert (type(manifest), manifest.command) == (Manifest, "init")
    assert manifest.tensors == load(outputs["cut"]).tensors


def test_the_hash_of_every_file_is_on_record(outputs):
    for name in NAMES:
        for file, record in load(outputs[name]).files.items():
            content = (outputs[name] / file).read_bytes()
            assert record.size == len(content)
            hashes = [digest for key, digest in asdict(record).items() if key != "size" and digest]
            assert len(hashes) == 1
            if record.sha256:
                assert record.sha256 == hashlib.sha256(content).hexdigest()
