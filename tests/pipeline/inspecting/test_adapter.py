"""`kasa inspect adapter` against PEFT's own merges and losses, and numpy on dense products in float64."""

import csv
import io
import json
import math
import shutil
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from kasa_cli.errors import ExitCode, IntegrityError, InvalidInput, UsageError
from kasa_cli.pipeline.inspecting.run_adapter import ModelLocation, RunOptions, adapter
from kasa_cli.pipeline.truncating.run import Patterns, TruncateRequest, truncate
from kasa_cli.render.adapters import adapter_tables
from kasa_cli.render.tables import _table, as_text
from kasa_cli.report import AdapterReport, ModuleRow
from tests.builders import tiny_models, truncated
from tests.builders.adapters import CASES, CONFIG, WEIGHTS, base_of, disturb_saved, save_lite, saved, tampered
from tests.builders.checkpoints import load
from tests.builders.runs import ROOT, inside

HERE = RunOptions(1, use_store=False)
EXACT = 1e-12
BY_SVD = 5e-6
"""Kinds that PEFT decomposes in float32."""
IN_FLOAT32 = {"pissa", "olora", "mica", "osf", "kasa", "oft-exact"}
LOST = {"pissa-niter"}
DENSE = {
    *("dora", "dora-embedding", "dora-conv1d", "ia3", "ia3-conv1d", "loha", "lokr", "lokr-both", "oft"),
    *("oft-exact", "oft-embedding", "hira", "hira-embedding", "miss-bat", "road"),
}
NEED_BASE = {
    *("pissa", "pissa-niter", "olora", "dora", "dora-conv1d", "ia3", "ia3-conv1d", "hra", "hra-gs", "oft"),
    *("oft-exact", "oft-embedding", "hira", "miss", "miss-bat", "miss-mini", "osf", "randlora", "road"),
    *("vera", "experts-patterns"),
}
WITHOUT_PATCHES = {"trainable-tokens", "ln-tuning"}
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def looked(path, base=None, base_is="auto") -> AdapterReport:
    return adapter(path, ModelLocation(str(base)) if base else None, base_is, HERE)


