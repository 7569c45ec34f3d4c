"""Faulty adapters through the command line: every fault and every command; exit code, one line, nothing written."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_cli.adapters import module_settings
from kasa_cli.errors import ExitCode
from tests.builders import tiny_models
from tests.builders.adapters import CONFIG, WEIGHTS, saved, tampered
from tests.builders.faults import st, tensor
from tests.builders.folders import tree_hash
from tests.builders.runs import inside

INVALID, UNSAFE = ExitCode.INVALID, ExitCode.UNSAFE
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
OTHER = "base_model.model.{}.lora_{}.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(folder):
    return tiny_models.save("llama", folder / "llama")


@pytest.fixture(autouse=True)
def no_store(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("KASA_STORE", str(tmp_path_factory.mktemp("store")))


def commands(adapter: Path, base: Path, out: Path, *more: object) -> dict[str, tuple[object, ...]]:
    """The arguments of every command that reads an adapter; one worker, as more would leave finished parts."""
    return {
        "merge": ("merge", adapter, "--into", base, "-o", out, *more),
        "convert": ("convert", adapter, "--to", "lora", "--base", base, "-o", out, "--workers", 1, *more),
        "inspect with its base": ("inspect", "adapter", adapter, "--base", base, *more),
        "inspect": ("inspect", "adapter", adapter),
    }


def assert_refused(capsys, arguments: tuple[object, ...], code: int, said: str, place: Path) -> None:
    """The command prints one line, nothing on stdout, and leaves no output."""
    before = sorted(place.iterdir())
    done = inside(capsys, *arguments)
    assert (done.code, done.out) == (code, ""), done
    line = done.err.removesuffix("\n")
    assert line.startswith("kasa: ") and line.isprintable() and len(line) < 1000, done.err
    assert re.search(said, line), line
    assert sorted(place.iterdir()) == before


@dataclass(frozen=True)
class Fault:
    """How an adapter is damaged, and the error; `alone` says whether its own files show the damage."""

    case: str
    change: Callable[[Path], Any]
    said: str
    code: int = INVALID
    alone: bool = True


# --- the config ---


def field(name: str, text: str, said: str, code: int = INVALID, case: str = "lora") -> Fault:
    """A field of the config with this text as its value, valid JSON or not."""

    def write(adapter: Path) -> None:
        fields = {key: json.dumps(value) for key, value in json.loads((adapter / CONFIG).read_text()).items()}
        fields[name] = text
        spelled = ",".join(f"{json.dumps(key)}:{value}" for key, value in fields.items())
        (adapter / CONFIG).write_text(f"{{{spelled}}}")

    return Fault(case, write, said, code)


def config(content: bytes, said: str, code: int = INVALID) -> Fault:
    """Other bytes in place of the config."""
    return Fault("lora", lambda adapter: (adapter / CONFIG).write_bytes(content), said, code)


HUGE = "1" + "0" * 400
COUNT, FINITE = "must be a whole number above 0", "must be a finite number"
CONFIGS = {
    "unknown field": field("shiny", "1", "unknown fields that may change the result: 'shiny'"),
    "field with escape codes": field("\x1b[2J", "1", r"unknown fields .*\\x1b\[2J"),
    **{f"r {text[:9]}": field("r", text, COUNT) for text in ("0", "-1", '"2"', "2.5", "true", "null", HUGE)},
    "r of a billion": field("r", "1000000000", r"expected \(r = 1000000000, i\)"),
    "r of other tensors": field("r", "5", r"shape \[4, 32\], expected \(r = 5, i\)"),
    "rank pattern of a billion": field("rank_pattern", '{"q_proj": 1000000000}', "expected .r = 1000000000"),
    **{
        f"alpha {text[:9]}": field("lora_alpha", text, FINITE)
        for text in ("1e400", "-1e400", "Infinity", '"x"', "true", "null", HUGE, f"-{HUGE}")
    },
    "alpha NaN": field("lora_alpha", "NaN", "invalid JSON .NaN."),
    "alpha of 5000 digits": field("lora_alpha", "1" * 5000, "invalid JSON"),
    "alpha pattern beyond float64": field("alpha_pattern", f'{{"q_proj": {HUGE}}}', "to finite numbers"),
    "beta beyond float64": field(
        "kasa_config", f'{{"beta": {HUGE}, "gamma": 0.1}}', "to numbers", INVALID, "kasa"
    ),
    "catastrophic rank pattern": field("rank_pattern", '{"(.*)*q_projX": 4}', "repeats groups"),
    "catastrophic alpha pattern": field("alpha_pattern", r'{"((.|..)+)+[x!]": 4}', "repeats groups"),
    "layers that are no numbers": field("layers_to_transform", '["1"]', "must be a number or a list"),
    "another layer": field(
        "layers_to_transform", "[1]", "layers.0.self_attn.q_proj', which the config does not target"
    ),
    "another target": field("target_modules", '["q_proj"]', "v_proj', which the config does not target"),
    "an excluded target": field("exclude_modules", '["v_proj"]', "v_proj', which the config does not target"),
    "dora without magnitudes": field("use_dora", "true", "lora_magnitude_vector .* is missing"),
    "rslora of 1": field("use_rslora", "1", "must be true or false"),
    "biases of an adapter": field("lora_bias", "true", "lora_B.bias .* is missing"),
    "rows that are not there": field("trainable_token_indices", "[1, 5]", "without trained rows"),
    "quantised": field("use_qalora", "true", "quantized base"),
    "type with NUL": field("peft_type", r'"LORA\u0000"', r"'LORA\\x00'"),
    "base with escape codes": field(
        "base_model_name_or_path", r'"a\u001b[2J"', r"'a\\x1b\[2J' is not printable", UNSAFE
    ),
    "base of half a character": field("base_model_name_or_path", r'"\ud800"', "not printable", UNSAFE),
    "duplicate keys": config(b'{"peft_type": "LORA", "r": 4, "r": 8}', "duplicate name 'r'"),
    "nested": config(b'{"auto_mapping":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested too deep"),
    "list": config(b"[]", "not a JSON object"),
    "empty": config(b"", "invalid JSON"),
    "Latin-1": config(b'{"a": "\xff"}', "invalid JSON"),
    "a hundred thousand fields": config(
        b'{"peft_type": "LORA",' + b",".join(b'"f%d":1' % i for i in range(99_999)) + b"}", "and 99996 more"
    ),
    "300 MB": Fault("lora", lambda adapter: os.truncate(adapter / CONFIG, 300_000_000), "too large"),
}


# --- names, shapes and numbers ---


def tensors(change: Callable[[Tensors], Any], said: str, code: int = INVALID, **more: Any) -> Fault:
    """Other tensors in the file."""

    def write(adapter: Path) -> None:
        held = load_file(adapter / WEIGHTS)
        change(held)
        held = {name: one.contiguous() for name, one in held.items()}
        save_file(held, adapter / WEIGHTS, {"format": "pt"})

    return Fault(more.pop("case", "lora"), write, said, code, **more)


def filled(name: str, value: float) -> Callable[[Tensors], Any]:
    """A tensor with one entry of that value."""
    return lambda held: held[name].reshape(-1)[3:4].fill_(value)


def renamed(module: str) -> Callable[[Tensors], Any]:
    """The factors of a module under the name of another."""
    return lambda held: held.update(
        {OTHER.format(module, "A"): held.pop(A), OTHER.format(module, "B"): held.pop(B)}
    )


def turned(*names: str) -> Callable[[Tensors], Any]:
    return lambda held: held.update({name: held[name].T for name in names})


def without(part: str) -> Callable[[Tensors], Any]:
    return lambda held: [held.pop(name) for name in list(held) if part in name]


def put(name: str, one: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda held: held.update({name: one})


NOT_FINITE, ROWS = (
    "(?:numbers that are|a number in this tensor is) not finite: .*{}",
    "base_model.model.model.embed_tokens.token_adapter",
)
CONTENTS = {
    "A turned": tensors(turned(A), r"shape \[32, 4\], expected \(r = 4, i\)"),
    "both turned": tensors(turned(A, B), r"shape \[32, 4\], expected \(r = 4, i\)"),
    "rank of A": tensors(put(A, torch.zeros(5, 32)), r"shape \[5, 32\]"),
    "inputs": tensors(put(A, torch.zeros(4, 31)), r"\[4, 31\], expected \(r = 4, i = 32\)", alone=False),
    "outputs": tensors(put(B, torch.zeros(33, 4)), r"\[33, 4\], expected \(o = 32, r = 4\)", alone=False),
    "no inputs": tensors(put(A, torch.zeros(4, 0)), "i is 0|i = 32"),
    "no outputs": tensors(put(B, torch.zeros(0, 4)), "o is 0|o = 32"),
    "no rows": tensors(put(A, torch.zeros(0, 32)), r"shape \[0, 32\]"),
    "no B": tensors(without(B), "lora_B of .* is missing"),
    "no q_proj": tensors(without(Q0), "without tensors in the adapter: .*q_proj", alone=False),
    "no layer": tensors(without("layers.1."), "without tensors in the adapter", alone=False),
    "no head": tensors(
        without("lm_head"), "modules_to_save without tensors.*'lm_head.weight'", case="saved", alone=False
    ),
    "no norm": tensors(
        without("layers.1.input_layernorm"),
        "modules_to_save without.*layers.1.input",
        case="saved",
        alone=False,
    ),
    "no rows of tokens": tensors(without("token"), "without trained rows", case="tokens"),
    "extra": tensors(put("x", torch.zeros(2)), "nothing accounts for: 'x'"),
    "extra without rows": tensors(put(f"{Q0}.lora_C.weight", torch.zeros(0, 5)), "nothing accounts for"),
    "scalar": tensors(put(A, torch.tensor(1.0)), r"shape \[\]"),
    **{
        f"{dtype}": tensors(put(A, torch.zeros(4, 32).to(dtype)), "dtype .* in an adapter")
        for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64)
    },
    "NaN in A": tensors(filled(A, float("nan")), NOT_FINITE.format("q_proj.lora_A.weight")),
    "infinity in B": tensors(filled(B, -float("inf")), NOT_FINITE.format("q_proj.lora_B.weight")),
    "escape codes": tensors(renamed("\x1b[2J"), r"tensor name '.*\\x1b\[2J", UNSAFE),
    "right to left": tensors(renamed("a\u202eb"), r"\\u202e", UNSAFE),
    "newline": tensors(renamed("a\nb"), "not printable", UNSAFE),
    "name of 5000 characters": tensors(renamed("x" * 5000), "4096", UNSAFE),
    "up and away": tensors(renamed("../../x"), "which the config does not target|no such module"),
    "markup": tensors(renamed("[/red]x.[bold]"), "which the config does not target|no such module"),
    "a layer beyond the last": tensors(
        renamed("model.layers.7.self_attn.q_proj"), "without tensors|no such module", alone=False
    ),
}


# --- the file ---


def header(content: object, said: str, code: int = INVALID, body: bytes = b"\0" * 16, **more: Any) -> Fault:
    """A file of tensors with such a header."""
    return Fault("lora", lambda adapter: st(adapter / WEIGHTS, content, body, **more), said, code)


def file(name: str, make: Callable[[Path], Any], said: str, code: int = UNSAFE) -> Fault:
    """Something else takes the place of a file."""

    def write(adapter: Path) -> None:
        (adapter / name).unlink()
        make(adapter / name)

    return Fault("lora", write, said, code)


ENTRY = b'"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
FILES = {
    "no bytes": file(WEIGHTS, Path.touch, "truncated", INVALID),
    "header of 2**63": header({"a": tensor(0, 16)}, "header too large", n=2**63),
    "header longer than the file": header({"a": tensor(0, 16)}, "truncated", n=1000),
    "a byte short": header({A: tensor(0, 16)}, "truncated: expected .* download", body=b"\0" * 15),
    "a byte long": header({A: tensor(0, 16)}, "trailing bytes", body=b"\0" * 17),
    "overlap": header({A: tensor(0, 16), B: tensor(8, 24)}, "overlaps", body=b"\0" * 24),
    "hole": header({A: tensor(0, 16), B: tensor(20, 36)}, "hole", body=b"\0" * 36),
    "shape that lies": header({A: tensor(0, 16, (2**40, 2**40))}, "does not fit its bytes"),
    "duplicate name": header(b"{" + ENTRY + b"," + ENTRY + b"}", "duplicate name 'a'"),
    "duplicate metadata": header(b'{"__metadata__":{"a":"1","a":"2"},' + ENTRY + b"}", "duplicate name"),
    "space": header(b" {" + ENTRY + b"}", "does not begin"),
    "unknown dtype": header({A: tensor(0, 16, dtype="F33")}, "unknown dtype"),
    "pickle renamed": file(
        WEIGHTS, lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n."), "header", INVALID
    ),
    "FIFO": file(WEIGHTS, os.mkfifo, "not a regular file"),
    "folder": file(WEIGHTS, os.mkdir, "not a regular file"),
    "device": file(WEIGHTS, lambda path: path.symlink_to("/dev/zero"), "leads out of the folder"),
    "FIFO for a config": file(CONFIG, os.mkfifo, "not a regular file"),
    "link out for a config": file(CONFIG, lambda path: path.symlink_to("/etc/hostname"), "leads out"),
    "link to nowhere": file(CONFIG, lambda path: path.symlink_to("x"), "config.json is missing", INVALID),
}
FAULTS = {
    **{f"config: {name}": fault for name, fault in CONFIGS.items()},
    **{f"content: {name}": fault for name, fault in CONTENTS.items()},
    **{f"file: {name}": fault for name, fault in FILES.items()},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_in_one_line_by_every_verb(name, base, tmp_path, capsys):
    fault = FAULTS[name]
    adapter = shutil.copytree(saved(fault.case), tmp_path / "adapter")
    fault.change(adapter)
    verbs = commands(adapter, base, tmp_path / "OUT")
    if fault.case == "kasa":
        verbs = {
            verb: (*given, "--base-is", "original") for verb, given in verbs.items() if verb != "inspect"
        }
    for verb, arguments in verbs.items():
        if fault.alone or verb != "inspect":
            assert_refused(capsys, arguments, fault.code, fault.said, tmp_path)


@pytest.mark.parametrize(
    ("case", "gone"), [("bias-all", "0.self_attn.k_proj"), ("bias-only", "1.self_attn.q_proj")]
)
def test_a_trained_bias_that_is_not_there_is_named(case, gone, tmp_path, capsys):
    qwen = tiny_models.save("qwen2", tmp_path / "qwen2")

    def drop(held: Tensors) -> None:
        [name] = [name for name in held if gone in name and name.endswith(".bias")]
        del held[name]

    adapter = tampered(saved(case), tmp_path / "x", drop)
    arguments = commands(adapter, qwen, tmp_path / "OUT")["merge"]
    assert_refused(capsys, arguments, INVALID, f"biases that the config trains.*{gone}.bias", tmp_path)


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda path: None, INVALID, "no such file"),
        (Path.mkdir, INVALID, "config.json is missing"),
        (lambda path: path.write_text("hi"), INVALID, "truncated"),
        (os.mkfifo, UNSAFE, "not a regular file"),
        (lambda path: path.symlink_to("nowhere"), INVALID, "no such file"),
        (lambda path: path.symlink_to("/dev/zero"), UNSAFE, "not a regular file"),
    ],
    ids=["nothing", "empty folder", "text", "FIFO", "link to nowhere", "device"],
)
def test_a_path_to_no_adapter_says_what_is_there(make, code, said, base, tmp_path, capsys):
    make(tmp_path / "adapter\x1b[2J")
    for arguments in commands(tmp_path / "adapter\x1b[2J", base, tmp_path / "OUT").values():
        assert_refused(capsys, arguments, code, said, tmp_path)


HARMLESS = {
    "pattern of targets": {"target_modules": "(.*)*q_projX"},
    "pattern of exclusions": {"exclude_modules": "(.*)*q_projX"},
    "pattern of layers": {"layers_pattern": "(.*)*q_projX", "layers_to_transform": [0, 1]},
    "base elsewhere": {"base_model_name_or_path": "../../x", "revision": "../x"},
    "base on the net": {"base_model_name_or_path": "http://127.0.0.1:9/x"},
    "library": {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "x"}},
    "task": {"task_type": "\x1b[2J"},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_never_followed_changes_nothing(name, base, tmp_path, capsys):
    adapter = tampered(saved("lora"), tmp_path / "x", **HARMLESS[name])
    outs = []
    for number, path in enumerate((adapter, saved("lora"))):
        done = inside(capsys, "merge", path, "--into", base, "-o", tmp_path / f"OUT{number}", "--json")
        assert done.code == 0 and done.json["totals"]["tensors_merged"] == 4, done.err
        assert "\x1b" not in done.out + done.err
        outs.append((tmp_path / f"OUT{number}" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_patterns_that_take_long_to_compile_are_given_up(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module_settings, "COMPILE_SECONDS", 0.0)
    adapter = tampered(saved("lora"), tmp_path / "x", alpha_pattern={"(a|b|c)" * 100: 4})
    for arguments in commands(adapter, base, tmp_path / "OUT").values():
        assert_refused(capsys, arguments, INVALID, "too long to compile", tmp_path)


# --- values and numbers ---


@pytest.mark.parametrize("case", ["saved", "tokens"])
def test_values_that_are_none_are_named_by_their_tensor(case, base, tmp_path, capsys):
    def poison(held: Tensors) -> None:
        filled(next(name for name in held if "lm_head" in name or "token" in name), float("nan"))(held)

    adapter = tampered(saved(case), tmp_path / "x", poison)
    arguments = commands(adapter, base, tmp_path / "OUT")["merge"]
    assert_refused(capsys, arguments, INVALID, NOT_FINITE.format("lm_head|trainable_tokens"), tmp_path)


@pytest.mark.parametrize("factor", [1e160, 1e300])
def test_numbers_too_large_are_a_numeric_failure_that_leaves_nothing(factor, base, tmp_path, capsys):
    def grow(held: Tensors) -> None:
        held.update({name: one.double() * factor for name, one in held.items()})

    adapter = tampered(saved("lora"), tmp_path / "x", grow)
    for arguments in commands(adapter, base, tmp_path / "OUT").values():
        assert_refused(capsys, arguments, ExitCode.NUMERIC, "layers", tmp_path)


def test_a_decomposition_that_overflows_names_the_module(base, tmp_path, capsys):
    def grow(held: Tensors) -> None:
        held.update({name: one.double() * 1e300 for name, one in held.items()})

    adapter = tampered(saved("vera"), tmp_path / "x", grow)
    arguments = (*commands(adapter, base, tmp_path / "OUT")["convert"], "--rank", 3)
    said = r"beyond float64 in a decomposition: model\.layers\.[01]\.self_attn\.[qv]_proj$"
    assert_refused(capsys, arguments, ExitCode.NUMERIC, said, tmp_path)


def test_a_sum_that_float16_does_not_hold_leaves_nothing(base, tmp_path, capsys):
    weights = {name: one.half() for name, one in load_file(base / "model.safetensors").items()}
    half = shutil.copytree(base, tmp_path / "half")
    save_file(weights, half / "model.safetensors", {"format": "pt"})
    adapter = tampered(saved("lora"), tmp_path / "x", lora_alpha=1e7)
    arguments = commands(adapter, half, tmp_path / "OUT")["merge"]
    assert_refused(capsys, arguments, ExitCode.NUMERIC, "does not fit F16.*--dtype", tmp_path)
    done = inside(capsys, *arguments, "--dtype", "float32")
    assert done.code == 0, done.err


def zeroed(held: Tensors) -> None:
    held.update({name: torch.zeros_like(one) for name, one in held.items()})


@pytest.mark.parametrize(
    ("change", "config", "more"),
    [
        (zeroed, {}, ()),
        (None, {"lora_alpha": 0}, ()),
        (None, {"lora_alpha": -0.0}, ()),
        (None, {}, ("--weight", 0)),
    ],
    ids=["zeros", "alpha 0", "alpha -0", "weight 0"],
)
def test_an_update_of_nothing_keeps_every_byte(change, config, more, base, tmp_path, capsys):
    adapter = tampered(saved("lora"), tmp_path / "x", change, **config)
    done = inside(capsys, *commands(adapter, base, tmp_path / "OUT")["merge"], *more, "--json")
    assert done.code == 0 and done.json["totals"]["max_abs_change"] == 0, done.err
    before, after = (load_file(place / "model.safetensors") for place in (base, tmp_path / "OUT"))
    for name, one in before.items():
        assert torch.equal(one.view(torch.int32), after[name].view(torch.int32)), name
    for verb in ("convert", "inspect", "inspect with its base"):
        if not more:
            done = inside(capsys, *commands(adapter, base, tmp_path / verb)[verb], "--json")
            assert done.code == 0 and done.json, done.err


def test_a_negative_alpha_is_a_negative_weight(base, tmp_path, capsys):
    adapter = tampered(saved("lora"), tmp_path / "x", lora_alpha=-6)
    runs = ((adapter, ()), (saved("lora"), ("--weight", -1)))
    for number, (path, more) in enumerate(runs):
        done = inside(capsys, *commands(path, base, tmp_path / f"OUT{number}")["merge"], *more)
        assert done.code == 0, done.err
    one, other = (load_file(tmp_path / f"OUT{number}" / "model.safetensors") for number in (0, 1))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e400"])
def test_a_weight_that_is_no_number_is_usage(weight, base, tmp_path, capsys):
    arguments = commands(saved("lora"), base, tmp_path / "OUT")["merge"]
    assert_refused(capsys, (*arguments, "--weight", weight), ExitCode.USAGE, "finite", tmp_path)


def test_an_adapter_all_of_whose_components_were_pruned_is_one_of_nothing(base, tmp_path, capsys):
    def prune(held: Tensors) -> None:
        for name, one in held.items():
            if "ranknum" not in name:
                held[name] = one[:, :0] if "lora_B" in name else one[:0]

    kept = {f"model.layers.{i}.self_attn.{m}_proj.lora_E": [False] * 6 for i in (0, 1) for m in "qv"}
    adapter = tampered(saved("adalora"), tmp_path / "x", prune, rank_pattern=kept)
    for verb, arguments in commands(adapter, base, tmp_path / "OUT").items():
        if verb != "convert":
            done = inside(capsys, *arguments, "--json")
            assert done.code == 0 and done.json, (verb, done.err)
    assert [row["sigma_max"] for row in done.json["modules"]] == [0.0] * 4


# --- places ---


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_an_output_at_in_or_around_an_adapter_is_refused(verb, base, tmp_path, capsys):
    adapter = shutil.copytree(saved("lora"), tmp_path / "over" / "adapter")
    (tmp_path / "link").symlink_to(adapter)
    before = tree_hash(tmp_path)
    for out in (adapter, adapter / "OUT", tmp_path / "over", tmp_path / "link", tmp_path / "link" / "OUT"):
        arguments = commands(adapter, base, out)[verb]
        for more in ((), ("--overwrite", "--restart")):
            done = inside(capsys, *arguments, *more)
            assert done.code in (ExitCode.USAGE, ExitCode.EXISTS) and not done.out, (out, done)
            assert tree_hash(tmp_path) == before


@pytest.mark.parametrize("verb", ["merge", "convert"])
def test_what_is_there_is_not_overwritten(verb, base, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "nowhere").symlink_to("x")
    for name in ("file", "folder", "nowhere"):
        arguments = commands(saved("lora"), base, tmp_path / name)[verb]
        assert_refused(capsys, arguments, ExitCode.EXISTS, "exists", tmp_path)
        assert_refused(
            capsys, (*arguments, "--overwrite"), ExitCode.EXISTS, "not an output of kasa", tmp_path
        )


def test_an_output_of_one_verb_is_replaced_by_that_of_another(base, tmp_path, capsys):
    for verb in ("convert", "merge", "convert"):
        arguments = commands(saved("lora"), base, tmp_path / "OUT")[verb]
        assert inside(capsys, *arguments, "--overwrite").code == 0
        assert json.loads((tmp_path / "OUT" / "kasa.manifest.json").read_text())["command"] == verb
        assert inside(capsys, "verify", tmp_path / "OUT", "--read-data").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


# --- bases ---


def test_another_base_of_the_same_shapes_is_a_mismatch(base, tmp_path, capsys):
    done = inside(capsys, *commands(saved("lora"), base, tmp_path / "lora")["convert"])
    assert done.code == 0, done.err
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for verb, arguments in commands(tmp_path / "lora", other, tmp_path / "OUT").items():
        if verb != "inspect":
            said = r"not the base.*layers\.1\.self_attn\.v_proj"
            assert_refused(capsys, arguments, ExitCode.INTEGRITY, said, tmp_path)
            assert inside(capsys, *commands(tmp_path / "lora", base, tmp_path / verb)[verb]).code == 0


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 100_000, b'{"digest": 1}', None])
def test_a_manifest_that_was_altered_is_a_mismatch(damage, base, tmp_path, capsys):
    assert inside(capsys, *commands(saved("lora"), base, tmp_path / "lora")["convert"]).code == 0
    manifest = tmp_path / "lora" / "kasa.manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"q_proj", b"k_proj") if damage is None else damage)
    for verb, arguments in commands(tmp_path / "lora", base, tmp_path / "OUT").items():
        if verb != "inspect":
            assert_refused(capsys, arguments, ExitCode.INTEGRITY, "manifest", tmp_path)


@pytest.fixture(scope="module")
def truncated(base, folder):
    from kasa_cli.pipeline.truncating.run import ModelLocation, TruncateRequest, truncate

    truncate(ModelLocation(str(base)), folder / "cut", TruncateRequest(rank=3, workers=1))
    return folder / "cut"


@pytest.mark.parametrize("position", [20, -3])
def test_a_tail_that_was_altered_is_a_mismatch(position, truncated, base, tmp_path, capsys):
    out = shutil.copytree(truncated, tmp_path / "cut")
    tail = out / "tail" / WEIGHTS
    raw = bytearray(tail.read_bytes())
    raw[position] ^= 1
    tail.write_bytes(raw)
    for verb, arguments in commands(out / "adapter", base, tmp_path / "OUT").items():
        if verb != "inspect":
            assert_refused(capsys, arguments, ExitCode.INTEGRITY, "altered.*tail", tmp_path)


def test_a_quantised_base_is_refused_by_name(base, tmp_path, capsys):
    quantised = shutil.copytree(base, tmp_path / "fp8")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, quantised / "model.safetensors", {"format": "pt"})
    gptq = shutil.copytree(base, tmp_path / "gptq")
    packed = {key: one for key, one in load_file(base / "model.safetensors").items() if key != name}
    packed[name.replace("weight", "qweight")] = torch.zeros(4, 32, dtype=torch.int32)
    packed[name.replace("weight", "scales")] = torch.zeros(1, 32)
    save_file(packed, gptq / "model.safetensors", {"format": "pt"})
    fields = json.loads((gptq / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (gptq / "config.json").write_text(json.dumps({**fields, "quantization_config": quantization}))
    for place in (quantised, gptq):
        for verb, arguments in commands(saved("lora"), place, tmp_path / "OUT").items():
            if verb != "inspect":
                assert_refused(capsys, arguments, INVALID, "(?i)q_proj|quanti", tmp_path)
