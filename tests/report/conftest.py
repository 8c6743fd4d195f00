"""Synthetic result rows that behave as real ones do: recovery falls and predicted error grows with the noise."""

import math
import random
import re

import pytest

TEXTS = (
    "Hi Marta, my new number is 555-0143, please do not share it with the team.",
    "The biopsy came back positive; Dr. Okafor wants to start treatment on Monday.",
    "My landlord at 27 Alder Street keeps the deposit although I paid every rent.",
    "Transfer 4,300 euro to account DE12 7700 0011 before Friday, reference Jonas.",
    "I told nobody at work that I am pregnant, so keep this between us.",
    "The password for the shared drive is harbor-violet-92, change it next week.",
    "We flew from Lisbon to Oslo on the 14th and lost both suitcases on the way.",
    "Grandpa's will leaves the lake house to Ines, and Peter does not know yet.",
    "She has taken sertraline for two years and finally sleeps through the night.",
    "Our son starts at Birch Hill school in August, the blue bus picks him up at 7.",
    "The offer is 71,500 plus bonus, but Tanaka said they would go up to 75.",
    "He was arrested in Graz last winter, which is why the visa was refused.",
    "Please cancel my membership 88-2041, I moved to Cardiff in the spring.",
    "The blood sugar was 212 this morning, much higher than the doctor wanted.",
)
LAYERS = {"embeddings": 0.41, "block 0": 0.27, "block 1": 0.14, "block 2": 0.08, "block 3": 0.05, "head": 0.05}
NOISE_LEVELS = (1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
PRIOR_STD = 0.052
FILLER = ("the", "and", "was", "it", "people", "house", "old", "very")


def word_pieces(text: str) -> list[str]:
    """Cut a text as a lower-casing word-piece tokenizer would, long words into two pieces."""
    pieces = []
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        pieces += [word[:4], "##" + word[4:]] if len(word) > 7 else [word]
    return pieces


def join(pieces: list[str]) -> str:
    return " ".join(pieces).replace(" ##", "").replace("##", "")


def attacked(rng: random.Random, texts: list[str], noise: float, strength: float) -> dict:
    """Return what an attack of some strength reports at a noise level."""
    right = 1 / (1 + (noise / strength) ** 1.2)
    entries, recovered, hits, kept, total, exact = [], [], 0, 0, 0, 0
    for text in texts:
        pieces = word_pieces(text)
        correct = [rng.random() < right for _ in pieces]
        in_bag = [flag or rng.random() < 0.35 * right for flag in correct]
        moved = [piece for piece, c, b in zip(pieces, correct, in_bag, strict=True) if b and not c]
        rng.shuffle(moved)
        guess = [
            p if c else moved.pop() if moved else rng.choice(FILLER) for p, c in zip(pieces, correct, strict=True)
        ]
        entries.append({"text": join(guess), "token_correct": correct, "token_in_bag": in_bag})
        recovered.append(join(guess))
        hits, kept, total = hits + sum(correct), kept + sum(in_bag), total + len(pieces)
        exact += all(correct)
    recall, order = kept / total, hits / total
    return {
        "rouge1": recall, "rouge2": order**2, "rougeL": order, "token_precision": recall, "token_recall": recall,
        "token_f1": recall, "position_accuracy": order, "exact_match": exact / len(texts),
        "google_bleu": order**2, "embedding_rmse": PRIOR_STD * (1.02 - right) * rng.uniform(0.9, 1.1) * 1.3,
        "texts": recovered, "per_example": entries, "seconds": 3.1 + rng.random(), "gradient_evaluations": 300,
        "iterations": 100, "stopped": "iteration limit", "notes": [],
    }  # fmt: skip


def make_row(example: int, noise: float, *, texts: list[str], defense: str, sweep: bool, seed: int) -> dict:
    """Return one result row; ``noise`` is the perturbation in multiples of the gradient's RMS."""
    rng = random.Random(f"{seed}-{example}-{defense}")
    hardness = math.exp(random.Random(f"{seed}-{example}").gauss(0, 0.5))
    influence = 0.004 * noise * hardness
    bayes = influence / math.sqrt(1 + (influence / PRIOR_STD) ** 2)
    tokens = [["[CLS]", *word_pieces(text), "[SEP]"] for text in texts]
    return {
        "key": f"{example}|{defense}", "example": example, "texts": texts, "labels": [example % 2] * len(texts),
        "tokens": tokens, "defense": defense, "sweep": sweep,
        "noise_rms": noise if sweep else None, "noise_std": 0.0021 * noise if sweep else None,
        "perturbation_rms": 0.0021 * noise, "gradient_rms": 0.0021,
        "lower_bound_l2": influence, "lower_bound_rms": influence / 30, "influence_l2": 30 * influence,
        "influence_rms": influence, "influence_converged": True, "influence_residual": 3e-4,
        "damping": 2.4e-5, "prior_std": PRIOR_STD, "lambda_max": 2.4, "lambda_max_residual": 1e-5,
        "products": 61, "expected_rms": influence * rng.uniform(0.95, 1.05), "expected_std_error": influence * 0.03,
        "expected_converged": True,
        "bayes_rms": bayes if noise else None, "bayes_std_error": 0.01 * bayes, "bayes_converged": True,
        "predicted_rms": bayes, "predicted_converged": True, "effective_rank": 1180.0, "dx": 1536, "null_share": 0.06,
        "token_influence": [[influence * math.exp(rng.gauss(0, 0.6)) for _ in row] for row in tokens],
        "layer_share": {name: share * rng.uniform(0.9, 1.1) for name, share in LAYERS.items()},
        "layer_share_std_error": dict.fromkeys(LAYERS, 0.01),
        "attacks": {"span": attacked(rng, texts, noise, 2.0 / hardness),
                    "matching": attacked(rng, texts, noise + 0.3, 0.8 / hardness)},
        "seconds": 4.2,
    }  # fmt: skip


def make_rows(
    examples: int = 6,
    *,
    noise_levels: tuple = NOISE_LEVELS,
    defenses: tuple = (("none", 0.0), ("topk(fraction=0.1)", 1.5)),
    batch_size: int = 1,
    seed: int = 0,
) -> list[dict]:
    """Return the rows of a whole synthetic run, as parsed from results.jsonl."""
    rows = []
    for example in range(examples):
        texts = [TEXTS[(example * batch_size + place) % len(TEXTS)] for place in range(batch_size)]
        for defense, noise in defenses:
            rows.append(make_row(example, noise, texts=texts, defense=defense, sweep=False, seed=seed))
        for noise in noise_levels:
            name = f"gaussian(std={noise:g}, unit=rms)"
            rows.append(make_row(example, noise, texts=texts, defense=name, sweep=True, seed=seed))
    return rows


def make_meta(**changes) -> dict:
    return {
        "model": "tiny-bert", "task": "sequence-classification", "data": "sample messages", "samples": 6,
        "batch_size": 1, "attacks": ["span", "matching"], "defenses": ["topk(fraction=0.1)"],
        "noise_levels": list(NOISE_LEVELS), "shared": "no-word-embeddings", "seed": 0, "parameters": 412_738,
        "command": "lmleak audit --model tiny-bert --samples 6", "versions": {"lmleak": "0.1.0", "torch": "2.13.0"},
        "commit": "0123abc", "date": "2026-01-02", "seconds": 71.0, "world_size": 1, "metric_of_risk": "token_recall",
    } | changes  # fmt: skip


@pytest.fixture
def synthetic_rows():
    """The factory of rows; a fixture because test modules cannot import each other."""
    return make_rows


@pytest.fixture
def synthetic_meta():
    return make_meta
