"""Reading an adapter's files, against the live layers of PEFT that saved them; then tampered files."""

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from kasa_cli.adapters import module_settings
from kasa_cli.adapters.reading import Adapter, Patch, open_adapter
from kasa_cli.errors import ExitCode, KasaError
from kasa_cli.methods.adapter_kinds.config_fields import version_of
from kasa_cli.methods.adapter_kinds.kind import BaseChange
from kasa_cli.methods.adapter_kinds.table import PEFT_TYPES
from tests.builders.adapters import (
    CASES,
    CONFIG,
    LORA,
    PREFIX,
    QV,
    WEIGHTS,
    live,
    put,
    save_lite,
    saved,
    tampered,
)

Q0 = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Any]


def consumed(adapter: Adapter) -> list[str]:
    """Every tensor that the reader assigns, once; a tensor that modules share counts once."""
    patched = {
        name for patch in adapter.patches for name in (*patch.tensors.values(), *patch.copies.values())
    }
    return sorted(
        [*patched, *(v.tensor for v in adapter.replacements), *(v.tensor for v in adapter.token_rows)]
    )


def refused(path: Path) -> KasaError:
    with pytest.raises(KasaError) as caught:
        open_adapter(path)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_what_peft_saves_has_one_place(name):
    case, adapter = CASES[name], open_adapter(saved(name))
    counts = (len(adapter.patches), len(adapter.replacements), len(adapter.token_rows))
    assert (adapter.kind, *counts) == (case.kind, case.num_patches, case.num_values, case.num_rows)
    assert consumed(adapter) == sorted(load_file(saved(name) / WEIGHTS))
    for patch in adapter.patches:
        json.dumps(dict(patch.settings), allow_nan=False)  # plain data


def layers_of(name: str) -> dict[str, BaseTunerLayer]:
    """PEFT's live layers by module."""
    found = {}
    for path, module in live(name).named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ParamWrapper):
            found[path.removeprefix(PREFIX)] = module
    return found


WITH_LAYERS = [
    name for name, case in CASES.items() if case.num_patches and "target_parameters" not in case.options
]


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_modules_ranks_and_scalings_are_those_of_the_live_layers(name):
    adapter, layers = open_adapter(saved(name)), layers_of(name)
    layers = {path: layer for path, layer in layers.items() if not path.endswith("token_adapter")}
    assert {patch.module for patch in adapter.patches} == layers.keys()
    for patch in adapter.patches:
        layer = layers[patch.module]
        for field, own in {"r": "r", "scaling": "scaling", "oft_block_size": "oft_block_size"}.items():
            held = getattr(layer, own, None)
            if field in patch.settings and isinstance(held, dict) and patch.kind != "adalora":
                assert patch.settings[field] == pytest.approx(held["default"]), (patch.module, field)
        if patch.kind == "ia3":
            assert patch.settings["feedforward"] is layer.is_feedforward
        if patch.kind == "adalora":
            expected = layer.scaling["default"] / (float(layer.ranknum["default"]) + 1e-5)
            assert patch.settings["scaling"] == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore")
def test_the_scaling_of_a_pruned_adalora_is_that_before_pruning(tmp_path):
    model = live("adalora")
    kept = {f"{Q0}.lora_E": [True, False, True, False, False, True]}
    model.peft_config["default"].rank_pattern = kept
    model.save_pretrained(tmp_path)
    patch = next(patch for patch in open_adapter(tmp_path).patches if patch.module == Q0)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(live("adalora").unload()), tmp_path)
    layer = loaded.base_model.model.get_submodule(Q0)
    assert layer.lora_A["default"].shape == (3, 32)
    expected = layer.scaling["default"] / (float(layer.ranknum["default"]) + 1e-5)
    assert patch.settings["scaling"] == pytest.approx(expected) and patch.settings["r"] == 6


def test_patterns_are_resolved_as_peft_resolves_them():
    ranks = {patch.module: patch.settings["r"] for patch in open_adapter(saved("patterns")).patches}
    layer = "model.layers.{}.self_attn.{}"
    assert [ranks[layer.format(i, name)] for i in (0, 1) for name in QV] == [8, 2, 4, 2]


