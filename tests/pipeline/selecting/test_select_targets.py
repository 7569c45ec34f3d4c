"""`kasa select-targets` against PEFT's own selector on the model that transformers loads from the same files."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import KappaTuneSelector, find_kappa_target_modules
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from scipy.stats import spearmanr

from kasa_cli.errors import ExitCode
from kasa_cli.methods.criteria import CRITERIA, Spectrum
from kasa_cli.pipeline.selecting.run import Amount, ModelLocation, RunOptions, SelectRequest, select_targets
from tests.builders import tiny_models
from tests.builders.checkpoints import changed, load, plain_model
from tests.builders.runs import inside

FAMILIES = list(tiny_models.FAMILIES)
NAMED = ["llama", "bert", "gpt2", "qwen3-moe", "mixtral", "llama4-text", "gpt-oss"]
SHARES = [0.05, 0.2, 0.29, 0.5, 1.0]
AMOUNTS = [Amount(num_modules=1), Amount(num_modules=3), Amount(num_modules=10_000), Amount(threshold=6.0)]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A checkpoint, PEFT's selector on its model, and a store for all its measurements."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_models.save(request.param, folder / "model")
    selector = KappaTuneSelector(load(model), show_progress=False)
    selector._compute_kappas()
    return request.param, model, selector, folder / "store"


def chosen(case, amount, **options):
    _, model, _, store = case
    return select_targets(
        ModelLocation(str(model)), SelectRequest(amount=amount, **options), running=RunOptions(1, store=store)
    )


def assert_resolved(ours, theirs):
    """Within 1e-3, or the resolution of float32: PEFT's smallest value is off by some roundings of the largest."""
    for name, score in theirs.items():
        assert ours[name] == pytest.approx(score, rel=max(1e-3, 4 * 2.0**-23 * score)), name


def theirs(selector, amount):
    wanted = vars(amount)
    parameters = selector.get_best_target_parameters(**wanted)
    return selector.get_best_targets(**wanted), parameters or None


@pytest.mark.parametrize("top_p", SHARES)
def test_the_best_share_is_that_of_peft_in_its_order(case, top_p):
    report = chosen(case, Amount(top_p=top_p))
    modules, parameters = theirs(case[2], Amount(top_p=top_p))
    assert list(report.target_modules) == modules
    assert (list(report.target_parameters) if report.target_parameters else None) == parameters


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_a_number_and_a_threshold_choose_as_peft_does(case, amount):
    report = chosen(case, amount)
    modules, parameters = theirs(case[2], amount)
    assert list(report.target_modules) == modules
    assert list(report.target_parameters or ()) == (parameters or [])


def test_every_score_is_that_of_peft_and_a_second_question_decomposes_nothing(case):
    _, _, selector, _ = case
    chosen(case, Amount(top_p=0.1))
    report = chosen(case, Amount(top_p=0.2))
    assert (report.totals["decompositions"], report.totals["candidates"]) == (0, len(report.candidates))
    ours = {row.module: row.score for row in report.candidates if row.kind == "module"}
    assert list(ours) == list(selector._condition_numbers)
    assert_resolved(ours, selector._condition_numbers)
    experts = {row.module: row.score for row in report.candidates if row.kind == "parameter"}
    assert list(experts) == list(selector._parameter_condition_numbers)
    assert_resolved(experts, selector._parameter_condition_numbers)
    for kind in ("module", "parameter"):
        places = [row.rank_in_order for row in report.candidates if row.kind == kind]
        assert sorted(places) == list(range(1, len(places) + 1))


@pytest.mark.parametrize("family", NAMED)
def test_the_one_line_of_peft_gives_the_two_lists_of_the_json(family, tmp_path, capsys):
    model = tiny_models.save(family, tmp_path / "model")
    found = inside(capsys, "select-targets", model, "--json").json
    one_line = find_kappa_target_modules(load(model), show_progress=False)
    assert {name: found[name] for name in one_line} == one_line
    assert (found["criterion"], found["rule"], found["matched_rank"]) == ("kappa", "peft", None)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "granite-moe"])
