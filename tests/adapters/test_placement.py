"""Placement of an adapter's patches on disk: merged by hand, piece by piece, against PEFT's own merge in memory."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from kasa_cli.adapters.parameter_placement import PlacedValue, placed_values
from kasa_cli.adapters.placement import TURNED_CLASSES, Placed, placed
from kasa_cli.adapters.reading import Adapter, Replacement, TokenRows, open_adapter
from kasa_cli.checkpoint.layout import Checkpoint, open_checkpoint
from kasa_cli.errors import ExitCode, InvalidInput
from kasa_cli.model_names.name_map import map_names
from kasa_cli.model_names.names import NameMap
from tests.builders import tiny_models
from tests.builders.adapters import CASES, EXPERTS, LORA, PREFIX, WEIGHTS, Case, put, saved, tampered

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
Q0 = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Base:
    checkpoint: Checkpoint
    names: NameMap

    def placed(self, adapter: Adapter) -> tuple[Placed, ...]:
        return placed(adapter, self.names, self.checkpoint.tensors)

    def values(self, adapter: Adapter) -> tuple[PlacedValue, ...]:
        return placed_values(adapter, self.names, self.checkpoint.tensors)

    def tensors(self) -> Tensors:
        return {
            n: t for file in self.checkpoint.shards for n, t in load_file(self.checkpoint.root / file).items()
        }


def surveyed(root: Path) -> Base:
    checkpoint = open_checkpoint(root)
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    return Base(checkpoint, map_names(checkpoint.config, shapes))


@cache
def base_of(family: str) -> Base:
    return surveyed(tiny_models.saved(family))


def product(one: Placed, adapter: Tensors, expert: int) -> torch.Tensor:
    """s B A of one matrix, oriented as in memory."""
    short = "lora_embedding_" if "lora_embedding_A" in one.patch.tensors else "lora_"
    A, B = (adapter[one.patch.tensors[f"{short}{letter}"]] for letter in "AB")
    r = one.patch.settings["r"]
    if len(one.matrices) > 1:
        A, B = A.reshape(len(one.matrices), r, -1)[expert], B.reshape(len(B), r, -1)[:, :, expert]
    delta = one.patch.settings["scaling"] * B @ A
    return delta.T if one.is_transposed else delta


def merge(base: Tensors, found: tuple[Placed, ...], adapter: Tensors) -> None:
    """Add every patch to the tensors on disk that it is placed on."""
    for one in found:
        for expert, parts in enumerate(one.matrices):
            delta = product(one, adapter, expert)
            assert delta.shape == one.shape and parts[-1].stop == one.shape[0]
            for part in parts:
                rows = delta[part.start : part.stop]
                target = base[part.piece.name]
                target = target if part.piece.index is None else target[part.piece.index]
                target += rows.T if one.is_turned else rows
        if "lora_B.bias" in one.patch.tensors:
            base[one.bias] += one.patch.settings["scaling"] * adapter[one.patch.tensors["lora_B.bias"]]


def put_values(base: Tensors, found: tuple[PlacedValue, ...], adapter: Tensors) -> None:
    """Replace every parameter, or rows of it."""
    for one in found:
        [[part]] = one.matrices
        new = adapter[one.value.tensor]
        if isinstance(one.value, TokenRows):
            base[part.piece.name][list(one.value.indices)] = new
        else:
            base[part.piece.name] = new.clone()


def merged_by_peft(base: Base, adapter: Path) -> Tensors:
    """The tensors that transformers saves after PEFT's merge."""
    config = base.checkpoint.config
    model = getattr(transformers, config["architectures"][0]).from_pretrained(base.checkpoint.root)
    assert isinstance(model, PreTrainedModel)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