def numpy(tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def changes(base, path) -> dict[str, np.ndarray]:
    """The change of every parameter by PEFT's merge, in float64 where PEFT supports it."""
    for dtype in (torch.float64, torch.float32):
        try:
            with warnings.catch_warnings(action="ignore"):
                before = {name: one.clone() for name, one in load(base, dtype=dtype).state_dict().items()}
                model = PeftModel.from_pretrained(load(base, dtype=dtype), path)
                after = model.merge_and_unload().state_dict()
            return {name: numpy(after[name]) - numpy(before[name]) for name in after if name in before}
        except TypeError:  # PiSSA and similar initialisations require float32
            continue
    raise AssertionError(path)


def cut(W: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return U[:, -t:], S[-t:], Vh[-t:]


def updates(name) -> dict[str, np.ndarray]:
    base, path = base_of(name), saved(name)
    found = changes(base, path)
    if CASES[name].kind == "kasa":  # PEFT's merge includes the truncation of the base
        for key, W in load(base).state_dict().items():
            if key.endswith(("q_proj.weight", "v_proj.weight")):
                U, S, Vh = cut(numpy(W), 4)
                found[key] = found[key] + (U * S) @ Vh
    return found


def update_of(row: ModuleRow, found: dict[str, np.ndarray]) -> np.ndarray:
    D = found[f"{row.module}.{row.parameter}"]
    return D if row.expert is None else D[row.expert]


# --- norm and singular values ---


@pytest.mark.parametrize("name", sorted(CASES.keys() - LOST - WITHOUT_PATCHES))
def test_norm_and_singular_values_are_those_of_the_change_that_peft_makes(name):
    found, tolerance = updates(name), BY_SVD if name in IN_FLOAT32 else EXACT
    rows = looked(saved(name), base_of(name), "original").modules
    assert rows and len({row.name for row in rows}) == len(rows)
    for row in rows:
        D = update_of(row, found)
        assert row.norm == pytest.approx(np.linalg.norm(D), rel=tolerance), row.name
        assert sorted(row.shape) == sorted(D.shape)
        if name in DENSE:
            assert row.singular_values is None and "only its norm" in row.why
            continue
        S = np.linalg.svd(D, compute_uv=False)
        ours = np.zeros(len(S))
        ours[: len(row.singular_values)] = row.singular_values
        np.testing.assert_allclose(ours, S, rtol=0, atol=tolerance * S[0])
        assert row.why is None and row.sigma_max == row.singular_values[0]
        energy = np.cumsum(S**2) / (S**2).sum()
        assert row.rank_90 == 1 + int((energy < 0.9).sum())
        assert row.stable_rank == pytest.approx((S**2).sum() / S[0] ** 2, rel=100 * tolerance)
        p = S[1e-9 * S[0] < S] / S.sum()
        if name not in IN_FLOAT32:
            assert row.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)


@pytest.mark.parametrize("name", sorted(CASES.keys() - WITHOUT_PATCHES))
def test_what_the_file_alone_tells_is_the_same_as_with_the_base(name):
    alone = looked(saved(name))
    whole = looked(saved(name), base_of(name), "original")
    known = [row for row in alone.modules if row.norm is not None]
    assert bool(known) == (name not in NEED_BASE)
    if name in NEED_BASE:
        wanted = "not in the file" if name in LOST else "give --base"
        assert all(row.why and wanted in row.why for row in alone.modules)
        assert any(wanted in note for note in alone.notes)
        return
    assert len(known) == len(alone.modules) == len(whole.modules)
    for one, other in zip(alone.modules, whole.modules, strict=True):
        assert (one.module, one.expert, one.norm) == (other.module, other.expert, other.norm)
        assert one.singular_values == other.singular_values and one.why == other.why
        assert one.shape == other.shape or "llama4" in name or "gpt-oss" in name or "one" in name
        assert (one.rank, one.alpha, one.scaling) == (other.rank, other.alpha, other.scaling)


def test_a_start_that_is_in_no_file_is_said_and_not_guessed():
    report = looked(saved("pissa-niter"), base_of("pissa-niter"))
    assert all(row.norm is None and "not in the file" in row.why for row in report.modules)
    assert report.totals["norm"] is None and report.totals["modules_without_norm"] == 4
    assert all(row.defect_a is not None for row in report.modules)


def test_an_adapter_in_half_precision_counts_as_it_is_stored(tmp_path):
    half = tampered(
        saved("lora"),
        tmp_path / "half",
        lambda tensors: tensors.update({name: one.to(torch.bfloat16) for name, one in tensors.items()}),
    )
    tensors = load_file(half / WEIGHTS)
    for row in looked(half).modules:
        A, B = (numpy(tensors[f"base_model.model.{row.module}.lora_{side}.weight"]) for side in "AB")
        S = np.linalg.svd(1.5 * B @ A, compute_uv=False)[:4]
        np.testing.assert_allclose(row.singular_values, S, rtol=1e-10)


def test_of_experts_each_is_a_row_in_order():
    rows = looked(saved("experts-qwen3"), base_of("experts-qwen3")).modules
    names = [row.name for row in rows if row.parameter == "down_proj" and ".0." in row.module]
    module = "model.layers.0.mlp.experts"
    assert names == [f"{module}.down_proj[{k}]" for k in range(4)]
    alone = [row.name for row in looked(saved("experts-qwen3")).modules]
    assert f"{module}[3]" in alone and f"{module}.base_layer[0]" in alone


# --- scaling, diagonal, orthogonality ---


@pytest.mark.parametrize("name", ["lora", "rslora", "patterns", "kasa", "dora", "conv1d", "experts", "vlm"])
def test_scaling_rank_and_alpha_are_those_of_peft_s_live_modules(name):
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(load(base_of(name)), saved(name))
    rows = looked(saved(name), base_of(name)).modules
    live = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for key, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    assert {row.module for row in rows} == set(live)
    for row in rows:
        module = live[row.module]
        assert row.scaling == module.scaling["default"]
        assert (row.rank, row.alpha) == (module.r["default"], module.lora_alpha["default"])


def test_the_scalings_that_are_not_alpha_over_r():
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(load(base_of("adalora")), saved("adalora"))
    live = {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if hasattr(module, "ranknum")
    }
    for row in looked(saved("adalora")).modules:
        module = live[row.module]
        assert row.scaling == pytest.approx(
            module.scaling["default"] / (float(module.ranknum["default"]) + 1e-5), rel=1e-6
        )
        assert row.rank == module.lora_E["default"].shape[0]
    tensors = load_file(saved("delora") / WEIGHTS)
    for row in looked(saved("delora")).modules:
        length = float(tensors[f"base_model.model.{row.module}.delora_lambda"])
        assert row.scaling == length / (2 if "v_proj" in row.module else 4) and row.alpha is None


@pytest.mark.parametrize(
    ("name", "A", "B"),
    [
        ("lora", "lora_A.weight", "lora_B.weight"),
        ("kasa", "lora_A.weight", "lora_B.weight"),
        ("adalora", "lora_A", "lora_B"),
        ("delora", "delora_A", "delora_B"),
        ("embedding", "lora_embedding_A", "lora_embedding_B"),
        ("dora", "lora_A.weight", "lora_B.weight"),
        ("osf", "osf_svd_params.V_low", "osf_svd_params.U_low"),
    ],
)
def test_the_orthogonality_defect_is_that_of_the_gram_matrices(name, A, B):
    tensors = load_file(saved(name) / WEIGHTS)
    rows = [row for row in looked(saved(name)).modules if f"base_model.model.{row.module}.{A}" in tensors]
    assert rows
    for row in rows:
        left, right = (numpy(tensors[f"base_model.model.{row.module}.{short}"]) for short in (A, B))
        one = np.eye(len(left))
        assert row.defect_a == pytest.approx(np.linalg.norm(left @ left.T - one), rel=EXACT)
        assert row.defect_b == pytest.approx(np.linalg.norm(right.T @ right - one), rel=EXACT)


def test_the_factors_of_an_expert_are_its_own():
    tensors = load_file(saved("experts-qwen3") / WEIGHTS)
    A = numpy(tensors["base_model.model.model.layers.0.mlp.experts.lora_A.weight"])
    B = numpy(tensors["base_model.model.model.layers.0.mlp.experts.lora_B.weight"])
    rows = [row for row in looked(saved("experts-qwen3")).modules if ".0.mlp.experts[" in row.name]
    assert len(rows) == 4
    for row in rows:
        k = row.expert
        left, right = A[4 * k : 4 * (k + 1)], B[:, k::4]
        assert row.defect_a == pytest.approx(np.linalg.norm(left @ left.T - np.eye(4)), rel=EXACT)
        assert row.defect_b == pytest.approx(np.linalg.norm(right.T @ right - np.eye(4)), rel=EXACT)
        assert row.norm == pytest.approx(np.linalg.norm(1.5 * right @ left), rel=EXACT)


@pytest.mark.parametrize(
    ("name", "short"), [("kasa", "lora_diag"), ("adalora", "lora_E"), ("vera", "vera_lambda_d")]
)
def test_the_learned_diagonal_is_the_file_s_with_its_signs(name, short, tmp_path):
    def change(tensors):
        for key in tensors:
            if key.endswith(short):
                tensors[key].view(-1)[:3] = torch.tensor([5.0, -5.0, 0.001])

    path = tampered(saved(name), tmp_path / "adapter", change)
    tensors = load_file(path / WEIGHTS)
    for row in looked(path, base_of(name), "original").modules:
        d = numpy(tensors[f"base_model.model.{row.module}.{short}"]).ravel()
        assert row.diagonal == tuple(d) and row.core is None
        assert row.diagonal_signs["positive"] == (d > 0.05).sum()
        assert row.diagonal_signs["negative"] == (d < -0.05).sum()
        assert sum(row.diagonal_signs.values()) == len(d) and row.diagonal_signs["near_zero"] >= 1
    assert all(row.diagonal is None for row in looked(saved("lora")).modules)


def test_a_dense_core_has_singular_values_and_no_diagonal(tmp_path):
    torch.manual_seed(1)

    def change(tensors):
        for key in tensors:
            if key.endswith("lora_diag"):
                tensors[key] = torch.randn(4, 4)

    path = tampered(saved("kasa"), tmp_path / "core", change)
    tensors, report = load_file(path / WEIGHTS), looked(path)
    for row in report.modules:
        A, B, D = (
            numpy(tensors[f"base_model.model.{row.module}.{short}"])
            for short in ("lora_A.weight", "lora_B.weight", "lora_diag")
        )
        assert row.diagonal is None and row.diagonal_signs is None
        np.testing.assert_allclose(row.core, np.linalg.svd(D, compute_uv=False), rtol=1e-12)
        S = np.linalg.svd(1.5 * B @ D @ A, compute_uv=False)[:4]
        np.testing.assert_allclose(row.singular_values, S, rtol=1e-10)
        assert row.penalties["l2"] == pytest.approx((D**2).sum(), rel=EXACT)
    assert "core" in as_text(report)


# --- KaSA's penalties ---


def terms(path):
    """The terms (d, A, B) of every layer, in float64."""
    tensors = load_file(path / WEIGHTS)
    for key in sorted(tensors):
        if key.endswith("lora_diag"):
            stem = key.removesuffix("lora_diag")
            yield tuple(numpy(tensors[stem + end]) for end in ("lora_diag", "lora_A.weight", "lora_B.weight"))


@pytest.fixture
def regularised(tmp_path):
    return tampered(saved("kasa"), tmp_path / "kasa", None, kasa_config={"beta": 0.3, "gamma": 0.07})


def test_peft_s_convention_is_peft_s_own_loss(regularised):
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(load(base_of("kasa")), regularised)
    found = looked(regularised).penalties
    assert (found["beta"], found["gamma"]) == (0.3, 0.07)
    assert found["peft"]["loss"] == pytest.approx(float(model._get_kasa_loss()), rel=1e-5)


def test_the_published_code_s_convention_is_its_loss_written_out(regularised):
    """Gram matrices of the long sides and the mean over the layers, as in `loss_fn` of the published code."""
    layers = list(terms(regularised))
    l2 = sum((d**2).sum() for d, _, _ in layers)
    l3 = sum(
        np.linalg.norm(A.T @ A - np.eye(A.shape[1])) + np.linalg.norm(B @ B.T - np.eye(len(B)))
        for _, A, B in layers
    )
    found = looked(regularised).penalties["reference"]
    assert found["loss"] == pytest.approx((0.3 * l2 + 0.07 * l3) / len(layers), rel=EXACT)
    assert found["l2"] == pytest.approx(l2 / len(layers), rel=EXACT)
    assert found["l3"] == pytest.approx(l3 / len(layers), rel=EXACT)


def test_the_paper_s_convention_squares(regularised):
    layers, one = list(terms(regularised)), np.eye(4)
    l2 = sum((d**2).sum() for d, _, _ in layers)
    l3 = sum(np.linalg.norm(B.T @ B - one) ** 2 + np.linalg.norm(A @ A.T - one) ** 2 for _, A, B in layers)
    found = looked(regularised).penalties["paper"]
    assert found["loss"] == pytest.approx(0.3 * l2 + 0.07 * l3, rel=EXACT)


def test_each_layer_has_its_own_penalties_and_they_add_up(regularised):
    report = looked(regularised)
    for convention, mean in (("paper", 1), ("peft", 1), ("reference", len(report.modules))):
        total = sum(row.penalties[f"l3_{convention}"] for row in report.modules) / mean
        assert report.penalties[convention]["l3"] == pytest.approx(total, rel=EXACT)
    one = next(iter(terms(regularised)))
    by_l2 = [row for row in report.modules if row.penalties["l2"] == pytest.approx((one[0] ** 2).sum())]
    assert len(by_l2) == 1
    expected = np.linalg.norm(one[1].T @ one[1] - np.eye(one[1].shape[1]))
    expected += np.linalg.norm(one[2] @ one[2].T - np.eye(len(one[2])))
    assert by_l2[0].penalties["l3_reference"] == pytest.approx(expected, rel=EXACT)


def test_other_kinds_have_no_penalties_and_an_empty_config_has_peft_s_weights(tmp_path):
    report = looked(saved("lora"))
    assert report.penalties is None and all(row.penalties is None for row in report.modules)
    bare = tampered(saved("kasa"), tmp_path / "bare", None, kasa_config={})
    default = peft.KasaConfig()
    found = looked(bare).penalties
    assert (found["beta"], found["gamma"]) == (default.beta, default.gamma)


# --- the share in the truncated part of the base ---


@pytest.fixture(scope="module")
def pretruncated(folder):
    """Square, wide and tall weights with a truncation rank above the adapter's; the adapter is trained a little."""
    model, out = base_of("kasa"), folder / "truncated"
    truncated.cut(model, out, *TARGETS, rank=4, truncation_rank=6, alpha=6, workers=1, use_store=False)
    disturb_saved(out / "adapter")
    trained = shutil.copytree(out / "adapter", folder / "trained")
    return model, out, trained


def assert_shares(report, model, source, t, tolerance):
    weights, tensors = load(model).state_dict(), load_file(Path(report.adapter) / WEIGHTS)
    shapes = set()
    for row in report.modules:
        W = numpy(weights[f"{row.module}.weight"])
        o, i = W.shape
        U, _, Vh = cut(W, t)
        key = f"base_model.model.{row.module}"
        A, B, d = (numpy(tensors[f"{key}.lora_{end}"]) for end in ("A.weight", "B.weight", "diag"))
        D = 1.5 * (B * d) @ A
        total, found = np.linalg.norm(D) ** 2, row.in_cut
        assert (found.rank, found.source) == (t, source)
        assert found.both == pytest.approx(np.linalg.norm(U.T @ D @ Vh.T) ** 2 / total, rel=tolerance)
        assert found.left == pytest.approx(np.linalg.norm(U.T @ D) ** 2 / total, rel=tolerance)
        assert found.right == pytest.approx(np.linalg.norm(D @ Vh.T) ** 2 / total, rel=tolerance)
        assert found.random_both == pytest.approx(t * t / (o * i))
        assert (found.random_left, found.random_right) == (pytest.approx(t / o), pytest.approx(t / i))
        shapes.add((o > i) - (o < i))
    return shapes


def test_the_share_from_the_tail_is_that_of_the_dropped_vectors(pretruncated):
    model, out, _ = pretruncated
    report = looked(out / "adapter")
    assert len(report.modules) == 8 and report.base_is is None
    assert assert_shares(report, model, "tail", 6, 1e-5) == {-1, 0, 1}
    again = looked(out / "adapter", out / "base")
    assert [row.in_cut for row in again.modules] == [row.in_cut for row in report.modules]
    assert again.base_is == "truncated"


def test_an_adapter_elsewhere_finds_the_tail_beside_its_base(pretruncated):
    model, out, trained = pretruncated
    assert_shares(looked(trained, out / "base"), model, "tail", 6, 1e-5)


def test_without_manifest_the_original_base_is_cut_at_the_rank_if_it_is_said_to_be_that(pretruncated):
    model, _, trained = pretruncated
    report = looked(trained, model, "original")
    assert report.base_is == "original"
    assert assert_shares(report, model, "base", 4, 1e-9) == {-1, 0, 1}


def test_without_a_tail_the_original_is_cut_as_deep_as_the_manifest_says(pretruncated, tmp_path):
    model, out, _ = pretruncated
    copy = shutil.copytree(out, tmp_path / "OUT")
    shutil.rmtree(copy / "tail")
    report = looked(copy / "adapter", model)
    assert report.base_is == "original"
    assert_shares(report, model, "base", 6, 1e-9)
    for base, wanted in ((copy / "base", "truncated already"), (None, "give the original base with --base")):
        report = looked(copy / "adapter", base)
        assert all(row.in_cut is None and wanted in row.in_cut_why for row in report.modules)
        assert any(wanted in note for note in report.notes)
        assert all(row.norm > 0 for row in report.modules)


def test_a_base_of_which_nothing_is_known_is_not_taken_for_the_original(pretruncated):
    model, _, trained = pretruncated
    report = looked(trained, model)
    assert report.base_is is None
    assert all(row.in_cut is None and "--base-is original" in row.in_cut_why for row in report.modules)
    told = looked(trained, model, "truncated")
    assert all("truncated already" in row.in_cut_why for row in told.modules)


def test_the_tail_lies_in_the_cut_whole_and_a_plain_lora_has_no_share(pretruncated):
    _, out, _ = pretruncated
    for row in looked(out / "tail").modules:
        assert row.in_cut.both == pytest.approx(1.0) and row.in_cut.left == pytest.approx(1.0)
    report = looked(saved("lora"), base_of("lora"))
    assert all(row.in_cut is None and row.in_cut_why is None for row in report.modules)


def test_an_altered_tail_and_another_base_are_mismatches(pretruncated, tmp_path):
    model, out, _ = pretruncated
    copy = shutil.copytree(out, tmp_path / "OUT")
    tail = load_file(copy / "tail" / WEIGHTS)
    save_file({name: -one for name, one in tail.items()}, copy / "tail" / WEIGHTS, {"format": "pt"})
    with pytest.raises(IntegrityError, match="altered"):
        looked(copy / "adapter")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    other = shutil.copytree(model, tmp_path / "other")
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="q_proj"):
        looked(out / "adapter", other)


