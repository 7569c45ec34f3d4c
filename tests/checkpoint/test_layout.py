"""A folder as a checkpoint: what belongs to it, what stays behind, and every folder that is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from kasa_cli.checkpoint.layout import open_checkpoint
from kasa_cli.errors import InvalidInput, KasaError, UnsafeInput
from tests.builders.faults import shard_name, st, tensor, tiny_model, weight_map, write_index
from tests.builders.folders import tree_hash

INDEX = "model.safetensors.index.json"
FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)
Q0 = "model.layers.0.self_attn.q_proj.weight"


def test_a_sharded_model_is_told_as_it_is(tmp_path):
    checkpoint = open_checkpoint(tiny_model(tmp_path / "m"))
    assert (list(checkpoint.shards), checkpoint.index_name) == ([FIRST, SECOND], INDEX)
    assert checkpoint.companions == ("config.json", "tokenizer.json")
    assert checkpoint.left_out == ()
    assert checkpoint.config["hidden_size"] == 16
    assert {name: checkpoint.shard_of(name) for name in checkpoint.tensors} == weight_map(tmp_path / "m")


def test_tensors_come_by_shard_and_offset_and_are_made_once(tmp_path):
    checkpoint = open_checkpoint(tiny_model(tmp_path / "m", layers=4))
    order = [(checkpoint.shard_of(name), entry.begin) for name, entry in checkpoint.tensors.items()]
    assert order == sorted(order)
    assert checkpoint.tensors is checkpoint.tensors


def test_a_single_file_needs_no_index_and_no_config(tmp_path):
    folder = tiny_model(tmp_path / "m", shards=1)
    (folder / "config.json").unlink()
    checkpoint = open_checkpoint(folder)
    assert (list(checkpoint.shards), checkpoint.index_name, checkpoint.config) == (
        ["model.safetensors"],
        None,
        {},
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [("model.safetensors", "model.fp16.safetensors"), (INDEX, "model.safetensors.index.fp16.json")],
)
def test_a_variant_that_stands_alone_is_the_checkpoint(tmp_path, old, new):
    folder = tiny_model(tmp_path / "m", shards=1 if old == "model.safetensors" else 2)
    (folder / old).rename(folder / new)
    assert new in {*open_checkpoint(folder).shards, open_checkpoint(folder).index_name}


@pytest.mark.parametrize("shards", [1, 2])
def test_config_may_name_the_weights(tmp_path, shards):
    folder = tiny_model(tmp_path / "m", shards=shards)
    name = {1: "weights.safetensors", 2: "weights.safetensors.index.json"}[shards]
    (folder / {1: "model.safetensors", 2: INDEX}[shards]).rename(folder / name)
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    assert len(open_checkpoint(folder).tensors) == 4


def remap(folder: Path, **changes: object) -> None:
    """Change the index: name another shard for a tensor, or (None) remove the tensor."""
    changed = {**weight_map(folder), **{name.replace("__", "."): shard for name, shard in changes.items()}}
    write_index(folder, {name: shard for name, shard in changed.items() if shard is not None})


def first_to(shard: object):
    return lambda folder: write_index(folder, {**weight_map(folder), Q0: shard})


def move_out(folder: Path, name: str) -> None:
    (folder.parent / "outside").mkdir()
    shutil.move(folder / name, folder.parent / "outside" / name)
    (folder / name).symlink_to(folder.parent / "outside" / name)


def copy_tensor(folder: Path) -> None:
    """The index names the first shard for tensors of the second."""
    st(folder / SECOND, {Q0: tensor(0, 16)}, b"\0" * 16)
    write_index(folder, {name: FIRST for name, file in weight_map(folder).items() if file == FIRST})
    write_index(folder, {**weight_map(folder), "other": SECOND})


def only(folder: Path, *names: str) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name in names:
        (folder / name).write_bytes(b"\x80\x04")


def config(text: str):
    return lambda folder: (folder / "config.json").write_text(text)


def deep(folder: Path) -> None:
    (folder / "a/b/c/d/e/f").mkdir(parents=True)


def many(folder: Path) -> None:
    for number in range(10_001):
        (folder / f"{number}.txt").touch()


def big_index(folder: Path) -> None:
    os.truncate(folder / INDEX, 200_000_000)


def loop(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(FIRST)


TEXT = Path.write_text
REFUSED = {
    **{
        f"B1 {shard}": (UnsafeInput, first_to(shard), "not a plain .safetensors file name")
        for shard in ("../x.safetensors", "/abs/x.safetensors", "C:x.safetensors", "\\\\h\\s\\x.safetensors")
    },
    "B1 a/../b": (UnsafeInput, first_to("a/../b.safetensors"), "not a plain"),
    "B1 subfolder": (UnsafeInput, first_to("a/b.safetensors"), "not a plain"),
    "B1 dots": (UnsafeInput, first_to(".."), "not a plain"),
    "B1 empty": (UnsafeInput, first_to(""), "not a plain"),
    "B1 escape codes": (UnsafeInput, first_to("\x1b[2J.safetensors"), "not a plain"),
    "B3 shard linked outside": (UnsafeInput, lambda f: move_out(f, FIRST), "leads out of the folder"),
    "B3 index linked outside": (UnsafeInput, lambda f: move_out(f, INDEX), "leads out of the folder"),
    "B3 config linked outside": (
        UnsafeInput,
        lambda f: move_out(f, "config.json"),
        "leads out of the folder",
    ),
    "B3 companion linked outside": (
        UnsafeInput,
        lambda f: move_out(f, "tokenizer.json"),
        "leads out of the folder",
    ),
    "B3 loop": (InvalidInput, loop, "broken link"),
    "B3 dangling companion": (InvalidInput, lambda f: (f / "vocab.txt").symlink_to("gone"), "broken link"),
    "B4 one shard absent": (InvalidInput, lambda f: (f / FIRST).unlink(), f"missing shards: {FIRST}"),
    "B4 all absent": (
        InvalidInput,
        lambda f: [(f / n).unlink() for n in (FIRST, SECOND)],
        f"{FIRST}, {SECOND}",
    ),
    "B5 not in its shard": (InvalidInput, first_to(SECOND), "in another shard"),
    "B5 in no shard": (InvalidInput, lambda f: remap(f, ghost=FIRST), "not in its shard: ghost"),
    "B5 not in the index": (
        InvalidInput,
        lambda f: remap(f, **{Q0.replace(".", "__"): None}),
        f"index: {Q0}",
    ),
    "B5 in two shards": (InvalidInput, copy_tensor, f"in two shards: {Q0}"),
    "B6 index is a list": (InvalidInput, lambda f: TEXT(f / INDEX, "[]"), "no weight_map"),
    "B6 no weight_map": (InvalidInput, lambda f: TEXT(f / INDEX, "{}"), "no weight_map"),
    "B6 weight_map is a list": (InvalidInput, lambda f: write_index(f, []), "no weight_map"),
    "B6 weight_map is empty": (InvalidInput, lambda f: write_index(f, {}), "no weight_map"),
    "B6 shard is a number": (InvalidInput, first_to(1), "is not a file name"),
    "B6 200 MB": (InvalidInput, big_index, "too large"),
    "B6 duplicate": (
        InvalidInput,
        lambda f: TEXT(f / INDEX, '{"weight_map":{"a":"x","a":"y"}}'),
        "duplicate name 'a'",
    ),
    "B6 nested": (InvalidInput, lambda f: TEXT(f / INDEX, '{"a":' + "[" * 200_000), "nested too deep"),
    "B6 cut short": (InvalidInput, lambda f: TEXT(f / INDEX, '{"weight_map":{'), "invalid JSON"),
    "B7 .bin in the index": (UnsafeInput, first_to("pytorch_model.bin"), "not a plain .safetensors"),
    "B8 single and index": (
        InvalidInput,
        lambda f: st(f / "model.safetensors", {}),
        f"model.safetensors and {INDEX} both claim",
    ),
    "B8 two indexes": (
        InvalidInput,
        lambda f: shutil.copy(f / INDEX, f / "b.safetensors.index.json"),
        "both claim",
    ),
    "C1 only pickle": (UnsafeInput, lambda f: only(f, "pytorch_model.bin"), "only pickle weights"),
    "C3 pickle renamed": (InvalidInput, lambda f: only(f, "model.safetensors"), "truncated"),
    "C7 .pt": (UnsafeInput, lambda f: only(f, "model.pt"), "only pickle weights (model.pt)"),
    "C7 tar": (UnsafeInput, lambda f: only(f, "model.tar"), "only tar archive weights"),
    "C7 DCP": (
        UnsafeInput,
        lambda f: only(f, ".metadata", "__0_0.distcp"),
        "only PyTorch distributed checkpoint",
    ),
    "C7 GGUF": (UnsafeInput, lambda f: only(f, "model-Q4_K_M.gguf"), "only GGUF weights"),
    "C7 npz": (UnsafeInput, lambda f: only(f, "data.npz"), "only NumPy archive weights"),
    "no weights": (InvalidInput, only, "no weights"),
    "only an optimizer": (InvalidInput, lambda f: only(f, "optimizer.pt", "training_args.bin"), "no weights"),
    "an adapter": (
        InvalidInput,
        lambda f: only(f, "adapter_model.safetensors"),
        "an adapter, not a checkpoint",
    ),
    "shards without an index": (InvalidInput, lambda f: (f / INDEX).unlink(), "shards without their index"),
    "Mistral's layout": (InvalidInput, lambda f: only(f, "consolidated.safetensors"), "no model.safetensors"),
    "two variants": (
        InvalidInput,
        lambda f: only(f, "model.a.safetensors", "model.b.safetensors"),
        "both claim",
    ),
    "transformers_weights outside": (
        UnsafeInput,
        config('{"transformers_weights":"../x.safetensors"}'),
        "not a plain",
    ),
    "transformers_weights pickle": (
        UnsafeInput,
        config('{"transformers_weights":"adapter_model.bin"}'),
        "not a plain",
    ),
    "transformers_weights gone": (InvalidInput, config('{"transformers_weights":"x.safetensors"}'), "absent"),
    "transformers_weights number": (InvalidInput, config('{"transformers_weights":1}'), "not a file name"),
    "D6 billion layers": (InvalidInput, config('{"num_hidden_layers":1e9}'), "num_hidden_layers is"),
    "D6 negative": (InvalidInput, config('{"text_config":{"hidden_size":-1}}'), "hidden_size is -1"),
    "D6 NaN": (InvalidInput, config('{"eps":NaN}'), "NaN"),
    "D6 infinite size": (InvalidInput, config('{"hidden_size":Infinity}'), "hidden_size is inf"),
    "D6 300 MB": (InvalidInput, lambda f: os.truncate(f / "config.json", 300_000_000), "too large"),
    "D6 nested 100,000 deep": (InvalidInput, config('{"a":' * 100_000), "nested too deep"),
    "D6 nested 100 deep": (InvalidInput, config('{"a":' * 100 + "1" + "}" * 100), "nested too deep"),
    "config is a list": (InvalidInput, config("[]"), "not a JSON object"),
    "config is cut short": (InvalidInput, config('{"a":'), "invalid JSON"),
    "A23 FIFO companion": (UnsafeInput, lambda f: os.mkfifo(f / "vocab.txt"), "not a regular file"),
    "A23 FIFO config": (
        UnsafeInput,
        lambda f: [(f / "config.json").unlink(), os.mkfifo(f / "config.json")],
        "regular",
    ),
    "A23 FIFO shard": (
        UnsafeInput,
        lambda f: [(f / FIRST).unlink(), os.mkfifo(f / FIRST)],
        "not a regular file",
    ),
    "A23 FIFO index": (
        UnsafeInput,
        lambda f: [(f / INDEX).unlink(), os.mkfifo(f / INDEX)],
        "not a regular file",
    ),
    "name with escape codes": (UnsafeInput, lambda f: (f / "\x1b[2J.txt").touch(), "not printable"),
    "name that is not UTF-8": (
        UnsafeInput,
        lambda f: Path(f, os.fsdecode(b"\xff.txt")).touch(),
        "not printable",
    ),
    "too deep": (InvalidInput, deep, "nested more than 4 deep"),
    "too many": (InvalidInput, many, "more than 10000 files"),
}


@pytest.mark.parametrize(("kind", "build", "word"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_is_no_sound_checkpoint_is_refused(tmp_path, kind, build, word):
    folder = tiny_model(tmp_path / "m")
    build(folder)
    before = tree_hash(tmp_path) if "too many" not in word else {}
    with pytest.raises(KasaError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert word in message
    assert message.isprintable() and len(message) < 1000
    assert not before or tree_hash(tmp_path) == before


@pytest.mark.parametrize("name", ["", "nowhere", "file"])
def test_what_is_no_directory_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="not a directory" if name else "no weights"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "text", ['{"time_step_limit":[0.0,Infinity]}', '{"a":1,"a":2}', '{"hidden_size":null}', "{}"]
)
def test_configs_as_they_exist_are_read(tmp_path, text):
    folder = tiny_model(tmp_path / "m")
    (folder / "config.json").write_text(text)
    open_checkpoint(folder)


def test_names_of_files_and_folders_may_be_strange(tmp_path):
    folder = tmp_path / "-m é [red]"
    folder.mkdir()
    folder = tiny_model(folder / os.fsdecode(b"\xff"))
    (folder / ("n" * 255)).touch()
    assert len(open_checkpoint(folder).tensors) == 4
