"""Model cards: which fields of an untrusted front matter are carried over, and names that must not break the card."""

import pytest
import yaml

from kasa_cli.checkpoint.model_card import card, source_facts

CARDS = {
    "no front matter": ("hello", {}),
    "a licence": (
        "---\nlicense: mit\nlicense_link: https://x\nother: 1\n---\n",
        {"license": "mit", "license_link": "https://x"},
    ),
    "not YAML": ("---\n: [\n---\n", {}),
    "a date that is none": ("---\nlicense: 2024-13-45\n---\n", {}),
    "nested beyond reason": (f"---\nlicense: {'[' * 5000}\n---\n", {}),
    "a list": ("---\n- license\n---\n", {}),
    "never closed": ("---", {}),
    "not UTF-8": (b"---\nlicense: \xff\n---\n", None),
}


@pytest.mark.parametrize(("text", "carried"), CARDS.values(), ids=CARDS)
def test_what_is_carried_over_from_a_card(tmp_path, text, carried):
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = source_facts(tmp_path, ("README.md",))
    assert carried is None or found == carried


def test_no_card_carries_nothing(tmp_path):
    assert source_facts(tmp_path, ()) == {}


def test_no_name_breaks_out_of_the_front_matter():
    text = card("x\n---\nlicense: mit", {}, "T", "B").decode()
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert front["base_model"] == "x\n---\nlicense: mit"
    assert "license" not in front