# --- edges ---


def test_a_fresh_adapter_has_a_zero_update_and_sound_json(tmp_path, capsys):
    model = tiny_models.save("llama", tmp_path / "model")
    options = TruncateRequest(rank=3, workers=1, patterns=Patterns(("q_proj",)), use_store=False)
    truncate(ModelLocation(str(model)), tmp_path / "OUT", options)
    done = inside(capsys, "inspect", "adapter", tmp_path / "OUT" / "adapter", "--json")
    assert done.code == 0
    for row in done.json["modules"]:
        assert row["norm"] == 0 and row["singular_values"] == [0, 0, 0] and row["rank_90"] == 0
        assert row["stable_rank"] == row["effective_rank"] == 0
        assert row["in_cut"] is None and row["in_cut_why"] == "the update is zero"
        assert row["defect_b"] == pytest.approx(3**0.5)
    assert inside(capsys, "inspect", "adapter", tmp_path / "OUT" / "adapter").code == 0


def test_padded_and_dependent_factors_have_zeros_in_their_spectrum(tmp_path):
    def change(tensors):
        for name in [key for key in tensors if key.endswith("lora_A.weight")]:
            tensors[name][2] = tensors[name][1]
            tensors[name][3] = 0

    path = tampered(saved("lora"), tmp_path / "padded", change)
    tensors = load_file(path / WEIGHTS)
    for row in looked(path).modules:
        A, B = (numpy(tensors[f"base_model.model.{row.module}.lora_{side}.weight"]) for side in "AB")
        S = np.linalg.svd(1.5 * B @ A, compute_uv=False)
        np.testing.assert_allclose(row.singular_values, S[:4], rtol=0, atol=1e-12 * S[0])
        assert max(row.singular_values[2:]) < 1e-12 * S[0] < row.singular_values[1]
        assert row.norm == pytest.approx(np.linalg.norm(S), rel=EXACT) and row.rank == 4


