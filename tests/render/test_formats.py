"""One report in four formats, compared with the expected text."""

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest

from kasa_cli.render.formats import FORMATS, finite
from kasa_cli.render.units import big, duration, number, percent
from kasa_cli.report import (
    AdapterRow,
    CandidateRow,
    DemoReport,
    DiffReport,
    DiffRow,
    Emission,
    MeasurePlan,
    MergedRow,
    MergeReport,
    PlanReport,
    SelectReport,
    Skipped,
    StoreReport,
    TensorRow,
    ToMeasure,
    ToTruncate,
    TruncateReport,
    VerifyReport,
)
from tests.builders import spectrum_reports


def row(layer: int, module: str, **figures) -> TensorRow:
    measured = {
        "kappa": 125.0,
        "dropped_energy": 0.0125,
        "relative_error": 0.11,
        "realised": 0.75,
        "changed_fraction": 0.5,
        "rounding_error": 0.001,
        "sigma_min": 0.02,
    }
    return TensorRow(
        name=f"model.layers.{layer}.{module}.weight",
        module=f"model.layers.{layer}.{module}",
        shape=(64, 48),
        dtype="BF16",
        stored_dtype="BF16",
        truncation_rank=4,
        sigma_max=2.5,
        sigma_cut=0.03,
        sigma_next=0.04,
        solver="gram-eigh",
        residual=1e-15,
        is_tied=False,
        **{**measured, **figures},
    )


