"""The candidates of `targets.candidates` against PEFT's own selector, on the model that transformers loads."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.helpers import KappaTuneSelector
from safetensors.torch import load_file, save_file
from torch import nn

from kasa_cli.checkpoint.matrix import Matrix, Orientation, Piece
from kasa_cli.errors import UsageError
from kasa_cli.targets.candidates import FUSED, AsIn, Candidate
from kasa_cli.targets.patterns import Patterns
from kasa_cli.targets.selection import select
from tests.builders import tiny_models
from tests.builders.candidates import (
    Saved,
    assert_accounted,
    assert_same_spectra,
    by_kind,
    peft_order,
    pieces_of,
    rewritten,
    saved,
    surveyed,
)
from tests.builders.checkpoints import WEIGHTS, Tensors


@pytest.fixture(params=tiny_models.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(family: str, tmp_path: Path) -> Saved:
    return saved(family, tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved("llama-tied", tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return saved("mixtral", tmp_path_factory.mktemp("mixtral"))


# --- the contract with PEFT, family by family ---


def test_the_candidates_are_those_of_peft_in_its_order(case: Saved) -> None:
    assert by_kind(case.chosen()[0]) == peft_order(case.model())


def test_a_small_limit_leaves_out_what_peft_leaves_out_and_names_it(case: Saved) -> None:
    found, skipped = case.chosen(max_dim=40)
    assert by_kind(found) == peft_order(case.model(), 40)
    assert_accounted(case, (found, skipped))
    everything = case.chosen()[0]
    too_wide = {piece.name for one in everything if max(one.shape) > 40 for piece in chain(*pieces_of(one))}
    assert too_wide == {one.name for one in skipped if "is over --max-dim 40" in one.reason}


def test_the_pieces_have_the_singular_values_of_the_matrices_in_memory(case: Saved) -> None:
    assert_same_spectra(case, case.chosen()[0])
    assert_same_spectra(case, case.chosen(as_in="kasa")[0])


@pytest.mark.parametrize("as_in", ["peft", "kasa"])
def test_every_tensor_is_accounted_for_once(case: Saved, as_in: AsIn) -> None:
    assert_accounted(case, case.chosen(as_in=as_in))


def test_kasa_takes_what_truncate_takes_and_the_fused_experts(family: str, case: Saved) -> None:
    found = case.chosen(as_in="kasa")[0]
    targets = select(case.entries, case.names, Patterns(), lambda outs, ins: 1).targets
    modules = {one.module: one for one in found if one.kind == "module"}
    assert modules.keys() == {target.module for target in targets}
    for target in targets:
        one = modules[target.module]
        assert (one.matrices, one.shape) == ((target.matrix,), target.shape)
        assert target.matrix.pieces == (Piece(target.name),)
        assert one.is_transposed == target.matrix.is_transposed == (family == "gpt2")
    assert by_kind(found)[1] == peft_order(case.model())[1]


def test_the_suffixes_are_those_of_peft() -> None:
    assert KappaTuneSelector(nn.Module(), show_progress=False).moe_param_suffixes == FUSED


# --- heads ---


def test_a_tied_head_takes_its_matrix_from_the_embedding(tied: Saved) -> None:
    found, skipped = tied.chosen()
    name = "model.embed_tokens.weight"
    assert found[-1] == Candidate(
        "lm_head", "module", (96, 32), (Matrix(name, (Piece(name),), (96, 32), "F32"),)
    )
    assert "model.embed_tokens.weight" not in {one.name for one in skipped}


def test_an_untied_head_has_its_own(llama: Saved) -> None:
    assert llama.chosen()[0][-1].matrices[0].pieces == (Piece("lm_head.weight"),)
    assert llama.reasons()["model.embed_tokens.weight"] == "embedding"


def test_a_tied_head_that_is_on_disk_as_well_has_its_own(tmp_path: Path) -> None:
    def doubled(tensors: Tensors) -> Tensors:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    case = rewritten("llama-tied", tmp_path, doubled)
    assert case.chosen()[0][-1].matrices[0].pieces == (Piece("lm_head.weight"),)
    assert case.reasons()["model.embed_tokens.weight"] == "embedding"
    assert by_kind(case.chosen()[0]) == peft_order(case.model())


def test_a_tied_tensor_says_of_which_end_it_speaks(tied: Saved) -> None:
    embedding = "model.embed_tokens.weight"
    assert tied.reasons(max_dim=95)[embedding] == "as lm_head: a side of 96 is over --max-dim 95"
    assert tied.reasons(as_in="kasa")[embedding] == "embedding"
    assert tied.reasons(excludes=["lm_head"])[embedding] == "embedding"


def test_a_head_that_is_not_on_disk_is_skipped_by_its_name_in_memory(tmp_path: Path) -> None:
    tiny_models.save("bert", tmp_path)
    case = surveyed(tmp_path, architectures=["BertForSequenceClassification"])
    assert case.reasons()["classifier.weight"] == "no tensor on disk holds it by itself"
    assert "classifier.weight" not in case.reasons(as_in="kasa")
    assert "classifier" not in case.labels()


# --- patterns ---

Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
GATES = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("as_in", ["peft", "kasa"])
@pytest.mark.parametrize(
    ("targets", "excludes", "expected"),
    [
        ((UP1, Q0), (), [Q0, UP1]),
        (("self_attn.q_proj",), ("*.1.*",), [Q0]),
        (("model.layers.1.mlp.*",), ("gate_proj", "down_proj"), [UP1]),
        (("embed_tokens", "lm_head", Q0), (), ["model.embed_tokens", Q0, "lm_head"]),
        (("*",), ("*_proj",), ["model.embed_tokens", "lm_head"]),
        (("*.norm", "*.q_proj"), ("*.1.*",), None),
    ],
)
def test_patterns_choose_in_the_order_of_the_model(
    llama: Saved, as_in: AsIn, targets: Any, excludes: Any, expected: list[str] | None
) -> None:
    if expected is None:
        with pytest.raises(UsageError, match=r"nothing that can be a candidate: \*\.norm: it is no matrix"):
            llama.chosen(*targets, as_in=as_in, excludes=excludes)
        return
    assert llama.labels(*targets, as_in=as_in, excludes=excludes) == expected
    assert_accounted(llama, llama.chosen(*targets, as_in=as_in, excludes=excludes))


def test_patterns_choose_fused_parameters(mixtral: Saved) -> None:
    assert mixtral.labels("gate_up_proj") == mixtral.labels("*.experts.gate_*", as_in="kasa") == GATES
    assert by_kind(mixtral.chosen(excludes=["*.experts.*"])[0]) == (peft_order(mixtral.model())[0], [])
    reasons = mixtral.reasons("gate_up_proj", excludes=["*.1.*"])
    assert reasons["model.layers.0.block_sparse_moe.experts.3.w2.weight"] == "not named"
    assert reasons["model.layers.1.block_sparse_moe.experts.0.w3.weight"] == "excluded"


@pytest.mark.parametrize(
    ("targets", "excludes", "message"),
    [
        (["q_porj"], [], r"matches no module: q_porj: near names: .*\bq_proj\b"),
        ([], ["k_prj"], r"matches no module: k_prj: near names: .*\bk_proj\b"),
        (["gate_up_porj"], [], r"matches no module: gate_up_porj: near names: .*\bgate_up_proj\b"),
        (["q_proj", "mlp.gate"], [], "nothing that can be a candidate: mlp.gate: it is no matrix"),
    ],
)
def test_patterns_that_choose_nothing(mixtral: Saved, targets: Any, excludes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixtral.chosen(*targets, excludes=excludes)


def test_a_pattern_whose_weights_are_all_too_wide_says_so(mixtral: Saved) -> None:
    with pytest.raises(UsageError, match="gate_up_proj: a side of 96 is over --max-dim 40"):
        mixtral.chosen("gate_up_proj", "q_proj", max_dim=40)


def test_excludes_may_leave_nothing(llama: Saved) -> None:
    assert llama.labels(excludes=["*"]) == llama.labels("q_proj", excludes=["q_proj"]) == []
    assert set(llama.reasons(excludes=["*"]).values()) == {"excluded", "not a matrix"}


# --- modules other than nn.Linear ---


def test_conv1d_is_kasas_and_not_pefts(tmp_path: Path) -> None:
    case = saved("gpt2", tmp_path)
    assert case.labels() == ["lm_head"]
    reasons = case.reasons()
    assert reasons["transformer.h.0.attn.c_attn.weight"] == "Conv1D: PEFT's selector has nn.Linear only"
    assert reasons["transformer.wpe.weight"] == "embedding"
    name = "transformer.h.1.mlp.c_fc.weight"
    matrix = Matrix(name, (Piece(name),), (128, 32), "F32", Orientation.TRANSPOSED)
    assert case.chosen("h.1.mlp.c_fc")[0] == (
        Candidate("transformer.h.1.mlp.c_fc", "module", (32, 128), (matrix,)),
    )


def test_routers_are_candidates_where_peft_sees_a_linear_map(tmp_path: Path) -> None:
    case = saved("llama4-text", tmp_path)
    router = "model.layers.0.feed_forward.router"
    assert router in case.labels()
    assert case.reasons(as_in="kasa")[f"{router}.weight"] == "router"
    assert case.labels("feed_forward.router", as_in="kasa") == [router, router.replace("0", "1")]


def test_a_stack_that_holds_no_experts_is_no_candidate(tmp_path: Path) -> None:
    case = saved("jamba", tmp_path)
    convolutions = [name for name, entry in case.entries.items() if "conv1d.weight" in name]
    assert convolutions
    for reasons in (case.reasons(), case.reasons(as_in="kasa"), case.reasons("*")):
        assert {reasons[name] for name in convolutions} == {"not a matrix"}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_only_floats_are_candidates(dtype: torch.dtype, tmp_path: Path) -> None:
    def packed(tensors: Tensors) -> Tensors:
        names = (f"{Q0}.weight", "model.layers.1.block_sparse_moe.experts.2.w3.weight")
        return {**tensors, **{name: tensors[name].to(dtype) for name in names}}

    case = rewritten("mixtral", tmp_path, packed)
    found, skipped = case.chosen()
    assert_accounted(case, (found, skipped))
    about = {one.name: one.reason for one in skipped if "is not decomposed" in one.reason}
    assert about.pop(f"{Q0}.weight") == f"dtype {case.entries[f'{Q0}.weight'].dtype} is not decomposed"
    assert len(about) == 8 and all("layers.1." in name for name in about)
    assert not {Q0, GATES[1]}.intersection(one.module for one in found)
    assert GATES[0] in {one.module for one in found}


def test_packed_weights_are_judged_by_their_shape(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path)
    path = tmp_path / WEIGHTS
    name = f"{Q0}.weight"
    save_file({**load_file(path), name: torch.zeros(512, 1)}, path, metadata={"format": "pt"})
    case = surveyed(tmp_path, quantization_config={"load_in_4bit": True})
    assert case.reasons()[name] == "[512, 1] on disk, [32, 32] in memory"


def test_tensors_that_the_model_has_no_place_for_are_skipped(tmp_path: Path) -> None:
    extra = "model.layers.2.eh_proj.weight"
    case = rewritten("llama", tmp_path, lambda tensors: {**tensors, extra: torch.ones(32, 64)})
    assert case.reasons()[extra] == "no linear layer of the model in memory"


# --- classes that transformers does not have ---


def strange(tensors: Tensors) -> Tensors:
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 48, 32),
        "model.layers.0.mlp.experts.w2": torch.ones(4, 32, 24),
        "model.layers.0.mlp.gate.weight": torch.ones(4, 32),
        "model.patch.weight": torch.ones(32, 3, 2, 2),
    }
    return {**tensors, **fused}


def test_of_an_unknown_class_names_and_shapes_are_all_there_is(tmp_path: Path) -> None:
    path = tiny_models.save("llama", tmp_path) / WEIGHTS
    save_file(strange(load_file(path)), path)
    case = surveyed(tmp_path, model_type="nobody_knows")
    assert case.names.model_class is None and case.names.note
    matrices = [
        name.removesuffix(".weight")
        for name, entry in case.entries.items()
        if len(entry.shape) == 2 and "embed" not in name
    ]
    found, skipped = case.chosen()
    assert by_kind(found) == (matrices, ["model.layers.0.mlp.experts.gate_up_proj"])
    assert found[-1].matrices[3].pieces == (Piece("model.layers.0.mlp.experts.gate_up_proj", 3),)
    assert_accounted(case, (found, skipped))
    fused = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.w2"]
    kasa = case.chosen(as_in="kasa")
    assert by_kind(kasa[0]) == (
        [m for m in matrices if m not in ("lm_head", "model.layers.0.mlp.gate")],
        fused,
    )
    assert_accounted(case, kasa)


def made_of(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> Saved:
    """A checkpoint that no class of transformers describes."""
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, directory / WEIGHTS)
    (directory / "config.json").write_text("{}")
    return surveyed(directory)


def test_in_an_unknown_class_a_parameter_may_be_called_like_a_module(tmp_path: Path) -> None:
    case = made_of(tmp_path, {"h.0.up_proj": (2, 4, 4), "h.0.up_proj.weight": (4, 4)})
    assert case.labels() == ["h.0.up_proj", "h.0.up_proj"]
    assert_accounted(case, case.chosen())


def test_the_number_of_experts_is_no_side(tmp_path: Path) -> None:
    case = made_of(tmp_path, {"h.0.experts.up_proj": (50, 4, 8), "h.1.experts.up_proj": (2, 4, 41)})
    assert case.labels(max_dim=40) == ["h.0.experts.up_proj"]


def test_an_empty_weight_is_no_candidate(tmp_path: Path) -> None:
    case = made_of(tmp_path, {"h.0.q.weight": (0, 4), "h.0.experts.up_proj": (0, 4, 4)})
    assert case.reasons() == dict.fromkeys(case.entries, "empty")


def test_what_truncate_refuses_as_tied_is_no_candidate_by_default(llama: Saved) -> None:
    """Two blocks of a family may share one tensor; it can still be named."""
    weights = tuple(
        replace(weight, tied_with=UP1) if weight.label == Q0 else weight for weight in llama.names.weights
    )
    case = replace(llama, names=replace(llama.names, weights=weights))
    assert case.reasons(as_in="kasa")[f"{Q0}.weight"] == f"linear, the same tensor in memory as {UP1}"
    assert case.labels(Q0, as_in="kasa") == [Q0]
    assert Q0 in case.labels()
