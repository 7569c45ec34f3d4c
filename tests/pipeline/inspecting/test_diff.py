"""`kasa inspect diff` against numpy: what changed between two checkpoints, and what did not."""

import csv
import io
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from kasa_cli.checkpoint import matrix
from kasa_cli.errors import ExitCode, IntegrityError, NumericalError, UsageError
from kasa_cli.pipeline.inspecting import diff as diff_file
from kasa_cli.pipeline.inspecting.run_diff import ModelLocation, Patterns, RunOptions, diff
from kasa_cli.report import DiffReport, DiffRow
from tests.builders import tiny_models
from tests.builders.checkpoints import changed, plain_model, save_plain
from tests.builders.matrices import gaussian, orthonormal
from tests.builders.runs import inside

DIM, RANK = 64, 8
UP1 = "model.layers.1.mlp.up_proj.weight"
FIGURE = 1e-9


def compared(one, other, *patterns: str, **options) -> DiffReport:
    """The report, computed in this process with the store of the test and `rank` 8."""
    rank = options.pop("rank", RANK)
    return diff(
        (ModelLocation(str(one)), ModelLocation(str(other))),
        Patterns(patterns),
        RunOptions(1, **options),
        rank,
    )


def tensors(model) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture
def base(tmp_path):
    return plain_model(tmp_path / "base", dim=DIM)


def noisy(scale: float):
    return lambda W: W + scale * gaussian(*W.shape, seed=5).to(W.dtype)


def everywhere(function, model, folder):
    """A copy of the model with the function applied to every linear weight of the blocks."""
    modules = {
        name.removesuffix(".weight").replace(".", "__"): function
        for name in tensors(model)
        if "layers" in name
    }
    return changed(model, folder, **modules)


# --- reference results by numpy ---


def angle(X: np.ndarray, Y: np.ndarray) -> float:
    """The largest principal angle, in degrees."""
    sine = np.linalg.norm(Y - X @ (X.T @ Y), 2)
    cosine = np.linalg.svd(X.T @ Y, compute_uv=False)[-1]
    return math.degrees(math.atan2(sine, cosine))


def effective_rank(S: np.ndarray) -> float:
    p = S[S > 0] / S.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def expected(A: torch.Tensor, B: torch.Tensor, rank: int = RANK) -> dict[str, object]:
    A, B = (W.to(torch.float64).numpy() for W in (A, B))
    (U, S, _), (X, T, _) = np.linalg.svd(A), np.linalg.svd(B)
    k = len(S)
    U, X = U[:, :k], X[:, :k]
    likeness = np.abs(X[:, :rank].T @ U[:, : 4 * rank]).max(axis=1)
    return {
        "relative_distance": np.linalg.norm(B - A) / np.linalg.norm(A),
        "sigma_max": (S[0], T[0]),
        "sigma_min": (S[-1], T[-1]),
        "kappa": (S[0] / S[-1], T[0] / T[-1]),
        "stable_rank": ((S**2).sum() / S[0] ** 2, (T**2).sum() / T[0] ** 2),
        "effective_rank": (effective_rank(S), effective_rank(T)),
        "spectrum_change": np.linalg.norm(T - S) / np.linalg.norm(S),
        "top_angle": angle(U[:, :rank], X[:, :rank]),
        "bottom_angle": angle(U[:, -rank:], X[:, -rank:]),
        "intruders": int((likeness < 0.6).sum()),
        "least_similarity": likeness.min(),
    }


TOLERANCES = {
    "sigma_min": 1e-6,
    "kappa": 1e-6,
    "top_angle": 1e-5,
    "bottom_angle": 1e-5,
    "least_similarity": 1e-6,
}


def assert_right(row: DiffRow, A: torch.Tensor, B: torch.Tensor, rank: int = RANK) -> None:
    for name, figure in expected(A, B, rank).items():
        found = getattr(row, name)
        assert found == pytest.approx(figure, rel=TOLERANCES.get(name, FIGURE), abs=1e-9), (row.name, name)
    assert row.shape == tuple(A.shape)
    assert row.subspace_rank == rank