TRUNCATED = TruncateReport(
    command="truncate",
    model="org/model",
    model_class="LlamaForCausalLM",
    rank=4,
    truncation_rank=4,
    alpha=8,
    dtype="auto",
    rounding="nearest",
    compat="peft",
    tensors=(
        row(0, "self_attn.q_proj"),
        row(1, "self_attn.q_proj", kappa=math.inf, sigma_min=0.0, realised=0.999),
        row(0, "mlp.up_proj", kappa=3.5, dropped_energy=2.26e-6, realised=None, changed_fraction=None),
    ),
    skipped=(
        Skipped("model.norm.weight", "not a matrix"),
        Skipped("lm_head.weight", "output head"),
        Skipped("model.layers.0.norm.weight", "not a matrix"),
    ),
    totals={"below_min_realised": 1, "min_realised": 0.9},
    output={"directory": "out", "base": "out/base", "adapter": "out/adapter", "tail": "out/tail"},
    notes=("a note",),
)
PLANNED = PlanReport(
    command="truncate",
    model="org/model",
    rank=4,
    truncation_rank=4,
    tensors=tuple(
        ToTruncate(f"layers.{n}.fc.weight", f"layers.{n}.fc", (64, 48), "F32", False, 4) for n in range(12)
    ),
    skipped=(),
    totals={"bytes_to_write": 90_868_376, "memory_bytes": 512e6, "seconds": 75.2},
    output={"base": True, "adapter": True, "tail": False},
)
VERIFIED = VerifyReport("verify", "out", ("manifest", "files"), 10, 21, 131_213)
COMPARED = replace(
    VERIFIED,
    compared=(
        {"name": "a.weight", "ulps": 0.4999, "tail_error": 2e-9},
        {"name": "b.weight", "ulps": None, "tail_error": None},
    ),
)
MEASURED = {"decompositions": 2, "decompositions_reused": 1}
SPECTRUM = spectrum_reports.minilm()
SELECTED = SelectReport(
    command="select-targets",
    model="org/model",
    model_class="MixtralForCausalLM",
    criterion="kappa",
    rule="peft",
    prefer="low",
    candidates=(
        CandidateRow("layers.0.q", "module", "q", (8, 8), 12.5, 1, True, None, None, {"snr": 2.0}),
        CandidateRow("layers.1.q", "module", "q", (8, 8), math.inf, 2, False, None, None, {"snr": 1.0}),
        CandidateRow(
            "layers.0.experts.up",
            "parameter",
            "experts.up",
            (8, 4),
            3.0,
            1,
            True,
            None,
            (2.0, 4.0),
            {"snr": 1.0},
        ),
    ),
    target_modules=("layers.0.q",),
    target_parameters=("layers.0.experts.up",),
    matched_rank=24,
    comparison=({"criterion": "snr", "prefer": "high", "overlap": 1.0, "rank_correlation": None},),
    skipped=(Skipped("norm.weight", "not a matrix"),),
    totals={"candidates": 3, **MEASURED},
    emission=Emission("names", "layers.0.q\n", "peft 0.21.2"),
)
DIFFERENT = DiffReport(
    command="inspect diff",
    models=("org/base", "org/chat"),
    tensors=(
        DiffRow(
            *("layers.0.q.weight", "layers.0.q", "q", (8, 8), 0.01, (2.0, 2.5), (0.5, 0.0), (4.0, math.inf)),
            *((3.0, 3.1), (6.0, 6.2), 0.02, 2, 1.5, 88.0, 1, 0.31),
        ),
    ),
    identical=("layers.1.q.weight",),
    skipped=(),
    rank_correlation=None,
    totals={"differing": 1, "identical": 1, **MEASURED},
)
STORED = StoreReport(
    command="store ls",
    store="~/.cache/kasa",
    tensors=(
        {
            "name": "layers.0.q.weight",
            "shape": [8, 8],
            "dtype": "BF16",
            "facts": ["ends-16", "extremes"],
            "bytes": 4096,
            "last_used": "2026-01-02 03:04",
            "content": "ab" * 32,
        },
    ),
    totals={"tensors": 1, "bytes": 4096},
)
TO_MEASURE = MeasurePlan(
    command="select-targets",
    model="org/model",
    tensors=tuple(ToMeasure(f"layers.{n}.fc.weight", f"layers.{n}.fc", (64, 48), "F32") for n in range(12)),
    skipped=(),
    totals={"bytes_to_write": 0, "memory_bytes": 512e6, "seconds": 75.2},
)
MERGED = MergeReport(
    command="merge",
    model="org/model",
    model_class="LlamaForCausalLM",
    base_is=None,
    dtype="auto",
    rounding="nearest",
    tensors=(MergedRow("layers.0.q.weight", "layers.0.q", "BF16", 1, 0.25, 1e-3),),
    adapters=(AdapterRow("my-adapter", "lora", 1.0, "ab" * 32, 2, 2),),
    totals={"tensors_merged": 1},
    output={"directory": "out"},
)
DEMO = DemoReport(
    command="demo",
    model="a model",
    is_generated=True,
    spectrum=SPECTRUM,
    selected=SELECTED,
    truncated=TRUNCATED,
    verified=COMPARED,
    merged=MERGED,
    rounding=({"dtype": "bfloat16", "rounding": "nearest", "realised_min": 0.2, "realised_median": 0.4},),
    similarity=0.98765,
    tail_difference=1.5e-6,
    merge_difference=2e-6,
)
REPORTS = {
    "truncate": TRUNCATED,
    "plan": PLANNED,
    "verify": VERIFIED,
    "against": COMPARED,
    "demo": DEMO,
    "spectrum": SPECTRUM,
    "select": SELECTED,
    "diff": DIFFERENT,
    "store": STORED,
    "measure": TO_MEASURE,
    "merge": MERGED,
}
ROWS = {
    "truncate": 3,
    "plan": 12,
    "verify": 1,
    "against": 2,
    "demo": 3,
    "spectrum": 36,
    "select": 3,
    "diff": 1,
}
ROWS |= {"store": 1, "measure": 12, "merge": 1}

