"""KaSA's algebra: truncation, initialisation of the adapter, tail, and the rules of PEFT and the published code."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from kasa_cli.linalg.bottom import Ends, ends
from kasa_cli.methods import kasa
from kasa_cli.methods.kasa import COMPATS, DIAG_INITS, InitialAdapter, Recipe
from tests.builders.matrices import (
    FLOATS,
    SHAPES,
    gaussian,
    kept,
    linear,
    log,
    same_bytes,
    with_spectrum,
)

RECIPE = Recipe(rank=4, scaling=2.0, seed=7)
MODULE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(name="W", params=SHAPES.values(), ids=SHAPES)
def weight(request):
    return with_spectrum(*request.param, linear(min(request.param), 50), torch.float32)


def truncated(W: torch.Tensor, found: Ends) -> torch.Tensor:
    L, R = kasa.truncation(found)
    return W.to(torch.float64) + L @ R


@pytest.mark.parametrize(
    ("alpha", "rank", "use_rslora", "expected"),
    [
        (32, 16, False, 2),
        (32, 16, True, 8),
        (8, 8, False, 1),
        (1, 4, False, 0.25),
        (1, 4, True, 0.5),
        (0, 4, True, 0),
    ],
)
def test_scaling_is_alpha_over_r_or_its_root(alpha, rank, use_rslora, expected):
    assert kasa.scaling(alpha, rank, use_rslora) == expected


@pytest.mark.parametrize("t", [0, 1, 4, 39])
def test_the_cut_leaves_the_largest_components(W, t):
    assert np.abs(truncated(W, ends(W, t)).numpy() - kept(W, min(W.shape) - t)).max() <= 1e-13


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_cut_of_a_cut_changes_nothing(dtype):
    once = truncated(W := gaussian(60, 40, dtype), ends(W, 4))
    assert torch.allclose(truncated(once, ends(once, 4)), once, atol=1e-12)


@pytest.mark.parametrize("init", ["randn", "ones"])
def test_an_adapter_starts_as_peft_starts_it(W, init):
    o, i = W.shape
    begun = kasa.initialise(ends(W, 4), Recipe(16, 2.0, 7), init, MODULE)
    bound = 1 / math.sqrt(i)  # Kaiming-uniform with a = √5
    reference = torch.empty(1000, i)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    assert begun.A.shape == (16, i)
    assert begun.B.shape == (o, 16)
    assert 0.95 * bound < begun.A.abs().max() <= bound * (1 + 1e-6)
    assert begun.A.std() == pytest.approx(float(reference.std()), rel=0.05)
    assert abs(float(begun.A.mean())) < 0.1 * bound
    assert (begun.B == 0).all()
    assert {begun.A.dtype, begun.B.dtype, begun.diag.dtype} == {torch.float32}


def test_the_diagonal_starts_as_its_name_says(W):
    recipe = Recipe(rank=39, scaling=2.0, seed=7)
    found = ends(W, 39)
    by = {init: kasa.initialise(found, recipe, init, MODULE).diag for init in DIAG_INITS}
    assert by["ones"].tolist() == [1.0] * 39
    assert 0.7 < by["randn"].std() < 1.3
    assert (by["randn"] < 0).any()
    assert torch.allclose(by["residual"].to(torch.float64), found.S / 2, rtol=1e-6)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 8.0])
def test_a_residual_start_is_where_the_model_was(W, scaling):
    found = ends(W, 4)
    begun = kasa.initialise(found, Recipe(4, scaling, 7), "residual", MODULE)
    delta = scaling * (begun.B * begun.diag).to(torch.float64) @ begun.A.to(torch.float64)
    assert (truncated(W, found) + delta - W).abs().max() <= 1e-7 * found.S[0]
    eye = torch.eye(4)
    assert (begun.A @ begun.A.T - eye).abs().max() <= 1e-6
    assert (begun.B.T @ begun.B - eye).abs().max() <= 1e-6


def test_a_residual_start_takes_the_largest_of_what_was_dropped(W):
    begun, found = kasa.initialise(ends(W, 9), RECIPE, "residual", MODULE), ends(W, 9)
    assert torch.allclose(begun.diag.to(torch.float64) * RECIPE.scaling, found.S[:4], rtol=1e-6)
    delta = RECIPE.scaling * (begun.B * begun.diag).to(torch.float64) @ begun.A.to(torch.float64)
    assert (
        np.abs((truncated(W, found) + delta).numpy() - kept(W, min(W.shape) - 5)).max()
        <= 1e-7 * found.sigma_next
    )


@pytest.mark.parametrize("t", [0, 3])
def test_a_residual_start_with_rank_to_spare_can_still_be_trained(W, t):
    found = ends(W, t)
    begun = kasa.initialise(found, Recipe(8, 2.0, 7), "residual", MODULE)
    assert (begun.A.shape, begun.B.shape, begun.diag.shape) == ((8, W.shape[1]), (W.shape[0], 8), (8,))
    assert (begun.A[t:].norm(dim=1) > 0).all()
    assert (begun.B[:, t:] == 0).all()
    assert (begun.diag[t:] == 1).all()
    delta = 2.0 * (begun.B * begun.diag).to(torch.float64) @ begun.A.to(torch.float64)
    assert (truncated(W, found) + delta - W).abs().max() <= 1e-7 * found.sigma_next


def test_every_start_is_specified():
    assert set(DIAG_INITS) == {"randn", "ones", "residual"}
    assert set(COMPATS) == {"peft", "reference"}


def bytes_of(begun: InitialAdapter) -> tuple[bytes, ...]:
    return tuple(X.numpy().tobytes() for X in (begun.A, begun.B, begun.diag))


@pytest.mark.parametrize("init", DIAG_INITS)
def test_a_start_depends_on_the_seed_and_the_name_alone(init):
    found = ends(gaussian(20, 30), 4)
    first = bytes_of(kasa.initialise(found, RECIPE, init, MODULE))
    torch.manual_seed(99)
    kasa.initialise(found, RECIPE, init, "another")
    assert bytes_of(kasa.initialise(found, RECIPE, init, MODULE)) == first
    others = [(Recipe(4, 2.0, 8), MODULE), (RECIPE, MODULE + "x"), (Recipe(4, 2.0, -7), MODULE)]
    for recipe, name in others:
        assert (bytes_of(kasa.initialise(found, recipe, init, name)) == first) == (init == "residual")


def test_the_state_of_torch_is_neither_read_nor_written():
    before = torch.random.get_rng_state()
    kasa.initialise(ends(gaussian(20, 30), 4), RECIPE, "randn", MODULE)
    assert same_bytes(before, torch.random.get_rng_state())


def test_the_numbers_of_a_name_are_the_same_on_every_machine():
    numbers = torch.rand(3, generator=kasa.generator_for(7, MODULE))
    assert numbers.tolist() == pytest.approx([0.4531402587890625, 0.6246976852416992, 0.09057402610778809])


@pytest.mark.parametrize("t", [1, 4])
def test_the_tail_is_the_cut_as_a_lora_of_scaling_one(W, t):
    found = ends(W, t)
    A, B = kasa.tail(found)
    assert (A.shape, B.shape) == ((t, W.shape[1]), (W.shape[0], t))
    assert A.is_contiguous()
    assert B.is_contiguous()
    delta = B.to(torch.float64) @ A.to(torch.float64)
    assert np.abs((W.to(torch.float64) + delta).numpy() - kept(W, min(W.shape) - t)).max() <= 1e-7 * float(
        found.S[0]
    )


@pytest.mark.parametrize("t", [1, 4])
def test_a_trained_adapter_is_a_plain_lora_of_rank_r_plus_t(W, t):
    found = ends(W, t)
    A, B, d = gaussian(3, W.shape[1]), gaussian(W.shape[0], 3), gaussian(1, 3)[0]
    tail_A, tail_B = (X.to(torch.float64) for X in kasa.tail(found))
    plain = torch.cat([2.0 * B * d, tail_B], dim=1) @ torch.cat([A, tail_A])
    assert torch.allclose(W + plain, truncated(W, found) + 2.0 * (B * d) @ A, atol=1e-7)


def published(W: torch.Tensor, r: int) -> np.ndarray:
    """The reference implementation, line by line: svd_rank = self.in_features - r."""
    U, S, Vh = np.linalg.svd(W.to(torch.float64).numpy(), full_matrices=False)
    svd_rank = W.shape[1] - r
    return U[:, :svd_rank] @ np.diag(S[:svd_rank]) @ Vh[:svd_rank]


@pytest.mark.parametrize("r", [1, 4, 20])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (60, 64), (63, 64), (64, 60)], ids=str)
def test_the_published_rule_drops_what_the_published_code_drops(shape, r):
    W = with_spectrum(*shape, linear(min(shape), 50))
    t = COMPATS["reference"](r, *shape)
    assert np.abs(truncated(W, ends(W, t)).numpy() - published(W, r)).max() <= 1e-13
    assert t == r - max(0, min(r, shape[1] - shape[0]))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pefts_rule_drops_the_rank(shape):
    assert COMPATS["peft"](4, *shape) == 4


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peft_truncates_to_the_same_weight(shape, use_rslora):
    peft = pytest.importorskip("peft")
    o, i = shape
    model = nn.Sequential()
    model.add_module("linear", nn.Linear(i, o))
    W = with_spectrum(o, i, log(min(shape), 100), torch.float32)
    model.linear.weight.data.copy_(W)
    settings = peft.KasaConfig(beta=0.0, gamma=0.0)
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["linear"], use_rslora=use_rslora, kasa_config=settings
        ),
    )
    layer = wrapped.base_model.model.linear
    found = ends(W, COMPATS["peft"](4, o, i))
    by_peft = layer.base_layer.weight.detach()
    assert (by_peft - truncated(W, found)).abs().max() <= 1e-5 * found.sigma_max
    assert (by_peft - W).abs().max() > 1e-4 * found.sigma_max
    assert layer.scaling["default"] == kasa.scaling(6, 4, use_rslora)
    begun = kasa.initialise(found, Recipe(4, 1.0, 0), "randn", "linear")
    tensors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"])
    assert [X.shape for X in tensors] == [begun.A.shape, begun.B.shape, begun.diag.shape]
    assert {X.dtype for X in tensors} == {begun.A.dtype}
    assert (tensors[1] == 0).all()