# --- base and noise ---


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0])
def test_base_and_base_with_noise(base, tmp_path, scale):
    other = everywhere(noisy(scale), base, tmp_path / "other")
    report, A, B = compared(base, other), tensors(base), tensors(other)
    assert [row.name for row in report.tensors] == [name for name in A if "layers" in name]
    for row in report.tensors:
        assert_right(row, A[row.name], B[row.name])
        assert row.name == f"{row.module}.weight"
    assert report.identical == ()
    assert report.totals == {
        "differing": 8,
        "identical": 0,
        "unmeasured": 0,
        "decompositions": 16,
        "decompositions_reused": 0,
    }


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (130, 20), (20, 130)], ids=str)
def test_tall_and_wide_weights_are_compared_by_their_left_vectors(tmp_path, shape):
    A = {f"model.layers.{n}.mlp.up_proj.weight": gaussian(*shape, torch.float32, seed=n) for n in (1, 2)}
    B = {name: W + 0.2 * gaussian(*shape, torch.float32, seed=9) for name, W in A.items()}
    rank = min(RANK, min(shape) // 4)
    for row in compared(save_plain(A, tmp_path / "a"), save_plain(B, tmp_path / "b")).tensors:
        assert_right(row, A[row.name], B[row.name], rank)


def test_the_order_of_the_two_matters_where_it_should(base, tmp_path):
    other = everywhere(lambda W: 3 * noisy(0.2)(W), base, tmp_path / "other")
    there, back = compared(base, other).tensors, compared(other, base).tensors
    for one, two in zip(there, back, strict=True):
        assert one.relative_distance > 1.9
        assert two.relative_distance < 0.71
        assert one.kappa == two.kappa[::-1]
        assert one.top_angle == pytest.approx(two.top_angle, abs=1e-6)


def test_signs_and_scale_turn_no_direction(base, tmp_path):
    other = everywhere(lambda W: -2 * W, base, tmp_path / "other")
    for row in compared(base, other).tensors:
        assert row.relative_distance == pytest.approx(3)
        assert max(row.top_angle, row.bottom_angle) < 1e-5
        assert row.least_similarity == pytest.approx(1, abs=1e-9)
        assert row.intruders == 0
        assert row.kappa[0] == pytest.approx(row.kappa[1], rel=1e-9)
        assert row.spectrum_change == pytest.approx(1)


# --- base and truncated ---


def test_truncation_takes_the_bottom_and_leaves_the_top(tmp_path, capsys):
    base = plain_model(tmp_path / "base", dim=DIM)
    options = ("-o", tmp_path / "out", "--rank", RANK, "--dtype", "float32", "--emit", "base")
    assert inside(capsys, "truncate", base, *options).code == ExitCode.DONE
    report = compared(base, tmp_path / "out" / "base")
    A = tensors(base)
    assert len(report.tensors) == 8
    for row in report.tensors:
        S = np.linalg.svd(A[row.name].to(torch.float64).numpy(), compute_uv=False)
        assert row.top_angle < 1e-3
        assert row.bottom_angle < 90.000001
        assert row.sigma_max[1] == pytest.approx(row.sigma_max[0], rel=1e-6)
        assert row.sigma_min[1] < 1e-6 * S[0]  # only the rounding to float32
        assert row.kappa[1] > 1e6 > row.kappa[0]
        dropped = np.linalg.norm(S[-RANK:]) / np.linalg.norm(S)
        assert row.relative_distance == pytest.approx(dropped, rel=1e-4)
        assert row.spectrum_change == pytest.approx(dropped, rel=1e-4)
        assert (row.intruders, row.least_similarity) == (0, pytest.approx(1, abs=1e-6))


def test_an_exact_cut_is_orthogonal_to_what_is_left_at_the_bottom(tmp_path):
    """The eight smallest are dropped, and the next eight become the smallest: a bottom of rank 16 shares half."""
    U, V, S = (
        orthonormal(DIM, DIM),
        orthonormal(DIM, DIM, seed=3),
        torch.linspace(9, 1, DIM, dtype=torch.float64),
    )
    cut = S.clone()
    cut[-RANK:] = S[-2 * RANK : -RANK] / 20
    cut[-2 * RANK : -RANK] = S[-RANK:] * 20
    name = "model.layers.0.mlp.up_proj.weight"
    models = [save_plain({name: (U * s) @ V.T}, tmp_path / label) for label, s in (("a", S), ("b", cut))]
    [row] = compared(*models).tensors
    assert row.bottom_angle < 1e-5  # the same subspace with its values exchanged
    swapped = S.clone()
    swapped[-RANK:], swapped[-2 * RANK : -RANK] = S[-2 * RANK : -RANK], S[-RANK:]
    [row] = compared(models[0], save_plain({name: (U * swapped) @ V.T}, tmp_path / "c")).tensors
    assert row.bottom_angle == pytest.approx(90)
    assert row.top_angle < 1e-5
    assert row.kappa[0] == pytest.approx(row.kappa[1])
    assert row.spectrum_change < 1e-12
    assert row.relative_distance > 0.01


# --- intruders ---


@pytest.fixture
def intruded(base, tmp_path):
    """A strong rank-1 term in a random direction, in one layer."""
    u, v = (gaussian(DIM, 1, torch.float32, seed=n) for n in (11, 12))
    return changed(base, tmp_path / "other", model__layers__1__mlp__up_proj=lambda W: W + 2 * u @ v.T)


def test_an_intruder_is_found_where_it_is_and_only_there(base, intruded):
    report = compared(base, intruded)
    [row] = report.tensors
    assert row.name == UP1
    assert row.intruders == 1
    assert_right(row, tensors(base)[UP1], tensors(intruded)[UP1])
    assert row.least_similarity < diff_file.INTRUDER
    assert len(report.identical) == 7
    assert UP1 not in report.identical


def test_a_stronger_own_direction_is_no_intruder(base, tmp_path):
    def stronger(W):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return W - 5 * S[3] * U[:, 3:4] @ Vh[3:4]  # even with the opposite sign

    [row] = compared(base, changed(base, tmp_path / "b", model__layers__1__mlp__up_proj=stronger)).tensors
    assert row.intruders == 0
    assert row.least_similarity == pytest.approx(1, abs=1e-5)
    assert row.sigma_max[1] > 3 * row.sigma_max[0]


def test_a_direction_from_the_middle_of_the_old_spectrum_is_no_intruder_within_reach(base, tmp_path):
    """Directions of A are searched up to four times the rank: the 20th is matched, the 60th is not."""
    found = {}
    for number in (20, 60):

        def lifted(W, number=number):
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            return W + 3 * S[0] * U[:, number : number + 1] @ Vh[number : number + 1]

        model = changed(base, tmp_path / str(number), model__layers__1__mlp__up_proj=lifted)
        [row] = compared(base, model).tensors
        assert_right(row, tensors(base)[UP1], tensors(model)[UP1])
        found[number] = row.intruders
    assert found == {20: 0, 60: 1}


# --- equal weights, and weights that only one model has ---


def test_identical_weights_are_listed_and_not_decomposed(base, tmp_path, monkeypatch):
    other = changed(base, tmp_path / "other", model__layers__0__mlp__up_proj=noisy(0.1))
    asked = []
    real = diff_file.distance
    monkeypatch.setattr(
        diff_file, "distance", lambda pair, sources: asked.append(pair.name) or real(pair, sources)
    )
    report = compared(base, other, use_store=False)
    assert asked == ["model.layers.0.mlp.up_proj.weight"]
    assert (report.totals["identical"], report.totals["decompositions"]) == (7, 2)
    assert {row.name for row in report.tensors} | {*report.identical} == {
        n for n in tensors(base) if "layers" in n
    }


def test_a_model_and_itself(base):
    report = compared(base, base)
    assert (report.tensors, len(report.identical), report.rank_correlation) == ((), 8, None)
    assert report.totals["decompositions"] == report.totals["decompositions_reused"] == 0


def test_other_shapes_and_absent_weights_are_skipped_with_a_reason(base, tmp_path):
    A = tensors(base)
    B = {name: W + 0.1 for name, W in A.items()}
    del B["model.layers.0.mlp.up_proj.weight"]
    B["model.layers.0.mlp.down_proj.weight"] = gaussian(DIM, 30, torch.float32)
    B["model.layers.2.mlp.up_proj.weight"] = gaussian(DIM, 30, torch.float32)
    report = compared(base, save_plain(B, tmp_path / "other"))
    assert {one.name: one.reason for one in report.skipped} == {
        "model.layers.0.mlp.up_proj": "only in A",
        "model.layers.2.mlp.up_proj": "only in B",
        "model.layers.0.mlp.down_proj": "its shape in B differs",
    }
    assert len(report.tensors) == 6


def test_nothing_in_common_is_a_slip_of_the_pen(base, tmp_path, capsys):
    other = save_plain({"model.layers.0.elsewhere.weight": torch.ones(4, 4)}, tmp_path / "other")
    with pytest.raises(UsageError, match="no weight in common"):
        compared(base, other)
    ran = inside(capsys, "inspect", "diff", base, other)
    assert ran.code == ExitCode.USAGE
    assert str(base) in ran.err
    assert str(other) in ran.err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_and_its_cast_differ_by_the_rounding(base, tmp_path, dtype):
    other = everywhere(lambda W: W.to(dtype), base, tmp_path / "other")
    A, B = tensors(base), tensors(other)
    rows = compared(base, other).tensors
    assert len(rows) == 8
    for row in rows:
        assert_right(row, A[row.name], B[row.name])
        assert 0 < row.relative_distance < 2.0**-8
    exact = everywhere(lambda W: W.to(torch.float32), other, tmp_path / "exact")
    for row in compared(other, exact).tensors:
        assert row.relative_distance == row.spectrum_change == 0
        assert row.kappa[0] == row.kappa[1]
        assert row.least_similarity == pytest.approx(1, abs=1e-12)


def test_zeros_are_far_from_anything_but_zeros(tmp_path):
    name = "model.layers.{}.mlp.up_proj.weight".format
    zero, W = torch.zeros(12, 8), gaussian(12, 8, torch.float32)
    A = save_plain({name(0): zero, name(1): zero.clone(), name(2): W}, tmp_path / "a")
    B = save_plain({name(0): zero.to(torch.float16), name(1): W, name(2): zero}, tmp_path / "b")
    rows = compared(A, B).tensors
    assert [row.relative_distance for row in rows] == [0, math.inf, pytest.approx(1)]
    assert [row.spectrum_change for row in rows] == [0, math.inf, pytest.approx(1)]
    assert rows[0].kappa == (math.inf, math.inf)


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (20, 1), (2, 9), (3, 3)], ids=str)
def test_the_narrowest_weights_have_subspaces_of_one_direction(tmp_path, shape):
    name = "model.layers.0.mlp.up_proj.weight"
    A, B = (gaussian(*shape, torch.float32, seed=n) for n in (1, 2))
    [row] = compared(save_plain({name: A}, tmp_path / "a"), save_plain({name: B}, tmp_path / "b")).tensors
    assert_right(row, A, B, rank=1)


