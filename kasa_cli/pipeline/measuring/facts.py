"""Spectral facts of a matrix: from the store, or by one decomposition.

A question is answered by the smallest fact that suffices, and every fact is computed in one way only. So an answer
does not depend on earlier questions, to the last bit.

    extremes      σ_max, σ_min, ‖W‖_F      answered by every measurement
    ends-16, -64  bottom factors           a larger one is stored with all smaller ones; ends-16 answers t = 8
    values        all singular values
    top-16, -64   top factors, likewise
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kasa_cli.checkpoint import numeric_environment
from kasa_cli.errors import NumericalError, UsageError
from kasa_cli.files import Store, canonical_json, open_store
from kasa_cli.linalg import (
    ANGLE_TOLERANCE,
    Ends,
    Gram,
    StreamedWeight,
    Tops,
    Values,
    ends_of,
    frame_of,
    level,
    tops_of,
    values_of,
)
from kasa_cli.pipeline.workers import RunOptions

SOLVER_EDITION = 2
"""Increase this number when the solvers change: facts and parts of another edition are not reused."""

Fact = TypeVar("Fact", "Extremes", Ends, Values, Tops)


@dataclass(frozen=True)
class Extremes:
    """The largest and the smallest singular value, and the norm: every measurement gives them."""

    sigma_max: float
    sigma_min: float
    frobenius: float
    solver: str
    residual: float

    @property
    def kappa(self) -> float:
        """σ_max over σ_min, infinite for a singular weight."""
        return self.sigma_max / self.sigma_min if self.sigma_min > 0 else math.inf


@dataclass(frozen=True)
class HashedMatrix:
    """A matrix to measure: the key of its content in the store, the hash of its stored bytes, and how to read it."""

    name: str
    content: str
    shape: tuple[int, int]
    dtype: str
    digest: str
    read: Callable[[], Tensor | StreamedWeight]


class Facts:
    """The store for one numerical environment: facts of other versions or thread counts are not used."""

    def __init__(self, store: Store | None, environment: Mapping[str, Any]) -> None:
        self.store = store
        known = {name: value for name, value in environment.items() if name not in ("kasa", "safetensors")}
        text = canonical_json({**known, "edition": SOLVER_EDITION})
        self._key = hashlib.sha256(text).hexdigest()[:16]

    def bench(self, weight: HashedMatrix) -> "Bench":
        """The measurement of a matrix."""
        return Bench(self, weight)

    def get(self, weight: HashedMatrix, question: str) -> bytes | None:
        """A fact from the store."""
        return self.store.get(weight.content, question, self._key) if self.store else None

    def put(self, weight: HashedMatrix, question: str, payload: bytes) -> None:
        """Keep a fact."""
        if self.store:
            self.store.put(weight.content, question, self._key, payload)


class Bench:
    """The measurement of one matrix: its Gram matrix, computed at most once, serves all questions.

    `is_new` tells whether a decomposition was computed; if not, the matrix was not read. Every question raises
    NumericalError with the name of the matrix if an entry is not finite or no solver converges.
    """

    def __init__(self, facts: Facts, weight: HashedMatrix) -> None:
        self.weight = weight
        self.is_new = False
        self._summed: Gram | None = None
        self._facts = facts
        self._side = min(weight.shape)
        self._answers: dict[str, Any] = {}

    def extremes(self) -> Extremes:
        """The largest and the smallest singular value, and the norm."""

        def compute() -> Extremes:
            fact = self._ends(level(self._side, 0)).cut(0)
            return Extremes(fact.sigma_max, fact.sigma_min, fact.frobenius, fact.solver, fact.residual)

        return self._ask("extremes", Extremes, compute)

    def bottom(self, t: int) -> Ends:
        """The t smallest components: those of the stored level, or exactly t where the level is less accurate."""
        if not 0 <= t < self._side:
            raise NumericalError(f"cannot drop {t} of {self._side} components", self.weight.name)
        self.extremes()
        fact = [self._ends(n) for n in _levels(self._side, t)][-1].cut(t)
        return fact if fact.angle <= ANGLE_TOLERANCE or fact.is_tied else self._ends(t)

    def top(self, t: int) -> Tops:
        """The t largest components, or all if there are fewer."""
        num_needed = min(t, self._side)
        levels = _levels(self._side + 1, num_needed)
        fact = [self._ask(f"top-{n}", Tops, partial(self._tops, n)) for n in levels][-1]
        return Tops(fact.U[:, :num_needed], fact.S[:num_needed], fact.V[:, :num_needed])

    def values(self) -> Values:
        """All singular values."""
        self.extremes()
        return self._ask("values", Values, lambda: values_of(self._gram, self._ends(level(self._side, 0))))

    def _ends(self, t: int) -> Ends:
        return self._ask(f"ends-{t}", Ends, lambda: ends_of(self._gram, t))

    def _tops(self, n: int) -> Tops:
        return tops_of(self._gram, n)

    @property
    def _gram(self) -> Gram:
        if self._summed is None:
            self.is_new = True
            self._summed = Gram(frame_of(self.weight.read()))
        return self._summed

    def _ask(self, question: str, kind: type[Fact], compute: Callable[[], Fact]) -> Fact:
        """The previous answer, the stored fact, or a new one."""
        if question not in self._answers:
            self._answers[question] = self._known(question, kind) or self._measure(question, compute)
        answer: Fact = self._answers[question]
        return answer

    def _measure(self, question: str, compute: Callable[[], Fact]) -> Fact:
        """Compute a fact and store it."""
        try:
            fact = compute()
        except NumericalError as error:
            if error.where:
                raise
            raise NumericalError(error.what, self.weight.name, error.remedy) from error
        about = {"dtype": self.weight.dtype, "name": self.weight.name, "shape": list(self.weight.shape)}
        self._facts.put(self.weight, question, pack(fact, about))
        return fact

    def _known(self, question: str, kind: type[Fact]) -> Fact | None:
        """The stored fact; None if there is none in the form of this version of kasa."""
        payload = self._facts.get(self.weight, question)
        try:
            return None if payload is None else unpack(kind, payload)
        except (KeyError, TypeError, ValueError, SafetensorError):
            return None


def _levels(side: int, t: int) -> Iterator[int]:
    """The levels up to the one that answers t. All of them are stored, so the answer to a smaller t never changes."""
    reached, num_needed = -1, level(side, t)
    while reached < num_needed:
        reached = level(side, reached + 1)
        yield reached


def pack(fact: Extremes | Ends | Values | Tops, about: Mapping[str, Any]) -> bytes:
    """A safetensors file with a single metadata key: with two keys its bytes would differ from run to run."""
    fields = {name: value for name, value in vars(fact).items() if not isinstance(value, Tensor)}
    tensors = {
        name: value.cpu().contiguous() for name, value in vars(fact).items() if isinstance(value, Tensor)
    }
    return save(tensors, {"kasa": json.dumps({"about": dict(about), "fields": fields}, sort_keys=True)})


def unpack(kind: type[Fact], payload: bytes) -> Fact:
    """The fact of a packed file."""
    fields: dict[str, Any] = {**header(payload)["fields"], **load(payload)}
    return kind(**fields)


def header(payload: bytes) -> dict[str, Any]:
    """The fields of a packed fact, and the name, shape and dtype of its matrix."""
    length = int.from_bytes(payload[:8], "little")
    content: dict[str, Any] = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["kasa"])
    return content


def content_hash(dtype: str, shape: tuple[int, ...], digest: str, *, is_transposed: bool) -> str:
    """The key of a matrix in the store: its bytes, dtype, shape and orientation."""
    text = f"{dtype} {'x'.join(map(str, shape))} {'transposed ' if is_transposed else ''}{digest}"
    return hashlib.sha256(text.encode()).hexdigest()


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not (name.startswith("cuda") and torch.cuda.is_available()):
        raise UsageError("no such device here", name, "use --device cpu")
    return torch.device(name)


def open_facts(running: RunOptions) -> Facts:
    """The facts of earlier runs in the same numerical environment; none without a store."""
    store = open_store(running.store) if running.use_store else None
    environment = numeric_environment(running.threads_per_worker, pick_device(running.device).type)
    return Facts(store, asdict(environment))


def store_notes(facts: Facts) -> list[str]:
    """A note if the store cannot keep facts."""
    trouble = facts.store.trouble if facts.store else None
    if trouble is None:
        return []
    where = f" ({trouble.where})" if trouble.where else ""
    return [
        f"the store could not keep every fact, so the next run measures some weights again: {trouble.what}{where}"
    ]
