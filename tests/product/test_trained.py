"""Trained adapters on real weights, MiniLM and a GPT-2: the output of `kasa merge` is PEFT's live model.

Truncated by kasa, trained a few steps by PEFT on real text, saved, merged; then hidden states or logits compared.
"""

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.builders import real_models
from tests.builders.runs import inside
from tests.builders.truncated import cut

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK, STEPS, NUM_TEXTS, LENGTH = 8, 4, 8, 40
PLAIN = {"rank": RANK, "workers": 1, "use_store": False}
EXACT = 1e-5
"""Relative to the largest entry: float32, through all layers."""
WEIGHTS = "adapter_model.safetensors"
SCALING = 2
"""alpha / r for the default alpha."""
CASES: dict[str, dict[str, Any]] = {
    "t=r": {},
    "t>r": {"truncation_rank": 3 * RANK, "use_rslora": True, "alpha": 12.0},
}
Output = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """The result of a training: outputs of the live model before and after, on text that it was not trained on."""

    out: Path
    adapter: Path
    before: torch.Tensor
    after: torch.Tensor
    moved: dict[str, float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of hundreds of megabytes that is removed at the end; one thread, so that each training is the same."""
    made, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(threads)
    shutil.rmtree(made)


def trained(live: PeftModel, loss: Output, output: Output, out: Path, adapter: Path) -> Trained:
    """A few steps of AdamW, dropout and all; the adapter saved as PEFT saves it."""
    torch.manual_seed(0)
    factors = {name: one for name, one in live.named_parameters() if one.requires_grad}
    start = {name: one.detach().clone() for name, one in factors.items()}
    before = seen(live, output)
    optimizer = torch.optim.AdamW(factors.values(), lr=5e-3)
    live.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(live).backward()
        optimizer.step()
    live.save_pretrained(adapter)
    moved = {name: float((one.detach() - start[name]).abs().max()) for name, one in factors.items()}
    return Trained(out, adapter, before, seen(live, output), moved)


def seen(model: nn.Module, output: Output) -> torch.Tensor:
    with torch.no_grad():
        return output(model.eval())


def away(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two outputs, relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


def without_another_cut(base: nn.Module, adapter: Path, **options: Any) -> PeftModel:
    """A KaSA adapter on a base that is already truncated: PEFT's own truncation is prevented."""
    model = PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=True, **options)
    put_off = [one for one in model.modules() if hasattr(one, "_lora_kasa_truncation_deferred")]
    assert put_off
    for module in put_off:
        module._lora_kasa_truncation_deferred.clear()
    return model


# --- MiniLM, KaSA ---


@pytest.fixture(scope="module")
def minilm() -> Path:
    return real_models.minilm()


def batch(model: Path, texts: list[str]) -> Any:
    cutting = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return AutoTokenizer.from_pretrained(model)(texts, **cutting)


def last_hidden(given: Any, model: nn.Module) -> torch.Tensor:
    return model(**given).last_hidden_state


def halves_find_each_other(halves: tuple[Any, Any], model: nn.Module) -> torch.Tensor:
    """A contrastive loss: the two halves of a paragraph belong together, others do not."""
    vectors = []
    for given in halves:
        mask = given["attention_mask"][..., None]
        vectors.append(normalize((last_hidden(given, model) * mask).sum(1), dim=-1))
    return cross_entropy(vectors[0] @ vectors[1].T / 0.05, torch.arange(NUM_TEXTS))


@pytest.fixture(scope="module")
def output(minilm: Path) -> Output:
    return partial(last_hidden, batch(minilm, real_models.paragraphs()[-4:]))