# --- names ---


def test_names_on_disk_may_differ_where_those_in_memory_do_not(tmp_path):
    """A model without and with a prefix in its names, as both are found on the Hub."""
    plain = tiny_models.save("bert", tmp_path / "plain")
    prefixed = tmp_path / "prefixed"
    prefixed.mkdir()
    renamed = {f"bert.{name}": 1.1 * W for name, W in tensors(plain).items()}
    save_file(renamed, prefixed / "model.safetensors", metadata={"format": "pt"})
    (prefixed / "config.json").write_text((plain / "config.json").read_text())
    report = compared(plain, prefixed)
    assert len(report.tensors) == 12
    assert all(row.relative_distance == pytest.approx(0.1, rel=1e-5) for row in report.tensors)
    assert {row.name for row in report.tensors} <= {*tensors(plain)}


@pytest.mark.parametrize("entries", [64, 1 << 22], ids=["in blocks", "at once"])
def test_experts_apart_and_experts_fused_are_the_same_weights(tmp_path, entries, monkeypatch):
    """One checkpoint has tensors for each expert, the other one tensor for all, as transformers has in memory."""
    monkeypatch.setattr(matrix, "BLOCK_ENTRIES", entries)
    apart = tiny_models.save("mixtral", tmp_path / "apart")
    in_memory = dict(tiny_models.build("mixtral").named_parameters())
    fused = {name: p.detach().clone() for name, p in in_memory.items()}
    changed_name = "model.layers.1.mlp.experts.down_proj"
    fused[changed_name][2] *= 1.5
    other = save_plain(fused, tmp_path / "fused")
    (other / "config.json").write_text((apart / "config.json").read_text())
    report = compared(apart, other)
    [row] = report.tensors
    assert row.module == changed_name
    assert row.relative_distance == pytest.approx(0.5, rel=1e-6)
    assert len(report.identical) == 23


