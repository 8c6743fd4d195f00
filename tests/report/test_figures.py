"""Figures: named axes with units, honest marks, absence with a reason, no global state."""

import sys

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from lmleak.report.drawing import encode
from lmleak.report.figures import FIGURES, agreement_figure, layer_figure, missing, noise_figure


def labels(figure):
    return [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel()) if text]


def curve(axes, label):
    line = next(line for line in axes.get_lines() if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


def test_every_axis_is_named_with_its_unit(synthetic_rows):
    for name, draw in FIGURES.items():
        figure = draw(synthetic_rows(3))
        assert isinstance(figure, Figure), name
        assert labels(figure), name
        for label in labels(figure):
            assert "(" in label, label
            assert any(unit in label for unit in ("RMS", "share", "percent", "input units")), label


def test_noise_figure_draws_medians_and_means(synthetic_rows):
    rows = synthetic_rows(3, noise_levels=(0.1, 1.0, 10.0))
    left, right = noise_figure(rows).axes
    levels, medians = curve(left, "I2F of the noise drawn")
    assert levels == [0.1, 1.0, 10.0]
    middle = sorted(row["influence_rms"] for row in rows if row["noise_rms"] == 1.0)[1]
    assert medians[1] == pytest.approx(middle)
    scores = [row["attacks"]["span"]["rouge1"] for row in rows if row["noise_rms"] == 1.0]
    assert curve(right, "span: ROUGE-1")[1][1] == pytest.approx(sum(scores) / 3)


def test_undefended_gradient_stands_left_of_the_break(synthetic_rows):
    left, right = noise_figure(synthetic_rows(2, noise_levels=(0.1, 1.0))).axes
    assert "no\nnoise" in [tick.get_text() for tick in left.get_xticklabels()]
    lone = [line for line in right.get_lines() if len(line.get_xdata()) == 1]
    assert lone
    assert all(line.get_xdata()[0] < 0.1 for line in lone)
    without = noise_figure(synthetic_rows(2, noise_levels=(0.1, 1.0), defenses=())).axes[0]
    assert "no\nnoise" not in [tick.get_text() for tick in without.get_xticklabels()]


def test_undefended_gradient_keeps_its_place_when_the_sweep_was_refused(synthetic_rows):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    for row in rows:
        if row["noise_rms"] is not None:
            row["attacks"] = {"span": {"refused": "full rank"}}
    left, right = noise_figure(rows).axes
    smallest, largest = left.get_xlim()
    assert all(smallest < line.get_xdata()[0] < largest for line in right.get_lines())
    assert right.yaxis.get_visible()


def test_unconverged_levels_are_marked(synthetic_rows):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    assert not any("≥" in line.get_label() for line in noise_figure(rows).axes[0].get_lines())
    for row in rows:
        row["influence_converged"] = row["noise_rms"] != 1.0
    assert curve(noise_figure(rows).axes[0], "≥ : solve stopped early")[0] == [1.0]


def test_layer_bars_are_mean_shares_in_percent(synthetic_rows):
    rows = synthetic_rows(3)
    axes = layer_figure(rows).axes[0]
    clean = [row["layer_share"]["embeddings"] for row in rows if row["defense"] == "none"]
    assert axes.patches[0].get_width() == pytest.approx(100 * sum(clean) / 3)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(rows[0]["layer_share"])


def test_one_example_takes_the_standard_error_of_its_estimate(synthetic_rows):
    axes = layer_figure(synthetic_rows(1)).axes[0]
    segment = axes.collections[0].get_segments()[0]
    assert segment[1][0] - segment[0][0] == pytest.approx(4.0)  # two standard errors of 1 percent on either side


def test_agreement_leaves_out_what_has_no_place(synthetic_rows):
    rows = synthetic_rows(3)
    assert len(agreement_figure(rows).axes) == 2
    for row in rows:
        for attack in row["attacks"].values():
            attack["embedding_rmse"] = None
    assert len(agreement_figure(rows).axes) == 1


def test_absent_figures_have_a_reason(synthetic_rows):
    clean = synthetic_rows(2, noise_levels=(), defenses=(("none", 0.0),))
    assert noise_figure(clean) is None
    assert "No noise sweep" in missing("risk_versus_noise", clean)
    assert agreement_figure(clean) is None
    assert "zero by definition" in missing("agreement", clean)
    for row in clean:
        row["attacks"], row["layer_share"] = {"tag": {"refused": "no"}}, None
    assert "refused" in missing("agreement", clean)
    assert layer_figure(clean) is None
    assert "layers" in missing("layers", clean)
    for row in clean:
        row["attacks"] = {}
    assert "No attack" in missing("agreement", clean)


@pytest.mark.parametrize("field", ["influence_rms", "lower_bound_rms", "bayes_rms", "prior_std"])
def test_missing_predictions_leave_the_rest(field, synthetic_rows):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    for row in rows:
        row[field] = None
    assert noise_figure(rows) is not None


def test_a_sweep_without_numbers_is_absent(synthetic_rows):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    for row in rows:
        row |= {
            "influence_rms": None,
            "lower_bound_rms": float("nan"),
            "bayes_rms": 0.0,
            "predicted_rms": None,
            "attacks": {},
        }
    assert noise_figure(rows) is None
    assert "neither" in missing("risk_versus_noise", rows)


def test_constant_data_is_drawn(synthetic_rows):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    for row in rows:
        row |= {"influence_rms": 0.5, "lower_bound_rms": 0.5, "bayes_rms": 0.5}
        for attack in row["attacks"].values():
            attack |= {"rouge1": 0.0, "token_recall": 0.0, "embedding_rmse": 0.5}
    for draw in FIGURES.values():
        assert encode(draw(rows), "svg").startswith(b"<?xml")


def test_no_global_state_is_touched(synthetic_rows):
    before = dict(mpl.rcParams)
    encode(noise_figure(synthetic_rows(1)), "png")
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_the_same_rows_give_the_same_bytes(kind, synthetic_rows):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    assert encode(noise_figure(rows), kind) == encode(noise_figure(rows), kind)
