"""How long does a merge take against a plain copy of the same files and against PEFT, and in how much memory?

    python benchmarks/merge.py --width 4096 --layers 24 --repeat 4
    python benchmarks/merge.py --width 4096 --layers 8 --repeat 3 --cold

A LoRA (with --dora a DoRA) on every linear weight of the layers. All start from the same files, read once before
each run so that the page cache holds them and nothing else (with --cold, dropped from it, so that they are only on
the disk), and with nothing left to write. Each is a process of its own, one after the other, round by round, and the
run of median time counts. PEFT: `from_pretrained`, `PeftModel.from_pretrained`, `merge_and_unload`,
`save_pretrained`. What kasa leaves is on disk and has been read back, so the copy to compare it with syncs its files
and its folder too; PEFT and the other copy leave that to the system. Both merges must have the same entries, but for
rounding. The first merge into a base asks transformers for its names, the next ones find them in kasa's store: both
are shown. Half the layers are merged once more: memory must not follow the size of the model. Up to three seconds of
a merge are imports, so few layers say little.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from measuring import Usage, gib, measured, show  # no torch here: a child's peak begins at that of its parent

CHUNK = 16 << 20
COPY, FAST_COPY, KASA, PEFT = "copy, synced", "copy, unsynced", "kasa", "PEFT"
FIRST, HALF = "kasa, new base", "kasa, half as deep"
OUTPUTS = {COPY: "copy", FAST_COPY: "copy", FIRST: "copy", KASA: "kasa", HALF: "copy", PEFT: "peft"}
"""Folders: those of the two merges are kept, to be compared."""
INPUTS = {model: (model, f"{model}-adapter") for model in ("model", "half")}


# --- what is merged ---


def make(place: Path, arguments: argparse.Namespace) -> None:
    """The model, one of half the layers, and an adapter for each."""
    import llama_shaped

    for name, layers in (("model", arguments.layers), ("half", arguments.layers // 2)):
        model = llama_shaped.write(place / name, arguments.width, layers)
        if arguments.dtype != "bfloat16":
            cast(model, arguments.dtype)
        write_adapter(model, place / f"{name}-adapter", arguments.rank, arguments.dora)


def cast(model: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    for file in shards(model):
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": dtype}))


def write_adapter(model: Path, folder: Path, rank: int, is_dora: bool) -> None:
    """Random factors, both full; an update of a tenth of the weight. DoRA's magnitudes are near those of the rows."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator, factors = torch.Generator().manual_seed(0), {}
    for name, (outs, ins) in linear_shapes(model):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{key}.lora_A.weight"] = torch.randn(rank, ins, generator=generator) * ins**-0.5
        factors[f"{key}.lora_B.weight"] = torch.randn(outs, rank, generator=generator) * 0.01
        if is_dora:
            spread = torch.rand(outs, generator=generator) + 0.5
            factors[f"{key}.lora_magnitude_vector.weight"] = 0.02 * ins**0.5 * spread
    modules = sorted({key.split(".")[-3] for key in factors})
    folder.mkdir()
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=modules, task_type="CAUSAL_LM", use_dora=is_dora
    )
    config.save_pretrained(folder)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})


