"""The comparison of attacks: means, intervals, costs and pairs as their definitions say; table, csv and figure."""

import io

import pytest
from rich.console import Console

from lmleak.errors import DataError
from lmleak.metrics import bootstrap_mean, paired_bootstrap
from lmleak.report.comparison import (
    FEWEST_FOR_P,
    SCORES,
    compare,
    comparison_figure,
    comparison_table,
    refusal_lines,
)
from lmleak.report.drawing import encode


def row(attack, sample, value, *, size=1, model="m", defense="none", seconds=2.0) -> dict:
    scores = dict.fromkeys(SCORES, value)
    return {
        "key": f"{attack}{sample}", "model": model, "data": "embedded", "batch_size": size, "defense": defense,
        "sample": sample, "attack": attack, "gradient_seconds": 0.5, "seconds": seconds, "gradient_evaluations": 7,
        "peak_bytes": None, **scores,
    }  # fmt: skip


def refused(attack, sample, reason, **group) -> dict:
    kept = row(attack, sample, 0.0, **group)
    return {k: v for k, v in kept.items() if k not in (*SCORES, "seconds", "peak_bytes")} | {"refused": reason}


GOOD, BAD = [1.0, 0.9, 1.0, 0.8, 1.0, 0.7, 1.0], [0.1, 0.3, 0.0, 0.2, 0.4, 0.1, 0.6]


@pytest.fixture
def rows():
    return (
        [row("good", i, v) for i, v in enumerate(GOOD)]
        + [row("bad", i, v, seconds=1.0 + i) for i, v in enumerate(BAD)]
        + [refused("picky", i, "works on decoders") for i in range(7)]
        + [row("bad", 0, 0.5, size=2)]
    )


def test_means_intervals_and_costs(rows):
    good, bad, picky, alone = compare(rows, seed=3)
    expected = bootstrap_mean(BAD, seed=3)
    for name in SCORES:
        assert (bad[name], bad[f"{name}_low"], bad[f"{name}_high"]) == (expected.value, expected.low, expected.high)
    assert bad["gradients"] == 4.0 / 0.5  # the median of 1 ... 7 seconds
    assert bad["seconds"] == 4.0
    assert bad["gradient_evaluations"] == 7
    assert bad["peak_bytes"] is None
    assert good["samples"] == bad["samples"] == 7
    assert (picky["samples"], picky["refused"], picky["reason"]) == (0, 7, "works on decoders")
    assert picky["rougeL"] is None
    assert (alone["batch_size"], alone["rougeL"], alone["rougeL_low"], alone["best"]) == (2, 0.5, None, "bad")


def test_the_best_attack_is_compared_in_pairs(rows):
    good, bad, picky, _ = compare(rows, seed=3)
    assert good["best"] == bad["best"] == picky["best"] == "good"
    assert good["difference"] is picky["difference"] is None
    expected = paired_bootstrap(BAD, GOOD, seed=3)
    assert (bad["difference"], bad["difference_low"], bad["difference_high"], bad["p_value"]) == (
        expected.value, expected.low, expected.high, expected.p_value,
    )  # fmt: skip


def test_pairs_are_of_samples_that_both_could_attack():
    rows = [row("a", i, v) for i, v in enumerate([1.0, 0.0, 1.0])]
    rows += [row("b", 0, 0.5), refused("b", 1, "no"), row("b", 2, 0.3)]
    a, b = compare(rows)
    assert a["best"] == "a"
    assert b["difference"] == pytest.approx(((0.5 - 1) + (0.3 - 1)) / 2)
    assert (b["samples"], b["refused"]) == (2, 1)


def test_few_pairs_have_no_p_value():
    for count, has_p_value in ((FEWEST_FOR_P - 1, False), (FEWEST_FOR_P, True)):
        rows = [row(name, i, v) for name, v in (("a", 1.0), ("b", 0.0)) for i in range(count)]
        _, b = compare(rows)
        assert (b["p_value"] is not None) == has_p_value
        assert b["difference"] == -1


def test_a_group_in_which_nothing_ran_has_no_best():
    (entry,) = compare([refused("a", 0, "no")])
    assert (entry["best"], entry["difference"], entry["samples"]) == (None, None, 0)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        compare([])


def test_table_says_scores_and_refusals(rows):
    entries = compare(rows)
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(comparison_table(entries))
    text = console.export_text()
    assert "impossible" in text
    assert "best" in text
    assert f"24 ({100 * entries[1]['rouge1_low']:.0f}–{100 * entries[1]['rouge1_high']:.0f})" in text
    assert refusal_lines(entries) == ["impossible on 7 gradient(s): works on decoders"]


def test_figure_has_a_panel_per_model_and_defense_and_is_reproducible(rows):
    other = [r | {"model": "n"} for r in rows] + [row("good", 0, 1.0, defense="sign", model="n")]
    entries = compare(rows + other)
    figure = comparison_figure(entries)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [f"{m}, embedded, {d}" for d in ("none", "sign") for m in ("m", "n")]
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert words == ["impossible"] * 2  # "picky" under both models; what was not tried is left blank
    assert encode(figure, "png") == encode(comparison_figure(entries), "png")
