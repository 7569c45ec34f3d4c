"""A file name from an index becomes a path only when it is one plain name."""

import sys

import pytest

from kasa_cli.checkpoint.layout import check_shard_name, open_checkpoint
from kasa_cli.errors import UnsafeInput
from tests.builders.faults import st, tensor, tiny_model, write_index

Q0 = "model.layers.0.self_attn.q_proj.weight"


def test_a_canary_outside_is_never_opened(tmp_path):
    folder = tiny_model(tmp_path / "m")
    st(tmp_path / "secret.safetensors", {Q0: tensor(0, 16)}, b"\0" * 16)
    write_index(folder, {Q0: "../secret.safetensors"})
    opened: list[str] = []
    watching = True
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None
    )
    with pytest.raises(UnsafeInput):
        open_checkpoint(folder)
    watching = False
    assert opened and not [path for path in opened if "secret" in path]


@pytest.mark.parametrize(
    "name", ["x.safetensors", "model-00001-of-00002.safetensors", "..x.safetensors", "a b.safetensors"]
)
def test_a_plain_shard_name_passes(name):
    check_shard_name(name, "index")


def test_the_rule_for_shard_names_is_the_one_of_the_hub_library(tmp_path):
    from huggingface_hub import load_torch_model
    from torch import nn

    for name in ("../x.safetensors", "/x.safetensors", "C:x.safetensors", "a/../b.safetensors", "x.bin"):
        write_index(tmp_path, {"weight": name})
        with pytest.raises((ValueError, OSError)):
            load_torch_model(nn.Linear(1, 1), tmp_path)
        with pytest.raises(UnsafeInput):
            check_shard_name(name, "index")
