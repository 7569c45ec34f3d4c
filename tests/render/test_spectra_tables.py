"""Tables of spectra in the terminal."""

import math
from dataclasses import replace

import pytest
from rich.console import Console

from kasa_cli.render.choices import choice_tables, store_tables
from kasa_cli.render.grid import Grid, abbreviated, places
from kasa_cli.render.spectra import BLOCKS, diff_tables, sketch, summary_tables
from kasa_cli.render.tables import _table
from kasa_cli.report import CandidateRow, DiffReport, DiffRow, SelectReport, StoreReport
from tests.builders import spectrum_reports


def shown(tables, width: int) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        for table in tables:
            console.print(_table(*table))
    return captured.get()


@pytest.fixture(scope="module")
def small():
    return spectrum_reports.report(3, spectrum_reports.LLAMA, "model.layers")


@pytest.fixture(scope="module")
def large():
    return spectrum_reports.report(10, spectrum_reports.LLAMA, "model.layers")


def test_a_small_model_has_a_row_a_weight_under_its_type(small):
    ((title, columns, rows),) = summary_tables(small)
    assert title.startswith("21 spectra") and len(rows) == 21 + 7
    assert [cell.strip() for cell in columns][:4] == ["module", "spectrum", "σ max", "σ min"]
    assert [row[0] for row in rows[:5]] == ["q_proj", "  0", "  1", "  2", "k_proj"]
    assert rows[0][1] == "64×64"


def test_worst_and_best_of_a_type_are_marked(small):
    ((_, columns, rows),) = summary_tables(small)
    mark, kappa = [cell.strip() for cell in columns].index(""), [cell.strip() for cell in columns].index("κ")
    of_type = rows[1:4]
    by_mark = {row[mark].strip(): float(row[kappa].replace(",", "")) for row in of_type}
    assert by_mark["▲"] == max(by_mark.values()) and by_mark["▼"] == min(by_mark.values())


def test_a_large_model_has_three_rows_a_type_and_its_extremes(large):
    by_type, extremes = summary_tables(large)
    assert [row[0] for row in by_type[2][:4]] == ["q_proj (10)", "  least", "  median", "  most"]
    assert len(by_type[2]) == 4 * 7
    order = sorted(large.tensors, key=lambda row: -row.kappa)
    assert extremes[2][0][:3] == (
        order[0].module_type.split(".")[1],
        order[0].module.split(".")[2],
        "▲ worst",
    )
    assert extremes[2][-1][2] == "▼ best"


@pytest.mark.parametrize("width", [80, 100])
def test_nothing_is_cut_off(small, large, width):
    for report in (small, large):
        text = shown(summary_tables(report), width)
        assert max(map(len, text.splitlines())) <= width and "…" not in text
        for row in summary_tables(report)[-1][2]:
            assert all(cell.strip() in text for cell in row if len(row[0]) < 10)


def test_a_drawing_falls_as_the_spectrum_does():
    drawing = sketch([2.0**-n for n in range(12)], 3.0)
    heights = [BLOCKS.index(block) for block in drawing]
    assert len(drawing) == 12 and heights[0] == 7 and heights == sorted(heights, reverse=True)


def test_zeros_are_dots_and_a_long_spectrum_is_thinned():
    assert sketch([1.0, 0.0], 1.0) == "█·"
    assert len(sketch([1.0] * 40, 1.0)) == 12 and sketch([], 1.0) == ""


def test_a_singular_weight_and_figures_not_measured_are_said():
    row, curve = spectrum_reports.singular("h.0.mlp.up", "mlp.up", (12, 8), 3)
    report = spectrum_reports.of([(replace(row, power_law_alpha=None, stable_rank=math.nan), curve)])
    cells = [cell.strip() for cell in summary_tables(report)[0][2][1]]
    assert "∞" in cells and cells[-1] == "–" and cells[-4] == "–" and "·" in cells[1]


def test_no_weights_is_no_rows(small):
    assert summary_tables(replace(small, tensors=(), curves=()))[0][2] == []


NAMES = {
    "t5": ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.0.SelfAttention.q"],
    "experts": ["model.layers.0.experts.0.w1", "model.layers.0.experts.1.w1", "model.layers.1.experts.0.w1"],
    "towers": ["vision.layers.0.q_proj", "text.layers.0.q_proj"],
    "no numbers": ["head", "neck"],
    "many zeros": ["h.0.q", "h.00.q"],
}


@pytest.mark.parametrize("modules", NAMES.values(), ids=NAMES)
def test_no_two_weights_share_a_place(small, modules):
    rows = [replace(small.tensors[0], name=m, module=m, module_type=m.split(".")[-1]) for m in modules]
    if modules != NAMES["many zeros"]:
        assert len(set(places(rows))) == len(rows)


def test_the_layers_of_t5_are_its_blocks(small):
    rows = [replace(small.tensors[0], name=m, module=m, module_type="SelfAttention.q") for m in NAMES["t5"]]
    grid = Grid(replace(small, tensors=tuple(rows)))
    assert grid.layers == ["0", "1"] and grid.types == ["q"]


