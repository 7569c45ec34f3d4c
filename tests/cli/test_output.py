"""Output: JSON as documented, no control characters, and progress only on a terminal."""

import io
import os
import pty
import re
import subprocess
import threading

import pytest
import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file

from kasa_cli.errors import ExitCode
from kasa_cli.render.progress import Live
from kasa_cli.report import Progress
from tests.builders.checkpoints import changed
from tests.builders.faults import st, tensor
from tests.builders.runs import TOKEN, command, environment, inside, outside

Q0 = "model.layers.0.self_attn.q_proj"
EVIL = "\x1b]52;c;cm0gLXJm\x07\x1b[2J[red]x[bold]\u202egnp\x9b31m"
MARKUP = "[red]x[/bold] [link=file:///etc]"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
REPORT = "command model rank truncation_rank alpha dtype rounding tensors skipped totals output"
REPORT_ADDS = " compat notes model_class"
TENSOR = (
    "name module shape dtype sigma_max sigma_min kappa sigma_cut sigma_next dropped_energy relative_error "
    "realised changed_fraction solver residual"
)
TENSOR_ADDS = " stored_dtype truncation_rank rounding_error is_tied"


def shown(done):
    return done.out + done.err


# --- JSON ---


def test_the_report_has_the_fields_of_the_contract(model, tmp_path, capsys):
    done = inside(capsys, "truncate", model, "-o", tmp_path / "OUT", "-r", 3, "--seed", 1, "--json")
    report = done.json
    assert done.code == 0
    assert report.keys() == set((REPORT + REPORT_ADDS).split())
    assert (report["command"], report["model"], report["rank"], report["alpha"]) == (
        "truncate",
        str(model),
        3,
        6,
    )
    assert (report["dtype"], report["rounding"]) == ("auto", "nearest")
    assert report["skipped"] == [
        {"name": "model.embed_tokens.weight", "reason": report["skipped"][0]["reason"]}
    ]
    assert len(report["tensors"]) == 8
    weights = load_file(model / "model.safetensors")
    stored = load_file(tmp_path / "OUT" / "base" / "model.safetensors")
    for row in report["tensors"]:
        assert row.keys() == set((TENSOR + TENSOR_ADDS).split())
        W, Q = weights[row["name"]].double(), stored[row["name"]].double()
        _, S, Vh = torch.linalg.svd(W)
        wanted = {
            "sigma_max": S[0],
            "sigma_min": S[-1],
            "kappa": S[0] / S[-1],
            "sigma_cut": S[-3],
            "sigma_next": S[-4],
            "dropped_energy": S[-3:].square().sum() / S.square().sum(),
            "relative_error": (Q - W).norm() / W.norm(),
            "realised": 1 - (Q @ Vh[-3:].T).norm() / S[-3:].norm(),
            "changed_fraction": (Q != W).double().mean(),
        }
        assert row["name"] == f"{row['module']}.weight" and row["shape"] == [16, 16]
        assert {name: row[name] for name in wanted} == pytest.approx(
            {name: float(value) for name, value in wanted.items()}, rel=1e-6
        )


def test_json_stays_json_when_a_weight_is_singular_or_zero(model, tmp_path, capsys):
    singular = changed(
        model,
        tmp_path / "model",
        model__layers__0__self_attn__q_proj=torch.ones_like,
        model__layers__1__self_attn__q_proj=torch.zeros_like,
    )
    done = inside(capsys, "truncate", singular, "-o", tmp_path / "OUT", "-r", 3, "--json")
    rows = {row["module"]: row for row in done.json["tensors"]}
    row = rows[Q0]
    assert (row["kappa"], row["kappa_is"], row["sigma_min"], row["dropped_energy"]) == (None, "inf", 0.0, 0.0)
    assert rows["model.layers.1.self_attn.q_proj"]["kappa"] is None
    assert "kappa_is" not in rows["model.layers.0.mlp.up_proj"]
    assert inside(capsys, "verify", tmp_path / "OUT", "--read-data", "--against", singular, "--json").json


def test_short_and_long_spelling_of_json_agree_and_verify_has_its_fields(model, tmp_path, capsys):
    for flag, name in (("--json", "A"), ("--format=json", "B")):
        done = inside(capsys, "truncate", model, "-o", tmp_path / name, "-r", 3, "--no-store", flag)
        (tmp_path / f"{name}.json").write_text(done.out.replace(str(tmp_path / name), "OUT"))
        assert done.out.startswith("{\n") and done.out.endswith("\n}\n")
    assert (tmp_path / "A.json").read_text() == (tmp_path / "B.json").read_text()
    report = inside(capsys, "verify", tmp_path / "A", "--json", "--against", model).json
    assert report.keys() == {"command", "output", "depth", "files", "tensors", "bytes_hashed", "compared"}
    assert {frozenset(one) for one in report["compared"]} == {frozenset({"name", "ulps", "tail_error"})}


