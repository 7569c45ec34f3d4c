"""`kasa convert`: PEFT loads its output and computes the same logits as with the adapter itself; refused adapters."""

import json
import re
import shutil
import warnings

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from kasa_cli.adapters.reading import open_adapter
from kasa_cli.adapters.writing import SERVED_RANKS, padded_rank
from kasa_cli.checkpoint.safetensors_file import read_header
from kasa_cli.errors import ExitCode, IntegrityError, InvalidInput, NumericalError, UsageError
from kasa_cli.linalg import frame
from kasa_cli.methods.adapter_kinds.as_lora import Limit, of_terms, of_weight
from kasa_cli.methods.adapter_kinds.change import Change, Term
from kasa_cli.pipeline.converting import factors as factors_file
from kasa_cli.pipeline.converting import run as verb
from kasa_cli.pipeline.converting.run import ConvertRequest, ModelLocation, RunOptions, convert
from kasa_cli.pipeline.merging.run import MergeRequest as MergeOptions
from kasa_cli.pipeline.merging.run import merge
from kasa_cli.pipeline.truncating.run import Patterns, truncate
from kasa_cli.pipeline.truncating.run import TruncateRequest as Truncation
from tests.builders.adapters import CASES, CONFIG, WEIGHTS, base_of, fill_b, live, saved, tampered
from tests.builders.checkpoints import load, logits
from tests.builders.folders import tree_hash
from tests.builders.matrices import close
from tests.builders.runs import finished, inside

HERE = RunOptions(1, use_store=False)
EXACT = {
    *(
        "lora",
        "rslora",
        "patterns",
        "pissa",
        "olora",
        "orthogonal",
        "mica",
        "kasa",
        "embedding",
        "embedding-tied",
    ),
    *("conv1d", "neox", "vlm", "experts", "experts-qwen3", "experts-patterns", "experts-gpt-oss"),
    *(
        "experts-llama4",
        "experts-one",
        "weight-parameter",
        "adalora",
        "hra",
        "hra-gs",
        "delora",
        "vera",
        "miss",
    ),
    *("miss-mini", "osf", "randlora"),
}
DENSE = {
    *("dora", "dora-embedding", "dora-conv1d", "ia3", "loha", "lokr", "lokr-both", "oft", "oft-exact"),
    *("oft-embedding", "hira", "hira-embedding", "miss-bat", "road"),
}
MORE = {
    "lora-bias": "model.layers.0.self_attn.q_proj.bias",
    "bias-all": "bias",
    "bias-only": "bias",
    "saved": "lm_head.weight",
    "tokens": "embed_tokens.weight",
    "tokens-by-layer": "lm_head.weight",
    "tokens-tied": "embed_tokens.weight",
    "trainable-tokens": "kasa merge",
    "ln-tuning": "kasa merge",
    "pissa-niter": "random",
    "ia3-conv1d": "ia3",
}


def converted(adapter, base, out, running=HERE, **options):
    return convert(
        adapter, ModelLocation(str(base)), out, ConvertRequest(**{"base_is": "original", **options}), running
    )


def with_peft(base, adapter):
    with warnings.catch_warnings(action="ignore"):
        return PeftModel.from_pretrained(load(base), adapter).eval()