def test_a_rank_above_the_sides_has_as_many_values_as_the_smaller_side(tmp_path):
    A, B = torch.randn(9, 16), torch.randn(5, 9)
    path = tampered(saved("lora"), tmp_path / "wide", None, r=9, target_modules=["proj"])
    name = "base_model.model.layers.0.proj.lora_{}.weight"
    save_file({name.format("A"): A, name.format("B"): B}, path / WEIGHTS, {"format": "pt"})
    (row,) = looked(path).modules
    S = np.linalg.svd(6 / 9 * numpy(B) @ numpy(A), compute_uv=False)
    np.testing.assert_allclose(row.singular_values, S, rtol=1e-10)
    assert (row.shape, row.rank) == ((5, 16), 9)


def lite_of_two_layers(path, config, **tensors):
    named = {f"layers.{n}.proj.{short}": one.clone() for n in range(2) for short, one in tensors.items()}
    return save_lite(path, named, **config)


def test_files_of_lora_lite_are_read_too(tmp_path):
    torch.manual_seed(3)
    A, B = torch.randn(4, 12), torch.randn(9, 4)
    plain = lite_of_two_layers(
        tmp_path / "l.safetensors", {"variant": "lora", "r": 4, "alpha": 8, "dtype": "x"}, lora_A=A, lora_B=B
    )
    for row in looked(plain).modules:
        S = np.linalg.svd(2 * numpy(B) @ numpy(A), compute_uv=False)[:4]
        np.testing.assert_allclose(row.singular_values, S, rtol=1e-10)
        assert (row.scaling, row.alpha, row.rank) == (2, 8, 4)
    length, w = torch.tensor(3.0), torch.rand(12)
    delora = lite_of_two_layers(
        tmp_path / "d.safetensors",
        {"variant": "delora", "r": 4, "alpha": 8, "lambda0": 1.0},
        lora_A=A,
        lora_B=B,
        lora_lambda=length,
        lora_wnorm=w,
    )
    for row in looked(delora).modules:
        inner = 1 / (np.linalg.norm(numpy(A), axis=1) * np.linalg.norm(numpy(B), axis=0))
        D = 3 / 4 * (numpy(B) * inner) @ numpy(A) * numpy(w)
        assert row.norm == pytest.approx(np.linalg.norm(D), rel=1e-10) and row.scaling == 0.75