def test_token_rows_come_with_their_indices():
    rows = {row.parameter: row.indices for row in open_adapter(saved("tokens-by-layer")).token_rows}
    assert rows == {"model.embed_tokens.weight": (1, 5), "lm_head.weight": (3,)}
    [row] = open_adapter(saved("trainable-tokens")).token_rows
    assert (row.parameter, row.indices) == ("model.embed_tokens.weight", (2, 3))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bias-all", {("model.layers.0.self_attn.k_proj.bias", "bias"), (f"{Q0}.bias", "bias")}),
        ("embedding", {("lm_head.weight", "base layer"), ("model.embed_tokens.weight", "base layer")}),
        ("saved", {("model.norm.weight", "modules_to_save"), ("lm_head.weight", "modules_to_save")}),
        ("ln-tuning", {("model.layers.1.input_layernorm.weight", "norm")}),
    ],
)
def test_what_the_file_holds_anew_has_its_reason(name, expected):
    found = {(value.parameter, value.why) for value in open_adapter(saved(name)).replacements}
    assert expected <= found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_head_that_lies_in_the_file_has_its_start_off_already(init, tmp_path):
    """PEFT saves a targeted head whole, as the initialisation left it; the adapter is a plain LoRA on it."""
    base = live("lora").unload()
    config = peft.LoraConfig(**{**LORA, "target_modules": ["lm_head"]}, init_lora_weights=init)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.lm_head.lora_B["default"].weight.data.add_(0.1)
    model.save_pretrained(tmp_path)
    [patch], tensors = open_adapter(tmp_path).patches, load_file(tmp_path / WEIGHTS)
    assert (patch.kind, patch.base_change, patch.settings["init_lora_weights"]) == (
        "lora",
        BaseChange.IN_FILE,
        True,
    )
    A, B = (tensors[patch.tensors[short]] for short in ("lora_A", "lora_B"))
    merged = tensors[f"{PREFIX}lm_head.base_layer.weight"] + patch.settings["scaling"] * B @ A
    assert torch.allclose(merged, model.merge_and_unload().lm_head.weight, atol=1e-6)


def test_a_start_that_cannot_be_found_again_is_said_to_be_lost():
    starts = {
        name: {patch.base_change for patch in open_adapter(saved(name)).patches}
        for name in ("lora", "mica", "pissa", "olora", "pissa-niter")
    }
    assert starts == {
        "lora": {BaseChange.NONE},
        "mica": {BaseChange.NONE},
        "pissa": {BaseChange.RECOMPUTED},
        "olora": {BaseChange.RECOMPUTED},
        "pissa-niter": {BaseChange.LOST},
    }


# --- names ---


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda name: name.replace("model.layers", "_orig_mod.model.layers"),
        lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        lambda name: f"_orig_mod.{name}",
        lambda name: re.sub(r"lora_(.)\.weight", r"lora_\1.other.weight", name),
    ],
)
def test_noise_in_names_and_a_missing_prefix_change_nothing(rename, tmp_path):
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    plain, other = saved("lora"), tampered(saved("lora"), tmp_path / "x", change)
    assert facts(open_adapter(other).patches) == facts(open_adapter(plain).patches)


def facts(patches: tuple[Patch, ...]) -> list[Any]:
    return sorted(
        (p.module, p.parameter, p.kind, sorted(p.tensors), sorted(p.settings.items(), key=str))
        for p in patches
    )


def test_old_files_say_less(tmp_path):
    """A minimal config is enough, and unset fields of old releases are accepted."""
    old = dict.fromkeys(json.loads((saved("lora") / CONFIG).read_text()), ...)
    old |= {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": QV,
        "enable_lora": None,
        "merge_weights": False,
    }
    adapter = open_adapter(tampered(saved("lora"), tmp_path / "x", **old))
    assert len(adapter.patches) == 4 and version_of(adapter.config) < (0, 18)