TABLE = """\
3 weights truncated by their 4 smallest components

 module type       n  shape            κ     energy  realised  median
 ────────────────────────────────────────────────────────────────────
 self_attn.q_proj  2  64×48        125–∞      1.2 %     0.750   0.875
 mlp.up_proj       1  64×48  3.500–3.500  0.00023 %         –       –

least realised

 tensor                                  realised  changed
 ─────────────────────────────────────────────────────────
 model.layers.0.self_attn.q_proj.weight     0.750   50.0 %
 model.layers.1.self_attn.q_proj.weight     0.999   50.0 %

left as they are

 reason        count  for example
 ──────────────────────────────────────
 not a matrix      2  model.norm.weight
 output head       1  lm_head.weight


1 of 3 weights realised less than 0.9 of the cut: rounding brought the rest back. Try --rounding preserve or \
--dtype float32, or use tail/.

wrote out; next:

  from peft import PeftModel
  from transformers import LlamaForCausalLM

  # train the KaSA adapter
  base = LlamaForCausalLM.from_pretrained("out/base", dtype="auto")
  model = PeftModel.from_pretrained(base, "out/adapter", is_trainable=True)

  # or leave the base alone: the truncation as a LoRA
  base = LlamaForCausalLM.from_pretrained("org/model", dtype="auto")
  model = PeftModel.from_pretrained(base, "out/tail")

  kasa verify out --read-data"""

MARKDOWN = """\
**3 weights truncated by their 4 smallest components**

| module type | n | shape | κ | energy | realised | median |
| --- | --- | --- | --- | --- | --- | --- |
| self_attn.q_proj | 2 | 64×48 | 125–∞ | 1.2 % | 0.750 | 0.875 |
| mlp.up_proj | 1 | 64×48 | 3.500–3.500 | 0.00023 % | – | – |

**least realised**

| tensor | realised | changed |
| --- | --- | --- |
| model.layers.0.self_attn.q_proj.weight | 0.750 | 50.0 % |
| model.layers.1.self_attn.q_proj.weight | 0.999 | 50.0 % |

**left as they are**

| reason | count | for example |
| --- | --- | --- |
| not a matrix | 2 | model.norm.weight |
| output head | 1 | lm_head.weight |"""

CSV = """\
name,module,shape,dtype,stored_dtype,truncation_rank,sigma_max,sigma_min,kappa,sigma_cut,sigma_next,\
dropped_energy,relative_error,realised,changed_fraction,rounding_error,solver,residual,is_tied,kappa_is
model.layers.0.self_attn.q_proj.weight,model.layers.0.self_attn.q_proj,64x48,BF16,BF16,4,2.5,0.02,125.0,0.03,0.04,\
0.0125,0.11,0.75,0.5,0.001,gram-eigh,1e-15,False,
model.layers.1.self_attn.q_proj.weight,model.layers.1.self_attn.q_proj,64x48,BF16,BF16,4,2.5,0.0,,0.03,0.04,\
0.0125,0.11,0.999,0.5,0.001,gram-eigh,1e-15,False,inf
model.layers.0.mlp.up_proj.weight,model.layers.0.mlp.up_proj,64x48,BF16,BF16,4,2.5,0.02,3.5,0.03,0.04,\
2.26e-06,0.11,,,0.001,gram-eigh,1e-15,False,"""


def stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


@pytest.fixture(autouse=True)
def no_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_the_table():
    assert stripped(FORMATS["table"](TRUNCATED)) == TABLE


def test_the_markdown():
    assert FORMATS["md"](TRUNCATED) == MARKDOWN


def test_the_csv():
    assert FORMATS["csv"](TRUNCATED) == CSV


def test_the_json():
    made = json.loads(FORMATS["json"](TRUNCATED), parse_constant=pytest.fail)
    first, singular, bare = made["tensors"]
    assert (first["shape"], first["kappa"], "kappa_is" in first) == ([64, 48], 125.0, False)
    assert (singular["kappa"], singular["kappa_is"], singular["sigma_min"]) == (None, "inf", 0.0)
    assert (bare["realised"], "realised_is" in bare) == (None, False)
    assert made["skipped"][1] == {"name": "lm_head.weight", "reason": "output head"}
    assert made["notes"] == ["a note"]


