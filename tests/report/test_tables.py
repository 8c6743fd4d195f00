"""The summary's numbers: means, intervals, worst cases, verdict words, correlations, console table."""

import io
import math

import pytest
from rich.console import Console
from scipy.stats import spearmanr

from lmleak.errors import ConfigError
from lmleak.report.correlation import best_predictors, correlation_table, correlations
from lmleak.report.rows import PREDICTORS, compact, percent
from lmleak.report.tables import console_table, summarise
from lmleak.report.verdict import LITTLE, NOT_ATTACKED, risk_level


def intervals(value):
    """Yield every dictionary of the summary that has interval ends."""
    if isinstance(value, dict):
        if {"low", "high"} <= value.keys():
            yield value
        for entry in value.values():
            yield from intervals(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from intervals(entry)


def entry_of(summary, defense):
    return next(entry for entry in summary["defenses"] if entry["defense"] == defense)


def set_scores(rows, value, attack="span", metric="token_recall"):
    for row in rows:
        row["attacks"][attack][metric] = value
    return rows


def test_means_worst_and_order_of_interval_ends(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(6)
    summary = summarise(rows, synthetic_meta())
    topk = [row for row in rows if row["defense"].startswith("topk")]
    recalls = [row["attacks"]["span"]["token_recall"] for row in topk]
    found = entry_of(summary, topk[0]["defense"])["attacks"]["span"]["token_recall"]
    assert found["mean"] == pytest.approx(sum(recalls) / len(recalls))
    assert found["worst"] == max(recalls)
    assert recalls[found["worst_example"]] == max(recalls)
    errors = [row["attacks"]["span"]["embedding_rmse"] for row in topk]  # an error: the smallest leaks most
    assert entry_of(summary, topk[0]["defense"])["attacks"]["span"]["embedding_rmse"]["worst"] == min(errors)
    checked = 0
    for interval in intervals(summary):
        value = interval.get("mean", interval.get("value"))
        if interval["low"] is not None:
            assert interval["low"] <= value <= interval["high"]
            checked += 1
    assert checked > 250


def test_defenses_come_in_reading_order(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2, noise_levels=(10.0, 0.1, 1.0))
    names = [entry["defense"] for entry in summarise(list(reversed(rows)), synthetic_meta())["defenses"]]
    assert names[:2] == ["none", "topk(fraction=0.1)"]
    assert [name.split(",")[0] for name in names[2:]] == ["gaussian(std=0.1", "gaussian(std=1", "gaussian(std=10"]


def test_one_example_has_no_interval(synthetic_rows, synthetic_meta):
    summary = summarise(synthetic_rows(1, noise_levels=(0.1, 1.0, 10.0)), synthetic_meta())
    assert all(interval["low"] is None and interval["high"] is None for interval in intervals(summary))
    assert "one example, so no interval" in summary["verdict"]["sentence"]


def test_same_rows_and_seed_give_the_same_summary(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(3, noise_levels=(0.1, 1.0))
    assert summarise(rows, synthetic_meta(seed=3)) == summarise(rows, synthetic_meta(seed=3))


def test_correlation_equals_scipy_and_points_the_right_way(synthetic_rows):
    rows = synthetic_rows(6)
    sweep = [row for row in rows if row["noise_rms"] is not None]
    found = {(e["attack"], e["metric"], e["predictor"], e["scope"]): e for e in correlations(rows)}
    entry = found["span", "rouge1", "influence_rms", "all"]
    expected = spearmanr(
        [row["influence_rms"] for row in sweep], [row["attacks"]["span"]["rouge1"] for row in sweep]
    ).statistic
    assert entry["value"] == pytest.approx(expected, abs=1e-12)
    assert entry["points"] == len(sweep)
    assert entry["examples"] == 6
    assert entry["value"] < -0.8
    assert found["span", "embedding_rmse", "influence_rms", "all"]["value"] > 0.8


def test_same_noise_correlation_sees_examples_and_not_the_noise_level(synthetic_rows):
    rows = synthetic_rows(6, noise_levels=(0.01, 1.0, 100.0))
    for row in rows:  # the score follows the noise, and among examples it rises with the prediction: the wrong way
        row["attacks"]["span"]["rouge1"] = 1 / (1 + (row["noise_rms"] or 0)) + 1e-3 * math.log1p(row["influence_rms"])
    found = {e["scope"]: e for e in correlations(rows) if (e["attack"], e["metric"]) == ("span", "rouge1")
             and e["predictor"] == "influence_rms"}  # fmt: skip
    assert found["all"]["value"] < -0.7
    assert found["same noise"]["value"] == pytest.approx(1.0)


def test_the_prediction_that_ranks_best_wins(synthetic_rows):
    rows = synthetic_rows(8, noise_levels=(0.01, 1.0, 100.0))
    for i, row in enumerate(rows):
        truth = (row["noise_rms"] or 0) * (1 + row["example"])
        row["expected_rms"] = truth
        row["influence_rms"], row["lower_bound_rms"] = truth * (3 if i % 2 else 0.01), (i * 7) % 5 + 0.1
        row["predicted_rms"] = None if row["noise_rms"] is None else 1.0
        row["attacks"]["span"] |= {"rouge1": 1 / (1 + truth), "embedding_rmse": truth}
    found = {(b["attack"], b["metric"]): b for b in best_predictors(rows)}
    for metric in ("rouge1", "embedding_rmse"):  # one falls with the error, one rises with it
        assert found["span", metric]["predictor"] == "expected_rms"
        assert found["span", metric]["share"] > 0.95
        assert sum(found["span", metric]["shares"].values()) == pytest.approx(1)
    assert correlation_table(rows, {"seed": 0}).columns[-1].header == "best (resamples won)"


def test_constant_scores_have_a_reason_instead_of_a_correlation(synthetic_rows):
    entries = [e for e in correlations(set_scores(synthetic_rows(3), 0.5)) if e["metric"] == "token_recall"]
    constant = [entry for entry in entries if entry["attack"] == "span" and entry["scope"] == "all"]
    assert len(constant) == len(PREDICTORS)
    assert all(entry["value"] is None and entry["note"] == "constant score" for entry in constant)


@pytest.mark.parametrize(
    ("mean", "worst", "level"),
    [
        (1.0, 1.0, "everything leaks"),
        (0.9, 1.0, "everything leaks"),
        (0.89, 1.0, "most leaks"),
        (0.3, 0.4, "some leaks"),
        (0.02, 0.9, "some leaks"),  # one victim is a leak
        (0.0, 0.0, LITTLE),
        (None, None, NOT_ATTACKED),
    ],
)
def test_levels(mean, worst, level):
    assert risk_level(mean, worst) == level


def test_no_verdict_says_safe(synthetic_rows, synthetic_meta):
    rows = set_scores(set_scores(synthetic_rows(4), 0.0), 0.0, attack="matching")
    for verdict in summarise(rows, synthetic_meta())["verdict"]["per_defense"]:
        assert verdict["level"] == LITTLE
        assert "safe" not in verdict["sentence"].replace("no proof of safety", "")
        assert "a stronger attacker may recover more" in verdict["sentence"].lower()


def test_verdict_of_a_failed_attack_quotes_a_prediction_that_says_otherwise(synthetic_rows, synthetic_meta):
    rows = set_scores(set_scores(synthetic_rows(4), 0.0), 0.0, attack="matching")
    _, topk = summarise(rows, synthetic_meta())["verdict"]["per_defense"]
    assert "is predicted to miss by" in topk["sentence"]
    assert "of the inputs' spread" in topk["sentence"]


def test_verdict_of_a_full_leak_counts_the_texts(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(4, batch_size=3)
    for row in rows:
        row["attacks"]["span"] |= {"token_recall": 1.0, "exact_match": 1.0}
    verdict = summarise(rows, synthetic_meta(batch_size=3))["verdict"]
    assert verdict["level"] == "everything leaks"
    assert "12 of 12 texts word for word" in verdict["sentence"]
    assert verdict["per_defense"][0]["attack"] == "span"


def test_refused_and_absent_attacks(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(3)
    for row in rows:
        row["attacks"] = {"tag": {"refused": "needs the labels"}}
    refused = summarise(rows, synthetic_meta())
    assert refused["verdict"]["level"] == NOT_ATTACKED
    assert "needs the labels" in refused["verdict"]["sentence"]
    assert refused["defenses"][0]["refused"] == {"tag": {"count": 3, "reason": "needs the labels"}}
    for row in rows:
        row["attacks"] = {}
    assert "No attack was run on the undefended gradient" in summarise(rows, synthetic_meta())["verdict"]["sentence"]
    assert summarise([], synthetic_meta())["verdict"]["level"] == NOT_ATTACKED


def test_an_attack_refused_on_some_examples_says_so(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(4, defenses=(("none", 0.0),), noise_levels=())
    for row in rows[:1]:
        row["attacks"] = {"span": {"refused": "too many tokens"}, "matching": {"refused": "too many tokens"}}
    summary = summarise(rows, synthetic_meta())
    assert summary["defenses"][0]["attacks"]["span"]["token_recall"]["count"] == 3
    assert "on 1 more of the 4 examples it could not run" in summary["verdict"]["sentence"]


def test_strongest_attack_is_chosen_per_defense(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(3)
    for row in rows:
        row["attacks"]["span"]["token_recall"] = 0.9 if row["defense"] == "none" else 0.1
        row["attacks"]["matching"]["token_recall"] = 0.5
    chosen = {entry["defense"]: entry["strongest_attack"] for entry in summarise(rows, synthetic_meta())["defenses"]}
    assert chosen.pop("none") == "span"
    assert set(chosen.values()) == {"matching"}


def test_noise_marks_hold_at_every_larger_level(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0, 10.0, 100.0))
    recalls = {0.1: 0.05, 1.0: 0.5, 10.0: 0.05, 100.0: 0.0}  # the first dip does not count
    for row in rows:
        for attack in row["attacks"].values():
            attack["token_recall"] = recalls.get(row["noise_rms"], 1.0)
    marks = summarise(rows, synthetic_meta())["noise"]
    assert marks["attacks_below_a_tenth_from"] == 10.0
    assert marks["largest_tested"] == 100.0
    assert marks["predicted_nothing_left_from"] in {10.0, 100.0}


def test_unconverged_and_missing_numbers_are_counted_out(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(3, noise_levels=(1.0,))
    rows[0]["influence_rms"], rows[0]["influence_converged"] = float("nan"), False
    rows[0]["attacks"]["span"]["rouge1"] = float("nan")
    entry = summarise(rows, synthetic_meta())["defenses"][0]
    assert entry["unconverged"]["influence_rms"] == 1
    assert entry["attacks"]["span"]["rouge1"]["count"] == 2
    assert math.isfinite(entry["influence_rms"]["median"])


@pytest.mark.parametrize("metric", ["rouge", "embedding_rmse"])
def test_metric_of_risk_must_be_a_share(metric, synthetic_rows, synthetic_meta):
    with pytest.raises(ConfigError, match="metric"):
        summarise(synthetic_rows(1), synthetic_meta(metric_of_risk=metric))


def test_console_table_shows_every_defense_and_survives_markup(synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2, noise_levels=(0.1,))
    for row in rows:
        row["defense"] = row["defense"].replace("topk(fraction=0.1)", "topk[bold](0.1)")
        row["influence_converged"] = False
        row["attacks"]["tag"] = {"refused": "needs labels"}
    console = Console(file=io.StringIO(), width=150)
    console.print(console_table(rows, synthetic_meta()))
    text = console.file.getvalue()
    assert "no defense" in text
    assert "topk[bold](0.1)" in text
    assert "≥ " in text
    assert "refused" in text
    assert "everything leaks" in text


def test_shares_never_round_a_part_up_to_all():
    assert [percent(value) for value in (0.0, 0.001, 0.42, 0.999, 1.0, None, math.nan)] == [
        "0%", "<1%", "42%", ">99%", "100%", "–", "–",
    ]  # fmt: skip


def test_compact_numbers():
    assert [compact(value) for value in (0, 0.01234, 1.5, 123.4, 1.2e-5, -3.4e7, None)] == [
        "0", "0.012", "1.5", "123", "1.2e-5", "-3.4e7", "–",
    ]  # fmt: skip
    assert [compact(value) for value in (9.96, 99.4, 99.6, -99.6)] == ["10", "99", "100", "-100"]