def test_experts_are_scored_one_by_one_and_count_by_their_mean(family, tmp_path):
    model = tiny_models.save(family, tmp_path / "model")
    report = select_targets(ModelLocation(str(model)), running=RunOptions(1))
    weights = dict(load(model).named_parameters())
    rows = [row for row in report.candidates if row.kind == "parameter"]
    assert rows
    for row in rows:
        W = weights[row.module].detach().double().numpy()
        S = [np.linalg.svd(expert, compute_uv=False) for expert in W]
        kappas = [values[0] / (values[-1] + 1e-8) for values in S]
        assert row.experts == pytest.approx(kappas, rel=1e-9)
        assert row.score == pytest.approx(np.mean(kappas), rel=1e-9)
        assert row.shape == W.shape[1:]


def test_what_peft_leaves_out_in_silence_is_named(tmp_path, capsys):
    model = tiny_models.save("mixtral", tmp_path / "model")
    found = inside(capsys, "select-targets", model, "--max-dim", 40, "--top-p", 1, "--json").json
    selector = KappaTuneSelector(load(model), max_dim_size_to_analyze=40, show_progress=False)
    assert found["target_modules"] == selector.get_best_targets(top_p=1.0)
    assert found["target_parameters"] is None
    reasons = {one["name"]: one["reason"] for one in found["skipped"]}
    assert "over --max-dim 40" in reasons["lm_head.weight"]
    experts = [reason for name, reason in reasons.items() if "experts" in name]
    assert experts and all("over --max-dim 40" in reason for reason in experts)


# --- weights that are not finite, or not of full rank ---


def test_a_nan_stops_with_the_name_of_its_tensor_and_is_listed_on_request(tmp_path, capsys):
    def poison(W):
        W[3, 4] = math.nan
        return W

    model = changed(plain_model(tmp_path / "a"), tmp_path / "b", model__layers__1__mlp__up_proj=poison)
    done = inside(capsys, "select-targets", model, "--json")
    assert (done.code, done.out) == (ExitCode.NUMERIC, "")
    assert "model.layers.1.mlp.up_proj.weight" in done.err and "[3, 4] is nan" in done.err
    done = inside(capsys, "select-targets", model, "--json", "--keep-going", "--top-p", 1)
    assert done.code == ExitCode.BELOW_STANDARD
    assert done.json["totals"]["unmeasured"] == 1
    assert len(done.json["target_modules"]) == done.json["totals"]["candidates"] > 5
    assert [one["name"] for one in done.json["skipped"] if "nan" in one["reason"]] == [
        "model.layers.1.mlp.up_proj.weight"
    ]


def test_a_singular_weight_is_last_and_a_zero_one_first_by_peft_and_both_last_by_the_strict_rule(
    tmp_path, capsys
):
    def singular(W):
        W[0] = W[1]
        return W

    model = changed(
        plain_model(tmp_path / "a"),
        tmp_path / "b",
        model__layers__0__mlp__up_proj=torch.zeros_like,
        model__layers__1__mlp__up_proj=singular,
    )
    zero, twin = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    peft = inside(capsys, "select-targets", model, "--json", "--top-p", 1).json
    assert (peft["target_modules"][0], peft["target_modules"][-1]) == (zero, twin)
    done = inside(capsys, "select-targets", model, "--json", "--top-p", 1, "--rule", "strict").json
    assert done["target_modules"][-2:] == [zero, twin]
    rows = {row["module"]: row for row in done["candidates"]}
    assert [(rows[name]["score"], rows[name]["score_is"]) for name in (zero, twin)] == [(None, "inf")] * 2


# --- other criteria and ways to choose ---


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe"])
def test_every_criterion_scores_all_linear_weights_of_the_blocks(family, criterion, tmp_path):
    model = tiny_models.save(family, tmp_path / "model")
    report = select_targets(
        ModelLocation(str(model)), SelectRequest(criterion=criterion, rule="strict"), running=RunOptions(1)
    )
    weights = dict(load(model).named_parameters())
    scored = {row.module: row for row in report.candidates}
    silent = {one.name for one in report.skipped if "nothing to say" in one.reason}
    assert len(scored) + len(silent) == {"gpt2": 8, "qwen3-moe": 12}[family]
    for name, row in scored.items():
        W = weights[name if row.kind == "parameter" else f"{name}.weight"].detach().double()
        matrices = list(W) if row.kind == "parameter" else [W]
        scores = []
        for one in matrices:
            S = torch.linalg.svdvals(one)
            spectrum = Spectrum(tuple(one.shape), float(S[0]), float(S[-1]), float(S.norm()), S)
            scores.append(CRITERIA[criterion].score(spectrum))
        assert row.score == pytest.approx(np.mean(scores), rel=1e-6)
    best = {one: scored[one].score for one in report.target_modules}
    others = [row.score for row in scored.values() if not row.selected and row.kind == "module"]
    sign = 1 if CRITERIA[criterion].prefer == "low" else -1
    assert all(sign * score <= sign * other for score in best.values() for other in others)
    assert list(best.values()) == sorted(best.values(), reverse=sign < 0)