def test_the_plan_says_operations_bytes_memory_and_time():
    shown = stripped(FORMATS["table"](PLANNED))
    assert "12 weights to truncate" in shown
    assert "fc              12  64×48  F32    drop 4" in shown
    assert shown.endswith(
        "would write 90.9 MB, use about 512.0 MB of memory and take about 1 min 16 s; nothing was written"
    )


def test_curves_are_for_pictures_and_maps_have_a_column_for_each_key():
    assert "curves" not in json.loads(FORMATS["json"](SPECTRUM))
    header = FORMATS["csv"](SPECTRUM).splitlines()[0].split(",")
    assert {"kappa", "energy_8", "sketch"} <= set(header)
    assert "others_snr" in FORMATS["csv"](SELECTED).splitlines()[0]


def test_what_was_merged():
    shown = stripped(FORMATS["table"](MERGED))
    assert re.search(r"my-adapter +lora +1\.000 +2 of 2", shown) and "1 tensors changed" in shown
    assert shown.endswith("wrote out; next: kasa verify out --read-data")


def test_what_a_choice_cost_and_what_the_next_one_will():
    assert stripped(FORMATS["table"](SELECTED)).endswith("weights measured: 2; known from the store: 1")


def test_what_was_verified():
    assert "bytes hashed" in FORMATS["table"](VERIFIED)
    shown = FORMATS["md"](COMPARED)
    assert "| recomputed from the base | 2 |" in shown
    assert "| furthest from exact, in last places | 0.500 |" in shown
    assert "| largest error of the tail / σ max | 2.0e-09 |" in shown


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize("spelling", FORMATS)
def test_every_report_has_every_spelling(report, spelling):
    text = FORMATS[spelling](report)
    assert text.strip() == text.rstrip() or spelling == "table"
    if spelling == "json":
        assert json.loads(text, parse_constant=pytest.fail)["command"] == report.command
    if spelling == "csv":
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
        assert len(rows) == ROWS[next(name for name, one in REPORTS.items() if one is report)]
        assert all(None not in one and "{" not in "".join(one.values()) for one in rows)


def test_a_pipe_in_a_name_does_not_break_markdown():
    report = replace(TRUNCATED, skipped=(Skipped("a|b", "odd | name"),))
    assert FORMATS["md"](report).splitlines()[-1] == "| odd &#124; name | 1 | a&#124;b |"


def test_finite_leaves_a_flag_for_everything_that_is_not():
    given = {
        "a": math.nan,
        "b": [{"c": -math.inf}],
        "d": (1.5, math.inf),
        "e": {"f": None, "g": 0.0},
        "h": True,
    }
    assert finite(given) == {
        "a": None,
        "a_is": "nan",
        "b": [{"c": None, "c_is": "-inf"}],
        "d": [1.5, None],
        "d_is": [None, "inf"],
        "e": {"f": None, "g": 0.0},
        "h": True,
    }


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (9.9996, "10.000"),
        (99.96, "100.0"),
        (-0.5, "-0.500"),
        (999_999, "999,999"),
        (1e-3, "0.001"),
        (9e-4, "9.0e-04"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_units():
    assert [big(value) for value in (0, 999, 1000, 1.5e9, 2e12, 3e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.5 GB",
        "2.0 TB",
        "3000.0 TB",
    ]
    assert [percent(value) for value in (0, 0.0099, 0.01, 1)] == ["0.0 %", "0.99 %", "1.0 %", "100.0 %"]
    assert [duration(value) for value in (0, 59.2, 60, 3599)] == ["1 s", "1 min", "1 min", "59 min 59 s"]
    assert [duration(value) for value in (3600, 90_061)] == ["1 h", "25 h 1 min"]