PLAIN = [
    name
    for name, case in CASES.items()
    if case.kind in ("lora", "trainable_tokens", "ln_tuning") and name not in ("embedding-tied",)
]


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_merged_piece_by_piece_is_what_peft_merges(name):
    base, path = base_of(CASES[name].family), saved(name)
    adapter, tensors, mine = open_adapter(path), load_file(path / WEIGHTS), base.tensors()
    put_values(mine, base.values(adapter), tensors)
    merge(mine, base.placed(adapter), tensors)
    expected = merged_by_peft(base, path)
    changed = {key for key, tensor in base.tensors().items() if not torch.equal(tensor, mine[key])}
    assert changed and mine.keys() == expected.keys()
    for key in mine:
        assert torch.allclose(mine[key], expected[key], atol=1e-5), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.num_patches])
def test_every_kind_fits_the_base_that_it_was_made_on(name):
    case = CASES[name]
    found = base_of(case.family).placed(open_adapter(saved(name)))
    assert len(found) == case.num_patches
    for one in found:
        assert one.patch.parameter and one.sides in (one.shape, one.shape[::-1])
        assert [part.start for part in one.matrices[0]] == [0, *(part.stop for part in one.matrices[0][:-1])]


def test_experts_are_led_to_the_projections_of_every_expert():
    found = base_of("mixtral").placed(open_adapter(saved("experts")))
    fused = next(one for one in found if one.patch.parameter == "gate_up_proj")
    names = [(part.piece.name.split("experts.")[1], part.start, part.stop) for part in fused.matrices[2]]
    assert names == [("2.w1.weight", 0, 48), ("2.w3.weight", 48, 96)]
    router = next(one for one in found if one.patch.module.endswith("mlp.gate"))
    assert router.matrices[0][0].piece.name == "model.layers.0.block_sparse_moe.gate.weight"


def test_the_numbers_of_an_expert_parameter_follow_the_patterns_for_its_name():
    found = base_of("qwen3-moe").placed(open_adapter(saved("experts-patterns")))
    numbers = {
        (one.patch.module.split(".")[2], one.patch.parameter): (
            one.patch.settings["r"],
            one.patch.settings["alpha"],
        )
        for one in found
    }
    assert numbers == {
        ("0", "gate_up_proj"): (4, 5),
        ("0", "down_proj"): (2, 6),
        ("1", "gate_up_proj"): (4, 6),
        ("1", "down_proj"): (2, 6),
    }


def test_classes_that_store_experts_in_out_are_those_of_transformers():
    root = Path(transformers.__file__).parent / "models"
    found = set()
    for path in root.glob("*/modeling_*.py"):
        text = path.read_text()
        for match in re.finditer(
            r"@use_experts_implementation\([^)]*is_transposed=True[^)]*\)\s*class (\w+)", text
        ):
            found.add(match[1])
    assert found and all(name.startswith(TURNED_CLASSES) for name in found)
    assert all(any(name.startswith(start) for name in found) for start in TURNED_CLASSES)


# --- experts of square matrices, where no shape tells the orientation ---