def test_the_other_end_can_be_preferred(tmp_path):
    model = ModelLocation(str(tiny_models.save("llama", tmp_path / "model")))
    low, high = (
        select_targets(model, SelectRequest(Amount(top_p=1.0), prefer=end), running=RunOptions(1))
        for end in ("low", "high")
    )
    assert low.target_modules == high.target_modules[::-1]


def test_within_each_type_as_many_are_chosen(tmp_path):
    model = ModelLocation(str(tiny_models.save("llama", tmp_path / "model")))
    options = SelectRequest(Amount(num_modules=1), per_type=True)
    report = select_targets(model, options, running=RunOptions(1))
    types = [row.module_type for row in report.candidates if row.selected]
    assert sorted(types) == sorted({row.module_type for row in report.candidates})
    for row in report.candidates:
        fellows = [one.score for one in report.candidates if one.module_type == row.module_type]
        assert row.selected == (row.score == min(fellows))
        assert row.rank_in_order == 1 + sum(score < row.score for score in fellows)


def test_a_fair_ranking_is_not_one_of_shapes(tmp_path):
    """Random weights: without its expected value for noise, κ does not depend on the shape."""
    model = ModelLocation(str(tiny_models.save("llama", tmp_path / "model")))
    plain = select_targets(model, SelectRequest(Amount(top_p=0.5)), running=RunOptions(1))
    fair = select_targets(model, SelectRequest(Amount(top_p=0.5), shape_fair=True), running=RunOptions(1))
    square = [row.module for row in plain.candidates if row.shape[0] == row.shape[1]]
    assert not set(square) & set(plain.target_modules)
    assert set(square) & set(fair.target_modules)
    ratios = {row.module: row.score / row.expected for row in fair.candidates}
    for is_square in (True, False):  # the smallest value of a square weight, and so κ, has a heavy tail
        group = [ratios[row.module] for row in fair.candidates if (row.module in square) == is_square]
        assert 1 / 3 < np.median(group) < 3
    assert list(fair.target_modules) == sorted(ratios, key=ratios.__getitem__)[: len(fair.target_modules)]


def test_a_criterion_that_chance_scores_nothing_has_no_fair_ranking(tmp_path, capsys):
    model = plain_model(tmp_path / "model")
    done = inside(capsys, "select-targets", model, "--criterion", "snr-mp", "--shape-fair")
    assert done.code == ExitCode.USAGE and "snr-mp" in done.err


def test_a_budget_is_matched_by_counting_parameters(tmp_path, capsys):
    model = tiny_models.save("qwen3-moe", tmp_path / "model")
    found = inside(capsys, "select-targets", model, "--match-budget", 8, "--top-p", 0.3, "--json").json
    weights = dict(load(model).named_parameters())

    def cost(row):
        W = weights[row["module"] if row["kind"] == "parameter" else f"{row['module']}.weight"]
        return math.prod(W.shape[:-2]) * sum(W.shape[-2:])

    total = sum(cost(row) for row in found["candidates"])
    rank = found["matched_rank"]
    spent = sum(cost(row) for row in found["candidates"] if row["selected"])
    assert rank * spent <= 8 * total < (rank + 1) * spent


def test_criteria_are_compared_by_overlap_and_rank_correlation(tmp_path):
    model = ModelLocation(str(tiny_models.save("llama", tmp_path / "model")))
    options = SelectRequest(Amount(num_modules=4), compare=("stable-rank", "kappa", "snr"))
    report = select_targets(model, options, running=RunOptions(1))
    assert [one["criterion"] for one in report.comparison] == ["stable-rank", "snr"]
    for one in report.comparison:
        other = {row.module: row.others[one["criterion"]] for row in report.candidates}
        theirs = set(sorted(other, key=other.__getitem__, reverse=True)[:4])
        ours = set(report.target_modules)
        assert one["overlap"] == pytest.approx(len(ours & theirs) / len(ours | theirs))
        right = spearmanr([-row.score for row in report.candidates], list(other.values())).statistic
        assert one["rank_correlation"] == pytest.approx(right)