def answers(base, adapter):
    """PEFT's logits with an adapter and with it disabled. A warning, such as one of a missing key, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|Model has `tie_word_embeddings")
        model = PeftModel.from_pretrained(load(base), adapter).eval()
    with model.disable_adapter():
        plain = logits(model)
    return logits(model), plain


def parts(out):
    return load_file(out / WEIGHTS), json.loads((out / CONFIG).read_text())


def same_products(one, other, tolerance=1e-6):
    """Assert that two PEFT files add the same update to the same modules."""
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name in (name for name in ours if "lora_B" in name):
        A = name.replace("lora_B", "lora_A")
        first, second = ours[name].double() @ ours[A].double(), theirs[name].double() @ theirs[A].double()
        assert float((first - second).norm()) <= tolerance * float(first.norm()), name


# --- exact forms ---


def test_every_case_is_sorted():
    assert EXACT | DENSE | MORE.keys() == CASES.keys()


@pytest.mark.parametrize("name", sorted(EXACT))
def test_peft_answers_as_with_the_adapter_itself(name, tmp_path):
    base, adapter = base_of(name), saved(name)
    report = converted(adapter, base, tmp_path / "OUT")
    expected, bare = logits(with_peft(base, adapter)), logits(load(base))
    found, plain = answers(base, tmp_path / "OUT")
    assert torch.equal(plain, bare)
    assert not torch.equal(expected, bare)
    assert float((found - expected).abs().max()) <= 1e-3 * float((expected - bare).abs().max())
    assert close(found, expected, 1e-6)
    assert (
        report.totals["tensors_consumed"]
        == report.totals["tensors_total"]
        == len(load_file(adapter / WEIGHTS))
    )
    assert all(row.rank == row.exact_rank and 0 < row.loss < 2e-7 for row in report.tensors)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_files_are_what_servers_read(name, tmp_path):
    """The rules of vLLM, llama.cpp and TGI: two tensors a module, one rank, alpha = rank, nothing else."""
    base, adapter = base_of(name), saved(name)
    report = converted(adapter, base, tmp_path / "OUT", pad_rank=True)
    tensors, config = parts(tmp_path / "OUT")
    rank = report.padded_rank
    assert rank in SERVED_RANKS and rank == padded_rank(report.rank)
    assert config["r"] == config["lora_alpha"] == rank and isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["modules_to_save"] is None
    assert (config["bias"], config["use_rslora"], config["use_dora"]) == ("none", False, False)
    assert config["init_lora_weights"] is True and "kasa_config" not in config
    assert config["peft_type"] == "LORA" and config["lora_bias"] is False
    assert config["base_model_name_or_path"] is None
    for key, tensor in tensors.items():
        assert re.fullmatch(r"base_model\.model\..+\.lora_((A|B)\.weight|embedding_(A|B))", key), key
        assert tensor.dtype == torch.float32
        assert re.sub("lora_(embedding_)?B", r"lora_\1A", key) in tensors
        assert tensor.shape["A" not in key.rpartition("lora_")[2]] % rank == 0
    assert list(read_header(tmp_path / "OUT" / WEIGHTS).metadata) == ["format"]


def test_ranks_and_scalings_of_patterns_become_one(tmp_path):
    base, adapter = base_of("patterns"), saved("patterns")
    report = converted(adapter, base, tmp_path / "OUT")
    assert {row.rank for row in report.tensors} == {2, 4, 8} and report.rank == report.padded_rank == 8
    tensors, _ = parts(tmp_path / "OUT")
    v_proj = tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"]
    assert (
        v_proj.shape == (8, 32) and torch.equal(v_proj[2:], torch.zeros(6, 32)) and v_proj[:2].abs().min() > 0
    )


# --- KaSA ---


@pytest.fixture(scope="module")
def model():
    return base_of("kasa")


def train(peft_model, steps=4):
    parameters = [one for one in peft_model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    tokens = torch.arange(12).view(2, 6) + 3
    for _ in range(steps):
        optimizer.zero_grad()
        peft_model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return peft_model.eval()


@pytest.fixture(scope="module")
def trained(folder):
    """A KaSA adapter that PEFT trained a little on the original base, and the logits of that model."""
    trained = train(live("kasa"))
    with warnings.catch_warnings(action="ignore"):
        trained.save_pretrained(folder / "trained")
    return folder / "trained", logits(trained)


@pytest.fixture(scope="module")
def operated(model, folder):
    """A truncated output (of a truncation rank above the adapter's), its trained adapter, and the logits."""
    out = folder / "operated"
    options = {"rank": 3, "truncation_rank": 5, "alpha": 7, "workers": 1, "use_store": False}
    truncate(ModelLocation(str(model)), out, Truncation(patterns=Patterns(("q_proj", "v_proj")), **options))
    with warnings.catch_warnings(action="ignore"):
        fresh = PeftModel.from_pretrained(load(out / "base"), out / "adapter", is_trainable=True)
        trained = train(fresh)
        trained.save_pretrained(folder / "elsewhere")
    shutil.copy(folder / "elsewhere" / WEIGHTS, out / "adapter" / WEIGHTS)
    return out, folder / "elsewhere", logits(trained)


def test_on_the_original_base_the_lora_is_the_trained_model(model, trained, tmp_path):
    adapter, expected = trained
    report = converted(adapter, model, tmp_path / "OUT")
    found, plain = answers(model, tmp_path / "OUT")
    assert float((found - expected).abs().max()) <= 1e-5
    assert torch.equal(plain, logits(load(model)))
    assert (report.on, report.base_is, report.rank) == ("original", "original", 8)
    assert float((expected - plain).abs().max()) > 1e-3


def test_on_the_truncated_base_too_with_the_rank_of_the_adapter(operated, tmp_path):
    out, adapter, expected = operated
    report = converted(adapter, out / "base", tmp_path / "OUT", base_is="auto", on="truncated")
    found, plain = answers(out / "base", tmp_path / "OUT")
    assert float((found - expected).abs().max()) <= 1e-5
    assert torch.equal(plain, logits(load(out / "base")))
    assert (report.on, report.base_is, report.rank) == ("truncated", "truncated", 3)


def test_the_cut_is_as_deep_as_the_manifest_says_and_from_the_tail_where_there_is_one(
    operated, model, tmp_path
):
    out, adapter, expected = operated
    for number, (given, base) in enumerate(
        [(out / "adapter", model), (out / "adapter", out / "base"), (adapter, out / "base")]
    ):
        report = converted(given, base, tmp_path / f"OUT{number}", base_is="auto")
        found, plain = answers(model, tmp_path / f"OUT{number}")
        assert float((found - expected).abs().max()) <= 1e-5
        assert torch.equal(plain, logits(load(model)))
        assert (report.on, report.rank) == ("original", 8)
    tensors, _ = parts(tmp_path / "OUT0")
    tail, _ = parts(out / "tail")
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(tensors[key][3:], tail[key])
    assert tree_hash(tmp_path / "OUT0" / WEIGHTS) == tree_hash(tmp_path / "OUT1" / WEIGHTS)


def test_tail_store_and_decomposition_agree(operated, model, tmp_path):
    out, _, _ = operated
    copy = shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns("tail", "base"))
    stored = RunOptions(1, store=tmp_path / "store")
    for name, given, running in (
        ("tail", out, HERE),
        ("computed", copy, HERE),
        ("first", copy, stored),
        ("stored", copy, stored),
    ):
        converted(given / "adapter", model, tmp_path / name, running, base_is="auto")
    same_products(tmp_path / "tail", tmp_path / "computed")
    assert (
        tree_hash(tmp_path / "computed" / WEIGHTS)
        == tree_hash(tmp_path / "first" / WEIGHTS)
        == tree_hash(tmp_path / "stored" / WEIGHTS)
    )