# --- tampered files ---


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(f"{PREFIX}{name}")


def move(name: str, other: str) -> Change:
    return lambda tensors: tensors.update({f"{PREFIX}{other}": tensors.pop(f"{PREFIX}{name}")})


A0, B0 = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
DIAG = {"kasa_config": {"beta": 0.0001, "gamma": 0.001}}

TAMPERED: dict[str, tuple[str, Change | None, dict[str, Any], str]] = {
    "extra": ("lora", put("model.extra", (3,)), {}, "nothing accounts for: 'base_model.model.model.extra'"),
    "extra norm": ("lora", put("model.norm.weight", (32,)), {}, "nothing accounts for"),
    "extra bias": ("lora", put(f"{Q0}.bias", (32,)), {}, "nothing accounts for"),
    "extra original": (
        "saved",
        put("lm_head.original_module.weight_", (3,)),
        {"modules_to_save": []},
        "nothing accounts",
    ),
    "diagonal of a plain LoRA": ("kasa", None, {"kasa_config": None}, "nothing accounts for.*lora_diag"),
    "magnitude of a plain LoRA": ("dora", None, {"use_dora": False}, "nothing accounts for.*magnitude"),
    "bias of a plain LoRA": ("lora-bias", None, {"lora_bias": False}, "nothing accounts for.*lora_B.bias"),
    "no diagonal": ("lora", None, DIAG, "lora_diag of .* is missing"),
    "no magnitude": ("lora", None, {"use_dora": True}, "lora_magnitude_vector of .* is missing"),
    "no B": ("lora", drop(B0), {}, f"lora_B of '{Q0}' is missing"),
    "no A": ("adalora", drop(f"{Q0}.lora_E"), {}, f"lora_E of '{Q0}' is missing"),
    "no projection": ("vera", lambda tensors: tensors.pop("base_model.vera_A"), {}, "vera_A is missing"),
    "renamed": ("lora", move(A0, f"{Q0}.lora_C.weight"), {}, "nothing accounts for|is missing"),
    "renamed module": ("lora", move(A0, f"{Q0}x.lora_A.weight"), {}, "is missing"),
    "two adapters": ("lora", put(f"{Q0}.lora_A.other.weight", (4, 32)), {}, "are the same tensor"),
    "adapters mixed": (
        "lora",
        lambda tensors: (
            move(A0, f"{Q0}.lora_A.one.weight")(tensors),
            move(B0, f"{Q0}.lora_B.two.weight")(tensors),
        ),
        {},
        "several adapters in one file: one, two",
    ),
    "twice": ("lora", lambda tensors: tensors.update({A0: torch.zeros(4, 32)}), {}, "are the same tensor"),
    "no module": ("lora", put("lora_A.weight", (4, 32)), {}, "nothing accounts for"),
    "deeper": ("lora", put(f"{Q0}.lora_A.default.x.weight", (4, 32)), {}, "nothing accounts for"),
    "wrapped": ("lora", move(A0, f"{Q0}.base_layer.lora_A.weight"), {}, "is missing|nothing accounts"),
    "shape of A": ("lora", put(A0, (4, 33, 1)), {}, r"shape \[4, 33, 1\], expected \(r = 4, i\).*lora_A"),
    "rank of A": ("lora", put(A0, (5, 32)), {}, r"shape \[5, 32\], expected \(r = 4, i\)"),
    "A and B": ("lora", put(B0, (32, 3)), {}, r"shape \[32, 3\], expected \(o, r = 4\)"),
    "diagonal": ("kasa", put(f"{Q0}.lora_diag", (4, 5)), {}, r"shape \[4, 5\], expected \(r = 4, r = 4\)"),
    "rank of the config": ("lora", None, {"r": 5}, r"expected \(r = 5, i\)"),
    "pattern of the config": ("lora", None, {"rank_pattern": {"q_proj": 3}}, r"expected \(r = 3, i\)"),
    "pruned": ("adalora", None, {"rank_pattern": {f"{Q0}.lora_E": [True]}}, r"expected \(n = 1, i\)"),
    "whole numbers": (
        "lora",
        lambda tensors: tensors.update({f"{PREFIX}{A0}": torch.zeros(4, 32, dtype=torch.int8)}),
        {},
        "dtype I8 in an adapter",
    ),
    "rotation": ("oft", put(f"{Q0}.oft_R.weight", (4, 27)), {}, "27 entries make no rotation"),
    "kron": ("lokr", put(f"{Q0}.lokr_w1", (4,)), {}, r"expected \(a, c\)"),
    "bat": ("miss-bat", put(f"{Q0}.miss_block", (8, 4, 3)), {}, r"expected \(n, r = 4, r = 4\)"),
    "side of ia3": (
        "ia3",
        None,
        {"feedforward_modules": ["k_proj"]},
        "of the other side than feedforward_modules",
    ),
    "rows": ("tokens", None, {"trainable_token_indices": [1]}, "the config 1 sound indices"),
    "rows twice": ("tokens", None, {"trainable_token_indices": [1, 1]}, "the config no sound indices"),
    "row below": ("tokens", None, {"trainable_token_indices": [1, -1]}, "the config no sound indices"),
    "row true": ("tokens", None, {"trainable_token_indices": [5, True]}, "the config no sound indices"),
    "rows of none": ("tokens", None, {"trainable_token_indices": None}, "the config no sound indices"),
    "target without tensors": (
        "lora",
        None,
        {"target_modules": [*QV, "layers.7.mlp.up_proj"]},
        "targets without tensors",
    ),
    "unknown field": (
        "lora",
        None,
        {"shiny": {"a": 1}},
        "unknown fields that may change the result: 'shiny'",
    ),
    "unknown number": ("lora", None, {"shiny": 0}, "unknown fields"),
    "unknown type": (
        "lora",
        None,
        {"peft_type": "SHINY"},
        "peft_type 'SHINY': kasa does not know how to merge it",
    ),
    "no type": ("lora", None, {"peft_type": ...}, "peft_type 'None'"),
    "type list": ("lora", None, {"peft_type": ["LORA"]}, "peft_type .*does not know"),
    "prompts": ("lora", None, {"peft_type": "PROMPT_TUNING"}, "adds to the input, not to the weights"),
    "xlora": ("lora", None, {"peft_type": "XLORA"}, "chooses between adapters by the input"),
    "alora": ("lora", None, {"alora_invocation_tokens": [1]}, "aLoRA depends on the input"),
    "arrow": ("lora", None, {"arrow_config": {"top_k": 3}}, "Arrow depends on the input"),
    "qalora": ("lora", None, {"use_qalora": True}, "QALoRA belongs to a quantized base"),
    "replication": ("lora", None, {"layer_replication": [[0, 2], [1, 2]]}, "it copies layers of the base"),
    "megatron": ("lora", None, {"megatron_config": {"a": 1}}, "Megatron"),
    "projection drawn": ("vera", None, {"save_projection": False}, "random projections are not drawn again"),
    "kasa and dora": ("kasa", None, {"use_dora": True}, "dora and kasa at once"),
    "kasa field": ("kasa", None, {"kasa_config": {"truncate": False, "beta": "x"}}, "kasa_config"),
    "start": ("lora", None, {"init_lora_weights": "shiny"}, "init_lora_weights 'shiny' is not known"),
    "old rotations": ("oft", None, {"peft_version": "0.17.1"}, "Cayley-Neumann series of a PEFT before 0.18"),
    "older rotations": ("oft", None, {"oft_block_size": ...}, "oft_block_size is missing"),
    "r zero": ("lora", None, {"r": 0}, "r is '0': must be a whole number above 0"),
    "r huge": ("lora", None, {"r": 10**10}, "must be a whole number above 0"),
    "r text": ("lora", None, {"r": "4"}, "must be a whole number above 0"),
    "r half": ("lora", None, {"r": 4.0}, "must be a whole number above 0"),
    "r true": ("lora", None, {"r": True}, "must be a whole number above 0"),
    "r missing": ("lora", None, {"r": ...}, "r is missing"),
    "alpha text": ("lora", None, {"lora_alpha": "x"}, "must be a finite number"),
    "alpha list": ("lora", None, {"lora_alpha": [1]}, "must be a finite number"),
    "flag": ("lora", None, {"use_rslora": "yes"}, "must be true or false"),
    "bias": ("lora", None, {"bias": "some"}, "must be none, all or"),
    "version": ("lora", None, {"peft_version": 19}, "must be a version"),
    "targets": ("lora", None, {"target_modules": [1]}, "must be a string or a list of strings"),
    "saved": ("lora", None, {"modules_to_save": {"a": 1}}, "must be a string or a list of strings"),
    "ranks": ("lora", None, {"rank_pattern": {"q_proj": "8"}}, "must map patterns to whole numbers"),
    "alphas": ("lora", None, {"alpha_pattern": [1]}, "must map patterns to finite numbers"),
    "no pattern": ("lora", None, {"rank_pattern": {"(": 4}}, "rank_pattern '\\(' is not a valid pattern"),
    "long pattern": ("lora", None, {"rank_pattern": {"a" * 5000: 4}}, "is longer than 1000 characters"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_adapter_is_refused_by_name(name, tmp_path):
    case, change, config, expected = TAMPERED[name]
    error = refused(tampered(saved(case), tmp_path / "x", change, **config))
    assert re.search(expected, str(error)), str(error)
    assert error.exit_code == ExitCode.INVALID


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*q_projX",
        "((.|..)+)+[x!]",
        "a{1000000000}",
        "((a{99}){99}){99}",
        "(?:a?){9999}",
        "(?R)*",
        "(?=x)",
        r"(a)\1",
    ],
)
def test_a_pattern_that_could_fill_the_memory_is_not_compiled(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(module_settings.regex, "compile", None)
    error = refused(tampered(saved("lora"), tmp_path / "x", alpha_pattern={pattern: 4}))
    assert "repeats groups, looks around or counts" in str(error) and error.exit_code == ExitCode.INVALID


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r".*\.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"),
        (r"layers\.(?:[0-9]|1[0-5])\..*", "model.layers.12.mlp"),
        (re.escape("model.layers.0.q-proj"), "model.layers.0.q-proj"),
        (r"^model.*[qv]_proj$", "model.layers.0.q_proj"),
        (r"(q|v)(_a)?_proj", "x.v_proj"),
        (r"layers.\d{1,2}.\w+", "layers.10.fc"),
    ],
)
def test_patterns_as_people_write_them_are_matched(pattern, name):
    patterns = module_settings.ValuePatterns("rank_pattern", {"nothing": 1, pattern: 2, ".*": 3}, Path())
    assert patterns.value(name, 0) == 2 and patterns.value("other", 0) == 3


