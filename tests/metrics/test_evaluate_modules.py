"""The ``evaluate`` wrappers equal the functions, by name, by file, combined, and without a network."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import lmleak.metrics
from lmleak.errors import ConfigError
from lmleak.metrics import METRICS, evaluate_modules, load, score_strings
from lmleak.metrics.text import Rouge
from tests.launching import environment, python

IDS = [[1, 2, 3], [4, 4], []], [[1, 2, 4], [4, 5], [7]]
TEXTS = ["my pin is four", "call Ana", ""], ["my pin is two", "call Ana now.", "東京"]
FOLDER = Path(evaluate_modules.__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)


def mean(function, pairs):
    return pytest.approx(np.mean([function(p, r) for p, r in zip(*pairs, strict=True)]), abs=1e-12)


def test_token_recovery_equals_the_functions():
    names = ("token_precision", "token_recall", "token_f1", "position_accuracy", "exact_match")
    result = load("token_recovery").compute(predictions=IDS[0], references=IDS[1])
    assert result == {name: mean(getattr(lmleak.metrics, name), IDS) for name in names}


def test_text_rouge_equals_the_function():
    result = load("text_rouge").compute(predictions=TEXTS[0], references=TEXTS[1])
    for k, name in enumerate(Rouge._fields):
        assert result[name] == mean(lambda p, r, k=k: lmleak.metrics.rouge(p, r)[k], TEXTS)
    latin, unicode = (
        load("text_rouge").compute(predictions=["東京 tower"], references=["大阪 tower"], words=words)
        for words in ("latin", "unicode")
    )
    assert latin["rouge1"] == 1.0
    assert unicode["rouge1"] == pytest.approx(1 / 3)


def test_google_bleu_equals_score_strings_where_the_order_is_right():
    result = load("google_bleu").compute(predictions=TEXTS[0], references=TEXTS[1])
    assert result["google_bleu"] == pytest.approx(score_strings(*TEXTS).google_bleu)
    assert load("google_bleu").compute(predictions=["b a"], references=["a b"], max_order=1)["google_bleu"] == 1.0


@pytest.mark.parametrize("kind", [lambda x: x, np.asarray, torch.tensor], ids=["list", "numpy", "torch"])
def test_embedding_rmse_pools_and_takes_what_people_have(kind):
    predictions = [kind([[1.0, 1.0]]), kind([[2.0, 2.0], [2.0, 2.0]])]
    references = [kind([[0.0, 0.0]]), kind([[0.0, 0.0], [0.0, 0.0]])]
    metric = load("embedding_rmse")
    assert metric.compute(predictions=predictions, references=references) == {
        "embedding_rmse": pytest.approx((18 / 6) ** 0.5)
    }
    shorter = metric.compute(predictions=predictions, references=[references[0], kind([[0.0, 0.0]])])
    assert shorter == {"embedding_rmse": None}


@pytest.mark.parametrize("name", METRICS)
def test_no_pair_is_none_not_a_division_by_zero(name):
    assert set(load(name).compute(predictions=[], references=[]).values()) == {None}


def test_batches_and_single_pairs_add_up_and_instances_are_reusable():
    metric = load("token_recovery")
    whole = metric.compute(predictions=IDS[0], references=IDS[1])
    metric.add_batch(predictions=IDS[0][:2], references=IDS[1][:2])
    metric.add(prediction=IDS[0][2], reference=IDS[1][2])
    assert metric.compute() == whole


def test_nothing_private_is_written_and_no_global_seed_moves(tmp_path):
    before = np.random.get_state()[1].copy()
    load("text_rouge").compute(predictions=["a"], references=["a"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (np.random.get_state()[1] == before).all()


def test_combine():
    both = evaluate.combine([load("text_rouge"), load("google_bleu")])
    result = both.compute(predictions=TEXTS[0], references=TEXTS[1])
    assert set(result) == {"rouge1", "rouge2", "rougeL", "google_bleu"}
    prefixed = evaluate.combine({"bleu": load("google_bleu")}, force_prefix=True)
    assert set(prefixed.compute(predictions=["a"], references=["a"])) == {"bleu_google_bleu"}


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'text_rouge'"):
        load("rouge_text")


def test_every_file_is_registered_and_holds_one_metric():
    assert {path.stem for path in FOLDER.glob("[a-z]*.py")} == set(METRICS)
    for name, class_name in METRICS.items():
        assert type(load(name)).__name__ == class_name
        assert load(name).name == name  # the prefix that evaluate.combine gives


BY_FILE = """
import json, socket, sys
def refuse(*_, **__): raise AssertionError("tried to reach the network")
socket.socket.connect = socket.getaddrinfo = refuse
import lmleak.metrics
assert "evaluate" not in sys.modules, "scoring should not pay for importing evaluate"
import evaluate
ids, texts, vectors = [[1, 2]], ["a b"], [[[1.0]]]
data = {"token_recovery": ids, "embedding_rmse": vectors}
metrics = {path: evaluate.load(path, keep_in_memory=True) for path in sys.argv[1:]}
results = {m.name: m.compute(predictions=data.get(m.name, texts), references=data.get(m.name, texts))
           for m in metrics.values()}
both = evaluate.combine([m for m in metrics.values() if m.name in ("text_rouge", "google_bleu")])
results["combined"] = both.compute(predictions=["a b"], references=["a c"])
print(json.dumps(results))
"""


def test_every_file_loads_by_its_path_without_a_network(tmp_path):
    # a process of its own: evaluate imports a copy of the file under a package name that it caches
    files = [FOLDER / f"{name}.py" for name in METRICS]
    done = python("-c", BY_FILE, *files, env=environment(HF_HOME=str(tmp_path)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert set(results) == {*METRICS, "combined"}
    assert set(results["token_recovery"].values()) == {1.0}
    assert results["embedding_rmse"] == {"embedding_rmse": 0.0}
    assert results["combined"] == {"rouge1": 0.5, "rouge2": 0.0, "rougeL": 0.5, "google_bleu": pytest.approx(1 / 3)}
