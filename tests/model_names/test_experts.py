"""How `model_names.experts` assembles weights, against the conversions of transformers."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from kasa_cli.checkpoint.matrix import Piece
from kasa_cli.model_names.conversion import LoadedTensor, compositions, described
from kasa_cli.model_names.experts import FOLLOWED, Composition, NotAssembled, matrices
from tests.builders import tiny_models
from tests.builders.candidates import (
    Saved,
    assert_accounted,
    assert_same_spectra,
    by_kind,
    on_disk,
    peft_order,
    pieces_of,
    rewritten,
    saved,
    singular_values,
    surveyed,
)
from tests.builders.checkpoints import WEIGHTS, Tensors

MOE = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


def saved_model(model: PreTrainedModel, directory: Path) -> Saved:
    tiny_models.fill(model)
    model.save_pretrained(directory)
    return surveyed(directory)


def without(*names: str) -> object:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


# --- the conversions that are followed ---

# dimensions in memory: operations, and the shapes of the tensors on disk by pattern; 12 experts, (6, 4) each
RECIPES: dict[int, list[tuple[list[ConversionOps], dict[str, list[tuple[int, ...]]]]]] = {
    2: [
        ([Concatenate(dim=0)], {"a": [(2, 4)], "b": [(4, 4)]}),
        ([PermuteForRope()], {"a": [(6, 4)]}),
        ([Transpose(0, 1)], {"a": [(4, 6)]}),
    ],
    3: [
        ([MergeModulelist(dim=0)], {"a.*.w": [(6, 4)] * 12}),
        ([MergeModulelist(dim=0), Concatenate(dim=1)], {"a.*.w": [(2, 4)] * 12, "a.*.v": [(4, 4)] * 12}),
        ([Concatenate(dim=1)], {"a": [(12, 3, 4)], "b": [(12, 3, 4)]}),
        ([Interleave(dim=1)], {"a": [(12, 6, 4)]}),
        ([Transpose(1, 2)], {"a": [(12, 4, 6)]}),
    ],
}


def disk_names(pattern: str, count: int) -> list[str]:
    """Names that a pattern matches, not in the order of the loader."""
    return [pattern.replace("*", str(number)) for number in range(count)]


@pytest.mark.parametrize(
    ("dimensions", "operations", "shapes"),
    [(dimensions, *recipe) for dimensions, recipes in RECIPES.items() for recipe in recipes],
    ids=str,
)
def test_a_followed_conversion_keeps_the_singular_values(
    dimensions: int, operations: list[ConversionOps], shapes: Mapping[str, list[tuple[int, ...]]]
) -> None:
    """transformers converts tensors of noise; the stacked pieces have the same spectra as the result."""
    torch.manual_seed(0)
    converter = WeightConverter(list(shapes), "fused", operations)
    assert (dimensions, tuple(map(described, operations))) in FOLLOWED
    tensors: Tensors = {}
    loaded: dict[str, LoadedTensor] = {}
    for pattern, sides in shapes.items():
        for name, shape in zip(disk_names(pattern, len(sides)), sides, strict=True):
            tensors[name] = torch.randn(shape, dtype=torch.float64)
            loaded[name] = LoadedTensor("fused", False, pattern, converter)
            converter.add_tensor("fused", name, pattern, lambda name=name: tensors[name])
    made = converter.convert("fused", config=SimpleNamespace(num_attention_heads=3))["fused"]
    found = matrices(
        tuple(made.shape), compositions(loaded)["fused"], {n: tuple(t.shape) for n, t in tensors.items()}
    )
    whole = made if dimensions == 3 else made[None]
    assert len(found) == len(whole)
    for pieces, W in zip(found, whole.numpy(), strict=True):
        assert np.allclose(singular_values(on_disk(tensors, pieces)), singular_values(W), atol=1e-13)


def test_every_followed_conversion_is_checked_against_transformers() -> None:
    checked = {(d, tuple(map(described, ops))) for d, recipes in RECIPES.items() for ops, _ in recipes}
    assert checked | {(2, ()), (3, ())} == FOLLOWED


def test_transformers_makes_fused_experts_in_no_other_way() -> None:
    """If this fails, a new transformers has a conversion: follow it, or skip its tensors by name."""
    ways: dict[tuple[str, ...], set[str]] = {}
    for family, conversions in conversion_mapping._build_checkpoint_conversion_mapping().items():
        for one in conversions:
            if isinstance(one, WeightConverter) and re.search(r"experts\.\w+_proj$", one.target_patterns[0]):
                ways.setdefault(tuple(map(described, one.operations)), set()).add(family)
    assert len(ways) > 4
    unknown = {
        operations: families for operations, families in ways.items() if (3, operations) not in FOLLOWED
    }
    assert unknown in ({}, {("ErnieFuseAndSplitTextVisionExperts",): {"ernie4_5_vl_moe"}})


# --- checkpoints ---


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "deepseek-v3", "jamba", "granite-moe", "gpt-oss"])
def test_experts_that_were_saved_fused_are_one_piece_each(family: str, tmp_path: Path) -> None:
    case = saved(family, tmp_path, save_original_format=False)
    chosen = case.chosen()
    assert by_kind(chosen[0]) == peft_order(case.model())
    fused = [one for one in chosen[0] if one.kind == "parameter"]
    assert fused
    for one in fused:
        assert pieces_of(one) == [(Piece(one.module, expert),) for expert in range(4)]
    assert_same_spectra(case, chosen[0])
    assert_accounted(case, chosen)


def test_an_expert_is_its_gate_above_its_up(tmp_path: Path) -> None:
    case = saved("mixtral", tmp_path)
    fused = {one.module: one for one in case.chosen()[0]}
    assert fused[GATE_UP].shape == (96, 32)
    for expert in range(4):
        gate, up, down = (Piece(MOE.format(1, expert, part)) for part in ("w1", "w3", "w2"))
        assert fused[GATE_UP].matrices[expert].pieces == (gate, up)
        assert fused[DOWN].matrices[expert].pieces == (down,)


def test_experts_are_ordered_by_number_not_by_name(tmp_path: Path) -> None:
    """Expert 10 sorts before expert 2 as text."""
    sizes = {**tiny_models.TEXT, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, num_local_experts=12, num_experts_per_tok=2)
    case = saved_model(transformers.MixtralForCausalLM(config), tmp_path)
    found = case.chosen()[0]
    assert found[-1].matrices[10].pieces == (Piece(MOE.format(0, 10, "w2")),)
    assert_same_spectra(case, found)


def test_experts_of_the_hub_may_lie_transposed(tmp_path: Path) -> None:
    """Qwen3-VL-MoE has the same name and other sides."""
    text = {**tiny_models.TEXT, **tiny_models.MOE, "head_dim": 8}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    case = saved_model(transformers.Qwen3VLMoeForConditionalGeneration(config), tmp_path)
    path = tmp_path / WEIGHTS
    tensors = load_file(path)
    turned = {n: t.transpose(1, 2).contiguous() if "experts" in n else t for n, t in tensors.items()}
    for stored in (tensors, turned):
        save_file(stored, path, metadata={"format": "pt"})
        case = surveyed(tmp_path)
        chosen = case.chosen()
        modules, parameters = peft_order(case.model())
        assert len(parameters) == 4
        assert by_kind(chosen[0]) == (modules, parameters)
        assert {one.is_transposed for one in chosen[0][len(modules) :]} == {stored is turned}
        assert not any(one.is_transposed for one in chosen[0][: len(modules)])
        assert_same_spectra(case, chosen[0])
        assert_accounted(case, chosen)


def test_a_matrix_that_transformers_splits_is_named(tmp_path: Path) -> None:
    sizes = {key: tiny_models.TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = transformers.NomicBertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    case = saved_model(transformers.NomicBertModel(config), tmp_path)
    split = [name for name in case.entries if "Wqkv.weight" in name]
    reasons = case.reasons()
    assert [reasons[name] for name in split] == ["transformers makes it by Chunk(dim=0): not followed"]
    absent = {name for name in reasons if name not in case.entries}
    missed = set(peft_order(case.model())[0]) - set(case.labels())
    assert {f"{module}.weight" for module in missed} - absent == {"layers.0.self_attn.q_proj.weight"}


# --- inconsistent checkpoints ---

AMISS = {
    "an expert": (
        [MOE.format(1, 2, part) for part in ("w1", "w2", "w3")],
        "expert 2 of 4 is not whole on disk",
    ),
    "one w3": ([MOE.format(1, 3, "w3")], "expert 3 of 4 is not whole on disk"),
    "one w1": ([MOE.format(1, 0, "w1")], "expert 0 of 4 is not whole on disk"),
    "every w3": ([MOE.format(1, e, "w3") for e in range(4)], "[48, 32] on disk, [96, 32] in memory"),
}


@pytest.mark.parametrize("missing", AMISS)
def test_a_parameter_that_is_not_whole_is_no_candidate(missing: str, tmp_path: Path) -> None:
    names, reason = AMISS[missing]
    case = rewritten("mixtral", tmp_path, without(*names))  # type: ignore[arg-type]
    found, skipped = case.chosen()
    assert_accounted(case, (found, skipped))
    gone = {GATE_UP, DOWN} if missing == "an expert" else {GATE_UP}
    everything = peft_order(tiny_models.build("mixtral"))
    assert by_kind(found) == (everything[0], [name for name in everything[1] if name not in gone])
    reasons = {one.name: one.reason for one in skipped}
    left = MOE.format(1, 1, "w1")
    assert reasons[left] == f"as {GATE_UP}: {reason}" or reasons[left] == reason


def test_a_parameter_of_which_nothing_is_on_disk_is_named(tmp_path: Path) -> None:
    names = [MOE.format(1, e, part) for e in range(4) for part in ("w1", "w3")]
    case = rewritten("mixtral", tmp_path, without(*names))  # type: ignore[arg-type]
    assert case.reasons()[GATE_UP] == "no tensor on disk holds it by itself"
    assert GATE_UP not in case.labels()


def test_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    def more(tensors: Tensors) -> Tensors:
        return {**tensors, MOE.format(1, 4, "w2"): torch.ones(32, 48)}

    case = rewritten("mixtral", tmp_path, more)
    assert DOWN not in case.labels()
    assert case.reasons()[MOE.format(1, 4, "w2")] == "5 experts on disk, 4 in memory"


def test_an_expert_of_another_shape_is_refused(tmp_path: Path) -> None:
    def narrow(tensors: Tensors) -> Tensors:
        return {**tensors, MOE.format(1, 2, "w3"): torch.ones(47, 32)}

    case = rewritten("mixtral", tmp_path, narrow)
    assert case.reasons()[MOE.format(1, 0, "w1")] == "[48, 32] and [47, 32] on disk, [96, 32] in memory"


def test_two_layouts_at_once_are_accounted_for(tmp_path: Path) -> None:
    """transformers cannot load this; kasa takes the layout that the loader would meet first."""

    def both(tensors: Tensors) -> Tensors:
        return {**tensors, DOWN: torch.ones(4, 32, 48)}

    case = rewritten("mixtral", tmp_path, both)
    chosen = case.chosen()
    assert_accounted(case, chosen)
    assert chosen[0][-1].matrices[1].pieces == (Piece(MOE.format(1, 1, "w2")),)


def test_the_first_tensor_to_arrive_decides_for_all() -> None:
    """As in the loader, a tensor that is stored whole takes precedence over its parts."""
    merge = WeightConverter("e.*.w", "fused", [MergeModulelist(dim=0)])
    whole, part = LoadedTensor("fused", True), LoadedTensor("fused", False, "e.*.w", merge)
    assert compositions({"a": whole, "e.0.w": part}) == {"fused": Composition((("a",),))}
    assert compositions({"e.0.w": part, "a": whole}) == {
        "fused": Composition((("e.0.w",),), ("MergeModulelist(dim=0)",))
    }


@pytest.mark.parametrize(
    ("shape", "made_of", "stored", "reason"),
    [
        ((6, 4), Composition(), {}, "no tensor"),
        ((6, 4), Composition((("a",),)), {"a": (4, 6)}, "on disk"),
        ((2, 6, 4), Composition((("a",),)), {"a": (2, 4, 6)}, "on disk"),
        ((2, 6, 4), Composition((("a",),)), {"a": (3, 6, 4)}, "3 experts on disk, 2 in memory"),
        ((2, 6, 4), Composition((("a",),)), {"a": (2, 24)}, "on disk"),
        (
            (6, 4),
            Composition((("a",), ("b",)), ("Concatenate(dim=0)",)),
            {"a": (3, 4), "b": (3, 5)},
            "on disk",
        ),
        (
            (6, 4),
            Composition((("a",), ("b",)), ("Concatenate(dim=1)",)),
            {"a": (6, 2), "b": (6, 2)},
            "not followed",
        ),
        ((2, 6, 4), Composition((("a",), ("b",)), ("Concatenate(dim=2)",)), {"a": (2, 6, 2)}, "not followed"),
        ((1, 6, 4), Composition((("a",),), ("MergeModulelist(dim=0)",)), {"a": (6, 4)}, "expert 0 of 1"),
        (
            (1, 6, 4),
            Composition((("a.0.x", "b.0.x"),), ("MergeModulelist(dim=0)",)),
            {"a.0.x": (6, 4), "b.0.x": (6, 4)},
            "2 experts",
        ),
        (
            (2, 6, 4),
            Composition((("a",),), ("Conv3dToLinear",)),
            {"a": (6, 4)},
            "by Conv3dToLinear: not followed",
        ),
    ],
)
def test_what_does_not_make_up_a_weight_is_refused(
    shape: tuple[int, ...], made_of: Composition, stored: dict[str, tuple[int, ...]], reason: str
) -> None:
    with pytest.raises(NotAssembled, match=reason):
        matrices(shape, made_of, stored)