def test_a_truncated_base_without_a_tail_is_no_way_to_the_original(operated, tmp_path, capsys):
    out, adapter, _ = operated
    alone = shutil.copytree(out / "base", tmp_path / "alone")
    done = inside(
        capsys,
        "convert",
        adapter,
        "--to",
        "lora",
        "--base",
        alone,
        "-o",
        tmp_path / "OUT",
        "--base-is",
        "truncated",
    )
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert "--on truncated" in done.err and [one.name for one in tmp_path.iterdir()] == ["alone"]


def test_what_cannot_be_known_of_the_base_stops_it(trained, model, tmp_path):
    with pytest.raises(IntegrityError, match="--base-is"):
        converted(trained[0], model, tmp_path / "OUT", base_is="auto")


def test_a_lora_for_the_other_base_knows_which_that_is(operated, model, tmp_path):
    """Converted from the original base for the truncated one and back; a merge into the wrong base is refused."""
    out, _, _ = operated
    converted(out / "adapter", model, tmp_path / "T", base_is="auto", on="truncated")
    converted(out / "adapter", out / "base", tmp_path / "O", base_is="auto", on="original")
    into = lambda adapter, base, name, **o: merge(  # noqa: E731
        [adapter], ModelLocation(str(base)), tmp_path / name, MergeOptions(**o), HERE
    )
    into(tmp_path / "T", out / "base", "a")
    into(tmp_path / "O", model, "b")
    one, other = (load_file(tmp_path / part / "model.safetensors") for part in "ab")
    for name in one:
        assert float((one[name] - other[name]).abs().max()) <= 1e-6
    for adapter, base in (("T", model), ("O", out / "base")):
        with pytest.raises(IntegrityError, match="not the base"):
            into(tmp_path / adapter, base, "c")


