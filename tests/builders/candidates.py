"""Checkpoints with the names of their tensors in memory, and assertions on any choice of candidates in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import KappaTuneSelector
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from kasa_cli.checkpoint.matrix import Piece
from kasa_cli.checkpoint.safetensors_file import TensorEntry, read_header
from kasa_cli.model_names.name_map import map_names
from kasa_cli.model_names.names import NameMap
from kasa_cli.report import Skipped
from kasa_cli.targets.candidates import AsIn, Candidate, candidates
from kasa_cli.targets.patterns import Patterns
from tests.builders import checkpoints, tiny_models
from tests.builders.checkpoints import WEIGHTS, Tensors, config_of, load

Chosen = tuple[tuple[Candidate, ...], tuple[Skipped, ...]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, its headers read."""

    directory: Path
    config: dict[str, Any]
    entries: Mapping[str, TensorEntry]
    names: NameMap

    def chosen(self, *targets: str, as_in: AsIn = "peft", max_dim: int = 16384, excludes: Any = ()) -> Chosen:
        return candidates(self.entries, self.names, Patterns(targets, tuple(excludes)), as_in, max_dim)

    def labels(self, *targets: str, **options: Any) -> list[str]:
        return [one.module for one in self.chosen(*targets, **options)[0]]

    def reasons(self, *targets: str, **options: Any) -> dict[str, str]:
        return {one.name: one.reason for one in self.chosen(*targets, **options)[1]}

    def model(self) -> PreTrainedModel:
        """The model that transformers loads: the oracle."""
        return load(self.directory)


def surveyed(directory: Path, **change: Any) -> Saved:
    config = {**config_of(directory), **change}
    entries = read_header(directory / WEIGHTS).tensors
    names = map_names(config, {name: entry.shape for name, entry in entries.items()})
    return Saved(directory, config, entries, names)


def saved(family: str, directory: Path, **kwargs: Any) -> Saved:
    return surveyed(tiny_models.save(family, directory, **kwargs))


def rewritten(family: str, directory: Path, change: Callable[[Tensors], Tensors]) -> Saved:
    """A family's checkpoint as another program would write it."""
    return surveyed(checkpoints.rewritten(tiny_models.saved(family), directory, change))


def peft_order(model: nn.Module, max_dim: int = 16384) -> tuple[list[str], list[str]]:
    """The modules and the parameters that PEFT's selector scores, in its order."""
    selector = KappaTuneSelector(model, max_dim, show_progress=False)
    selector._compute_kappas()
    assert selector._condition_numbers is not None and selector._parameter_condition_numbers is not None
    return list(selector._condition_numbers), list(selector._parameter_condition_numbers)


def by_kind(found: tuple[Candidate, ...]) -> tuple[list[str], list[str]]:
    modules = [one.module for one in found if one.kind == "module"]
    parameters = [one.module for one in found if one.kind == "parameter"]
    assert [one.module for one in found] == modules + parameters
    return modules, parameters


def in_memory(model: nn.Module, candidate: Candidate) -> torch.Tensor:
    """The matrices of a candidate in the model, one after another."""
    if candidate.kind == "parameter":
        return model.get_parameter(candidate.module)
    weight = model.get_submodule(candidate.module).weight
    assert isinstance(weight, torch.Tensor)
    return weight[None]


def pieces_of(candidate: Candidate) -> list[tuple[Piece, ...]]:
    return [matrix.pieces for matrix in candidate.matrices]


def on_disk(tensors: Tensors, pieces: tuple[Piece, ...]) -> np.ndarray:
    parts = [tensors[p.name] if p.index is None else tensors[p.name][p.index] for p in pieces]
    return torch.cat(parts).double().numpy()


def singular_values(W: np.ndarray) -> np.ndarray:
    return np.linalg.svd(W, compute_uv=False)


def assert_same_spectra(case: Saved, found: tuple[Candidate, ...]) -> None:
    tensors, model = load_file(case.directory / WEIGHTS), case.model()
    for candidate in found:
        held = in_memory(model, candidate).detach().double().numpy()
        assert candidate.shape == held.shape[1:], candidate.module
        assert candidate.num_matrices == len(held), candidate.module
        for pieces, W in zip(pieces_of(candidate), held, strict=True):
            found_values, true_values = singular_values(on_disk(tensors, pieces)), singular_values(W)
            assert np.abs(found_values - true_values).max() < 1e-12 * true_values[0], (
                candidate.module,
                pieces,
            )


def assert_accounted(case: Saved, chosen: Chosen) -> None:
    """Every tensor on disk is either a piece of a candidate or skipped, exactly once."""
    found, skipped = chosen
    pieces = {piece.name for one in found for piece in chain(*pieces_of(one))}
    left = [one.name for one in skipped]
    assert len(left) == len(set(left))
    assert pieces.isdisjoint(left)
    assert pieces.union(left) == set(case.entries)
    assert all(one.reason for one in skipped)
