"""`kasa inspect spectrum` against numpy, on the tensors that transformers has in memory."""

import csv
import io
import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import torch
from safetensors.torch import load_file

from kasa_cli.errors import ExitCode
from kasa_cli.pipeline.inspecting.spectrum import RANKS, best_and_worst
from kasa_cli.pipeline.measuring import facts
from kasa_cli.render.units import number
from tests.builders import tiny_models
from tests.builders.checkpoints import changed, plain_model, save_plain
from tests.builders.runs import inside

Row = dict[str, object]
FAMILIES = ["llama", "bert", "gpt2", "mixtral"]
EMBEDDED = {"llama": ["model.embed_tokens", "lm_head"], "bert": ["embeddings.word_embeddings"]}
ROLES = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "bert": {"query", "key", "value", "dense"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
}
FIGURES = 1e-9
"""Relative tolerance of smooth functions of singular values that are accurate to 1e-10 of the largest."""


def spectrum(capsys, model, *options):
    return inside(capsys, "inspect", "spectrum", model, "--json", "--workers", 1, *options)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return request.param, tiny_models.save(request.param, tmp_path_factory.mktemp(request.param) / "model")


def in_memory(family: str) -> dict[str, list[np.ndarray]]:
    """By module (or parameter of fused experts): the matrices that compute, as (out, in), in float64."""
    model, found = tiny_models.build(family), {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        is_conv = type(model.get_submodule(module)).__name__ == "Conv1D" if module != name else False
        W = parameter.detach().to(torch.float64).numpy()
        if W.ndim == 3:
            found[name] = list(W)
        elif W.ndim == 2:
            found[module] = [W.T if is_conv else W]
    return found


# --- figures, implemented from their definitions ---


def bulk_median(k: int, long: int) -> float:
    """The median singular value of noise of that shape and variance 1, by integrating Marchenko and Pastur's law."""
    low, high = (math.sqrt(long) - math.sqrt(k)), (math.sqrt(long) + math.sqrt(k))

    def density(s: float) -> float:
        return math.sqrt(max((high**2 - s**2) * (s**2 - low**2), 0)) / (math.pi * k * s) if s else 0.0

    def share(s: float) -> float:
        return scipy.integrate.quad(density, low, s, limit=200, epsabs=1e-12)[0] - 0.5

    return float(scipy.optimize.brentq(share, low + 1e-9, high, xtol=1e-12))


def noise_edge(S: np.ndarray, k: int, long: int) -> tuple[float, float, int]:
    """Noise, its upper edge, and the values above it; fitted anew without those until no more rise."""
    above = 0
    while True:
        sigma = float(np.median(S[above:])) / bulk_median(k - above, long - above)
        edge = sigma * (math.sqrt(long) + math.sqrt(k))
        risen = int((edge < S).sum())
        if risen <= above:
            return sigma, edge, risen
        above = risen


def power_law(S: np.ndarray) -> tuple[float, float, int]:
    """Clauset's fit, every eigenvalue but the two largest tried for xmin."""
    eigenvalues = np.sort(S**2)
    tried = []
    for start in range(len(eigenvalues) - 2):
        tail = eigenvalues[start:]
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        below = np.arange(len(tail)) / len(tail)
        distance = np.abs(below - (1 - (tail / tail[0]) ** (1 - alpha))).max()
        tried.append((distance, alpha, tail[0], len(tail)))
    _, alpha, xmin, count = min(tried, key=lambda one: one[0])
    return float(alpha), float(xmin), count


def figures(W: np.ndarray) -> Row:
    """All figures of a row."""
    S, (k, long) = np.linalg.svd(W, compute_uv=False), sorted(W.shape)
    p = S / S.sum()
    sigma, edge, above = noise_edge(S, k, long)
    alpha, xmin, tail = power_law(S)
    entropy = -(p * np.log(p)).sum()
    return {
        "sigma_max": S[0],
        "sigma_min": S[-1],
        "kappa": S[0] / S[-1],
        "frobenius": np.linalg.norm(W),
        "nuclear": S.sum(),
        "stable_rank": (W**2).sum() / S[0] ** 2,
        "effective_rank": np.exp(entropy),
        "entropy": entropy,
        "numerical_rank": np.linalg.matrix_rank(W),
        "energy": {str(r): (S[:r] ** 2).sum() / (S**2).sum() for r in (1, 8, 16, 32, 64, 128, 256) if r < k},
        "mp_sigma": sigma,
        "mp_edge": edge,
        "mp_above": above,
        "power_law_alpha": alpha,
        "power_law_xmin": xmin,
        "power_law_tail": tail,
        "sketch": S[np.round(np.linspace(0, k - 1, 24)).astype(int)].tolist() if k > 24 else S.tolist(),
    }


TOLERANCES = {"sigma_min": 1e-7, "kappa": 1e-7, "mp_sigma": 1e-7, "mp_edge": 1e-7}
"""Tolerances of figures that depend on a small value or a numerical integral: looser than FIGURES."""


def assert_right(row: Row, W: np.ndarray) -> None:
    expected = figures(W)
    for name, figure in expected.items():
        assert row[name] == pytest.approx(figure, rel=TOLERANCES.get(name, FIGURES)), (row["name"], name)
    assert row["shape"] == list(W.shape)
    assert row["energy"].keys() == expected["energy"].keys()


# --- the rows ---


def test_every_figure_of_every_matrix_is_numpys(case, capsys):
    family, model = case
    ran = spectrum(capsys, model)
    assert ran.code == ExitCode.DONE
    rows = ran.json["tensors"]
    by_module: dict[str, list[Row]] = {}
    for row in rows:
        by_module.setdefault(row["module"], []).append(row)
        assert row["dtype"] == "F32"
        assert row["solver"].startswith("gram-eigh + ")
    right = in_memory(family)
    for module, found in by_module.items():
        assert len(found) == len(right[module])
        for row, W in zip(found, right[module], strict=True):
            assert_right(row, W)
    assert ran.json["model_class"] == type(tiny_models.build(family)).__name__
    assert ran.json["totals"] == {
        "tensors": len(rows),
        "unmeasured": 0,
        "decompositions": len(rows),
        "decompositions_reused": 0,
    }


def test_every_linear_weight_of_the_blocks_has_a_row_and_every_other_tensor_a_reason(case, capsys):
    family, model = case
    report = spectrum(capsys, model).json
    names, reasons = [row["name"] for row in report["tensors"]], report["skipped"]
    assert len({*names}) == len(names)
    blocks = [module for module in in_memory(family) if any(part.isdecimal() for part in module.split("."))]
    linear = [module for module in blocks if module.split(".")[-1] in ROLES[family]]
    assert {row["module"] for row in report["tensors"]} == {*linear}
    assert {row["module_type"].split(".")[-1] for row in report["tensors"]} == ROLES[family]
    assert all(one["reason"] for one in reasons)
    on_disk, skipped = {*load_file(model / "model.safetensors")}, {one["name"] for one in reasons}
    assert skipped <= on_disk
    assert not skipped & {*names}
    joined = {name for name in on_disk if name.endswith((".w1.weight", ".w3.weight"))}  # as gate_up_proj[n]
    assert on_disk - skipped - joined == on_disk & {*names}


def test_an_expert_has_a_row_of_its_own(tmp_path, capsys):
    model = tiny_models.save("mixtral", tmp_path)
    rows = spectrum(capsys, model).json["tensors"]
    experts = [row for row in rows if "experts" in row["module"]]
    assert len(experts) == 2 * 4 * 2
    joined = [row["name"] for row in experts if row["module"] == "model.layers.1.mlp.experts.gate_up_proj"]
    assert joined == [f"model.layers.1.mlp.experts.gate_up_proj[{n}]" for n in range(4)]
    alone = [row["name"] for row in experts if row["module"] == "model.layers.1.mlp.experts.down_proj"]
    assert alone == [f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight" for n in range(4)]


@pytest.mark.parametrize("family", EMBEDDED)
def test_embeddings_and_heads_can_be_asked_for(family, tmp_path, capsys):
    model = tiny_models.save(family, tmp_path)
    asked = [word for module in EMBEDDED[family] for word in ("--target", module)]
    rows = spectrum(capsys, model, *asked).json["tensors"]
    assert {row["module"] for row in rows} == {*EMBEDDED[family]}
    for row in rows:
        assert row["name"] == f"{row['module']}.weight"
        assert_right(row, in_memory(family)[row["module"]][0])
    by_end = spectrum(capsys, model, "--target", EMBEDDED[family][0].split(".")[-1]).json["tensors"]
    assert [row["module"] for row in by_end] == EMBEDDED[family][:1]


def test_a_tied_head_is_the_embedding_once(tmp_path, capsys):
    model = tiny_models.save("llama-tied", tmp_path)
    report = spectrum(capsys, model, "--target", "embed_tokens", "--target", "lm_head").json
    [row] = report["tensors"]
    assert (row["name"], row["module"]) == ("model.embed_tokens.weight", "model.embed_tokens")
    assert report["totals"]["decompositions"] == 1
    assert report["totals"]["decompositions_reused"] == 0


def test_a_model_of_no_known_family_is_measured_by_the_names_on_disk(tmp_path, capsys):
    model = plain_model(tmp_path)
    ran = spectrum(capsys, model)
    weights = load_file(model / "model.safetensors")
    rows = ran.json["tensors"]
    assert {row["name"] for row in rows} == {name for name in weights if ".layers." in name}
    for row in rows:
        assert row["name"] == f"{row['module']}.weight"
        assert_right(row, weights[row["name"]].to(torch.float64).numpy())
    assert ran.json["model_class"] is None
    assert "none-of-these" in ran.json["notes"][0]
    assert "names in memory are taken to be those on disk" in ran.err


def test_patterns_choose(tmp_path, capsys):
    model = plain_model(tmp_path)
    rows = spectrum(capsys, model, "--target", "q_proj", "--exclude", "*.1.*").json["tensors"]
    assert [row["module"] for row in rows] == ["model.layers.0.self_attn.q_proj"]
    assert spectrum(capsys, model, "--target", "nowhere").code == ExitCode.USAGE
    assert spectrum(capsys, model, "--exclude", "*").code == ExitCode.USAGE


@pytest.mark.parametrize("workers", [1, 3])
def test_a_second_question_decomposes_nothing_and_answers_the_same(tmp_path, capsys, workers):
    model = plain_model(tmp_path, dim=40)
    first = spectrum(capsys, model).json
    second = spectrum(capsys, model, "--workers", workers).json
    fresh = spectrum(capsys, model, "--no-store", "--workers", workers).json
    assert second["tensors"] == first["tensors"] == fresh["tensors"]
    assert (second["totals"]["decompositions"], second["totals"]["decompositions_reused"]) == (0, 8)
    assert fresh["totals"] == first["totals"]


@pytest.mark.parametrize("options", [(), ("--no-store",)], ids=["store", "no store"])
def test_every_weight_is_solved_once_for_all_its_figures(tmp_path, capsys, options, monkeypatch):
    solved, real = [], facts.ends_of
    monkeypatch.setattr(facts, "ends_of", lambda gram, t: solved.append(t) or real(gram, t))
    spectrum(capsys, plain_model(tmp_path, dim=40), *options)
    assert solved == [16] * 8


# --- best and worst ---


def test_the_extremes_of_kappa_in_a_type_are_marked(case, capsys):
    _, model = case
    rows = spectrum(capsys, model).json["tensors"]
    for kind in {row["module_type"] for row in rows}:
        group = sorted((row for row in rows if row["module_type"] == kind), key=lambda row: row["kappa"])
        assert [row["name"] for row in group if row["is_best"]] == [group[0]["name"]]
        assert [row["name"] for row in group if row["is_worst"]] == [group[-1]["name"]]


def test_one_of_a_kind_is_neither_best_nor_worst(tmp_path, capsys):
    rows = spectrum(capsys, plain_model(tmp_path, layers=1)).json["tensors"]
    assert not any(row["is_best"] or row["is_worst"] for row in rows)
    assert best_and_worst([]) == {}


# --- files and formats ---


def test_all_singular_values_can_be_had_as_a_file(case, tmp_path, capsys):
    family, model = case
    file = tmp_path / "values.safetensors"
    report = spectrum(capsys, model, "--values", file).json
    values = load_file(file)
    assert {*values} == {row["name"] for row in report["tensors"]}
    assert report["output"] == {"values": str(file)}
    numbers: dict[str, int] = {}
    for row in report["tensors"]:
        number = numbers.setdefault(row["module"], 0)
        numbers[row["module"]] += 1
        right = np.linalg.svd(in_memory(family)[row["module"]][number], compute_uv=False)
        S = values[row["name"]]
        assert S.dtype == torch.float64
        assert np.abs(S.numpy() - right).max() <= 1e-10 * right[0]
        assert (float(S[0]), float(S[-1])) == (row["sigma_max"], row["sigma_min"])


def test_the_file_of_values_is_the_same_from_the_store(tmp_path, capsys):
    model, bytes_of = plain_model(tmp_path / "m"), []
    for name, options in {"a": (), "b": (), "c": ("--no-store",)}.items():
        spectrum(capsys, model, "--values", tmp_path / name, *options)
        bytes_of.append((tmp_path / name).read_bytes())
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]


def test_csv_and_json_agree(tmp_path, capsys):
    model = plain_model(tmp_path, dim=24)
    rows = spectrum(capsys, model).json["tensors"]
    ran = inside(capsys, "inspect", "spectrum", model, "--format", "csv")
    cells = list(csv.DictReader(io.StringIO(ran.out)))
    assert len(cells) == len(rows) == 8
    for cell, row in zip(cells, rows, strict=True):
        for name, figure in row.items():
            if name == "energy":
                assert {rank: float(cell[f"energy_{rank}"]) for rank in figure} == figure
            elif name == "shape":
                assert cell[name] == "24x24"
            elif name == "sketch":
                assert [float(word) for word in cell[name].split()] == figure
            else:
                assert cell[name] == str(figure), name


@pytest.mark.parametrize("spelling", ["table", "md"])
def test_table_and_markdown_name_every_weight_and_its_condition(tmp_path, capsys, spelling):
    model = plain_model(tmp_path, dim=24)
    rows = spectrum(capsys, model).json["tensors"]
    ran = inside(capsys, "inspect", "spectrum", model, "--format", spelling)
    assert ran.code == ExitCode.DONE
    for row in rows:
        assert row["module_type"].split(".")[-1] in ran.out
        assert all(number(row[name]) in ran.out for name in ("sigma_max", "kappa", "stable_rank"))
    assert ran.out.count("▲") == ran.out.count("▼") == 4 + 1  # one of each type, and the legend


def test_a_singular_weight_has_an_infinite_condition_and_valid_json(tmp_path, capsys):
    model = changed(
        plain_model(tmp_path / "m"),
        tmp_path / "n",
        model__layers__0__mlp__up_proj=torch.zeros_like,
        model__layers__1__mlp__up_proj=lambda W: torch.ones_like(W),
    )
    rows = {row["name"]: row for row in spectrum(capsys, model).json["tensors"]}
    zero, ones = (rows[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1))
    for row in (zero, ones):
        assert (row["kappa"], row["kappa_is"], row["sigma_min"]) == (None, "inf", 0.0)
        assert row["power_law_alpha"] is None
    assert [zero[name] for name in ("numerical_rank", "stable_rank", "effective_rank", "frobenius")] == [
        0
    ] * 4
    assert ones["numerical_rank"] == 1
    assert ones["stable_rank"] == pytest.approx(1)
    for spelling in ("csv", "md", "table"):
        assert inside(capsys, "inspect", "spectrum", model, "--format", spelling).code == ExitCode.DONE


FILES = {"--html": "page.html", "--values": "values.safetensors"}


@pytest.mark.parametrize("option", FILES)
def test_a_file_that_is_there_is_not_written_over_unless_asked(tmp_path, capsys, option):
    model, file = plain_model(tmp_path / "m"), tmp_path / FILES[option]
    file.write_text("mine")
    ran = spectrum(capsys, model, option, file)
    assert ran.code == ExitCode.EXISTS
    assert file.read_text() == "mine"
    assert str(file) in ran.err
    assert ran.out == ""
    assert spectrum(capsys, model, option, file, "--overwrite").code == ExitCode.DONE
    assert file.read_bytes() != b"mine"


def test_a_page_and_pictures_are_written(tmp_path, capsys):
    model = plain_model(tmp_path / "m")
    ran = spectrum(capsys, model, "--html", tmp_path / "page.html", "--png", tmp_path / "deep" / "pictures")
    assert ran.code == ExitCode.DONE
    assert (tmp_path / "page.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    pictures = list((tmp_path / "deep" / "pictures").iterdir())
    assert pictures
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures)


# --- weights that cannot be measured ---


def poisoned(W: torch.Tensor) -> torch.Tensor:
    W[3, 5] = math.nan
    return W


@pytest.fixture
def ill(tmp_path):
    return changed(
        plain_model(tmp_path / "sound"),
        tmp_path / "ill",
        model__layers__1__mlp__up_proj=poisoned,
        model__layers__0__self_attn__q_proj=lambda W: W * math.inf,
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_no_number_ends_the_run_and_names_the_tensor(tmp_path, capsys, workers):
    model = changed(plain_model(tmp_path / "m"), tmp_path / "n", model__layers__1__mlp__up_proj=poisoned)
    ran = spectrum(capsys, model, "--values", tmp_path / "values", "--workers", workers)
    assert ran.code == ExitCode.NUMERIC
    assert "entry [3, 5] is nan: model.layers.1.mlp.up_proj.weight" in ran.err
    assert ran.out == ""
    assert not (tmp_path / "values").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_under_keep_going_it_is_listed_and_the_rest_measured(ill, tmp_path, capsys, workers):
    ran = spectrum(capsys, ill, "--keep-going", "--values", tmp_path / "values", "--workers", workers)
    assert ran.code == ExitCode.BELOW_STANDARD
    report = ran.json
    lost = {"model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"}
    reasons = {one["name"]: one["reason"] for one in report["skipped"]}
    assert reasons["model.layers.1.mlp.up_proj.weight"] == "entry [3, 5] is nan"
    assert reasons["model.layers.0.self_attn.q_proj.weight"].startswith("entry [0, 0] is ")
    names = {row["name"] for row in report["tensors"]}
    assert len(names) == 6
    assert not names & lost
    assert {*load_file(tmp_path / "values")} == names
    assert (report["totals"]["tensors"], report["totals"]["unmeasured"]) == (6, 2)
    assert report["totals"]["decompositions"] == 6


@pytest.mark.parametrize("spelling", ["json", "csv", "md", "table"])
def test_where_nothing_can_be_measured_there_is_an_empty_report(tmp_path, capsys, spelling):
    sick = {f"model.layers.{n}.mlp.up_proj.weight": torch.full((9, 7), math.nan) for n in range(2)}
    model = save_plain(sick, tmp_path / "m")
    ran = inside(
        capsys, "inspect", "spectrum", model, "--keep-going", "--format", spelling, "--values", tmp_path / "v"
    )
    assert ran.code == ExitCode.BELOW_STANDARD
    if spelling == "json":
        assert json.loads(ran.out)["tensors"] == []
    assert load_file(tmp_path / "v") == {}


def test_a_sound_model_under_keep_going_is_done(tmp_path, capsys):
    assert spectrum(capsys, plain_model(tmp_path), "--keep-going").code == ExitCode.DONE


def test_the_ranks_whose_energy_is_shown_are_below_the_side(tmp_path, capsys):
    for dim in (8, 9, 33):
        rows = spectrum(capsys, plain_model(tmp_path / str(dim), dim=dim)).json["tensors"]
        assert [int(rank) for rank in rows[0]["energy"]] == [rank for rank in RANKS if rank < dim]


@pytest.mark.parametrize("option", ["--html", "--values"])
def test_what_cannot_be_written_is_refused_before_the_work(option, tmp_path, capsys):
    model = plain_model(tmp_path / "model")
    (tmp_path / "folder").mkdir()
    done = inside(capsys, "inspect", "spectrum", model, option, tmp_path / "folder")
    assert (done.code, done.out) == (ExitCode.EXISTS, "")
    done = inside(capsys, "inspect", "spectrum", model, option, tmp_path / "nowhere" / "file")
    assert (done.code, done.out) == (ExitCode.USAGE, "") and "nowhere" in done.err
    (tmp_path / "file").write_text("")
    assert inside(capsys, "inspect", "spectrum", model, "--png", tmp_path / "file").code == ExitCode.EXISTS
