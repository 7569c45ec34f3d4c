"""Presets: kasa's own presets work, flags take precedence, and an invalid preset is refused before anything runs."""

import re
from pathlib import Path

import pytest
import torch
import transformers as tf
import typer
import yaml

from kasa_cli.cli import app, flags
from kasa_cli.cli.presets import Option, load
from kasa_cli.errors import ExitCode, InvalidInput, UsageError
from kasa_cli.linalg.rounding import ROUNDINGS
from kasa_cli.methods import kasa
from kasa_cli.methods.criteria import CRITERIA, RULES
from kasa_cli.methods.selection import SIGNS
from kasa_cli.pipeline.adapter_on_base.provenance import BASES
from kasa_cli.pipeline.truncating import options
from kasa_cli.pipeline.truncating import run as verb
from kasa_cli.render.formats import FORMATS
from kasa_cli.targets import trainer_configs
from tests.builders.checkpoints import plain_model
from tests.builders.runs import ROOT, inside

PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
DEFAULT = ROOT / "configs" / "default.yaml"
NOT_IN_PRESETS = {"model", "output_dir", "config", "verbose", "help"}
KNOWN = {"rank": Option("rank", False), "target": Option("target", True), "emit": Option("emit", False)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of the family that each preset is made for, with sides above the preset's rank."""
    folder = tmp_path_factory.mktemp("presets")
    sides = {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        roberta = tf.RobertaConfig(**sides, vocab_size=32, max_position_embeddings=16, pad_token_id=1)
        tf.RobertaForSequenceClassification(roberta).save_pretrained(folder / "roberta")
        tf.LlamaForCausalLM(tf.LlamaConfig(**sides, vocab_size=32)).save_pretrained(folder / "llama")
    return {
        "default": folder / "llama",
        "kasa-glue-roberta": folder / "roberta",
        "kasa-commonsense-llama": folder / "llama",
    }


@pytest.fixture
def preset(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "preset.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.fixture
def model(tmp_path):
    return plain_model(tmp_path / "model")


@pytest.fixture
def asked(monkeypatch, capsys):
    """The arguments with which a command line calls its command; nothing runs."""
    heard = {}

    def listen(where, options, *_):
        heard.update(where=where, options=options)
        raise UsageError("heard")

    monkeypatch.setattr(verb, "plan", listen)
    monkeypatch.setattr(verb, "truncate", lambda where, output, *rest: listen(where, *rest))

    def ask(*arguments: object) -> dict:
        heard.clear()
        done = inside(capsys, "truncate", "model", "-o", "out", *arguments)
        assert done.err == "kasa: heard\n", done.err
        return dict(heard)

    return ask


# --- presets that come with kasa ---


def test_every_preset_is_tested(models):
    assert {path.stem for path in PRESETS} == models.keys()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_plans_on_a_model_of_its_family(models, path, capsys):
    done = inside(capsys, "truncate", models[path.stem], "-o", "out", "--dry-run", "--json", "--config", path)
    assert done.code == 0, done.err
    wanted = yaml.safe_load(path.read_text())
    plan = done.json
    assert (plan["rank"], plan["truncation_rank"]) == (
        wanted["rank"],
        wanted["truncation_rank"] or wanted["rank"],
    )
    ends = {target["module"].rsplit(".", 1)[1] for target in plan["tensors"]}
    assert not wanted["target"] or ends == set(wanted["target"])
    assert all(target["dropped"] == plan["truncation_rank"] for target in plan["tensors"])


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_values_of_a_preset_arrive(asked, path):
    wanted, options = yaml.safe_load(path.read_text()), asked("--config", path)["options"]
    assert (options.rank, options.dropped) == (wanted["rank"], wanted["truncation_rank"] or wanted["rank"])
    assert options.lora_alpha == (wanted["alpha"] or 2 * wanted["rank"])
    assert (options.beta, options.gamma) == (float(wanted["beta"]), float(wanted["gamma"]))
    assert options.patterns.targets == tuple(wanted["target"])
    assert options.compat == wanted["compat"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_note_on_the_published_rule_is_there(path):
    assert re.search("compat: reference|reference: the published", path.read_text())


def test_the_defaults_spelled_out_are_the_defaults(asked):
    assert asked("--config", DEFAULT) == asked()
    assert asked("--config", DEFAULT, "--dry-run") == asked("--dry-run")
    assert asked()["options"] == verb.TruncateRequest()


def test_the_defaults_spelled_out_are_complete_and_explained():
    command = typer.main.get_command(app.app).commands["truncate"]
    names = {
        option.lstrip("-").replace("-", "_") for parameter in command.params for option in parameter.opts[:1]
    }
    assert yaml.safe_load(DEFAULT.read_text()).keys() == names - NOT_IN_PRESETS
    lines = [line for line in DEFAULT.read_text().splitlines() if re.match("[a-z]", line)]
    assert [line for line in lines if "#" not in line] == ["emit: [base, adapter, tail]"]


# --- any preset ---


def test_flags_win(asked, preset):
    path = preset("rank: 4\nalpha: 5\ntarget: [q_proj, up_proj]\nuse-rslora: true\nemit: [base, tail]\n")
    alone, beside = (
        asked("--config", path)["options"],
        asked("-r", 6, "--target", "v", "--config", path)["options"],
    )
    assert (alone.rank, alone.alpha, alone.use_rslora, alone.emit) == (4, 5, True, ("base", "tail"))
    assert (beside.rank, beside.alpha) == (6, 5)
    assert (alone.patterns.targets, beside.patterns.targets) == (("q_proj", "up_proj"), ("v",))


def test_a_preset_may_be_short_and_ask_for_json(model, preset, capsys):
    done = inside(
        capsys, "truncate", model, "-o", "out", "--config", preset("format: json\ndry_run: yes\nrank: 3\n")
    )
    assert done.json["rank"] == 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rank: 8", {"rank": "8"}),
        ("target: q_proj", {"target": ["q_proj"]}),
        ("target: [a, b]", {"target": ["a", "b"]}),
        ("target: []", {"target": []}),
        ("emit: [base, tail]", {"emit": "base,tail"}),
        ("rank: null\nemit: ~\ntarget:", {}),
        ("rank: 1e-4", {"rank": "1e-4"}),
        ("rank: 010", {"rank": "010"}),
        ("rank: 2024-13-45", {"rank": "2024-13-45"}),
        ("{}", {}),
    ],
)
def test_a_value_is_taken_as_it_is_spelled(preset, text, found):
    assert load(preset(text), KNOWN) == found


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("rnk: 8", UsageError, "'rnk'.*line 1: did you mean rank?"),
        ("rank: 8\nqqqqqq: 8", UsageError, "'qqqqqq'.*line 2: known: emit, rank, target"),
        ("rank: 8\nrank: 8", UsageError, "twice.*line 2"),
        ("rank: [8", InvalidInput, "not YAML"),
        ("\t", InvalidInput, "not YAML"),
        ("a: b: c", InvalidInput, "not YAML"),
        ("rank: 8\n---\nrank: 9", InvalidInput, "not YAML"),
        (b"\xff\xfe\x00", InvalidInput, "not YAML"),
        ("[" * 100_000, InvalidInput, "nested too deep"),
        ("#" * 2_000_000, InvalidInput, "too large"),
        ("", InvalidInput, "not a map"),
        ("[rank]", InvalidInput, "not a map"),
        ("8", InvalidInput, "not a map"),
        ("? [a]\n: 8", InvalidInput, "not the name of an option"),
        ("rank: {a: 8}", InvalidInput, "neither a value nor a list"),
        ("target: [[a]]", InvalidInput, "neither a value nor a list"),
        ("target: &a [*a]", InvalidInput, "neither a value nor a list"),
        ("model: x", UsageError, "unknown option 'model'"),
    ],
)
def test_a_bad_preset_is_refused_and_the_place_is_named(preset, text, error, said):
    path = preset(text)
    with pytest.raises(error, match=said) as caught:
        load(path, KNOWN)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("rnk: 8", ExitCode.USAGE, "did you mean rank?"),
        ("trunc_rank: 8", ExitCode.USAGE, "did you mean truncation_rank?"),
        ("config: other.yaml", ExitCode.USAGE, "unknown option 'config'"),
        ("rank: 8.5", ExitCode.USAGE, "'--rank'"),
        ("rank: true", ExitCode.USAGE, "'--rank'"),
        ("rank: [8, 16]", ExitCode.USAGE, "'--rank'"),
        ("rounding: up", ExitCode.USAGE, "'nearest', 'preserve'"),
        ("use_rslora: perhaps", ExitCode.USAGE, "'--use-rslora'"),
        ("rank: [8", ExitCode.INVALID, "not YAML"),
    ],
)
def test_exit_codes(preset, model, capsys, text, code, said):
    done = inside(capsys, "truncate", model, "-o", "out", "--config", preset(text))
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert len(done.err.splitlines()) == 1
    assert inside(capsys, "truncate", model, "-o", "out", "--config", "nowhere.yaml").code == ExitCode.USAGE
    assert inside(capsys, "truncate", model, "-o", "out", "--config", "x" * 300).code == ExitCode.RESOURCE


@pytest.mark.parametrize(
    ("choice", "table"),
    [
        (flags.Dtype, options.DTYPES),
        (flags.RoundingName, ROUNDINGS),
        (flags.DiagInit, kasa.DIAG_INITS),
        (flags.Compat, kasa.COMPATS),
        (flags.Format, FORMATS),
        (flags.CriterionName, CRITERIA),
        (flags.Rule, RULES),
        (flags.End, SIGNS),
        (flags.EmitName, trainer_configs.FORMATS),
        (flags.BaseIs, BASES),
    ],
)
def test_the_choices_of_a_flag_are_the_rows_of_its_table(choice, table):
    assert {str(one) for one in choice} == set(table)