def test_in_half_precision_it_is_said_that_the_cut_is_not_what_was_stored(trained, model, tmp_path):
    load(model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    report = converted(trained[0], tmp_path / "half", tmp_path / "OUT")
    assert any("half precision" in note for note in report.notes)
    assert not converted(trained[0], model, tmp_path / "full").notes


# --- names on disk ---


@pytest.mark.parametrize("name", ["lora", "conv1d", "neox", "vlm", "experts", "experts-qwen3", "embedding"])
def test_names_on_disk_are_those_of_tensors_of_these_shapes(name, tmp_path):
    """The update is the one that `kasa merge` adds to those tensors."""
    base, adapter = base_of(name), saved(name)
    converted(adapter, base, tmp_path / "OUT", names="disk")
    tensors, config = parts(tmp_path / "OUT")
    before = load_file(base / "model.safetensors")
    merge([adapter], ModelLocation(str(base)), tmp_path / "merged", MergeOptions(), HERE)
    after = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    named = set()
    for key in (key for key in tensors if "lora_A" in key or "embedding_A" in key):
        stem = re.sub(r"\.lora_(embedding_)?A(\.weight)?$", "", key)
        delta = tensors[re.sub(r"(lora_(embedding_)?)A", r"\1B", key)].double() @ tensors[key].double()
        is_turned = "embedding_A" in key or config["fan_in_fan_out"]
        disk = stem.removeprefix("base_model.model.") + ".weight"
        delta = delta.T if is_turned else delta
        assert delta.shape == before[disk].shape
        exact = before[disk].double() + delta
        assert float((exact - after[disk].double()).abs().max()) <= 1e-6 * float(exact.abs().max())
        named.add(disk)
    assert named == changed
    listed = config["target_modules"]
    assert {f"{one}.weight" for one in listed} == named if isinstance(listed, list) else name == "vlm"


@pytest.mark.parametrize("name", ["experts-gpt-oss", "experts-llama4"])
def test_experts_in_one_tensor_have_no_names_on_disk(name, tmp_path):
    with pytest.raises(InvalidInput, match=r"one tensor on disk.*experts.*--names peft"):
        converted(saved(name), base_of(name), tmp_path / "OUT", names="disk")


@pytest.mark.parametrize("name", ["experts", "experts-qwen3", "experts-gpt-oss"])
def test_experts_lie_as_peft_stacks_them(name, tmp_path):
    """The shapes of PEFT's own file, at the common rank."""
    base, adapter = base_of(name), saved(name)
    converted(adapter, base, tmp_path / "OUT")
    ours, theirs = load_file(tmp_path / "OUT" / WEIGHTS), load_file(adapter / WEIGHTS)
    assert {key: one.shape for key, one in ours.items()} == {key: one.shape for key, one in theirs.items()}
    kept = json.loads((adapter / CONFIG).read_text())
    config = json.loads((tmp_path / "OUT" / CONFIG).read_text())
    assert all(
        any(one.endswith(end) for end in kept["target_parameters"]) for one in config["target_parameters"]
    )


def test_a_router_that_is_no_linear_module_goes_by_its_parameter(tmp_path):
    base = base_of("experts-gpt-oss")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=["router.weight"]
    )
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(load(base), config)
        fill_b(model)
        model.save_pretrained(tmp_path / "adapter")
    converted(tmp_path / "adapter", base, tmp_path / "OUT")
    found, _ = answers(base, tmp_path / "OUT")
    assert close(found, logits(model.eval()), 1e-6)
    assert parts(tmp_path / "OUT")[1]["target_parameters"][0].endswith("mlp.router.weight")


def test_an_expert_named_as_on_disk_is_converted_by_those_names_only(tmp_path):
    base = base_of("experts")
    name = "model.layers.0.block_sparse_moe.experts.2.w2"
    A, B = torch.randn(2, 48), torch.randn(32, 2)
    (tmp_path / "old").mkdir()
    key = f"base_model.model.{name}.lora_"
    save_file({f"{key}A.weight": A, f"{key}B.weight": B}, tmp_path / "old" / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [name]}
    (tmp_path / "old" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InvalidInput, match="--names disk"):
        converted(tmp_path / "old", base, tmp_path / "OUT")
    converted(tmp_path / "old", base, tmp_path / "OUT", names="disk")
    assert torch.equal(load_file(tmp_path / "OUT" / WEIGHTS)[f"{key}A.weight"], A)


# --- recompression ---


def updates(name):
    """W' - W of every weight that PEFT's merge changes, in numpy's float64."""
    base, adapter = base_of(name), saved(name)
    before = load(base, dtype=torch.float64)
    with warnings.catch_warnings(action="ignore"):
        merged = PeftModel.from_pretrained(load(base, dtype=torch.float64), adapter).merge_and_unload()
    after = merged.state_dict()
    pairs = {key: (after[key] - one).numpy() for key, one in before.state_dict().items() if one.ndim == 2}
    return {key: delta for key, delta in pairs.items() if np.abs(delta).max() > 0}


