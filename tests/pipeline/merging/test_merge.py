"""`kasa merge` against PEFT's `merge_and_unload` on the same files, for every kind and layer; and refusals."""

import json
import shutil
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from kasa_cli.checkpoint.layout import open_checkpoint
from kasa_cli.checkpoint.safetensors_file import Reader, read_header
from kasa_cli.errors import AlreadyMerged, ExitCode, IntegrityError, InvalidInput, UsageError
from tests.builders import tiny_models
from tests.builders.adapters import CASES, CONFIG, WEIGHTS, base_of, disturb_saved, saved, tampered
from tests.builders.checkpoints import load
from tests.builders.folders import tree_hash
from tests.builders.merged import merged
from tests.builders.runs import finished, inside
from tests.builders.truncated import cut

TIED = {"embedding-tied", "dora-embedding-tied"}
LOST = {"pissa-niter"}
EXACT = 1e-6
"""Relative to the largest entry; BY_SVD has the errors of kinds that PEFT decomposes in float32."""
BY_SVD = {"kasa": 4e-6, "osf": 1e-5}
onto_original = partial(merged, base_is="original")


def by_peft(base, adapter, **kwargs):
    """The tensors of PEFT's merged model."""
    with warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(load(base, **kwargs), adapter).merge_and_unload()
    return model.state_dict()


def assert_equal(ours, theirs, tolerance=EXACT):
    for name, tensor in theirs.items():
        largest = float(tensor.abs().max()) or 1.0
        assert float((ours[name] - tensor).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("name", sorted(CASES.keys() - LOST - TIED))
def test_a_merged_model_is_that_of_peft(name, tmp_path):
    base, adapter = base_of(name), saved(name)
    report = onto_original(adapter, base, tmp_path / "OUT")
    ours, theirs = load(tmp_path / "OUT").state_dict(), by_peft(base, adapter)
    assert ours.keys() >= theirs.keys()
    assert_equal(ours, theirs, BY_SVD.get(name, EXACT))
    (row,) = report.adapters
    assert row.tensors_consumed == row.tensors_total == len(load_file(adapter / WEIGHTS))
    before, after = (read_header(place / "model.safetensors") for place in (base, tmp_path / "OUT"))
    untouched = before.tensors.keys() - {one.name for one in report.tensors}
    weights = load_file(base / "model.safetensors"), load_file(tmp_path / "OUT" / "model.safetensors")
    assert untouched and report.totals["tensors_copied"] == len(untouched)
    for tensor in untouched:
        assert before.tensors[tensor] == after.tensors[tensor]
        assert torch.equal(weights[0][tensor], weights[1][tensor])
    for one in report.tensors:
        change = (weights[1][one.name].double() - weights[0][one.name].double()).abs().max()
        assert one.max_abs_change == pytest.approx(float(change), rel=1e-12)
        assert 0 <= one.rounding_error < 1e-6


@pytest.mark.parametrize("name", sorted(LOST | (TIED & CASES.keys())))
def test_what_has_no_exact_merge_is_refused_by_name(name, tmp_path):
    with pytest.raises(InvalidInput, match=r"initialisation|--untie"):
        onto_original(saved(name), base_of(name), tmp_path / "OUT")
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    ("name", "init", "what", "remedy"),
    [
        ("lora", "loftq", "quantized base", "dequantized"),
        ("lora", "corda", "data-driven", "path_initial_model"),
        ("kasa", "pissa", "without the diagonal", "with PEFT"),
    ],
)
def test_an_initialisation_that_cannot_be_undone_is_refused_with_its_own_remedy(
    name, init, what, remedy, tmp_path
):
    adapter = tampered(saved(name), tmp_path / "adapter", init_lora_weights=init)
    with pytest.raises(InvalidInput, match=what) as caught:
        onto_original(adapter, base_of(name), tmp_path / "OUT")
    assert remedy in caught.value.remedy and not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    "name", ["lora", "rslora", "patterns", "dora", "kasa", "ia3", "hra", "loha", "experts"]
)
def test_in_half_precision_the_result_is_no_further_from_the_exact_one_than_that_of_peft(name, tmp_path):
    adapter = saved(name)
    tiny_models.save(CASES[name].family, tmp_path / "half", dtype=torch.bfloat16)
    load(tmp_path / "half", dtype=torch.float64).save_pretrained(tmp_path / "exact")
    onto_original(adapter, tmp_path / "half", tmp_path / "OUT")
    onto_original(adapter, tmp_path / "exact", tmp_path / "double")
    ours = load(tmp_path / "OUT", dtype=torch.bfloat16).state_dict()
    theirs = by_peft(tmp_path / "half", adapter, dtype=torch.bfloat16)
    exact = load(tmp_path / "double", dtype=torch.float64).state_dict()
    for key, tensor in theirs.items():
        mine = float((ours[key].double() - exact[key]).norm())
        assert mine <= float((tensor.double() - exact[key]).norm()) * (1 + 1e-9), key


