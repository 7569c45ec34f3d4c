"""Which files of a folder belong to the model, and which links are followed."""

import os
import shutil
from pathlib import Path

import pytest

from kasa_cli.checkpoint.layout import open_checkpoint
from kasa_cli.errors import UnsafeInput
from tests.builders.faults import shard_name, tiny_model

FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)

KEPT = [
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "preprocessor_config.json",
    "LICENSE",
    "modeling_own.py",
    "README.md",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "vision-lora/adapter_config.json",
    "vision-lora/adapter_model.safetensors",
    "mel_filters.npz",
    "voices/one.npy",
]
LEFT = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    "model.gguf",
    "tf_model.h5",
    "flax_model.msgpack",
    "rust_model.ot",
    "model.onnx",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "kasa.manifest.json",
    ".gitattributes",
    ".env",
    "events.out.tfevents.1",
    "2_Dense/pytorch_model.bin",
    "model.fp16.safetensors",
    "medusa.safetensors",
]
NOT_ENTERED = ["onnx", "openvino", "original", ".git", ".cache", "checkpoint-500", "runs", "__pycache__"]


def test_what_belongs_to_the_model_goes_along_and_the_rest_has_a_reason(tmp_path):
    folder = tiny_model(tmp_path / "m", shards=1)
    (folder / "tokenizer.json").unlink()
    for name in (*KEPT, *LEFT, *(f"{directory}/x.safetensors" for directory in NOT_ENTERED)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.companions == tuple(sorted(KEPT))
    assert [left.name for left in checkpoint.left_out] == sorted(LEFT + NOT_ENTERED)
    assert all(left.reason for left in checkpoint.left_out)


def test_no_pickle_beside_safetensors_is_opened(tmp_path):
    folder = tiny_model(tmp_path / "m")
    os.mkfifo(folder / "pytorch_model.bin")  # opening it would hang
    assert [left.name for left in open_checkpoint(folder).left_out] == ["pytorch_model.bin"]


def hub_snapshot(cache: Path) -> Path:
    """A model as the Hub cache keeps it: a snapshot of links to blobs, one of them to the shared store."""
    root = tiny_model(cache / "models--o--n" / "snapshots" / "c0ffee")
    blobs, shared = cache / "models--o--n" / "blobs", cache / "blobs" / "ab"
    blobs.mkdir()
    shared.mkdir(parents=True)
    for path in list(root.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(Path("../../blobs", path.name))
    shutil.move(blobs / FIRST, shared / "abcd")
    (blobs / FIRST).symlink_to(Path("../../blobs/ab/abcd"))
    return root


def test_links_into_the_hub_cache_are_trusted_when_kasa_looked_there(tmp_path):
    root = hub_snapshot(tmp_path / "hub")
    assert len(open_checkpoint(root, hub_cache=tmp_path / "hub").tensors) == 4
    with pytest.raises(UnsafeInput, match="Hub id"):
        open_checkpoint(root)
    with pytest.raises(UnsafeInput):
        open_checkpoint(root, hub_cache=tmp_path / "hub" / "models--o--n" / "snapshots")


def test_links_inside_the_folder_are_followed(tmp_path):
    folder = tiny_model(tmp_path / "m")
    (folder / SECOND).rename(folder / "stored.safetensors")
    (folder / SECOND).symlink_to("stored.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert len(open_checkpoint(tmp_path / "link").tensors) == 4


def test_a_linked_directory_is_left_out(tmp_path):
    folder = tiny_model(tmp_path / "m")
    (folder / "up").symlink_to("..")
    assert [left.name for left in open_checkpoint(folder).left_out] == ["up"]
