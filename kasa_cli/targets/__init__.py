"""Which weights a verb works on: patterns, candidates, trainer configs."""

from kasa_cli.targets import trainer_configs
from kasa_cli.targets.candidates import AsIn, Candidate, candidates
from kasa_cli.targets.patterns import Patterns, patterns
from kasa_cli.targets.selection import RankRule, Selection, Target, select
from kasa_cli.targets.trainer_configs import Chosen

__all__ = [
    "AsIn",
    "Candidate",
    "Chosen",
    "Patterns",
    "RankRule",
    "Selection",
    "Target",
    "candidates",
    "patterns",
    "select",
    "trainer_configs",
]

LATE = ("peft_trial",)
"""A module of the face that is imported where it is used, since it imports transformers and PEFT."""