@pytest.mark.parametrize("name", ["patterns", "kasa", "hra", *sorted(DENSE)])
@pytest.mark.parametrize("limit", [{"rank": 3}, {"energy": 0.8}], ids=["rank", "energy"])
def test_what_is_lost_is_what_the_singular_values_say(name, limit, tmp_path):
    report = converted(saved(name), base_of(name), tmp_path / "OUT", **limit)
    deltas, lost, total = updates(name), 0.0, 0.0
    assert {f"{row.module}.weight" for row in report.tensors} == deltas.keys()
    for row in report.tensors:
        squares = np.linalg.svd(deltas[f"{row.module}.weight"], compute_uv=False) ** 2
        if "rank" in limit:
            kept = min(3, row.exact_rank or 3)
        else:
            kept = int(np.argmax(np.cumsum(squares) >= 0.8 * squares.sum() * (1 - 1e-9))) + 1
        assert row.rank == kept
        assert row.norm == pytest.approx(squares.sum() ** 0.5, rel=1e-5)
        assert row.loss == pytest.approx((squares[kept:].sum() / squares.sum()) ** 0.5, rel=1e-3, abs=1e-6)
        lost, total = lost + squares[kept:].sum(), total + squares.sum()
    assert report.totals["loss"] == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)
    assert report.totals["largest_loss"] == max(row.loss for row in report.tensors)
    assert report.rank == max(row.rank for row in report.tensors)
    assert_stored_loss(report, deltas, tmp_path / "OUT")


def assert_stored_loss(report, deltas, out):
    """The reported loss is that of the written file, computed entry by entry."""
    tensors, config = parts(out)
    for row in report.tensors:
        key = f"base_model.model.{row.module}.lora_"
        kind = "embedding_{}" if f"{key}embedding_A" in tensors else "{}.weight"
        kept = (tensors[key + kind.format("B")].double() @ tensors[key + kind.format("A")].double()).numpy()
        delta = deltas[f"{row.module}.weight"]
        kept = kept.T if config["fan_in_fan_out"] or "embedding" in kind else kept
        loss = np.linalg.norm(delta - kept) / np.linalg.norm(delta)
        assert row.loss == pytest.approx(loss, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["loha", "dora", "oft"])
def test_at_full_rank_anything_is_exact(name, tmp_path):
    base, adapter = base_of(name), saved(name)
    report = converted(adapter, base, tmp_path / "OUT", rank=64)
    found, _ = answers(base, tmp_path / "OUT")
    assert close(found, logits(with_peft(base, adapter)), 1e-5)
    assert report.totals["largest_loss"] < 1e-5


@pytest.mark.parametrize("shape", [(64, 12), (12, 64), (24, 24)], ids=str)
@pytest.mark.parametrize("grain", [1, 5])
def test_a_tall_weight_is_looked_at_by_rows_whatever_the_grain(shape, grain, monkeypatch):
    monkeypatch.setattr(frame, "PANEL_WIDTH", 7)
    monkeypatch.setattr(frame, "PANEL_BYTES", 1)
    monkeypatch.setattr(frame, "BLOCK_ENTRIES", 40)
    torch.manual_seed(0)
    W, scale = torch.randn(shape), torch.randn(shape[0]).double()

    def scaled(X, first):
        assert first % grain == 0 and ((first + len(X)) % grain == 0 or first + len(X) == shape[0])
        return X * scale[first : first + len(X), None]

    found = of_weight(W, Change(map=scaled, grain=grain), Limit(rank=4))
    delta = W.double() * (scale[:, None] - 1)
    S = np.linalg.svd(delta.numpy(), compute_uv=False)
    assert found.norm == pytest.approx(np.linalg.norm(S), rel=1e-9)
    assert found.error == pytest.approx(np.linalg.norm(S[4:]), rel=1e-6)
    error = np.linalg.norm(delta.numpy() - (found.B.double() @ found.A.double()).numpy())
    assert found.error == pytest.approx(error, rel=1e-9)


def test_an_update_of_nothing_is_a_lora_of_nothing():
    none = Change(map=lambda X, first: X)
    for limit in (Limit(rank=2), Limit(energy=0.9)):
        found = of_weight(torch.randn(6, 4), none, limit)
        assert (found.norm, found.error) == (0, 0) and not found.B.any()
    zero = Term(torch.zeros(6, 2).double(), torch.randn(2, 4).double())
    assert of_terms([zero], Limit(energy=0.9)).norm == 0


def test_a_loss_below_roundoff_is_still_measured():
    """‖LR - BA‖ computed from products of the factors alone would have an error of 1e-8 of the norm."""
    torch.manual_seed(0)
    L, R = torch.randn(40, 3, dtype=torch.float64), torch.randn(3, 30, dtype=torch.float64)
    found = of_terms([Term(L, R)], Limit())
    error = float(torch.linalg.matrix_norm(L @ R - found.B.double() @ found.A.double()))
    assert found.error == pytest.approx(error, rel=1e-6)
    assert 1e-9 < found.error / found.norm < 1e-7