def test_values_beside_updates_are_listed_and_none_is_left_out():
    for name in ("saved", "bias-all", "tokens", "lora-bias", "ln-tuning", "trainable-tokens", "embedding"):
        case, report = CASES[name], looked(saved(name))
        tensors = load_file(saved(name) / WEIGHTS)
        biases = [key for key in tensors if key.endswith("lora_B.bias")]
        assert len(report.values) == case.num_values + case.num_rows + len(biases)
        for one in report.values:
            assert one.shape == tuple(tensors[one.tensor].shape) and one.why
        assert report.totals["tensors"] == len(tensors)
        assert report.totals["parameters"] == sum(one.numel() for one in tensors.values())


@pytest.mark.parametrize("short", ["lora_A", "lora_B", "lora_diag"])
def test_a_number_that_is_none_is_named(short, tmp_path, capsys):
    def change(tensors):
        name = next(key for key in tensors if short in key and "layers.1" in key)
        tensors[name].view(-1)[0] = math.nan

    path = tampered(saved("kasa"), tmp_path / "nan", change)
    done = inside(capsys, "inspect", "adapter", path, "--json")
    assert (done.code, done.out) == (ExitCode.INVALID, "")
    assert "not finite" in done.err and f"layers.1.self_attn.q_proj.{short}" in done.err
    assert done.err.count("\n") == 1