def test_every_entry_is_rounded_once(tmp_path):
    """No entry is further from the exact sum than half a unit in the last place."""
    tiny_models.save("llama", tmp_path / "half", dtype=torch.bfloat16)
    adapter = saved("lora")
    onto_original(adapter, tmp_path / "half", tmp_path / "OUT")
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("half", "OUT"))
    tensors = load_file(adapter / WEIGHTS)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        exact = before[f"{name}.weight"].double() + 6 / 4 * B @ A
        stored = after[f"{name}.weight"]
        step = (
            torch.nextafter(stored.abs(), torch.tensor(torch.inf, dtype=stored.dtype)).double()
            - stored.abs().double()
        )
        assert bool(((stored.double() - exact).abs() <= step / 2).all())


# --- several at once, weights ---


def test_adapters_add_up_with_their_weights_kasa_among_them(tmp_path):
    base = base_of("kasa")
    adapters = [saved("kasa"), saved("lora")]
    onto_original(adapters, base, tmp_path / "OUT", weights=(0.5, -2.0))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "OUT" / "model.safetensors")
    kasa, lora = (load_file(one / WEIGHTS) for one in adapters)
    for layer in range(2):
        for module in ("q_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{module}"
            key = f"base_model.model.{name}"
            W = before[f"{name}.weight"].double()
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            exact = (U[:, :-4] * S[:-4]) @ Vh[:-4]
            exact += (
                0.5
                * 6
                / 4
                * (kasa[f"{key}.lora_B.weight"].double() * kasa[f"{key}.lora_diag"].double())
                @ (kasa[f"{key}.lora_A.weight"].double())
            )
            exact -= 2 * 6 / 4 * lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double()
            found = after[f"{name}.weight"].double()
            assert float((found - exact).abs().max()) <= 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("name", ["dora", "hra", "ia3"])
def test_a_map_has_no_weight_but_one(name, tmp_path):
    with pytest.raises(UsageError, match="weight"):
        onto_original(saved(name), base_of(name), tmp_path / "OUT", weights=(0.5,))


def test_the_same_adapter_is_merged_once(tmp_path, capsys):
    base, adapter = base_of("lora"), saved("lora")
    with pytest.raises(AlreadyMerged):
        onto_original([adapter, adapter], base, tmp_path / "twice")
    onto_original(adapter, base, tmp_path / "OUT")
    elsewhere = shutil.copytree(adapter, tmp_path / "elsewhere")
    done = inside(capsys, "merge", elsewhere, "--into", tmp_path / "OUT", "-o", tmp_path / "again")
    assert done.code == ExitCode.EXISTS and "already contains this adapter" in done.err
    other = saved("rslora")
    assert inside(capsys, "merge", other, "--into", tmp_path / "OUT", "-o", tmp_path / "more").code == 0


# --- KaSA: is the base truncated already? ---


@pytest.fixture(scope="module")
def pretruncated(folder):
    """A model, its truncated output, and a copy of the adapter that is trained a little."""
    model, out = base_of("kasa"), folder / "truncated"
    cut(model, out, "q_proj", "v_proj", rank=4, alpha=6, workers=1, use_store=False)
    trained = disturb_saved(shutil.copytree(out / "adapter", folder / "trained"))
    return model, out, trained


def test_the_manifest_of_a_truncated_base_says_so(pretruncated, tmp_path):
    model, out, trained = pretruncated
    report = merged(trained, out / "base", tmp_path / "from-truncated")
    assert report.base_is == "truncated"
    told = merged(trained, model, tmp_path / "from-original", base_is="original")
    assert told.base_is == "original"
    one, other = (load(tmp_path / place).state_dict() for place in ("from-truncated", "from-original"))
    assert_equal(one, other, 1e-6)
    truth = by_peft(model, trained)
    assert_equal(one, truth, 4e-6)


def test_what_cannot_be_known_stops_the_command(pretruncated, tmp_path, capsys):
    model, _, trained = pretruncated
    done = inside(capsys, "merge", trained, "--into", model, "-o", tmp_path / "OUT")
    assert (done.code, done.out) == (ExitCode.INTEGRITY, "")
    assert "--base-is" in done.err and not (tmp_path / "OUT").exists()


def test_the_manifest_beside_an_adapter_knows_both_of_its_bases(pretruncated, tmp_path):
    model, out, trained = pretruncated
    copied = shutil.copytree(out, tmp_path / "copy")
    shutil.copy(trained / WEIGHTS, copied / "adapter" / WEIGHTS)
    assert merged(copied / "adapter", model, tmp_path / "a").base_is == "original"
    assert merged(copied / "adapter", out / "base", tmp_path / "b").base_is == "truncated"
    stranger = tiny_models.save("llama", tmp_path / "stranger")
    weights = load_file(stranger / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] += 1
    save_file(weights, stranger / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="made for another base"):
        merged(copied / "adapter", stranger, tmp_path / "c")
    with pytest.raises(IntegrityError, match="not the base"):
        merged(copied / "adapter", stranger, tmp_path / "c", base_is="original")
    assert (
        merged(copied / "adapter", stranger, tmp_path / "c", base_is="original", force_base=True).base_is
        == "original"
    )


def test_the_tail_makes_the_truncated_base(pretruncated, tmp_path):
    model, out, _ = pretruncated
    merged(out / "tail", model, tmp_path / "OUT")
    assert_equal(
        load_file(tmp_path / "OUT" / "model.safetensors"), load_file(out / "base" / "model.safetensors"), 1e-6
    )


def test_a_cut_that_rounding_brought_back_in_one_weight_leaves_the_base_known(pretruncated, tmp_path):
    """That weight is the same in both bases; the other weights distinguish them."""
    from kasa_cli.pipeline.adapter_on_base.provenance import Origin, adapter_manifest, base_is

    model, out, _ = pretruncated
    known = adapter_manifest(out / "adapter")
    names = [name for name, record in known.tensors.items() if record.role == "truncated"]
    for place, expected in ((model, "original"), (out / "base", "truncated")):
        base = Origin(open_checkpoint(place), None)
        record, digest = known.tensors[names[0]], base.digest(names[0])
        record = replace(record, stored=replace(record.stored, blake3=digest))
        record = replace(record, before=replace(record.before, input_blake3=digest))
        known = replace(known, tensors={**known.tensors, names[0]: record})
        assert base_is("auto", base, known, names) == expected


def test_trained_rows_are_rounded_once_when_the_dtype_is_wider(tmp_path):
    tiny_models.save("llama", tmp_path / "half", dtype=torch.bfloat16)
    adapter = saved("tokens")
    onto_original(adapter, tmp_path / "half", tmp_path / "OUT", dtype="float32")
    stored = load_file(tmp_path / "OUT" / "model.safetensors")["model.embed_tokens.weight"]
    trained = next(one for name, one in load_file(adapter / WEIGHTS).items() if "trainable_tokens" in name)
    assert torch.equal(stored[[1, 5]], trained)


def test_a_dense_core_of_old_files_is_merged(tmp_path):
    """`lora_diag` of shape (r, r), as the published code trained it for a while."""

    def core(tensors):
        for name in [name for name in tensors if name.endswith("lora_diag")]:
            tensors[name] = torch.diag(tensors[name])

    base, adapter = base_of("kasa"), saved("kasa")
    dense = tampered(adapter, tmp_path / "dense", core)
    onto_original(adapter, base, tmp_path / "a")
    onto_original(dense, base, tmp_path / "b")
    one, other = (load_file(tmp_path / part / "model.safetensors") for part in "ab")
    assert_equal(one, other, 1e-7)


# --- refusals ---


def test_a_tensor_that_nothing_consumes_is_named(tmp_path, capsys):
    adapter = tampered(saved("lora"), tmp_path / "odd", lambda tensors: tensors.update(extra=torch.ones(3)))
    done = inside(capsys, "merge", adapter, "--into", base_of("lora"), "-o", tmp_path / "OUT")
    assert (done.code, done.out) == (ExitCode.INVALID, "") and "extra" in done.err


def test_a_shape_that_does_not_fit_is_named(tmp_path, capsys):
    adapter, other = saved("lora"), tiny_models.save("gpt2", tmp_path / "gpt2")
    done = inside(capsys, "merge", adapter, "--into", other, "-o", tmp_path / "OUT")
    assert done.code == ExitCode.INVALID and "q_proj" in done.err


def test_numbers_that_are_none_are_refused(tmp_path, capsys):
    def poison(tensors):
        next(iter(tensors.values()))[0, 0] = torch.nan

    adapter = tampered(saved("lora"), tmp_path / "nan", poison)
    done = inside(capsys, "merge", adapter, "--into", base_of("lora"), "-o", tmp_path / "OUT")
    assert done.code in (ExitCode.INVALID, ExitCode.NUMERIC) and "finite" in done.err
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--weight", 1, "--weight", 2), "2 weights for 1"),
        (("--rounding", "up"), "up"),
        (("--base-is", "x"), "x"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, said, tmp_path, capsys):
    done = inside(
        capsys,
        "merge",
        saved("lora"),
        "--into",
        base_of("lora"),
        "-o",
        tmp_path / "OUT",
        *options,
    )
    assert (done.code, done.out) == (ExitCode.USAGE, "") and said in done.err


# --- the output ---


def test_the_output_verifies_and_says_what_was_done(tmp_path, capsys):
    base, adapter = shutil.copytree(base_of("lora"), tmp_path / "base"), saved("lora")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# card\n")
    done = inside(capsys, "merge", adapter, "--into", base, "-o", tmp_path / "OUT", "--json")
    assert done.code == 0, done.err
    assert {"name", "module", "terms", "max_abs_change", "rounding_error"} <= done.json["tensors"][0].keys()
    assert inside(capsys, "verify", tmp_path / "OUT", "--read-data").code == 0
    text = (tmp_path / "OUT" / "README.md").read_text()
    assert "license: mit" in text and str(tmp_path) not in text
    manifest = (tmp_path / "OUT" / "kasa.manifest.json").read_text()
    assert str(tmp_path) not in manifest and json.loads(manifest)["command"] == "merge"
    shard = tmp_path / "OUT" / "model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    altered = inside(capsys, "verify", tmp_path / "OUT", "--read-data")
    assert altered.code == ExitCode.INTEGRITY and "tensor" in altered.err
    assert inside(capsys, "verify", tmp_path / "OUT", "--against", base).code == ExitCode.USAGE


def test_workers_and_a_store_change_no_byte_and_shards_stay(tmp_path):
    base = tiny_models.save("mixtral", tmp_path / "base", max_shard_size="40KB")
    adapter = saved("experts")
    trees = []
    for number, options in enumerate((("--workers", 1, "--no-store"), ("--workers", 4))):
        out = tmp_path / f"OUT{number}"
        done = finished(tmp_path / "log", "merge", adapter, "--into", base, "-o", out, *options)
        assert done.code == 0, done.err
        trees.append(tree_hash(out))
    assert trees[0] == trees[1]
    assert {file.name for file in base.glob("*.safetensors")} == {f.name for f in out.glob("*.safetensors")}
    assert len(list(base.glob("*.safetensors"))) > 2


def test_a_wider_dtype_and_preserve_are_rounded_as_told(tmp_path):
    tiny_models.save("llama", tmp_path / "half", dtype=torch.bfloat16)
    adapter = saved("lora")
    reports = {
        name: onto_original(adapter, tmp_path / "half", tmp_path / name, **options)
        for name, options in {
            "nearest": {},
            "wide": {"dtype": "float32"},
            "preserve": {"rounding": "preserve"},
        }.items()
    }
    assert max(row.rounding_error for row in reports["wide"].tensors) < 1e-7
    assert {row.dtype for row in reports["wide"].tensors} == {"F32"}
    nearest, preserve = (
        {row.name: row.rounding_error for row in reports[name].tensors} for name in ("nearest", "preserve")
    )
    assert all(nearest[name] <= preserve[name] < 3 * nearest[name] for name in nearest)
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert "float32" in (config.get("dtype"), config.get("torch_dtype"))


def test_a_pickle_is_not_opened(tmp_path, capsys):
    adapter = tmp_path / "pickle"
    adapter.mkdir()
    shutil.copy(saved("lora") / CONFIG, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    done = inside(capsys, "merge", adapter, "--into", base_of("lora"), "-o", tmp_path / "OUT")
    assert done.code == ExitCode.UNSAFE


# --- the plan ---


@pytest.mark.parametrize("name", ["lora", "experts", "saved", "tokens", "dora", "bias-all"])
def test_the_plan_names_what_the_merge_does_and_reads_no_weight(name, tmp_path, capsys, monkeypatch):
    base, adapter = base_of(name), saved(name)
    asked = ("merge", adapter, "--into", base, "-o", tmp_path / "OUT", "--max-shard-size", "30KB", "--json")
    with monkeypatch.context() as headers_only:
        for reading in ("tensor", "chunks", "rows"):
            headers_only.setattr(Reader, reading, lambda *args: pytest.fail("a weight was read"))
        planned = inside(capsys, *asked, "--dry-run").json
    assert planned["dry_run"] and not (tmp_path / "OUT").exists()
    done = inside(capsys, *asked).json
    changed = {(one["name"], one["module"]) for one in done["tensors"]}
    assert {(one["name"], one["module"]) for one in planned["tensors"]} == changed
    written = sum(path.stat().st_size for path in (tmp_path / "OUT").glob("*.safetensors"))
    assert planned["totals"]["bytes_to_write"] == written
    for total in ("tensors_merged", "tensors_copied"):
        assert planned["totals"][total] == done["totals"][total]
    table = inside(capsys, *asked[:-1], "--dry-run").out
    assert f"{len(changed)} tensors would change" in table and "nothing was written" in table


def test_what_a_merge_refuses_its_plan_refuses(tmp_path, capsys):
    adapter = tampered(saved("lora"), tmp_path / "odd", lambda tensors: tensors.update(extra=torch.ones(3)))
    done = inside(capsys, "merge", adapter, "--into", base_of("lora"), "-o", tmp_path / "O", "--dry-run")
    assert (done.code, done.out) == (ExitCode.INVALID, "") and "extra" in done.err