def test_what_float32_cannot_hold_is_no_factor():
    with pytest.raises(NumericalError, match="float32"):
        of_terms([Term(torch.full((2, 1), 1e39, dtype=torch.float64), torch.ones(1, 2).double())], Limit())


# --- refusals ---


@pytest.mark.parametrize("name", sorted(DENSE))
def test_what_has_no_low_rank_form_is_refused_by_its_kind(name, tmp_path, capsys):
    arguments = ("--to", "lora", "--base", base_of(name), "-o", tmp_path / "OUT")
    done = inside(capsys, "convert", saved(name), *arguments)
    assert (done.code, done.out) == (ExitCode.INVALID, "")
    assert (
        f"kind {CASES[name].kind} " in done.err
        and "--rank or --energy" in done.err
        and "kasa merge" in done.err
    )
    assert not list(tmp_path.iterdir())  # no unfinished work of another job prevents what the error advises


@pytest.mark.parametrize("name", sorted(MORE))
def test_what_is_more_than_a_change_of_weights_is_refused_by_name(name, tmp_path):
    for limit in ({}, {"rank": 4}) if name != "ia3-conv1d" else ({"rank": 4},):
        with pytest.raises(InvalidInput, match="bias" if name == "ia3-conv1d" else MORE[name]):
            converted(saved(name), base_of(name), tmp_path / "OUT", **limit)


def test_a_base_layer_in_the_file_must_be_that_of_the_base(tmp_path):
    def other(tensors):
        tensors["base_model.model.model.embed_tokens.base_layer.weight"][0, 0] += 1

    adapter = tampered(saved("embedding"), tmp_path / "other", other)
    with pytest.raises(InvalidInput, match=r"base layer.*embed_tokens"):
        converted(adapter, base_of("embedding"), tmp_path / "OUT")


@pytest.mark.parametrize("name", ["pissa", "kasa"])
def test_a_start_taken_off_a_tied_weight_is_no_lora_on_one_end(name, tmp_path):
    def moved(tensors):
        for key in list(tensors):
            one = tensors.pop(key)
            if "layers.0" in key and "q_proj" in key:
                one = torch.randn(96, 4) if "lora_B" in key else one
                tensors[key.replace("model.layers.0.self_attn.q_proj", "lm_head")] = one

    adapter = tampered(saved(name), tmp_path / "tied", moved, target_modules=["lm_head"])
    with pytest.raises(InvalidInput, match="embed_tokens"):
        converted(adapter, base_of("embedding-tied"), tmp_path / "OUT")


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (lambda tensors: tensors.update(extra=torch.ones(3)), {}, "extra"),
        (lambda tensors: None, {"new_field": 3}, "new_field"),
        (lambda tensors: next(iter(tensors.values())).fill_(torch.nan), {}, "finite"),
    ],
)
def test_nothing_is_lost_in_silence(change, config, said, tmp_path):
    adapter = tampered(saved("lora"), tmp_path / "odd", change, **config)
    with pytest.raises(InvalidInput, match=said):
        converted(adapter, base_of("lora"), tmp_path / "OUT")


def test_another_shape_is_refused_by_name(tmp_path):
    with pytest.raises(InvalidInput, match="q_proj"):
        converted(saved("lora"), base_of("conv1d"), tmp_path / "OUT")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rank", 2, "--energy", 0.5), "--rank and --energy"),
        (("--energy", 0), "--energy"),
        (("--energy", 1.5), "--energy"),
        (("--energy", "nan"), "--energy"),
        (("--rank", 0), "--rank"),
        (("--on", "truncated"), "kind lora"),
        (("--names", "mine"), "mine"),
        (("--to", "gguf"), "gguf"),
        (("--to", "lora-lite", "--names", "disk"), "--names"),
    ],
)
def test_what_cannot_be_meant_is_usage(options, said, tmp_path, capsys):
    given = ("--base", base_of("lora"), "-o", tmp_path / "OUT", "--to", "lora", *options)
    done = inside(capsys, "convert", saved("lora"), *given)
    assert (done.code, done.out) == (ExitCode.USAGE, "") and said in done.err


def test_ranks_that_servers_accept():
    assert [padded_rank(rank) for rank in (1, 2, 8, 9, 33, 257, 321, 512)] == [1, 8, 8, 16, 64, 320, 512, 512]
    with pytest.raises(UsageError, match=r"513.*--rank"):
        padded_rank(513)