def test_layers_are_in_numeric_order_and_the_rest_last(small):
    modules = ["h.10.q", "h.9.q", "head"]
    rows = [replace(small.tensors[0], name=m, module=m, module_type=m.split(".")[-1]) for m in modules]
    assert Grid(replace(small, tensors=tuple(rows))).layers == ["9", "10", "–"]


def test_an_abbreviation_is_of_one_type_only():
    kinds = ["a.experts.0.w1", "a.experts.1.w1", "a.q"]
    assert abbreviated(kinds) == {
        "a.experts.0.w1": "experts.0.w1",
        "a.experts.1.w1": "experts.1.w1",
        "a.q": "q",
    }


def change(layer: int, distance: float, **more) -> DiffRow:
    figures = {
        "sigma_max": (1.0, 2.0),
        "sigma_min": (0.1, 0.1),
        "kappa": (10.0, 20.0),
        "stable_rank": (3.0, 3.0),
        "effective_rank": (5.0, 5.0),
    }
    name = f"model.layers.{layer}.mlp.up"
    return DiffRow(
        name=f"{name}.weight",
        module=name,
        module_type="mlp.up",
        shape=(8, 8),
        relative_distance=distance,
        spectrum_change=0.1,
        subspace_rank=4,
        top_angle=12.34,
        bottom_angle=80.0,
        intruders=layer,
        least_similarity=0.5,
        **{**figures, **more},
    )


def test_differences_are_summed_up_by_type_and_the_largest_come_first():
    rows = (change(0, 0.01), change(1, 0.5), change(2, 0.02))
    report = DiffReport("inspect diff", ("base", "tuned\x1b"), rows, ("same",), (), 0.97, {})
    by_type, largest = diff_tables(report)
    assert (
        "base → tuned\\x1b: 3 weights differ" in by_type[0]
        and "identical: 1" in by_type[0]
        and "0.970" in by_type[0]
    )
    assert by_type[2] == [("up", "3", "2.0 %", "50.0 %", "0.100", "12.3°", "80.0°", "3")]
    assert [row[1] for row in largest[2]] == ["1", "2", "0"]
    assert largest[2][0][2:] == ("50.0 %", "1.000 → 2.000", "10.0 → 20.0", "12.3°", "1 of 4")


def candidates(count: int, chosen: int) -> tuple[CandidateRow, ...]:
    return tuple(
        CandidateRow(f"h.{n}.q", "module", "q", (8, 8), 10.0 + n, n + 1, n < chosen) for n in range(count)
    )


def choice(rows: tuple[CandidateRow, ...], **more) -> SelectReport:
    stated = {"comparison": (), "matched_rank": None, "target_parameters": None, "target_modules": ()}
    return SelectReport(
        command="select-targets",
        model="m",
        model_class=None,
        criterion="kappa",
        rule="peft",
        prefer="low",
        candidates=rows,
        skipped=(),
        totals={},
        **{**stated, **more},
    )


def test_the_chosen_and_a_few_next_ones_are_listed_best_first():
    best, by_type = choice_tables(choice(tuple(reversed(candidates(40, 3))), matched_rank=27))
    assert (
        best[0].startswith("3 of 40 chosen by kappa, low first, rule peft; rank 27") and "32 more" in best[0]
    )
    assert [row[1] for row in best[2]] == ["✓"] * 3 + [""] * 5
    assert best[2][0] == ["h.0.q", "✓", "1", "10.0"]
    assert by_type[2] == [("q", "3", "40", "10.0", "29.5", "49.0")]


def test_expectations_other_criteria_and_experts_have_their_place():
    first, *rest = candidates(3, 1)
    first = replace(first, expected=9.0, others={"snr": 0.5}, experts=(1.0, 2.0, 6.0))
    comparison = ({"criterion": "snr", "overlap": 0.5, "rank_correlation": None},)
    best, _, compared, experts = choice_tables(choice((first, *rest), comparison=comparison))
    assert best[1] == ["module", "", "order", "kappa", "expected", "snr"]
    assert best[2][0][-2:] == ["9.000", "0.500"] and best[2][1][-2:] == ["–", "–"]
    assert compared[1:] == (["criterion", "overlap", "rank correlation"], [["snr", "0.500", "–"]])
    assert experts[2] == [("h.0.q", "✓", "3", "1.000", "3.000", "6.000")]


def test_the_store_is_listed_by_name_shape_and_size():
    rows = tuple(
        {
            "name": f"layers.{n}.q.weight",
            "shape": [8, 4],
            "dtype": "BF16",
            "facts": ["ends-16", "extremes", "values"],
            "bytes": 1200 * n,
            "last_used": "2026-01-02 03:04",
            "content": f"{n:064x}",
        }
        for n in range(70)
    )
    listed, totals = store_tables(StoreReport("store ls", "/cache", rows, {"bytes": 3e6, "dry_run": True}))
    assert listed[0] == "70 tensors known in /cache; 10 more not shown"
    assert listed[2][2] == ("layers.2.q.weight", "8×4", "BF16", "ends-16 values", "2.4 kB", "2026-01-02")
    assert totals[2] == [("bytes", "3.0 MB"), ("dry run", "yes")]
