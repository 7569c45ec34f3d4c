"""The contract of the command line: exit codes, one line per error, stdout and stderr, and --help."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import kasa_cli
from kasa_cli import __version__
from kasa_cli.errors import ExitCode
from kasa_cli.files.staging import Staging
from kasa_cli.methods.criteria import CRITERIA
from kasa_cli.targets.trainer_configs import FORMATS as FORMATS_OF_HAND_OFF
from tests.builders.checkpoints import plain_model
from tests.builders.faults import write_index
from tests.builders.folders import tree_hash
from tests.builders.runs import environment, inside, outside

Q0 = "model.layers.0.self_attn.q_proj"
EVIL = "\x1b]52;c;cm0gLXJm\x07\x1b[2J[red]x[/red]\u202egnp\x9b31m\r"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
OPTIONS = """
--revision --cache-dir --local-files-only --output-dir -o --overwrite --restart --format --json --quiet -q
--verbose -v --target --exclude --targets-from --config --workers --threads-per-worker --device --seed --dry-run
--rank -r --truncation-rank --alpha --use-rslora --emit --dtype --rounding --min-realised --strict --diag-init
--beta --gamma --compat --max-shard-size
"""
VERBS = ([], ["inspect"], ["store"], *(verb.split() for verb in kasa_cli.VERBS))


COMMON = "--target --exclude --targets-from --workers --store --no-store --keep-going --json --format"
MORE_OPTIONS = {
    "verify": "--read-data --against",
    "select-targets": f"{COMMON} --dry-run --config --top-p --num-modules --threshold --criterion --prefer --rule"
    " --max-dim --per-type --shape-fair --match-budget --compare --emit --output",
    "inspect spectrum": f"{COMMON} --dry-run --config --html --png --values --overwrite",
    "inspect adapter": "--base --base-is --revision --workers --store --no-store --json --format",
    "inspect diff": f"{COMMON} --rank --revision-b",
    "merge": "--into --weight --base-is --force-base --untie --dry-run --dtype --rounding --max-shard-size"
    " --overwrite --restart",
    "convert": "--to --base --dry-run --on --names --rank --energy --pad-rank --base-is --force-base"
    " --overwrite --restart --json --workers --store --no-store --revision --cache-dir --config",
    "store prune": "--max-size --older-than --all --dry-run",
}


def poison(model):
    """Write a NaN at the end of the last weight of the file."""
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\xc0\x7f")


# --- exit codes, in new processes ---


def unwritable(model, place):
    place.mkdir(mode=0o555)
    if os.getuid() == 0:  # root may write anywhere unless it drops that capability
        if not shutil.which("setpriv"):
            pytest.skip("setpriv is not installed")
        bounds = (
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-dac_override,-dac_read_search",
        )
        return {"prefix": ("setpriv", *bounds)}
    return {}


def small_files(model, place):
    place.mkdir()
    return {"prefix": ("sh", "-c", 'ulimit -f 8; exec "$@"', "sh")}


def only_pickle(model, place):
    place.mkdir()
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def traversing(model, place):
    place.mkdir()
    (model / "model.safetensors").rename(model.parent / "secret.safetensors")
    write_index(model, {f"{Q0}.weight": "../secret.safetensors"})


def corrupt(model, place):
    place.mkdir()
    os.truncate(model / "model.safetensors", 5000)


def not_a_number(model, place):
    place.mkdir()
    poison(model)


def published(model, place):
    (place / "OUT").mkdir(parents=True)
    (place / "OUT" / "mine").write_text("")


def unreachable(model, place):
    place.mkdir()
    return {"model": "org/nowhere", "env": {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place)}}


@pytest.mark.parametrize(
    ("prepare", "code", "said"),
    [
        (corrupt, ExitCode.INVALID, r"truncated: .*model\.safetensors: download it again"),
        (only_pickle, ExitCode.UNSAFE, r"pickle.*pytorch_model\.bin.*convert"),
        (traversing, ExitCode.UNSAFE, r"'\.\./secret\.safetensors'.*index\.json"),
        (published, ExitCode.EXISTS, r"output exists.*OUT"),
        (unwritable, ExitCode.RESOURCE, r"Permission denied.*OUT.*permissions"),
        (small_files, ExitCode.RESOURCE, r"File too large.*ulimit"),
        (not_a_number, ExitCode.NUMERIC, r"model\.layers\.\d\.\w+\.\w+\.weight"),
        (unreachable, ExitCode.NETWORK, r"org/nowhere"),
    ],
)
def test_exit_codes_of_a_refused_run(copy, tmp_path, prepare, code, said):
    place = tmp_path / "place"
    setting = prepare(copy, place) or {}
    before, beside = tree_hash(copy), sorted(path.name for path in tmp_path.iterdir())
    done = outside("truncate", setting.pop("model", copy), "-o", place / "OUT", "-r", 2, "--json", **setting)
    assert (done.code, done.out) == (code, ""), done.err
    assert re.fullmatch(rf"kasa: [^\n]*{said}[^\n]*\n", done.err), done.err
    assert tree_hash(copy) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == beside
    assert not (place / "OUT" / "kasa.manifest.json").exists()
    if code == ExitCode.RESOURCE and prepare is small_files:  # finished parts are kept
        assert outside("truncate", copy, "-o", place / "OUT", "-r", 2, "--json").json["totals"]


def test_a_run_below_the_standard_exits_with_11_and_is_complete(tmp_path, capsys):
    model = plain_model(tmp_path / "model", dim=64, dtype=torch.bfloat16)
    strict = ("--strict", "--min-realised", 0.999)
    done = outside("truncate", model, "-o", tmp_path / "OUT", "-r", 1, "--json", *strict)
    assert done.code == ExitCode.BELOW_STANDARD
    assert done.json["totals"]["below_min_realised"] > 0
    assert inside(capsys, "verify", tmp_path / "OUT", "--read-data").code == 0
    loose = inside(capsys, "truncate", model, "-o", tmp_path / "O2", "-r", 1, "--json", *strict[1:])
    assert loose.code == 0


def test_an_output_that_another_run_holds_is_7(model, tmp_path, capsys):
    with Staging(tmp_path / "OUT", fingerprint={"job": 1}):
        begun = time.monotonic()
        done = inside(capsys, "truncate", model, "-o", tmp_path / "OUT", "-r", 2)
        assert time.monotonic() - begun < 1
    assert (done.code, done.out) == (ExitCode.LOCKED, "")
    assert f"pid {os.getpid()}" in done.err


BAD = [
    ([], "Missing command"),
    (["nonsense"], "nonsense"),
    (["truncate"], "MODEL"),
    (["truncate", "model"], "--output-dir"),
    (["truncate", "model", "-o", "out", "--frobnicate"], "--frobnicate"),
    (["truncate", "model", "-o", "out", "--token", "x"], "--token"),
    (["truncate", "model", "-o", "out", "-r", "many"], "--rank"),
    (["truncate", "model", "-o", "out", "-r", "0"], "--rank"),
    (["truncate", "model", "-o", "out", "--truncation-rank", "-1"], "--truncation-rank"),
    (["truncate", "model", "-o", "out", "--dtype", "int8"], "'float16'"),
    (["truncate", "model", "-o", "out", "--beta", "nan"], "--beta"),
    (["truncate", "model", "-o", "out", "--gamma", "inf"], "--gamma"),
    (["truncate", "model", "-o", "out", "--min-realised", "nan"], "--min-realised"),
    (["truncate", "model", "-o", "out", "--max-shard-size", "big"], "such as 5GB"),
    (["truncate", "model", "-o", "out", "--max-shard-size", "0GB"], "such as 5GB"),
    (["truncate", "model", "-o", "out", "--workers", "-1"], "--workers"),
    (["truncate", "model", "-o", "out", "--threads-per-worker", "0"], "--threads-per-worker"),
    (["truncate", "../a/b/c", "-o", "out"], "not a Hub id"),
    (["truncate", "MODEL", "-o", "out", "--alpha", "nan"], "alpha"),
    (["truncate", "MODEL", "-o", "out", "--emit", "base,tall"], "'tall': known: base, adapter, tail"),
    (["truncate", "MODEL", "-o", "out", "--target", "q_prj"], "near names: q_proj"),
    (["truncate", "MODEL", "-o", "out", "-r", "16"], "model.layers.0.mlp.down_proj.weight"),
    (["truncate", "MODEL", "-o", "out", "-r", "2", "--device", "abacus"], "abacus"),
    (["truncate", f"MODEL{EVIL}", "-o", "out"], "not a Hub id"),
    (["truncate", "model", "-o", "out", "--device", "cpu", f"--{EVIL}"], "No such option"),
    (["verify", "out", "out"], "out"),
    (["verify", "out", "--workers", "-1"], "--workers"),
    (["verify", "out", "--format", "xml"], "'json'"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=lambda value: str(value)[-24:])
def test_what_cannot_be_asked_for_is_2_in_one_line(model, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    arguments = [str(model) if argument == "MODEL" else argument for argument in arguments]
    done = inside(capsys, *arguments)
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert re.fullmatch(r"kasa: .+\n", done.err) and said in done.err
    assert not RAW.search(done.err.rstrip("\n"))
    assert not list(tmp_path.iterdir())
    assert done.err.count(": ") >= 2  # what, where or what to do


def test_the_program_itself_refuses_and_answers():
    assert outside("truncate", "--nonsense").code == ExitCode.USAGE
    assert outside("--version") == (0, f"kasa {__version__}\n", "")


def test_a_traceback_is_shown_when_asked_for_and_never_else(copy, tmp_path, monkeypatch, capsys):
    corrupt(copy, tmp_path / "place")
    for flags in ((), ("-q",), ("--json",)):
        assert "Traceback" not in inside(capsys, "truncate", copy, "-o", tmp_path / "OUT", *flags).err
    for flag in ("-v", "--verbose", "-qv"):
        shown = inside(capsys, "truncate", copy, "-o", tmp_path / "OUT", flag)
        assert shown.err.startswith("Traceback") and shown.err.splitlines()[-1].startswith("kasa: truncated")
        assert shown.out == ""

    def bug(*_, **__):
        raise RuntimeError(EVIL)

    monkeypatch.setattr(kasa_cli, "verify", bug, raising=False)
    for flags, is_long in (((), False), (("-v",), True)):
        done = inside(capsys, "verify", "out", *flags)
        assert (done.code, done.out, "Traceback" in done.err) == (ExitCode.INTERNAL, "", is_long)
        assert done.err.splitlines()[-1].startswith("kasa: internal error: RuntimeError")
        assert not RAW.search(done.err.replace("\n", ""))


# --- help ---


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_answers_at_once_without_torch(verb):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kasa_cli", *verb, "--help"],
        env=environment(COLUMNS="200"),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    heavy = {
        "torch",
        "transformers",
        "safetensors",
        "scipy",
        "numpy",
        "huggingface_hub",
        "yaml",
        "rich_toolkit",
        "altair",
        "vl_convert",
    }
    assert not imported & heavy
    assert "kasa_cli" in imported
    assert not re.search(r"--token|--allow-pickle|--trust-remote-code", done.stdout)


def test_help_lists_every_option_of_the_contract_and_every_verb(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    listed = inside(capsys, "truncate", "--help").out
    for option in re.findall(r"\S+", OPTIONS):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", listed), option
    for default in ("[default: 16]", "0.9", "base,adapter,tail", "randn|ones|residual", "auto|float32"):
        assert default in listed, default
    verbs = inside(capsys, "--help").out
    assert set(re.findall(r"^│ ([a-z][a-z-]*)  ", verbs, re.M)) == {verb[0] for verb in VERBS if verb}
    for verb, options in MORE_OPTIONS.items():
        assert set(options.split()) <= set(
            re.findall(r"--[a-z-]+", inside(capsys, *verb.split(), "--help").out)
        )
    offered = inside(capsys, "select-targets", "--help").out
    assert all(name in offered for name in (*CRITERIA, *FORMATS_OF_HAND_OFF))


def test_codes_of_the_contract():
    contract = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 130, 143}
    assert {int(code) for code in ExitCode} == contract