# --- lora-lite ---


@pytest.mark.parametrize("name", ["lora", "patterns", "kasa", "hra", "vlm"])
def test_a_lora_lite_file_reads_back_and_merges_to_the_same(name, tmp_path):
    base, adapter = base_of(name), saved(name)
    report = converted(adapter, base, tmp_path / "OUT", to="lora-lite")
    back = open_adapter(tmp_path / "OUT" / "adapter.safetensors")
    assert (back.kind, report.names, len(back.patches)) == ("lite-lora", None, len(report.tensors))
    assert list(back.container.metadata) == ["cfg"]
    assert back.config["alpha"] == back.config["r"] == report.rank and back.config["dtype"] == "float32"
    modules = [module for module, _ in load(base).named_modules()]
    taken = {one for one in modules for pattern in back.config["target_names"] if re.search(pattern, one)}
    assert taken == {row.module for row in report.tensors}
    for number, one in enumerate((adapter, tmp_path / "OUT" / "adapter.safetensors")):
        options = MergeOptions(base_is="original")
        merge([one], ModelLocation(str(base)), tmp_path / f"merged{number}", options, HERE)
    ours, theirs = (load_file(tmp_path / f"merged{number}" / "model.safetensors") for number in (1, 0))
    for key, tensor in theirs.items():
        assert float((ours[key] - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max()), key


def test_lora_lite_takes_no_module_for_another_of_that_end(tmp_path):
    def only_one(tensors):
        for key in [key for key in tensors if "layers.1.self_attn.q_proj" not in key]:
            del tensors[key]

    module = "model.layers.1.self_attn.q_proj"
    adapter = tampered(saved("lora"), tmp_path / "one", only_one, target_modules=[module])
    converted(adapter, base_of("lora"), tmp_path / "OUT", to="lora-lite")
    (pattern,) = open_adapter(tmp_path / "OUT" / "adapter.safetensors").config["target_names"]
    names = [name for name, _ in load(base_of("lora")).named_modules()]
    assert [name for name in names if re.search(pattern, name)] == [module]


@pytest.mark.parametrize("name", ["conv1d", "experts", "embedding"])
def test_lora_lite_knows_linear_modules_only(name, tmp_path):
    with pytest.raises(InvalidInput, match="lora-lite holds linear modules only"):
        converted(saved(name), base_of(name), tmp_path / "OUT", to="lora-lite")


# --- the output ---


def test_the_output_verifies_and_says_where_it_comes_from(tmp_path, capsys):
    base, adapter = shutil.copytree(base_of("lora"), tmp_path / "base"), saved("lora")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# card\n")
    arguments = ("--to", "lora", "--base", base, "-o", tmp_path / "OUT")
    done = inside(capsys, "convert", adapter, *arguments, "--json")
    assert done.code == 0, done.err
    assert {"module", "names", "rank", "exact_rank", "norm", "loss"} == done.json["tensors"][0].keys()
    assert inside(capsys, "verify", tmp_path / "OUT", "--read-data").code == 0
    card = (tmp_path / "OUT" / "README.md").read_text()
    assert "license: mit" in card and "library_name: peft" in card
    for path in (tmp_path / "OUT").iterdir():
        assert not any(str(place).encode() in path.read_bytes() for place in (tmp_path, adapter.parent))
    manifest = json.loads((tmp_path / "OUT" / "kasa.manifest.json").read_text())
    assert manifest["command"] == "convert"
    assert manifest["tensors"].keys() == {name for row in done.json["tensors"] for name in row["names"]}
    assert inside(capsys, "verify", tmp_path / "OUT", "--against", base).code == ExitCode.USAGE
    assert inside(capsys, "convert", adapter, *arguments).code == ExitCode.EXISTS
    assert inside(capsys, "convert", adapter, *arguments, "--overwrite").code == 0


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "README.md"])
def test_verify_finds_a_flipped_byte(name, tmp_path, capsys):
    converted(saved("lora"), base_of("lora"), tmp_path / "OUT")
    path = tmp_path / "OUT" / name
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    done = inside(capsys, "verify", tmp_path / "OUT", "--read-data")
    assert done.code == ExitCode.INTEGRITY and name in done.err
    assert ("tensor base_model" in done.err) == (name == WEIGHTS)


def test_verify_finds_another_header(tmp_path, capsys):
    converted(saved("lora"), base_of("lora"), tmp_path / "OUT")
    path = tmp_path / "OUT" / WEIGHTS
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"F32"', b'"I32"', 1))
    done = inside(capsys, "verify", tmp_path / "OUT")
    assert done.code == ExitCode.INTEGRITY and "lora_A" in done.err