def linear_shapes(model: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    from safetensors import safe_open

    for file in shards(model):
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        yield from ((n, (s[0], s[1])) for n, s in shapes.items() if ".layers." in n and len(s) == 2)


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


# --- who is measured ---


def copy(model: Path, out: Path, is_synced: bool) -> None:
    """Every file; then, where asked for, every byte on disk and the names too."""
    out.mkdir()
    for file in sorted(model.iterdir()):
        shutil.copyfile(file, out / file.name)
    if is_synced:
        for path in (*out.iterdir(), out):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def peft(model: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    PeftModel.from_pretrained(loaded, adapter).merge_and_unload().save_pretrained(out)


def contenders(place: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Usage]]:
    """How to run each."""
    workers = arguments.workers
    this = [sys.executable, __file__, "--place", str(place), "--run"]

    def kasa(name: str, result: Path, is_new: bool = True) -> Usage:
        store = place / f"{name}-store"
        if is_new:
            shutil.rmtree(store, ignore_errors=True)
        given = [str(place / f"{name}-adapter"), "--into", str(place / name), "-o", str(result)]
        command = [sys.executable, "-m", "kasa_cli", "merge", *given, "--workers", str(workers)]
        return measured([*command, "--store", str(store), "-q", "--json"], output=place / f"{name}.json")

    found = {
        COPY: lambda: measured([*this, "synced"]),
        FAST_COPY: lambda: measured([*this, "copy"]),
        FIRST: lambda: kasa("model", place / OUTPUTS[FIRST]),
        KASA: lambda: kasa("model", place / OUTPUTS[KASA], is_new=False),
        HALF: lambda: kasa("half", place / OUTPUTS[HALF]),
    }
    return found if arguments.without_peft else {**found, PEFT: lambda: measured([*this, "peft"], workers)}


RUNS: dict[str, Callable[[Path], None]] = {
    "copy": lambda place: copy(place / "model", place / OUTPUTS[FAST_COPY], False),
    "synced": lambda place: copy(place / "model", place / OUTPUTS[COPY], True),
    "peft": lambda place: peft(place / "model", place / "model-adapter", place / OUTPUTS[PEFT]),
    "check": lambda place: check(place / "model", place / OUTPUTS[KASA], place / OUTPUTS[PEFT]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the median counts")
    parser.add_argument(
        "--cold", action="store_true", help="drop the input from the page cache before each run"
    )
    parser.add_argument("--without-peft", action="store_true", help="only kasa and the copies")
    parser.add_argument("--dir", type=Path, help="where to work: the disk to be measured; default: TMPDIR")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--run", choices=("make", *RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run == "make":
        make(arguments.place, arguments)
    elif arguments.run:
        RUNS[arguments.run](arguments.place)
    elif arguments.layers < 2:
        parser.error("half of the layers are merged, too: give two at least")
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="kasa-bench-", dir=arguments.dir) as name:
        place = Path(name)
        options = [f"--{flag}={getattr(arguments, flag)}" for flag in ("width", "layers", "dtype", "rank")]
        options += ["--dora"] if arguments.dora else []
        measured([sys.executable, __file__, "--place", name, "--run", "make", *options])
        size, half_size = (num_bytes(place / name) for name in ("model", "half"))
        shape = f"width {arguments.width}, {arguments.layers} layers, {arguments.dtype}, {gib(size)}"
        kind = "DoRA" if arguments.dora else "LoRA"
        print(f"Llama-shaped, {shape}; {kind} of rank {arguments.rank} on all linear weights", flush=True)
        runs = rounds(place, contenders(place, arguments), arguments.repeat, arguments.cold)
        figures = {who: middle(usages) for who, usages in runs.items()}
        show(figures)
        conclude(figures, size, half_size)
        if not arguments.without_peft:
            measured([sys.executable, __file__, "--place", name, "--run", "check"], output=place / "check")
            print((place / "check").read_text(), end="")
    if arguments.json:
        each = {who: [usage.seconds for usage in usages] for who, usages in runs.items()}
        found = {who: {**vars(usage), "each": each[who]} for who, usage in figures.items()}
        arguments.json.write_text(json.dumps(found, indent=1))


def rounds(
    place: Path, who: dict[str, Callable[[], Usage]], repeat: int, is_cold: bool
) -> dict[str, list[Usage]]:
    """Every contender in turn, and again: what is slow for a while is slow for all.

    Memory that was just given back is faster to get again, so each round begins with another one, and every other
    round goes the other way.
    """
    runs: dict[str, list[Usage]] = {name: [] for name in who}
    for turn in range(repeat):
        first = turn % len(who)
        for name in [*who, *who][first : first + len(who)][:: -1 if turn % 2 else 1]:
            prepare(place, name, is_cold)
            runs[name].append(who[name]())
    return runs


def prepare(place: Path, name: str, is_cold: bool) -> None:
    """No output of that name, nothing of anyone else's left to write, in the page cache its input alone, or nothing.

    Memory that holds other files would have to be cleared first, in one run more than in another.
    """
    for folder in (place / OUTPUTS[name], place / OUTPUTS[COPY]):
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    wanted = () if is_cold else INPUTS["half" if name == HALF else "model"]
    for file in sorted(path for path in place.glob("*/*") if path.is_file()):
        with file.open("rb", buffering=0) as opened:
            if file.parent.name not in wanted:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.parent.name in wanted and opened.read(CHUNK):
                pass


def middle(usages: list[Usage]) -> Usage:
    """The run of median wall time."""
    median = statistics.median_low(usage.seconds for usage in usages)
    return next(usage for usage in usages if usage.seconds == median)


def conclude(figures: dict[str, Usage], size: int, half_size: int) -> None:
    kasa, half, first = figures[KASA], figures[HALF], figures[FIRST]
    for who in (KASA, FIRST):
        ratios = [f"{figures[who].seconds / figures[one].seconds:.2f} x {one}" for one in (COPY, FAST_COPY)]
        print(f"wall of {who}: {'; '.join(ratios)}")
    further = (first.seconds - half.seconds) / (size - half_size) * 2**30
    print(
        f"a further GiB takes {further:.1f} s, to copy and sync one {figures[COPY].seconds / size * 2**30:.1f} s"
    )
    print(
        f"peak memory of kasa: {gib(kasa.peak_bytes)}, of half the layers {gib(half.peak_bytes)}, files {gib(size)}"
    )


def check(base: Path, ours: Path, theirs: Path) -> None:
    """The embedding and the first and last layers of both merges: equal but for rounding, and not the base."""
    import torch

    tensors = [tensors_of(folder) for folder in (ours, theirs, base)]
    layers = sorted({name.split(".")[2] for name in tensors[2] if ".layers." in name}, key=int)
    parts = ("model.embed_tokens.", *(f"model.layers.{layer}." for layer in (layers[0], layers[-1])))
    names = [name for name in tensors[2] if name.startswith(parts)]
    differing = entries = 0
    furthest = update = 0.0
    for name in names:
        a, b, before = (found[name]() for found in tensors)
        difference, largest = (a.double() - b.double()).abs(), float(b.abs().max())
        allowed = torch.finfo(b.dtype).eps * b.double().abs() + 1e-6 * largest
        if a.dtype != b.dtype or bool((difference > allowed).any()):
            raise SystemExit(f"kasa and PEFT disagree on {name}")
        differing, entries = differing + int((difference > 0).sum()), entries + a.numel()
        furthest = max(furthest, float(difference.max()) / largest)
        update = max(update, float((b.double() - before.double()).abs().max()) / largest)
    print(
        f"{len(names)} tensors of kasa and PEFT compared: {100 * differing / entries:.4f} % of the entries differ,"
        f" by {furthest:.1e} of the largest at most; the update is {update:.1e} of it"
    )


def tensors_of(folder: Path) -> dict[str, Callable]:
    """How to read each tensor of a model."""
    from safetensors import safe_open

    opened = [safe_open(file, "pt") for file in shards(folder)]
    return {name: (lambda f=f, n=name: f.get_tensor(n)) for f in opened for name in f.keys()}  # noqa: SIM118


if __name__ == "__main__":
    main()