def test_bad_input_is_one_line_with_its_code(tmp_path, capsys):
    good = saved("kasa")
    unknown = tampered(good, tmp_path / "unknown", None, use_telepathy=True)
    left = tampered(good, tmp_path / "left", lambda t: t.update({"base_model.model.x.y": torch.ones(2)}))
    (tmp_path / "empty").mkdir()
    other = tiny_models.save("gpt2", tmp_path / "gpt2")
    for arguments, code, said in (
        ([tmp_path / "nowhere"], ExitCode.INVALID, "nowhere"),
        ([tmp_path / "empty"], ExitCode.INVALID, "no adapter"),
        ([unknown], ExitCode.INVALID, "use_telepathy"),
        ([left], ExitCode.INVALID, "x.y"),
        ([good, "--base", other], ExitCode.INVALID, "q_proj"),
        ([good, "--base", tmp_path / "nowhere"], ExitCode.USAGE, "nowhere"),
        ([good, "--base-is", "maybe"], ExitCode.USAGE, "maybe"),
        ([good, "--base-is", "original"], ExitCode.USAGE, "give the base"),
        ([], ExitCode.USAGE, "ADAPTER"),
    ):
        done = inside(capsys, "inspect", "adapter", *arguments)
        assert (done.code, done.out, done.err.count("\n")) == (code, "", 1), (arguments, done.err)
        assert done.err.startswith("kasa: ") and said in done.err
    with pytest.raises(UsageError):
        looked(good, None, "maybe")


