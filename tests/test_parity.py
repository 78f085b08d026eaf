"""model.py computes what transformers computes: with the same weights, at odd sizes, with padding,
in gradients and in generated text."""

import csv
from pathlib import Path

import pytest

from benchmarks import parity

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", parity.CASES)
def test_parity(name):
    row = parity.measure(name)
    assert row["largest_logit"] > 3 and row["largest_gradient"] > 0.05  # something to compare
    assert row["logits"] < 1e-4 and row["padded"] < 1e-4 and row["gradients"] < 1e-3
    if name != "BertForMaskedLM":
        assert row["same_greedy_tokens"] == row["greedy_tokens"] == 400


def test_parity_of_a_real_encoder():
    assert parity.measure_minilm()["padded"] < 1e-4


def test_parity_sees_a_difference(monkeypatch):
    """A wrong epsilon in a norm, or another base of the rotary positions, does not pass."""
    for name, key, value in (
        ("GPT2LMHeadModel", "layer_norm_epsilon", 1e-3),
        ("Qwen2ForCausalLM, untied, 6 groups", "rope_theta", 2e4),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(parity.pretrained, "settings_of", changed(parity.pretrained.settings_of))
            build = parity.build
            patch.setattr(
                parity,
                "build",
                lambda settings, key=key, value=value, build=build: build(
                    wrong(settings, key, value)
                ),
            )
            assert parity.measure(name)["logits"] > 1e-3


def wrong(settings: dict, key: str, value) -> dict:
    return (
        {**settings, "rope_parameters": {"rope_type": "default", key: value}}
        if key == "rope_theta"
        else {**settings, key: value}
    )


def changed(settings_of):
    """settings_of, blind for what `wrong` changed."""

    def blind(config, name):
        config.layer_norm_epsilon = 1e-5
        if getattr(config, "rope_parameters", None):
            config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
        return settings_of(config, name)

    return blind


def test_readme_shows_the_measured_errors():
    with open(ROOT / "results" / "parity.csv", newline="") as file:
        assert parity.markdown(list(csv.DictReader(file))) in (ROOT / "docs/interop.md").read_text()
