"""What the tables of a layer-wise audit say of attacks on gradients with layers hidden."""

import re

from lmleak.report.layers_figures import mean_of, residual_curves, residual_panels
from lmleak.report.layers_tables import _attack_findings, _chance, protection_table


def row(hidden, outcome):
    left = {"nats": 99.6, "low": 0.5, "high": 120.0}
    return {"hidden": list(hidden), "latent": {"topic": left}, "original": {}, "attacks": {"gs": outcome}}


REFUSED = {"refused": "needs block 0"}
ATTACKED = {"rmse": 0.5, "rmse_low": 0.25, "rmse_high": 0.75, "examples": 8}
CURVES = {"first layers first": [(0, (), row((), ATTACKED)), (1, ("block 0",), row(("block 0",), REFUSED))]}


def test_attacks_say_over_how_many_examples_and_how_far_they_vary():
    assert mean_of([ATTACKED, REFUSED]) == "mean of 8 examples"
    assert mean_of([ATTACKED | {"examples": 1}]) == "mean of 1 example"
    assert mean_of([REFUSED]) == "cannot run"
    html = protection_table(CURVES)
    assert "<th>gs, mean of 8 examples</th>" in html
    assert "RMSE 0.5 <small>[0.25, 0.75]</small>" in html
    assert "<td>cannot run</td>" in html
    assert re.findall(r'<tr><td class="name">(.*?)</td>', html) == ["nothing", "block&nbsp;0"]
    assert "100 <small>[0.5, 120]</small>" in html


def test_a_panel_names_attack_and_number_of_examples():
    assert [panel.label for panel in residual_panels(CURVES)] == [
        "information left about topic (nats)", "error (model-input units, rms)\ngs, mean of 8 examples",
    ]  # fmt: skip
    labels = [axes.get_ylabel() for axes in residual_curves(CURVES).axes]
    assert labels == [panel.label for panel in residual_panels(CURVES)]


def test_too_few_shuffles_are_not_called_chance():
    assert _chance({"p_value": 0.1, "permutations": 9}) == (
        " The linear test cannot reject chance: the smallest possible p is 0.10 (permutations=9; write 19 or more)."
    )
    assert _chance({"p_value": 0.1, "permutations": 19}) == " The linear test does not tell it from chance (p = 0.10)."
    assert _chance({"p_value": 0.05, "permutations": 19}) == _chance({}) == ""


def test_several_layers_are_hidden_and_one_is():
    one = CURVES["first layers first"]
    assert "once block 0 is hidden" in _attack_findings(CURVES)[0]
    pair = ("embeddings", "block 0")
    two = {"first layers first": [one[0], (2, pair, row(pair, REFUSED))]}
    assert "once embeddings and block 0 are hidden" in _attack_findings(two)[0]
