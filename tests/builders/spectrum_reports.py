"""Spectrum reports of random matrices: the numbers are those of real singular values."""

import math
from dataclasses import replace

import numpy as np

from kasa_cli.report import Curve, Skipped, SpectrumReport, SpectrumRow

MINILM = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (1536, 384),
    "output.dense": (384, 1536),
}
LLAMA = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (16, 64),
    "self_attn.v_proj": (16, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (160, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}


def trained(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Noise, and directions above it that fall off by a power law, as training leaves them."""
    noise = rng.standard_normal(shape) * 0.03
    rank = min(shape) // 3
    strength = (
        0.03 * math.sqrt(max(shape)) * rng.uniform(3, 9) / np.arange(1, rank + 1) ** rng.uniform(0.4, 0.9)
    )
    left, right = (np.linalg.qr(rng.standard_normal((side, rank)))[0] for side in shape)
    return noise + (left * strength) @ right.T


def spectrum(name: str, kind: str, W: np.ndarray, points: int = 128) -> tuple[SpectrumRow, Curve]:
    S = np.linalg.svd(W, compute_uv=False)
    p = S / S.sum()
    entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
    noise = float(np.median(np.abs(W)) / 0.6745)
    edge = noise * (math.sqrt(W.shape[0]) + math.sqrt(W.shape[1]))
    index = np.unique(np.geomspace(1, len(S), points).round().astype(int))
    sketch = S[np.linspace(0, len(S) - 1, 12).round().astype(int)]
    tail = S[: max(4, len(S) // 4)]
    row = SpectrumRow(
        name=f"{name}.weight",
        module=name,
        module_type=kind,
        shape=W.shape,
        dtype="F32",
        sigma_max=float(S[0]),
        sigma_min=float(S[-1]),
        kappa=float(S[0] / S[-1]) if S[-1] > 0 else math.inf,
        frobenius=float(np.linalg.norm(S)),
        nuclear=float(S.sum()),
        stable_rank=float((S**2).sum() / S[0] ** 2) if S[0] else math.nan,
        effective_rank=math.exp(entropy),
        entropy=entropy,
        numerical_rank=int((S[0] * 1e-6 < S).sum()),
        energy={str(r): float((S[:r] ** 2).sum() / (S**2).sum()) for r in (8, 32)},
        mp_sigma=noise,
        mp_edge=edge,
        mp_above=int((edge < S).sum()),
        power_law_alpha=1 + len(tail) / float(np.log(tail**2 / tail[-1] ** 2).sum()) if tail[-1] else None,
        power_law_xmin=float(tail[-1] ** 2),
        power_law_tail=len(tail),
        solver="svd",
        sketch=tuple(map(float, sketch)),
    )
    return row, Curve(row.name, tuple(map(int, index)), tuple(map(float, S[index - 1])))


def report(
    layers: int, kinds: dict[str, tuple[int, int]], path: str, seed: int = 0, **extra
) -> SpectrumReport:
    rng = np.random.default_rng(seed)
    both = [
        spectrum(f"{path}.{layer}.{kind}", kind, trained(shape, rng))
        for layer in range(layers)
        for kind, shape in kinds.items()
    ]
    return of(both, **extra)


def of(both: list[tuple[SpectrumRow, Curve]], **extra) -> SpectrumReport:
    rows = marked([row for row, _ in both])
    stated = {
        "command": "inspect spectrum",
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "model_class": "BertModel",
        "skipped": (
            Skipped("embeddings.word_embeddings.weight", "not in a block"),
            Skipped("pooler.dense.weight", "not in a block"),
        ),
        "totals": {"tensors": len(rows), "decompositions": len(rows), "decompositions_reused": 0},
        "curves": tuple(curve for _, curve in both),
    }
    return SpectrumReport(**{**stated, **extra}, tensors=tuple(rows))


def marked(rows: list[SpectrumRow]) -> list[SpectrumRow]:
    """Worst and best κ of each type, as the report has them."""
    kinds = {row.module_type: [r for r in rows if r.module_type == row.module_type] for row in rows}
    worst = {max(group, key=lambda r: r.kappa).name for group in kinds.values() if len(group) > 1}
    best = {min(group, key=lambda r: r.kappa).name for group in kinds.values() if len(group) > 1}
    return [replace(row, is_worst=row.name in worst, is_best=row.name in best) for row in rows]


def minilm(**extra) -> SpectrumReport:
    return report(6, MINILM, "encoder.layer", **extra)


def llama(layers: int = 80, **extra) -> SpectrumReport:
    return report(layers, LLAMA, "model.layers", model="meta-llama/Llama-3.3-70B-Instruct", **extra)


def singular(name: str, kind: str, shape: tuple[int, int], rank: int, seed: int = 1):
    """A weight of exactly that rank: its other singular values are zero to the last bit."""
    rng = np.random.default_rng(seed)
    W = np.zeros(shape)
    W[:rank, :rank] = rng.standard_normal((rank, rank))
    return spectrum(name, kind, W)