def test_a_pattern_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(module_settings, "MATCH_SECONDS", 0.0)
    patterns = module_settings.ValuePatterns("rank_pattern", {r"(\w*.*|.*)" * 6 + "[XYZ]": 1}, Path("x"))
    with pytest.raises(KasaError, match="takes too long to match") as caught:
        patterns.value("a.b" * 2000, 0)
    assert caught.value.exit_code == ExitCode.INVALID


def test_a_pattern_for_targets_is_never_matched(tmp_path):
    adapter = open_adapter(tampered(saved("lora"), tmp_path / "x", target_modules="(.*)*q_projX"))
    assert len(adapter.patches) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"peft_type": "LORA", "r": 4, "r": 8}', "duplicate name 'r'"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', "invalid JSON"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": 1e400}', "must be a finite number"),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": Infinity}', "must be a finite number"),
        ("[]", "not a JSON object"),
        ("", "invalid JSON"),
        ('{"auto_mapping": ' + "[" * 200 + "]" * 200 + "}", "nested too deep"),
        ('{"a": ' + "[" * 100_000, "nested too deep|invalid JSON"),
    ],
)
def test_a_config_that_is_no_config(text, expected, tmp_path):
    adapter = tampered(saved("lora"), tmp_path / "x")
    (adapter / CONFIG).write_text(text)
    error = refused(adapter)
    assert re.search(expected, str(error)) and error.exit_code == ExitCode.INVALID