# --- stdout and stderr ---


def test_notes_go_to_stderr_and_quiet_silences_them(model, tmp_path, capsys):
    loud = inside(capsys, "truncate", model, "-o", tmp_path / "A", "-r", 3, "--truncation-rank", 4)
    quiet = inside(capsys, "truncate", model, "-o", tmp_path / "B", "-r", 3, "--truncation-rank", 4, "-q")
    assert re.fullmatch(r"(note: .+\n)+", loud.err)
    assert "PEFT drops the 3 smallest" in loud.err and "note:" not in loud.out
    assert quiet.err == ""
    assert quiet.out.replace(str(tmp_path / "B"), "") == loud.out.replace(str(tmp_path / "A"), "")


def test_off_a_terminal_there_is_neither_progress_nor_colour(model, tmp_path):
    done = outside("truncate", model, "-o", tmp_path / "OUT", "-r", 3)
    assert done.code == 0
    assert not RAW.search(shown(done))
    assert all(line.startswith("note: ") for line in done.err.splitlines())


def on_a_terminal(*arguments, **env):
    """Both streams on a terminal of 200 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(*arguments),
        env=environment(TERM="xterm-256color", COLUMNS="200", **env),
        stdout=theirs,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
    )
    os.close(theirs)
    parts = []

    def drain():
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # the reader has closed the terminal
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    code = process.wait(120)
    reader.join(20)
    os.close(ours)
    return code, b"".join(parts).decode()


def test_a_terminal_shows_progress_and_no_name_is_obeyed(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "none-of-these"}')
    names = [f"layers.{n}.{MARKUP}.weight" for n in range(3)]
    header = {name: tensor(n * 1024, (n + 1) * 1024, (16, 16)) for n, name in enumerate(names)}
    st(model / "model.safetensors", header, torch.eye(16).mul(2).repeat(3, 1).numpy().tobytes())
    code, text = on_a_terminal("truncate", model, "-o", tmp_path / "OUT", "-r", "2", NO_COLOR="1")
    assert code == 0, text
    assert "measuring" in text and "writing base" in text
    assert MARKUP in text
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7]|38|48)(;[0-9;]*)?m", text)
    assert "\x1b]" not in text


def test_the_progress_line_shows_a_name_as_text():
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=200)
    with Live(console) as live:
        live(Progress("measure", 3))
        for done, name in enumerate((f"layers.0.{MARKUP}", f"layers.1.{EVIL}"), 1):
            live(Progress("measure", 3, done, done / 3, name))
            console.print(live._progress.get_renderable())
    plain = Text.from_ansi(drawn.getvalue()).plain
    assert "measuring" in plain and "2/3" in plain and MARKUP in plain
    assert "[2J[red]x[bold]" in plain and "\x1b]52" not in drawn.getvalue() and "\u202e" not in plain


def test_quiet_on_a_terminal_is_quiet(model, tmp_path):
    code, text = on_a_terminal("truncate", model, "-o", tmp_path / "OUT", "-r", "3", "-q", "--json")
    assert code == 0
    assert text.startswith("{\r\n") and text.endswith("}\r\n")
    assert not RAW.search(text.replace("\r\n", "\n"))


# --- hostile names ---


@pytest.mark.parametrize("spelling", ["table", "json", "csv", "md"])
def test_names_of_folders_never_reach_the_terminal_raw(copy, tmp_path, capsys, spelling):
    model, output = copy.rename(tmp_path / f"in{EVIL}"), tmp_path / f"out{EVIL}"
    for arguments, code in (
        (("truncate", model, "-o", output, "-r", 3, "--dry-run"), 0),
        (("truncate", model, "-o", output, "-r", 3), 0),
        (("truncate", model, "-o", output, "-r", 3, "-v"), ExitCode.EXISTS),
        (("verify", output, "--read-data", "--against", model), 0),
        (("verify", model, "-v"), ExitCode.INTEGRITY),
        (("truncate", tmp_path / f"no{EVIL}", "-o", output, "-v"), ExitCode.USAGE),
    ):
        done = inside(capsys, *arguments, "--format", spelling)
        assert done.code == code, done.err
        assert not RAW.search(shown(done)), arguments


def test_names_in_files_never_reach_the_terminal_raw(copy, tmp_path, capsys):
    (copy / "config.json").write_text(
        '{"model_type": "%s", "architectures": ["%s"]}' % ((r"\u001b[2J\u202e",) * 2)
    )
    done = inside(capsys, "truncate", copy, "-o", tmp_path / "OUT", "-r", 3)
    assert (done.code, bool(RAW.search(shown(done)))) == (0, False)
    assert r"\x1b" in done.err and "\\u202e" in done.err
    raw = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(raw.replace(b"embed_tokens", b"\\u001b]0;xyz"))
    done = inside(capsys, "truncate", copy, "-o", tmp_path / "O2", "-r", 3, "-v")
    assert (done.code, done.out, bool(RAW.search(done.err))) == (ExitCode.UNSAFE, "", False)
    (copy / "preset.yaml").write_text('"\\e[2J": 8')
    done = inside(capsys, "truncate", copy, "-o", tmp_path / "O3", "--config", copy / "preset.yaml")
    assert (done.code, done.out, bool(RAW.search(done.err))) == (ExitCode.USAGE, "", False)


def test_the_card_carries_no_markup_of_a_name(copy, tmp_path, capsys):
    (copy / "README.md").write_text("---\nlicense: 'x\n\n  <script>'\nbase_model: evil\n---\n<script>\n")
    assert inside(capsys, "truncate", copy, "-o", tmp_path / "OUT", "-r", 3).code == 0
    front = (tmp_path / "OUT" / "README.md").read_text().split("---")
    assert "evil" not in "".join(front) and "<script>" not in "".join(front[2:])


# --- the token, and plans ---


def test_a_token_turns_up_nowhere(copy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder, codes = tmp_path / "work", []
    for model, output in ((copy, "OUT"), (copy, "OUT"), (copy / "none", "NONE"), ("org/none", "HUB")):
        done = inside(capsys, "truncate", model, "-o", folder / output, "-r", 2, "-v")
        codes.append(done.code)
        assert TOKEN not in shown(done)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\xc0\x7f")
    done = inside(capsys, "truncate", copy, "-o", folder / "NAN", "-r", 2, "-v")
    assert [*codes, done.code] == [0, ExitCode.EXISTS, ExitCode.USAGE, ExitCode.NETWORK, ExitCode.NUMERIC]
    assert TOKEN not in shown(done)
    assert list(folder.glob("NAN.kasa-partial/job.json"))
    for path in folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_header_is_all_that_a_plan_reads(tmp_path, capsys):
    """64 GiB of holes: reading them would exceed the time limit of the test."""
    side = 1 << 17
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "none-of-these"}')
    header = {f"{Q0}.weight": tensor(0, 4 * side * side, (side, side))}
    st(model / "model.safetensors", header, sparse=4 * side * side)
    before = [(path, path.stat().st_mtime_ns) for path in (tmp_path, *sorted(tmp_path.rglob("*")))]
    plan = inside(capsys, "truncate", model, "-o", tmp_path / "OUT", "--dry-run", "--json").json
    assert plan["dry_run"] is True
    [row] = plan["tensors"]
    assert (row["name"], row["module"], row["shape"]) == (f"{Q0}.weight", Q0, [side, side])
    assert (row["dtype"], row["dropped"]) == ("F32", 16)
    assert plan["totals"]["bytes_to_write"] > 64 << 30
    assert plan["totals"]["memory_bytes"] > 128 << 30
    assert plan["totals"]["seconds"] > 1000
    assert plan["output"] == {"base": True, "adapter": True, "tail": True}
    table = inside(capsys, "truncate", model, "-o", tmp_path / "OUT", "--dry-run").out
    assert "drop 16" in table and "131072×131072" in table and "nothing was written" in table
    assert [(path, path.stat().st_mtime_ns) for path in (tmp_path, *sorted(tmp_path.rglob("*")))] == before


def test_a_plan_refuses_what_the_run_would(model, tmp_path, capsys):
    done = inside(capsys, "truncate", model, "-o", tmp_path / "OUT", "-r", 16, "--dry-run", "--json")
    assert (done.code, done.out) == (ExitCode.USAGE, "")


def test_paths_to_paste_are_quoted(copy, tmp_path, capsys):
    done = inside(capsys, "truncate", copy, "-o", tmp_path / 'a "b" $c', "-r", 3)
    assert f"kasa verify '{tmp_path}/a \"b\" $c' --read-data" in done.out
    assert f'from_pretrained(base, "{tmp_path}/a \\"b\\" $c/tail")' in done.out
