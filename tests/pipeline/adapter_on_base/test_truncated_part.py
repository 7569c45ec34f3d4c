"""KaSA's truncation in a merge: rank from the manifest, factors from the tail, the store or a decomposition."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kasa_cli.errors import IntegrityError
from kasa_cli.pipeline.measuring.facts import Bench
from kasa_cli.pipeline.merging.run import MergeRequest, ModelLocation, RunOptions, merge
from tests.builders import tiny_models
from tests.builders.adapters import disturb_saved
from tests.builders.matrices import assert_close, kept
from tests.builders.truncated import cut

WEIGHTS = "adapter_model.safetensors"
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}
RANK, DEEP = 3, 5


@dataclass(frozen=True)
class Output:
    """A model and its truncated output, with a nonzero adapter."""

    model: Path
    out: Path

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"

    def merged(
        self, base: Path, out: Path, running: RunOptions | None = None, **options
    ) -> dict[str, torch.Tensor]:
        running = running or RunOptions(1, use_store=False)
        merge([self.adapter], ModelLocation(str(base)), out, MergeRequest(**options), running)
        return load_file(out / "model.safetensors")


@pytest.fixture(params=sorted(TARGETS))
def output(request, tmp_path):
    model, targets = tiny_models.saved(request.param), TARGETS[request.param]
    options = {"rank": RANK, "truncation_rank": DEEP, "alpha": 7, "workers": 1, "use_store": False}
    cut(model, tmp_path / "out", *targets, **options)
    disturb_saved(tmp_path / "out" / "adapter")
    return Output(model, tmp_path / "out")


def assert_all_close(ours, theirs, tolerance=1e-6):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor, tolerance)


def test_the_cut_of_the_original_is_as_deep_as_that_of_the_truncated_base(output, tmp_path):
    """Not the rank of the adapter, which a reader without the manifest would assume."""
    one = output.merged(output.model, tmp_path / "a")
    assert_all_close(one, output.merged(output.out / "base", tmp_path / "b"))
    name = next(name for name in one if name.endswith(("q_proj.weight", "c_attn.weight")))
    module = f"base_model.model.{name.removesuffix('.weight')}"
    adapter, W = load_file(output.adapter / WEIGHTS), load_file(output.model / "model.safetensors")[name]
    A, B, d = (
        adapter[f"{module}.{part}"].double() for part in ("lora_A.weight", "lora_B.weight", "lora_diag")
    )
    update = 7 / RANK * (B * d) @ A
    exact = torch.from_numpy(kept(W, -DEEP)) + (update.T if len(update) != len(W) else update)
    assert float((one[name] - exact).abs().max()) <= 1e-6 * float(exact.abs().max())


def test_factors_of_the_tail_the_store_and_a_decomposition_agree(output, tmp_path, monkeypatch):
    from_scratch = Output(output.model, shutil.copytree(output.out, tmp_path / "copy"))
    shutil.rmtree(from_scratch.out / "tail")
    computed = from_scratch.merged(output.model, tmp_path / "a", RunOptions(1, store=tmp_path / "store"))
    asked = []
    decompose = Bench._measure
    monkeypatch.setattr(Bench, "_measure", lambda *args: asked.append(args) or decompose(*args))
    stored = from_scratch.merged(output.model, tmp_path / "b", RunOptions(1, store=tmp_path / "store"))
    assert not asked
    monkeypatch.setattr(Bench, "bottom", lambda *args: pytest.fail("the tail was there"))
    by_tail = output.merged(output.model, tmp_path / "c")
    assert all(torch.equal(stored[name], one) for name, one in computed.items())
    assert_all_close(by_tail, computed)


def test_a_tail_of_another_base_is_not_used(output, tmp_path):
    stranger = shutil.copytree(output.model, tmp_path / "stranger")
    weights = load_file(stranger / "model.safetensors")
    moved = {name: one.flip(0).contiguous() for name, one in weights.items()}
    save_file(moved, stranger / "model.safetensors", {"format": "pt"})
    forced = {"base_is": "original", "force_base": True}
    with_tail = output.merged(stranger, tmp_path / "a", **forced)
    shutil.rmtree(output.out / "tail")
    assert_all_close(with_tail, output.merged(stranger, tmp_path / "b", **forced), 0)


def test_an_altered_tail_is_named(output, tmp_path):
    path = output.out / "tail" / WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="altered"):
        output.merged(output.model, tmp_path / "a")


def test_of_two_adapters_the_one_that_lacks_more_says_how_deep_the_cut_is(tmp_path):
    """As in PEFT, where the larger truncation counts, in any order of the adapters."""
    model = tiny_models.save("llama", tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj"
    W = load_file(model / "model.safetensors")[f"{name}.weight"]
    exact, generator = torch.from_numpy(kept(W, -4)), torch.Generator().manual_seed(8)
    adapters = []
    for rank in (2, 4, 3):
        place = tmp_path / str(rank)
        place.mkdir()
        A, B = (
            torch.randn(rank, W.shape[1], generator=generator),
            torch.randn(W.shape[0], rank, generator=generator),
        )
        d = torch.randn(rank, generator=generator)
        key = f"base_model.model.{name}"
        tensors = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B, f"{key}.lora_diag": d}
        save_file(tensors, place / WEIGHTS, {"format": "pt"})
        words = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": [name],
            "kasa_config": {},
        }
        (place / "adapter_config.json").write_text(json.dumps({**words, "peft_version": "0.21.2"}))
        adapters.append(place)
        exact = exact + (B.double() * d.double()) @ A.double()
    options = MergeRequest(base_is="original")
    merge(adapters, ModelLocation(str(model)), tmp_path / "OUT", options, RunOptions(1, use_store=False))
    found = load_file(tmp_path / "OUT" / "model.safetensors")[f"{name}.weight"]
    assert float((found - exact).abs().max()) <= 1e-6 * float(exact.abs().max())
