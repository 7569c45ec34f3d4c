"""Whole processes, measured by the operating system: wall and processor seconds, peak resident memory."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measured(command: Sequence[str], threads: int | None = None, output: Path | None = None) -> Usage:
    """Run a command to its end, output to stderr or a file; what it used."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if threads:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    begun = time.perf_counter()
    with output.open("wb") if output else nullcontext(sys.stderr) as out:
        process = subprocess.Popen(command, env=environment, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - begun
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def llama_shaped(folder: Path, width: int, layers: int) -> Path:
    """A checkpoint, made by a process of its own: whoever is measured next begins with the memory of this one."""
    maker = Path(__file__).with_name("llama_shaped.py")
    measured([sys.executable, str(maker), str(folder), str(width), str(layers)])
    return folder


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def show(figures: Mapping[str, Usage]) -> None:
    """One row a contender, with its figures over those of kasa, the one called so."""
    ours = figures["kasa"]
    width = max(map(len, figures)) + 1
    print(
        f"{'':{width}} {'wall':>9} {'processor':>10} {'peak memory':>12}   against kasa: wall, processor, memory"
    )
    for name, one in figures.items():
        ratios = (
            one.seconds / ours.seconds,
            one.cpu_seconds / ours.cpu_seconds,
            one.peak_bytes / ours.peak_bytes,
        )
        row = f"{name:{width}} {one.seconds:7.1f} s {one.cpu_seconds:8.1f} s {gib(one.peak_bytes):>12}"
        print(f"{row}   {' '.join(f'{ratio:6.2f} x' for ratio in ratios)}")
