"""The page as a file: well-formed, self-contained, escaped, strict JSON beside it, whole or not there at all."""

import json
import re
from html.parser import HTMLParser

import pytest

from lmleak.report import figures, page
from lmleak.report.page import strict_json, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(HTMLParser):
    """Fails on a tag that is closed out of order; collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.headings, self.seen = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.references += [value for name, value in attributes if name in {"src", "href", "srcset", "action", "data"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def check(path):
    html = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert all(reference.startswith("data:") for reference in checker.references)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "script" not in checker.seen
    assert "$" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S)  # no placeholder left
    return html, checker


def loads_strictly(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture
def quick_figures(monkeypatch):
    """Draw figures but do not render them, for tests that look at the rest of the page."""
    monkeypatch.setattr(page, "encode", lambda figure, kind: kind.encode())


def test_full_report(tmp_path, synthetic_rows, synthetic_meta):
    rows = synthetic_rows(6)
    for row in rows:
        row["influence_converged"] = row["noise_rms"] != 100.0
    path = write_report(rows, synthetic_meta(), tmp_path)
    html, checker = check(path)
    assert path == tmp_path / "report.html"
    assert checker.headings == [
        "Risk versus noise", "Does the risk number predict the attack?", "Risk of each token",
        "Which layers give it away", "All numbers", "What this report does not say", "How to reproduce it",
    ]  # fmt: skip
    first = html.index("recovered by the span attack")
    assert html.index("everything leaks") < first < html.index("<h2>")  # the verdict and its proof come first
    assert "≥ " in html
    assert "lmleak audit --model tiny-bert" in html
    assert "0123abc" in html
    assert html.count('src="data:image/svg+xml;base64,') == 3
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in figures.FIGURES for kind in ("png", "pdf")}
    assert (tmp_path / "figures" / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "layers.pdf").read_bytes().startswith(b"%PDF")
    summary = loads_strictly(tmp_path / "summary.json")
    assert summary["verdict"]["level"] == "everything leaks"
    assert summary["meta"]["seed"] == 0
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.usefixtures("quick_figures")
def test_markup_in_texts_names_and_settings_is_escaped(tmp_path, synthetic_rows, synthetic_meta):
    attack = "<script>alert(1)</script>"
    rows = synthetic_rows(2, noise_levels=(1.0,))
    for row in rows:
        row["texts"] = [attack]
        row["tokens"] = [["[CLS]", "<", "script", ">", "[SEP]"]]
        row["token_influence"] = [[0.1] * 5]
        row["defense"] = f"{row['defense']}{attack}" if row["defense"] != "none" else "none"
        row["attacks"] = {attack: row["attacks"]["span"] | {"texts": [attack], "per_example": []}}
        row["layer_share"] = {attack: 1.0}
    meta = synthetic_meta(model=attack, task=attack, data=attack, command=attack, versions={attack: attack})
    html, _ = check(write_report(rows, meta, tmp_path))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


@pytest.mark.usefixtures("quick_figures")
def test_dollar_signs_and_braces_survive(tmp_path, synthetic_rows, synthetic_meta):
    html = write_report(
        synthetic_rows(1, noise_levels=()), synthetic_meta(command="lmleak audit --text '$model costs ${5}'"), tmp_path
    ).read_text(encoding="utf-8")
    assert "$model costs ${5}" in html


@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("attacks", [{}, {"tag": {"refused": "TAG needs <labels>"}}])
def test_without_a_scored_attack(attacks, tmp_path, synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    for row in rows:
        row["attacks"] = attacks
    html, _ = check(write_report(rows, synthetic_meta(), tmp_path))
    assert "not attacked" in html
    assert "nothing is known about recovered text" in html
    assert "nothing to compare the prediction with" in html
    if attacks:
        assert "refused: TAG needs &lt;labels&gt;" in html
    assert loads_strictly(tmp_path / "summary.json")["correlations"] == []


@pytest.mark.usefixtures("quick_figures")
def test_clean_rows_alone(tmp_path, synthetic_rows, synthetic_meta):
    rows = synthetic_rows(3, noise_levels=(), defenses=(("none", 0.0),), batch_size=4)
    html, _ = check(write_report(rows, synthetic_meta(batch_size=4), tmp_path))
    assert "No noise sweep was run" in html
    assert "No rank correlation exists: constant prediction." in html
    assert "No row has an error per token" in html
    assert "mean over 4 texts" in html


@pytest.mark.usefixtures("quick_figures")
def test_rows_with_every_optional_number_missing(tmp_path, synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    optional = ("expected_rms", "bayes_rms", "layer_share", "layer_share_std_error", "token_influence", "damping",
                "prior_std", "labels", "influence_converged", "influence_rms", "lower_bound_rms", "predicted_rms",
                "predicted_converged", "expected_converged", "bayes_converged")  # fmt: skip
    for row in rows:
        row |= dict.fromkeys(optional)
    check(write_report(rows, synthetic_meta(), tmp_path))


@pytest.mark.usefixtures("quick_figures")
def test_the_page_names_the_damping_and_marks_what_did_not_converge(tmp_path, synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2, noise_levels=(1.0,))
    for row in rows:
        row["bayes_converged"] = False
    html = write_report(rows, synthetic_meta(), tmp_path).read_text(encoding="utf-8")
    assert "Here it is 2.4e-5 (1.0e-5 times the largest eigenvalue of J Jᵀ)." in html
    assert re.search(r"<td>≈ \d", html)
    assert not re.search(r"<td>≥ \d", html)


@pytest.mark.usefixtures("quick_figures")
def test_layers_without_factors_are_named_where_there_are_any(tmp_path, synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2)
    assert "double backward" not in write_report(rows, synthetic_meta(), tmp_path / "none").read_text()
    for row in rows:
        row["by_autodiff"] = ["scale<1>", *(f"slope.{i}" for i in range(6))]
    html, _ = check(write_report(rows, synthetic_meta(), tmp_path / "some"))
    assert "<code>scale&lt;1&gt;</code>, <code>slope.0</code>" in html
    assert "and 2 more went by double backward" in html
    assert "slope.4" not in html


@pytest.mark.usefixtures("quick_figures")
def test_how_products_were_made_and_checked_is_said(tmp_path, synthetic_rows, synthetic_meta):
    meta = synthetic_meta() | {"implementation": "factored", "product_difference": 2.5e-7}
    html, _ = check(write_report(synthetic_rows(2), meta, tmp_path / "checked"))
    assert "differed by at most 2.5e-7 (relative) from double backward" in html
    meta = synthetic_meta() | {"implementation": "autodiff", "product_difference": None}
    html, _ = check(write_report(synthetic_rows(2), meta, tmp_path / "autodiff"))
    assert "All products with the derivatives went by double backward" in html
    assert "short formula" not in html


@pytest.mark.usefixtures("quick_figures")
def test_a_level_where_no_attack_ran_is_not_called_recovered(tmp_path, synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2, noise_levels=(0.1, 1.0))
    for row in rows:
        if row["noise_rms"] == 1.0:
            row["attacks"] = {"span": {"refused": "full rank"}}
    html = write_report(rows, synthetic_meta(), tmp_path).read_text(encoding="utf-8")
    assert "At 1 times the gradient's RMS, the largest noise tested, no attack ran." in html
    assert "or more." not in html


@pytest.mark.usefixtures("quick_figures")
def test_no_rows(tmp_path, synthetic_meta):
    html, _ = check(write_report([], synthetic_meta(), tmp_path))
    assert "There are no results." in html


@pytest.mark.usefixtures("quick_figures")
def test_many_examples_are_folded(tmp_path, synthetic_rows, synthetic_meta):
    html, _ = check(write_report(synthetic_rows(20, noise_levels=(1.0,)), synthetic_meta(), tmp_path))
    assert "All other examples, worst first (18)" in html
    assert "8 more texts" in html
    visible = re.sub(r"<details>.*?</details>", "", html, flags=re.S)
    assert visible.count('<article class="example">') == 3  # worst and median undefended, worst of the defense


@pytest.mark.usefixtures("quick_figures")
def test_a_failing_figure_leaves_the_folder_as_it_was(tmp_path, monkeypatch, synthetic_rows, synthetic_meta):
    rows = synthetic_rows(2, noise_levels=(1.0,))
    write_report(rows, synthetic_meta(model="first"), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken(rows):
        raise RuntimeError("no figure today")

    monkeypatch.setitem(figures.FIGURES, "agreement", broken)
    with pytest.raises(RuntimeError, match="no figure today"):
        write_report(rows, synthetic_meta(model="second"), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    fresh = tmp_path / "fresh"
    with pytest.raises(RuntimeError):
        write_report(rows, synthetic_meta(), fresh)
    assert not fresh.exists()


@pytest.mark.usefixtures("quick_figures")
def test_figures_of_an_earlier_run_do_not_stay(tmp_path, synthetic_rows, synthetic_meta):
    write_report(synthetic_rows(2, noise_levels=(1.0,)), synthetic_meta(), tmp_path)
    assert (tmp_path / "figures" / "risk_versus_noise.png").exists()
    write_report(synthetic_rows(2, noise_levels=()), synthetic_meta(), tmp_path)
    assert not (tmp_path / "figures" / "risk_versus_noise.png").exists()


def test_strict_json():
    value = {"a": [float("nan"), float("inf"), 1.5], 2: (None, True)}
    assert json.loads(strict_json(value)) == {"a": [None, None, 1.5], "2": [None, True]}