def test_a_transposed_layer_is_compared_as_it_computes(tmp_path):
    model = tiny_models.save("gpt2", tmp_path / "a")
    other = everywhere_gpt2(model, tmp_path / "b")
    A, B = tensors(model), tensors(other)
    rows = {row.name: row for row in compared(model, other).tensors}
    for name in ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"):
        assert_right(rows[name], A[name].T, B[name].T)


def everywhere_gpt2(model, folder):
    weights = {
        name: W + 0.02 * gaussian(*W.shape, torch.float32, seed=4) if W.ndim == 2 else W
        for name, W in tensors(model).items()
    }
    save_plain(weights, folder)
    (folder / "config.json").write_text((model / "config.json").read_text())
    return folder


# --- the order by κ ---


def test_the_rank_correlation_is_scipys(base, tmp_path):
    other = everywhere(noisy(0.3), base, tmp_path / "other")
    report = compared(base, other)
    kappas = np.array([row.kappa for row in report.tensors])
    assert report.rank_correlation == pytest.approx(spearmanr(*kappas.T).statistic, abs=1e-12)
    assert abs(report.rank_correlation) < 1


def test_of_one_weight_there_is_no_order(base, intruded):
    assert compared(base, intruded).rank_correlation is None


# --- large weights ---


def test_large_weights_are_read_by_rows(tmp_path, monkeypatch):
    name = "model.embed_tokens.weight"
    A, B = gaussian(3000, 24, torch.bfloat16), gaussian(3000, 24, torch.bfloat16, seed=1)
    models = save_plain({name: A}, tmp_path / "a"), save_plain({name: B}, tmp_path / "b")
    held = compared(*models, "embed_tokens", use_store=False)
    monkeypatch.setattr(matrix, "STREAMED_BYTES", 1000)
    monkeypatch.setattr(matrix, "BLOCK_ENTRIES", 24 * 100)
    monkeypatch.setattr(matrix.Matrix, "stored", None)
    read = compared(*models, "embed_tokens", use_store=False)
    assert read.tensors[0].relative_distance == pytest.approx(held.tensors[0].relative_distance, rel=1e-14)
    assert_right(read.tensors[0], A, B, rank=6)