@pytest.fixture(scope="module", params=sorted(CASES))
def kasa(request: pytest.FixtureRequest, minilm: Path, folder: Path, output: Output) -> Trained:
    """KaSA trained on a truncated MiniLM; where the truncation rank is the adapter's, as PEFT itself loads it."""
    out = cut(minilm, folder / request.param, **PLAIN, **CASES[request.param]).out
    base = AutoModel.from_pretrained(out / "base")
    load = without_another_cut if "truncation_rank" in CASES[request.param] else PeftModel.from_pretrained
    texts = real_models.paragraphs()[:NUM_TEXTS]
    ends = [text[: len(text) // 2] for text in texts], [text[len(text) // 2 :] for text in texts]
    loss = partial(halves_find_each_other, tuple(batch(minilm, end) for end in ends))
    live = load(base, out / "adapter", is_trainable=True)
    return trained(live, loss, output, out, folder / f"{request.param}-trained")


def test_a_few_steps_move_all_that_is_trained_and_what_comes_out(kasa: Trained, output: Output) -> None:
    for part in ("lora_A", "lora_B", "lora_diag"):
        moved = [change for name, change in kasa.moved.items() if part in name]
        assert len(moved) == 36 and min(moved) > 1e-3, part
    assert away(kasa.before, seen(AutoModel.from_pretrained(kasa.out / "base"), output)) < EXACT
    assert away(kasa.after, kasa.before) > 1e4 * EXACT


def test_merged_into_the_truncated_base_it_is_the_live_model(
    kasa: Trained, output: Output, tmp_path: Path, folder: Path, capsys
) -> None:
    merged = folder / tmp_path.name
    done = inside(capsys, "merge", kasa.adapter, "--into", kasa.out / "base", "-o", merged, "--json")
    assert done.code == 0, done.err
    assert (done.json["base_is"], len(done.json["tensors"])) == ("truncated", 36)
    assert away(seen(AutoModel.from_pretrained(merged), output), kasa.after) < EXACT
    assert inside(capsys, "verify", merged, "--read-data").code == 0


def test_merged_into_the_original_it_is_the_live_model(
    kasa: Trained, minilm: Path, output: Output, tmp_path: Path, folder: Path, capsys
) -> None:
    """PEFT's files have the rank of the adapter and not the truncation rank, which only the manifest has."""
    trained_here = shutil.copytree(kasa.out, folder / f"{tmp_path.name}-out") / "adapter"
    shutil.copy(kasa.adapter / WEIGHTS, trained_here)
    given = [[trained_here], [kasa.out / "tail", kasa.adapter, "--base-is", "truncated"]]
    if kasa.out.name == "t=r":
        given.append([kasa.adapter, "--base-is", "original"])
    for number, adapters in enumerate(given):
        merged = folder / f"{tmp_path.name}-{number}"
        done = inside(capsys, "merge", *adapters, "--into", minilm, "-o", merged, "--json")
        assert done.code == 0, done.err
        assert away(seen(AutoModel.from_pretrained(merged), output), kasa.after) < EXACT, adapters


def exact(model: Path, adapter: Path, is_cut: bool) -> dict[str, torch.Tensor]:
    """The merged weights in float64, truncated by numpy."""
    weights, factors = load_file(model / "model.safetensors"), load_file(adapter / WEIGHTS)
    modules = [key.removesuffix(".lora_diag") for key in factors if key.endswith("lora_diag")]
    found = {}
    for key in modules:
        name = f"{key.removeprefix('base_model.model.')}.weight"
        A, B, diagonal = (factors[f"{key}.lora_{end}"].double() for end in ("A.weight", "B.weight", "diag"))
        W = weights[name].double().numpy()
        if not is_cut:
            with threadpool_limits(1):
                U, S, Vh = np.linalg.svd(W, full_matrices=False)
            W = W - (U[:, -RANK:] * S[-RANK:]) @ Vh[-RANK:]
        found[name] = torch.from_numpy(W) + SCALING * (B * diagonal) @ A
    return found


@pytest.mark.parametrize("kasa", ["t=r"], indirect=True)
@pytest.mark.parametrize(("base_is", "less"), [("truncated", 1), ("original", 0.95)])
def test_in_bfloat16_it_is_nearer_to_the_exact_merge_than_that_of_peft(
    base_is: str, less: float, kasa: Trained, minilm: Path, output: Output, folder: Path, capsys
) -> None:
    """PEFT rounds the truncated base, the small update and their sum; kasa rounds once."""
    is_cut = base_is == "truncated"
    half, merged = folder / f"half-{base_is}", folder / f"merged-{base_is}"
    source = kasa.out / "base" if is_cut else minilm
    AutoModel.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(half)
    arguments = [kasa.adapter, "--into", half, "--base-is", base_is, "-o", merged]
    assert inside(capsys, "merge", *arguments).code == 0
    load = without_another_cut if is_cut else PeftModel.from_pretrained
    theirs = load(AutoModel.from_pretrained(half, dtype="auto"), kasa.adapter).merge_and_unload()
    ours = AutoModel.from_pretrained(merged, dtype="auto")
    assert ours.dtype == theirs.dtype == torch.bfloat16
    truth = exact(half, kasa.adapter, is_cut)
    mine, peft = (errors(model.double(), truth) for model in (ours, theirs))
    assert len(truth) == 36 and (mine < peft).all() and np.median(mine / peft) < less
    if not is_cut:
        exactly = seen(with_weights(ours, truth), output)
        assert (seen(ours, output) - exactly).norm() < (seen(theirs, output) - exactly).norm()


def errors(model: nn.Module, truth: dict[str, torch.Tensor]) -> np.ndarray:
    """The distance of each weight from the exact one, relative to its norm."""
    found = {name: model.get_parameter(name).detach() for name in truth}
    return np.array([float((found[name] - one).norm() / one.norm()) for name, one in truth.items()])


def with_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of the model in float64 with the exact weights."""
    exact_one = copy.deepcopy(model).double()
    missing, unexpected = exact_one.load_state_dict(weights, strict=False)
    assert not unexpected and len(missing) + len(weights) == len(exact_one.state_dict())
    return exact_one


# --- GPT-2: Conv1D, where PEFT has no KaSA ---


@pytest.fixture(scope="module")
def gpt2(folder: Path) -> Path:
    return real_models.gpt2(folder)


def logits(given: torch.Tensor, model: nn.Module) -> torch.Tensor:
    return model(input_ids=given).logits


def next_word(given: torch.Tensor, model: nn.Module) -> torch.Tensor:
    return model(input_ids=given, labels=given).loss


@pytest.fixture(scope="module")
def words(gpt2: Path) -> torch.Tensor:
    texts = real_models.paragraphs()
    vocabulary = AutoModelForCausalLM.from_pretrained(gpt2).config.vocab_size
    return real_models.tokens([*texts[:NUM_TEXTS], *texts[-4:]], vocabulary, LENGTH)


@pytest.fixture(scope="module")
def lora(gpt2: Path, words: torch.Tensor, folder: Path) -> Trained:
    """A plain LoRA trained on a truncated GPT-2: on base/, as the note of `kasa truncate` advises."""
    out = cut(gpt2, folder / "gpt2-out", **PLAIN).out
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    targets = ["c_attn", "c_fc", "c_proj"]
    config = LoraConfig(r=RANK, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    live = get_peft_model(base, config)
    loss, output = partial(next_word, words[:NUM_TEXTS]), partial(logits, words[NUM_TEXTS:])
    return trained(live, loss, output, out, folder / "gpt2-trained")


def test_the_tail_of_a_gpt2_on_the_original_is_the_truncated_base(
    lora: Trained, gpt2: Path, words: torch.Tensor
) -> None:
    output = partial(logits, words[NUM_TEXTS:])
    original = seen(AutoModelForCausalLM.from_pretrained(gpt2), output)
    tail = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2), lora.out / "tail")
    assert away(seen(tail, output), lora.before) < EXACT
    assert away(original, lora.before) > 100 * EXACT


def test_a_lora_on_conv1d_merged_is_the_live_model_on_either_base(
    lora: Trained, gpt2: Path, words: torch.Tensor, folder: Path, capsys
) -> None:
    assert min(lora.moved.values()) > 1e-3 and away(lora.after, lora.before) > 1e3 * EXACT
    output = partial(logits, words[NUM_TEXTS:])
    for base, adapters in ((lora.out / "base", [lora.adapter]), (gpt2, [lora.out / "tail", lora.adapter])):
        merged = folder / f"gpt2-merged-{len(adapters)}"
        done = inside(capsys, "merge", *adapters, "--into", base, "-o", merged, "--json")
        assert done.code == 0, done.err
        assert {row["terms"] for row in done.json["tensors"]} == {len(adapters)}
        assert away(seen(AutoModelForCausalLM.from_pretrained(merged), output), lora.after) < EXACT