def test_the_name_of_the_base_does_not_talk_to_the_terminal(tmp_path):
    error = refused(tampered(saved("lora"), tmp_path / "x", base_model_name_or_path="a\x1b[2Jb\n"))
    assert error.exit_code == ExitCode.UNSAFE and "not printable" in str(error)
    other = tampered(saved("lora"), tmp_path / "y", base_model_name_or_path=["x"])
    assert refused(other).exit_code == ExitCode.INVALID
    away = tampered(saved("lora"), tmp_path / "z", base_model_name_or_path="../../etc", revision="../x")
    assert len(open_adapter(away).patches) == 4


def test_a_pickle_is_refused_with_what_to_do(tmp_path):
    adapter = tampered(saved("lora"), tmp_path / "x")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    error = refused(adapter)
    assert error.exit_code == ExitCode.UNSAFE and "pickle" in error.what and "safetensors" in error.remedy
    (adapter / "adapter_model.bin").unlink()
    assert refused(adapter).exit_code == ExitCode.INVALID


def test_a_link_out_of_the_folder_is_refused_but_for_the_hubs_cache(tmp_path):
    adapter = tampered(saved("lora"), tmp_path / "x")
    (adapter / WEIGHTS).rename(tmp_path / "blob")
    (adapter / WEIGHTS).symlink_to(tmp_path / "blob")
    assert refused(adapter).exit_code == ExitCode.UNSAFE
    assert open_adapter(adapter, hub_cache=tmp_path).patches