def test_a_file_that_changes_during_the_comparison_is_an_integrity_error(base, intruded, monkeypatch):
    real = diff_file.distance

    def late(pair, sources):
        (intruded / "model.safetensors").write_bytes((intruded / "model.safetensors").read_bytes())
        return real(pair, sources)

    monkeypatch.setattr(diff_file, "distance", late)
    with pytest.raises(IntegrityError, match="changed since"):
        compared(base, intruded)


# --- the command ---


def test_a_second_comparison_decomposes_nothing_and_says_the_same(base, intruded, capsys):
    first = inside(capsys, "inspect", "diff", base, intruded, "--json", "--rank", RANK).json
    second = inside(capsys, "inspect", "diff", base, intruded, "--json", "--rank", RANK, "--workers", 3).json
    fresh = inside(capsys, "inspect", "diff", base, intruded, "--json", "--rank", RANK, "--no-store").json
    assert first["tensors"] == second["tensors"] == fresh["tensors"]
    assert first["models"] == [str(base), str(intruded)]
    assert (second["totals"]["decompositions"], second["totals"]["decompositions_reused"]) == (0, 2)
    assert first["totals"]["decompositions"] == fresh["totals"]["decompositions"] == 2


def test_the_spectrum_of_both_saves_the_comparison_the_decompositions(base, intruded, capsys):
    for model in (base, intruded):
        inside(capsys, "inspect", "spectrum", model, "--json")
    [row] = compared(base, intruded).tensors
    assert_right(row, tensors(base)[UP1], tensors(intruded)[UP1])


@pytest.mark.parametrize("spelling", ["csv", "md", "table"])
def test_every_format_tells_of_the_intruder(base, intruded, capsys, spelling):
    ran = inside(capsys, "inspect", "diff", base, intruded, "--format", spelling, "--rank", RANK)
    assert ran.code == ExitCode.DONE
    if spelling == "csv":
        [row] = csv.DictReader(io.StringIO(ran.out))
        assert (row["name"], row["intruders"], row["shape"]) == (UP1, "1", "64x64")
    else:
        assert "1 of 8" in ran.out


@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_number_ends_the_run_or_is_listed(base, tmp_path, capsys, side):
    ill = changed(base, tmp_path / "ill", model__layers__1__mlp__up_proj=lambda W: W * math.nan)
    models = (ill, base) if side == 0 else (base, ill)
    with pytest.raises(NumericalError, match=f"nan: {UP1}"):
        compared(*models)
    assert inside(capsys, "inspect", "diff", *models).code == ExitCode.NUMERIC
    ran = inside(capsys, "inspect", "diff", *models, "--keep-going", "--json")
    assert ran.code == ExitCode.BELOW_STANDARD
    assert ran.json["skipped"] == [{"name": UP1, "reason": "entry [0, 0] is nan"}]
    assert ran.json["totals"]["unmeasured"] == 1
    assert len(ran.json["identical"]) == 7


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_of_nothing_is_refused(base, intruded, capsys, rank):
    with pytest.raises(UsageError, match="must be positive"):
        compared(base, intruded, rank=rank)
    assert inside(capsys, "inspect", "diff", base, intruded, "--rank", rank).code == ExitCode.USAGE


@pytest.mark.parametrize(("rank", "used"), [(1, 1), (5, 5), (16, 16), (17, 16), (1000, 16)])
def test_the_rank_is_at_most_a_quarter_of_the_side(base, intruded, rank, used):
    [row] = compared(base, intruded, rank=rank).tensors
    assert_right(row, tensors(base)[UP1], tensors(intruded)[UP1], used)
