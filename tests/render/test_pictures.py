"""Pictures are PNG files of a sensible size that are not blank."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kasa_cli.render.pictures import pictures
from tests.builders import spectrum_reports

KINDS = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (64, 32)}


def decoded(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    report = spectrum_reports.report(4, KINDS, "model.layers")
    return {name: decoded(png) for name, png in pictures(report).items()}


def test_there_is_one_of_each(drawn):
    assert set(drawn) == {"heatmap.png", "heatmap-stable-rank.png", "spectra.png"}


@pytest.mark.parametrize("name", ["heatmap.png", "heatmap-stable-rank.png", "spectra.png"])
def test_it_is_drawn_on_white_at_twice_the_size(drawn, name):
    height, width, _ = drawn[name].shape
    assert 500 < width < 4000 and 200 < height < 4000
    assert (drawn[name][0] == 255).all() and (drawn[name][-1] == 255).all()
    colours = np.unique(drawn[name].reshape(-1, 3), axis=0)
    saturated = colours.max(axis=1).astype(int) - colours.min(axis=1) > 60
    assert saturated.sum() > 8


def test_singular_weights_have_a_colour_of_their_own():
    report = spectrum_reports.report(2, KINDS, "model.layers")
    rows = [replace(row, kappa=float("inf")) if n == 1 else row for n, row in enumerate(report.tensors)]
    picture = decoded(pictures(replace(report, tensors=tuple(rows), curves=()))["heatmap.png"])
    assert (picture == (0xE6, 0x43, 0x9A)).all(axis=2).sum() > 500


def test_without_curves_there_is_no_picture_of_them():
    report = spectrum_reports.report(1, KINDS, "model.layers")
    assert "spectra.png" not in pictures(replace(report, curves=()))


def test_every_weight_infinite_is_a_picture_too():
    report = spectrum_reports.report(1, KINDS, "model.layers")
    rows = tuple(replace(row, kappa=float("inf"), sigma_min=0.0) for row in report.tensors)
    assert decoded(pictures(replace(report, tensors=rows))["heatmap.png"]).size