def test_what_is_no_adapter_says_so(tmp_path):
    assert "adapter_config.json is missing" in str(refused(tmp_path))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG).write_text("{}")
    assert str(tmp_path / "adapter") in refused(tmp_path).remedy
    assert "no such file" in str(refused(tmp_path / "absent"))
    nothing = tampered(saved("lora"), tmp_path / "x", lambda tensors: tensors.clear())
    assert "without tensors" in str(refused(nothing))


def test_every_field_of_peft_has_a_row():
    """This fails when a release of PEFT has a new field."""
    from dataclasses import fields

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value in PEFT_TYPES:
            known = PEFT_TYPES[kind.value][0].config.fields.keys()
            assert {field.name for field in fields(config)} - known == set(), kind


# --- lora-lite ---

SIDES = (24, 16)  # out, in
LITE: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "lora": ("lite-lora", {"lora_A": (4, 16), "lora_B": (24, 4)}, {}),
    "eva": ("lite-lora", {"lora_A": (4, 16), "lora_B": (24, 4)}, {}),
    "pissa": ("lite-pissa", {"lora_A": (4, 16), "lora_B": (24, 4)}, {}),
    "dora": ("lite-dora", {"lora_A": (4, 16), "lora_B": (24, 4), "lora_m": (24,)}, {}),
    "delora": (
        "lite-delora",
        {"lora_A": (4, 16), "lora_B": (24, 4), "lora_lambda": (), "lora_wnorm": (16,)},
        {"lambda0": 15.0},
    ),
    "hra": ("lite-hra", {"lora_U": (4, 16)}, {}),
    "ia3": ("lite-ia3", {"lora_g": (24,)}, {}),
    "ia3_ff": ("lite-ia3_ff", {"lora_g": (16,)}, {}),
    "road": (
        "lite-road",
        {"lora_road_theta": (24,), "lora_road_alpha": (24,)},
        {"road_variant": "road_2", "group_size": 8},
    ),
    "antipasto": (
        "lite-antipasto",
        {"lora_U": (24, 4), "lora_S": (4,), "lora_Vh": (4, 16), "lora_delta_s": (4,), "lora_rot_T": (2, 1)},
        {"block_size": 2, "max_rotation_angle": 0.5, "rotate_basis": "V"},
    ),
}


