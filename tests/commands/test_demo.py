"""The demo: the whole path, on real weights where they are installed and on generated ones elsewhere."""

import pytest

from kasa_cli.commands import demo as verb
from kasa_cli.errors import OutputExists
from kasa_cli.render.formats import FORMATS


def check(report):
    assert report.spectrum.totals["decompositions"] == len(report.spectrum.tensors)
    assert report.truncated.totals["decompositions"] == 0, "measured once"
    assert report.selected.target_modules and report.selected.emission.checked_by
    assert report.verified.depth[-2:] == ("data", "base")
    nearest, preserve = report.rounding
    assert preserve["realised_min"] > nearest["realised_min"]
    assert 0.5 < report.similarity < 1
    assert report.tail_difference < 1e-4
    assert report.merge_difference < 1e-4
    assert report.model in FORMATS["table"](report)


def test_without_the_extra_a_generated_llama_walks_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "PACKAGE", "no_such_package")
    report = verb.demo(tmp_path / "demo", workers=2)
    assert report.is_generated
    check(report)
    with pytest.raises(OutputExists):
        verb.demo(tmp_path / "demo")
    again = verb.demo(tmp_path / "demo", overwrite=True)
    assert again.spectrum.totals["decompositions"] == 0
    assert again.truncated.totals == report.truncated.totals


def test_with_the_extra_minilm_does(tmp_path):
    if verb.packaged_model() is None:
        pytest.skip("the extra `demo` is not installed")
    report = verb.demo(tmp_path / "demo", workers=2)
    assert not report.is_generated
    check(report)