@pytest.mark.parametrize("to", ["lora", "lora-lite"])
def test_it_is_merged_into_its_own_base_only(to, tmp_path, capsys):
    base = base_of("lora")
    converted(saved("lora"), base, tmp_path / "OUT", to=to)
    adapter = tmp_path / "OUT" if to == "lora" else tmp_path / "OUT" / "adapter.safetensors"
    stranger = shutil.copytree(base, tmp_path / "stranger")
    weights = load_file(stranger / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] += 1
    save_file(weights, stranger / "model.safetensors", {"format": "pt"})
    done = inside(capsys, "merge", adapter, "--into", stranger, "-o", tmp_path / "M")
    assert done.code == ExitCode.INTEGRITY and "q_proj" in done.err
    assert (
        inside(capsys, "merge", adapter, "--into", stranger, "-o", tmp_path / "M", "--force-base").code == 0
    )
    assert inside(capsys, "merge", adapter, "--into", base, "-o", tmp_path / "N").code == 0
    again = ("convert", adapter, "--to", "lora", "--base", stranger, "-o", tmp_path / "again")
    assert inside(capsys, *again).code == ExitCode.INTEGRITY


def test_workers_change_no_byte(tmp_path):
    base, adapter = base_of("experts"), saved("experts")
    trees = []
    for workers in (1, 2):
        arguments = ("--to", "lora", "--base", base, "-o", tmp_path / f"OUT{workers}", "--rank", 2)
        done = finished(tmp_path / "log", "convert", adapter, *arguments, "--workers", workers)
        assert done.code == 0, done.err
        trees.append(tree_hash(tmp_path / f"OUT{workers}"))
    assert trees[0] == trees[1]


def test_an_interrupted_run_goes_on_with_the_factors_it_has(tmp_path, monkeypatch):
    base, adapter = base_of("lora"), saved("lora")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verb, "write_factors", stopped)
        with pytest.raises(KeyboardInterrupt):
            converted(adapter, base, tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()
    with pytest.raises(IntegrityError, match="another job"):
        converted(adapter, base, tmp_path / "OUT", rank=2)
    monkeypatch.setattr(factors_file, "_convert_one", stopped)
    converted(adapter, base, tmp_path / "OUT")
    monkeypatch.undo()
    converted(adapter, base, tmp_path / "whole")
    assert tree_hash(tmp_path / "OUT") == tree_hash(tmp_path / "whole")


def test_a_person_sees_what_was_kept_and_what_comes_next(tmp_path, capsys):
    base = base_of("patterns")
    arguments = ("--to", "lora", "--base", base, "-o", tmp_path / "OUT")
    done = inside(capsys, "convert", saved("patterns"), *arguments, "--rank", 2)
    assert done.code == 0 and "most lost" in done.out and "loss over all" in done.out
    assert re.search(r"q_proj +2 +2 +4–8", done.out) and "kasa verify" in done.out
    exact = inside(capsys, "convert", saved("patterns"), *arguments, "--overwrite")
    assert "most lost" not in exact.out and "exact:" in exact.out


# --- the plan ---


@pytest.mark.parametrize("name", ["kasa", "lora", "experts", "hra"])
def test_the_plan_names_what_is_converted_and_writes_nothing(name, tmp_path, capsys):
    adapter, base = saved(name), base_of(name)
    asked = (
        "convert",
        adapter,
        "--to",
        "lora",
        "--base",
        base,
        "--base-is",
        "original",
        "-o",
        tmp_path / "OUT",
    )
    planned = inside(capsys, *asked, "--dry-run", "--json").json
    assert planned["dry_run"] and planned["totals"]["bytes_to_write"] is None and not list(tmp_path.iterdir())
    table = inside(capsys, *asked, "--dry-run").out
    done = inside(capsys, *asked, "--json").json
    assert [one["module"] for one in planned["tensors"]] == [one["module"] for one in done["tensors"]]
    assert planned["totals"]["tensors_to_write"] == done["totals"]["tensors_written"]
    assert f"{len(done['tensors'])} updates would become lora" in table and "nothing was written" in table


def test_what_a_conversion_refuses_its_plan_refuses(tmp_path, capsys):
    adapter, base = saved("dora"), base_of("dora")
    done = inside(
        capsys, "convert", adapter, "--to", "lora", "--base", base, "-o", tmp_path / "OUT", "--dry-run"
    )
    assert (done.code, done.out) == (ExitCode.INVALID, "") and "dora" in done.err