def test_a_factor_that_does_not_fit_its_base_is_refused(tmp_path):
    def change(tensors):
        for name in [key for key in tensors if "q_proj.lora_A" in key]:
            tensors[name] = torch.ones(4, 7)

    path = tampered(saved("lora"), tmp_path / "odd", change)
    assert len(looked(path).modules) == 4
    with pytest.raises(InvalidInput, match="lora_A"):
        looked(path, base_of("lora"))


# --- output ---


def test_every_field_of_a_row_is_documented():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for field in (*fields(ModuleRow), *fields(AdapterReport)):
        assert f"`{field.name}`" in page or field.name in ("command", "adapter", "kind", "base", "notes"), (
            field.name
        )


def test_csv_has_a_line_a_weight_and_markdown_and_tables_have_text(capsys):
    path = saved("kasa")
    done = inside(capsys, "inspect", "adapter", path, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    report = looked(path)
    assert [row["name"] for row in rows] == [row.name for row in report.modules]
    assert float(rows[0]["penalties_l3_peft"]) == report.modules[0].penalties["l3_peft"]
    assert rows[0]["shape"] == "32x32" and len(rows[0]["singular_values"].split()) == 4
    assert "published code" in inside(capsys, "inspect", "adapter", path, "--format", "md").out
    noisy = inside(capsys, "inspect", "adapter", path)
    assert "note: share in the cut, 4 of 4" in noisy.err and "note" not in noisy.out
    assert inside(capsys, "inspect", "adapter", path, "-q").err == ""


def widths(report, width):
    console = Console(width=width)
    with console.capture() as captured:
        for table in adapter_tables(report):
            if table[2]:
                console.print(_table(*table))
    return captured.get()


def many(report, layers):
    """The same rows for many layers."""
    rows = [
        replace(row, name=f"model.layers.{n}.{row.module_type}", module=f"model.layers.{n}.{row.module_type}")
        for n in range(layers)
        for row in report.modules[: len(report.modules) // 2]
    ]
    return replace(report, modules=tuple(rows))


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_of_many_weights_it_is_by_type(width, pretruncated):
    _, out, _ = pretruncated
    report = looked(out / "adapter")
    few, lots = widths(report, width), widths(many(report, 50), width)
    for text in (few, lots):
        assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert len(few.splitlines()) < 40 and len(lots.splitlines()) < 50
    for kind in TARGETS:
        assert kind in few and kind in lots
    assert "model.layers.0" not in few and "▲ most" in lots and "▼ least" in lots


def test_what_is_not_known_has_no_column():
    text = as_text(looked(saved("pissa")))
    assert "‖ΔW‖" not in text and "⊥A" in text and "cut" not in text
    assert "singular" not in text and "KaSA" not in text


def test_the_report_does_not_depend_on_the_number_of_workers(pretruncated):
    _, out, _ = pretruncated
    one = adapter(out / "adapter", None, "auto", RunOptions(1, use_store=False))
    three = adapter(out / "adapter", None, "auto", RunOptions(3, use_store=False))
    assert one == three


def test_layers_are_in_natural_order(tmp_path):
    tensors = {}
    for n in (2, 10, 1):
        tensors[f"base_model.model.layers.{n}.proj.lora_A.weight"] = torch.ones(4, 6)
        tensors[f"base_model.model.layers.{n}.proj.lora_B.weight"] = torch.ones(5, 4)
    path = tampered(saved("lora"), tmp_path / "order", None, target_modules=["proj"])
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    assert [row.module for row in looked(path).modules] == [f"layers.{n}.proj" for n in (1, 2, 10)]
    assert json.loads((path / CONFIG).read_text())["target_modules"] == ["proj"]
