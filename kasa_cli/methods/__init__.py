"""The choices: tables of pure functions."""

from kasa_cli.methods import kasa, selection
from kasa_cli.methods.criteria import CRITERIA, RULES, Score, Spectrum, expected
from kasa_cli.methods.penalties import CONVENTIONS, Layer, penalties
from kasa_cli.methods.selection import SIGNS, Amount, matched_rank, rank_correlation

__all__ = [
    "CONVENTIONS",
    "CRITERIA",
    "RULES",
    "SIGNS",
    "Amount",
    "Layer",
    "Score",
    "Spectrum",
    "expected",
    "kasa",
    "matched_rank",
    "penalties",
    "rank_correlation",
    "selection",
]