def square(family: str) -> PreTrainedModel:
    """A tiny mixture whose experts have hidden_size x hidden_size matrices."""
    config = copy.deepcopy(tiny_models.build(family).config)
    for field, value in {"intermediate_size": 32, "moe_intermediate_size": 32}.items():
        if hasattr(config, field):
            setattr(config, field, value)
    model = type(tiny_models.build(family))(config)
    tiny_models.fill(model)
    return model


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4-text"])
def test_square_experts_go_the_way_that_the_release_says(family, tmp_path):
    square(family).save_pretrained(tmp_path / "base")
    base = surveyed(tmp_path / "base")
    model = peft.get_peft_model(
        square(family),
        peft.LoraConfig(**{**LORA, "target_modules": []}, target_parameters=["experts.down_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    adapter, tensors, mine = (
        open_adapter(tmp_path / "adapter"),
        load_file(tmp_path / "adapter" / WEIGHTS),
        base.tensors(),
    )
    merge(mine, base.placed(adapter), tensors)
    expected = merged_by_peft(base, tmp_path / "adapter")
    assert all(torch.allclose(mine[key], expected[key], atol=1e-5) for key in mine)
    old = replace(adapter, config={**adapter.config, "peft_version": "0.18.1"})
    assert {one.is_transposed for one in base.placed(old)} == {True}
    unknown = replace(base, names=replace(base.names, model_class=None))
    with pytest.raises(InvalidInput, match="their orientation is unknown"):
        unknown.placed(adapter)


def test_files_of_an_older_peft_have_the_sides_of_experts_the_other_way_round(tmp_path):
    """Before PEFT 0.19, A had the outputs and B the inputs; a transposition makes such a file from a current one."""
    r, experts = 4, 4

    def swap(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            A, B = tensors[name].reshape(experts, r, -1), tensors[other].reshape(-1, r, experts)
            tensors[name] = B.permute(2, 1, 0).reshape(experts * r, -1)
            tensors[other] = A.permute(2, 1, 0).reshape(-1, r * experts)

    today = saved("experts-qwen3")
    old = tampered(today, tmp_path / "old", swap, peft_version="0.18.0")
    base, merged = base_of("qwen3-moe"), []
    for path in (today, old):
        mine = base.tensors()
        merge(mine, base.placed(open_adapter(path)), load_file(path / WEIGHTS))
        merged.append(mine)
    assert all(torch.allclose(merged[0][key], merged[1][key], atol=1e-6) for key in merged[0])
    assert not torch.equal(
        merged[0]["model.layers.0.mlp.experts.0.up_proj.weight"],
        base.tensors()["model.layers.0.mlp.experts.0.up_proj.weight"],
    )


def test_adapters_of_transformers_4_name_experts_as_the_files_do(tmp_path):
    """Before transformers 5, every expert was a module of its own, named as on disk."""
    base = base_of("mixtral")
    old = {"lora_A.weight": (4, 32), "lora_B.weight": (48, 4)}
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}" for e in range(4) for w in ("w1", "w3")]

    def change(tensors: Tensors) -> None:
        tensors.clear()
        tensors.update(
            {f"{PREFIX}{n}.{short}": torch.randn(shape) for n in names for short, shape in old.items()}
        )

    path = tampered(saved("lora"), tmp_path / "v4", change, target_modules=["w1", "w3"], peft_version=...)
    found = base.placed(open_adapter(path))
    assert sorted(one.matrices[0][0].piece.name for one in found) == sorted(
        f"{name}.weight" for name in names
    )


def test_a_module_named_as_on_disk_is_the_one_in_memory(tmp_path):
    """GPT-2 on the Hub has names without `transformer.`, and so has an adapter of the model without a head."""
    base = base_of("gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in base.tensors().items()}
    (tmp_path / "hub").mkdir()
    save_file(tensors, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    (tmp_path / "hub" / "config.json").write_text((base.checkpoint.root / "config.json").read_text())

    def shorter(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace("transformer.", "")] = tensors.pop(name)

    found = surveyed(tmp_path / "hub").placed(
        open_adapter(tampered(saved("conv1d"), tmp_path / "x", shorter))
    )
    assert {one.is_transposed for one in found} == {True}
    places = {one.patch.module: one.matrices[0][0].piece.name for one in found}
    assert places["transformer.h.0.attn.c_proj"] == "h.0.attn.c_proj.weight" and len(places) == 6


# --- tied weights, resized vocabularies ---


def test_one_end_of_tied_weights_is_said_to_be_tied():
    base = base_of("llama-tied")
    [one] = base.placed(open_adapter(saved("embedding-tied")))
    assert (one.tied, one.tied_with, one.is_transposed) == (True, "lm_head", True)
    [value] = base.values(open_adapter(saved("embedding-tied")))
    assert (value.tied, value.tied_with) == (True, "lm_head")
    [rows] = base.values(open_adapter(saved("tokens-tied")))
    assert (rows.tied, rows.tied_with) == (False, "lm_head")  # PEFT ties trained rows by itself
    assert not any(one.tied for one in base_of("llama").placed(open_adapter(saved("embedding"))))


def test_both_ends_of_tied_weights_are_not_tied(tmp_path):
    case = Case(
        "llama-tied",
        peft.LoraConfig,
        {**LORA, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        "lora",
    )
    model = peft.get_peft_model(tiny_models.fresh("llama-tied"), case.make(**case.options))
    model.save_pretrained(tmp_path)
    found = base_of("llama-tied").placed(open_adapter(tmp_path))
    assert [(one.tied, one.matrices[0][0].piece.name) for one in found] == [
        (False, "model.embed_tokens.weight")
    ] * 2


@pytest.mark.parametrize("is_targeted", [True, False])
def test_a_resized_vocabulary_is_said(is_targeted, tmp_path):
    base = base_of("llama")
    model = tiny_models.fresh("llama")
    model.resize_token_embeddings(100)
    model.name_or_path = str(base.checkpoint.root)
    targets = ["embed_tokens"] if is_targeted else ["q_proj"]
    peft.get_peft_model(model, peft.LoraConfig(**{**LORA, "target_modules": targets})).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    adapter = open_adapter(tmp_path)
    values = {one.value.parameter: one for one in base.values(adapter)}
    assert values["model.embed_tokens.weight"].vocabulary == (96, 100)
    why = "base layer" if is_targeted else "resized"
    assert isinstance(one := values["model.embed_tokens.weight"].value, Replacement) and one.why == why
    found = base.placed(adapter)
    if is_targeted:
        assert found[0].shape == (100, 32) and found[0].matrices[0][0].stop == 100


# --- what does not fit ---


def both(name: str, other: str) -> Callable[[Tensors], Any]:
    """Another name for a module."""

    def change(tensors: Tensors) -> None:
        for key in [key for key in tensors if f"{name}." in key]:
            tensors[key.replace(f"{name}.", f"{other}.")] = tensors.pop(key)

    return change


MISFITS: dict[str, tuple[str, str, Callable[[Tensors], Any] | None, dict[str, Any], str]] = {
    "columns of A": (
        "lora",
        "llama",
        put(f"{Q0}.lora_A.weight", (4, 33)),
        {},
        r"shape \[4, 33\], expected \(r = 4, i = 32\)",
    ),
    "rows of B": (
        "lora",
        "llama",
        put(f"{Q0}.lora_B.weight", (31, 4)),
        {},
        r"shape \[31, 4\], expected \(o = 32, r = 4\)",
    ),
    "no such module": (
        "lora",
        "llama",
        both(Q0, "model.layers.9.x"),
        {"target_modules": "x"},
        "no such module in the base",
    ),
    "no matrix": ("lora", "llama", both(Q0, "model.norm"), {"target_modules": "x"}, "no matrix in the base"),
    "other base": ("lora", "gpt2", None, {}, "no such module in the base|targets in the base"),
    "a layer lost": (
        "lora",
        "llama",
        lambda t: [t.pop(key) for key in list(t) if f"{Q0}." in key],
        {},
        f"targets in the base without tensors in the adapter: '{Q0}'",
    ),
    "wrappers": (
        "experts-qwen3",
        "qwen3-moe",
        None,
        {"target_parameters": EXPERTS[:1]},
        "2 wrappers for 1 targeted",
    ),
    "another parameter": (
        "experts-one",
        "gpt-oss",
        None,
        {"target_parameters": EXPERTS[:1]},
        r"shape \[32, 16\], expected|shape",
    ),
    "experts of another number": (
        "experts-one",
        "gpt-oss",
        lambda t: t.update({k: (v[:8] if "lora_A" in k else v[:, :8]).clone() for k, v in t.items()}),
        {},
        r"expected \(r = 16, i = ",
    ),
    "rank of experts": ("experts-one", "gpt-oss", None, {"r": 8}, r"expected \(r = 32, i = "),
    "bias of none": ("lora-bias", "llama", None, {}, "a bias for .*, which has no bias in the base"),
    "kron": (
        "lokr",
        "llama",
        put(f"{Q0}.lokr_w1", (4, 5)),
        {},
        r"the product is \[32, 40\], the weight \[32, 32\]",
    ),
    "blocks": ("oft", "llama", put(f"{Q0}.oft_R.weight", (3, 28)), {}, "3 blocks of 8 for 32 inputs"),
    "projection": (
        "vera",
        "llama",
        lambda t: t.update({"base_model.vera_A": torch.zeros(4, 31)}),
        {},
        "too small",
    ),
    "bases": (
        "randlora",
        "llama",
        put(f"{Q0}.randlora_gamma", (8, 31)),
        {},
        "the bases are of another weight",
    ),
    "angles": ("road", "llama", put(f"{Q0}.road_theta", (15,)), {}, r"expected \(s = 15\)|angles"),
    "gate": (
        "ia3",
        "llama",
        put("model.layers.0.self_attn.k_proj.ia3_l", (17, 1)),
        {},
        r"expected \(o = 16, 1\)",
    ),
    "components": (
        "osf",
        "llama",
        put(f"{Q0}.osf_svd_params.U_low", (33, 28)),
        {},
        r"expected \(o = 32, k\)",
    ),
    "bat": (
        "miss-bat",
        "llama",
        put(f"{Q0}.miss_block", (7, 4, 4)),
        {},
        "blocks of 4 do not divide 32 and 32",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_the_base_is_refused_by_name(name, tmp_path):
    case, family, change, config, expected = MISFITS[name]
    path = tampered(saved(case), tmp_path / "x", change, **config)
    with pytest.raises(InvalidInput) as caught:
        base_of(family).placed(open_adapter(path))
    assert re.search(expected, str(caught.value)), str(caught.value)
    assert caught.value.exit_code == ExitCode.INVALID and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "change", "config", "expected"),
    [
        ("saved", put("model.norm.weight", (31,)), {}, r"shape \[31\], in the base \[32\]"),
        ("saved", put("lm_head.weight", (96, 31)), {}, r"shape \[96, 31\], in the base \[96, 32\]"),
        ("saved", put("extra.norm.weight", (32,)), {}, "no such parameter in the base: 'extra.norm.weight'"),
        ("tokens", None, {"trainable_token_indices": [1, 96]}, "row 96 is outside the 96 rows of the base"),
        (
            "tokens",
            put("model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 31)),
            {},
            r"rows of shape \[2, 31\]",
        ),
    ],
)
def test_a_value_that_does_not_fit_the_base_is_refused_by_name(case, change, config, expected, tmp_path):
    adapter = open_adapter(tampered(saved(case), tmp_path / "x", change, **config))
    with pytest.raises(InvalidInput, match=expected):
        base_of("llama").values(adapter)


def test_a_quantized_base_is_refused(tmp_path):
    base = base_of("llama")
    entries = {n: replace(e, dtype="I8") if "q_proj" in n else e for n, e in base.checkpoint.tensors.items()}
    with pytest.raises(InvalidInput, match="dtype I8 in the base"):
        placed(open_adapter(saved("lora")), base.names, entries)


def test_without_the_class_names_are_those_on_disk(tmp_path):
    base = base_of("gpt2")
    entries = base.checkpoint.tensors
    names = map_names({"model_type": "unheard"}, {name: entry.shape for name, entry in entries.items()})
    found = placed(open_adapter(saved("conv1d")), names, entries)
    assert {one.is_transposed for one in found} == {True}
    moe = base_of("qwen3-moe")
    with pytest.raises(InvalidInput):
        placed(
            open_adapter(saved("experts-qwen3")),
            replace(moe.names, model_class=None),
            moe.checkpoint.tensors,
        )