def lite(path: Path, variant: str, change: Change | None = None, **config: Any) -> Path:
    """A file as lora-lite saves it."""
    _, shapes, fields = LITE[variant]
    tensors = {
        f"model.layers.{i}.fc.{short}": torch.randn(shape, dtype=torch.bfloat16)
        for i in (0, 1)
        for short, shape in shapes.items()
    }
    if change:
        change(tensors)
    common = {"r": 4, "alpha": 8, "dtype": "bfloat16", "target_roles": ["reader"], "target_names": [r"\.fc$"]}
    cfg = {"variant": variant, **common, "exclude_names": ["lm_head"], "layers": None, **fields, **config}
    return save_lite(path, tensors, **cfg)


@pytest.mark.parametrize("variant", LITE)
def test_lora_lite_files_are_read_from_their_header(variant, tmp_path):
    adapter = open_adapter(lite(tmp_path / "a.safetensors", variant))
    assert adapter.kind == LITE[variant][0] and {p.module for p in adapter.patches} == {
        f"model.layers.{i}.fc" for i in (0, 1)
    }
    assert consumed(adapter) == sorted(adapter.container.tensors)
    settings = adapter.patches[0].settings
    assert settings["r"] == 4 and settings["scaling"] == (
        2 if "lora_B" in LITE[variant][1] and variant != "delora" else None
    )
    assert settings.items() >= LITE[variant][2].items()


@pytest.mark.parametrize(
    ("variant", "change", "config", "expected"),
    [
        ("lora", lambda t: t.update({"model.x": torch.zeros(2)}), {}, "nothing accounts for: 'model.x'"),
        ("lora", lambda t: t.pop("model.layers.0.fc.lora_B"), {}, "lora_B of .* is missing"),
        ("lora", None, {"r": 3}, r"expected \(r = 3, i\)"),
        ("lora", None, {"kind": "shiny"}, "unknown fields"),
        ("lora", None, {"variant_kwargs": {"a": 1}}, "unknown fields"),
        ("lora", None, {"alpha": ...}, "alpha is missing"),
        ("antipasto", None, {"rotate_basis": "none"}, "nothing accounts for.*rot_T"),
        ("antipasto", None, {"block_size": 4}, "2 blocks of 4 for rank 4"),
        ("road", None, {"group_size": ...}, "group_size is missing"),
        ("dora", lambda t: t.pop("model.layers.1.fc.lora_m"), {}, "lora_m of .* is missing"),
    ],
)
def test_a_tampered_lora_lite_file_is_refused_by_name(variant, change, config, expected, tmp_path):
    error = refused(lite(tmp_path / "a.safetensors", variant, change, **config))
    assert re.search(expected, str(error)), str(error)
    assert error.exit_code == ExitCode.INVALID


def test_an_unknown_variant_lists_the_known_ones(tmp_path):
    save_file({"a.lora_A": torch.zeros(2)}, tmp_path / "a.safetensors", {"cfg": '{"variant": "shiny"}'})
    error = refused(tmp_path / "a.safetensors")
    assert "'shiny' is not known" in error.what and "antipasto" in error.remedy


def test_a_file_without_a_config_is_no_adapter():
    assert "no cfg in its header" in str(refused(saved("lora") / WEIGHTS))


def test_what_kasa_writes_is_read(tmp_path):
    from kasa_cli.pipeline.truncating.run import ModelLocation, TruncateRequest, truncate
    from tests.builders import tiny_models

    model = tiny_models.save("llama", tmp_path / "model")
    truncate(ModelLocation(str(model)), tmp_path / "out", TruncateRequest(rank=3, workers=1))
    adapter, tail = open_adapter(tmp_path / "out" / "adapter"), open_adapter(tmp_path / "out" / "tail")
    assert (adapter.kind, tail.kind) == ("kasa", "lora") and len(adapter.patches) == len(tail.patches) == 14
    with warnings.catch_warnings(action="ignore"):
        assert {patch.settings["scaling"] for patch in tail.patches} == {1.0}