# --- trainer configs ---


@pytest.mark.parametrize("family", [*NAMED, "deepseek-v3", "gemma3-vlm"])
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings", "ignore::FutureWarning")
def test_the_emission_for_peft_wraps_exactly_the_choice(family, tmp_path, capsys):
    model = tiny_models.save(family, tmp_path / "model")
    exclude = ("--exclude", "router") if family == "llama4-text" else ()
    options = ("--top-p", 0.4, "--emit", "peft", *exclude)
    done = inside(capsys, "select-targets", model, *options, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["emission"]["checked_by"].startswith("peft 0.")
    wrapped = get_peft_model(load(model), LoraConfig(**json.loads(found["emission"]["text"])))
    names = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer")
        for name, module in wrapped.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    modules = {name.rpartition(".")[0] for name in found["target_parameters"] or ()}
    assert names == set(found["target_modules"]) | modules


def test_a_router_that_peft_can_wrap_and_not_train_is_refused_by_name(tmp_path, capsys):
    model = tiny_models.save("llama4-text", tmp_path / "model")
    done = inside(capsys, "select-targets", model, "--top-p", 1, "--emit", "peft")
    assert done.code in (ExitCode.USAGE, ExitCode.INTEGRITY)
    assert "router" in done.err and "--exclude" in done.err and done.out == ""


@pytest.mark.parametrize("kind", ["names", "peft", "axolotl", "llamafactory", "regex"])
def test_a_hand_off_is_the_result_or_goes_to_a_file(kind, tmp_path, capsys):
    model = tiny_models.save("llama", tmp_path / "model")
    printed = inside(capsys, "select-targets", model, "--emit", kind)
    assert printed.code == 0, printed.err
    file = tmp_path / "hand-off"
    written = inside(capsys, "select-targets", model, "--emit", kind, "-o", file, "--json")
    assert file.read_text() == printed.out
    assert written.json["emission"]["text"].strip() == printed.out.strip()
    again = inside(capsys, "select-targets", model, "--emit", kind, "-o", file)
    assert (again.code, file.read_text()) == (ExitCode.EXISTS, printed.out)
    assert inside(capsys, "select-targets", model, "--emit", "names", "-o", file, "--overwrite").code == 0


def test_truncate_takes_the_file(tmp_path, capsys):
    model, file = tiny_models.save("llama", tmp_path / "model"), tmp_path / "targets.json"
    done = inside(capsys, "select-targets", model, "--exclude", "lm_head", "-o", file)
    assert done.code == 0, done.err
    wanted = json.loads(file.read_text())["target_modules"]
    made = inside(
        capsys, "truncate", model, "-o", tmp_path / "OUT", "-r", 3, "--targets-from", file, "--json"
    )
    assert sorted(row["module"] for row in made.json["tensors"]) == sorted(wanted)
    assert made.json["totals"]["decompositions"] == 0
    changed_tensors = load_file(tmp_path / "OUT" / "base" / "model.safetensors")
    before = load_file(model / "model.safetensors")
    differing = {name for name in before if not torch.equal(before[name], changed_tensors[name])}
    assert differing == {f"{name}.weight" for name in wanted}


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--top-p", 0), "--top-p"),
        (("--top-p", 1.01), "--top-p"),
        (("--top-p", "nan"), "--top-p"),
        (("--num-modules", 0), "--num-modules"),
        (("--num-modules", -1), "--num-modules"),
        (("--threshold", "nan"), "--threshold"),
        (("--top-p", 0.5, "--num-modules", 3), "one of"),
        (("--compare", "kappa,beauty"), "beauty"),
        (("--match-budget", 0), "match-budget"),
        (("--target", "q_prjo"), "q_proj"),
        (("--threshold", 0.5, "--emit", "peft"), "nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(options, said, tmp_path, capsys):
    done = inside(capsys, "select-targets", plain_model(tmp_path / "model"), *options)
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert said in done.err and len(done.err.splitlines()) == 1
