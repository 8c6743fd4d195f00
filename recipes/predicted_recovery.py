"""Is the predicted probability that a token is recovered calibrated?

For every text and noise level: ``lmleak.influence.recovery`` predicts per token, without an attack; then attackers are
run on real noisy gradients and every token is compared.
  local-map       ||g(x) - g||^2 / (2 sigma^2) + ||x - mu||^2 / (2 tau^2), minimised from the truth, decoded by cosine
  local-discrete  ||g(text) - g||^2 minimised over tokens, one position at a time, from the truth; exact gradients
  the rest        attacks of the toolkit, which start from nothing
Local attackers know the optimum's neighbourhood, so they stand for the attack whose search never fails. Noise of the
attackers is never the noise of the predictions.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/predicted_recovery.py
        --config configs/predicted_recovery/reference.yaml

(one line). A killed run continues where it stopped. One process or several give the same rows. The table and figure in
recipes/results (predicted_recovery*) come from configs/predicted_recovery/all.yaml: 12 texts, 25 minutes on one busy
core.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cache

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from matplotlib.figure import Figure
from predicted_recovery_attackers import DiscreteAttacker, attack_hits, local_map
from rich.console import Console
from rich.table import Table

from lmleak.adapters import TextAdapter, load_adapter
from lmleak.attacks import parse_attack
from lmleak.config import check_counts, check_positive, parse_config
from lmleak.data import load_examples
from lmleak.defenses import GaussianNoise, derived_seed
from lmleak.errors import ConfigError
from lmleak.evaluation import ResultFolder, exit_status, finish, process_state, run_items
from lmleak.evaluation.audit import identity
from lmleak.files import write_bytes_atomically, write_csv_atomically
from lmleak.gradients import capture_gradient
from lmleak.influence.recovery import METHODS, RecoveryPredictor
from lmleak.metrics import calibration_error
from lmleak.metrics.calibration import BINS
from lmleak.report.drawing import BLUE, GREY, INK, ORANGE, PURPLE, VERMILION, encode, house_style, light_grid

PAIRS = (
    ("gaussian", "local-map"),
    *((method, "local-discrete") for method in METHODS if method != "gaussian"),
)


@dataclass(frozen=True)
class RecoveryConfig:
    """Compare predicted with measured recovery of every token over noise levels."""

    models: list[str] = field(default_factory=lambda: ["reference-bert", "reference-gpt2"])
    """Embedded names, local directories, shape files or hub ids of language models."""
    data: str | None = None
    """File or datasets id; the embedded samples if not given."""
    samples: int = 4
    """Texts per model."""
    max_length: int = 8
    """Truncate texts to this many tokens: linear methods take a product per coordinate."""
    noise_levels: list[float] = field(default_factory=lambda: [1e-3, 0.03, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0])
    """In multiples of the gradient's root mean square."""
    candidates: int = 64
    """Tokens per position for the substitution methods and the discrete attacker."""
    predicted_draws: int = 64
    """Noise draws per prediction."""
    measured_draws: int = 2
    """Noise draws per text and level on which the local attackers run."""
    iterations: int = 60
    """Most L-BFGS iterations of local-map."""
    attacks: list[str] = field(default_factory=lambda: ["span", "tag(iterations=120)"])
    """Attacks that start from nothing."""
    attack_levels: list[float] = field(default_factory=lambda: [1e-3, 0.3, 10.0])
    """The noise levels at which they run."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "runs/predicted_recovery"
    """Folder for rows, table and figure."""

    def __post_init__(self):
        counts = ("samples", "max_length", "measured_draws", "iterations")
        check_counts(self, *counts)
        check_positive(self, "noise_levels")
        if unknown := set(self.attack_levels) - set(self.noise_levels):
            raise ConfigError(f"attack_levels must be among noise_levels, got {min(unknown)}")
        for spec in self.attacks:
            parse_attack(spec)


# One text -------------------------------------------------------------------------------------------------


@cache
def adapter_of(model: str, seed: int) -> TextAdapter:
    """Return the model, loaded once per process."""
    return load_adapter(model, seed=seed)


def text_rows(config: RecoveryConfig, index: int, model: str, text: str, label: int | None) -> list[dict]:
    """Return one row per noise level of one text under one model."""
    adapter = adapter_of(model, config.seed)
    labels = [label] if adapter.task == "sequence-classification" else None
    batch = adapter.batch([text], labels, max_length=config.max_length)
    true = capture_gradient(adapter, batch)
    predictor = RecoveryPredictor(adapter, batch, candidates=config.candidates, seed=config.seed)
    seeds = [derived_seed(derived_seed(config.seed, index), 1 + k) for k in range(config.measured_draws)]
    started = time.perf_counter()
    predictor.problem  # noqa: B018 (computed at first use; timed)
    linear = time.perf_counter()
    predictor.table  # noqa: B018
    substituted = time.perf_counter()
    discrete = DiscreteAttacker(predictor, true, seeds)
    rows = []
    for level in config.noise_levels:
        std = level * true.rms
        predictions = {m: predictor.predict(std, method=m, draws=config.predicted_draws) for m in METHODS}
        maps = [local_map(predictor, true, std, seed, config.iterations) for seed in seeds]
        measured = {"local-map": [hits for hits, _ in maps], "local-discrete": discrete.hits(std)}
        if level in config.attack_levels:
            noisy = GaussianNoise(std=std, seed=seeds[0])(true)
            measured |= {spec: attack_hits(spec, adapter, noisy, batch, seeds[0]) for spec in config.attacks}
        rows.append({
            "key": f"{index}|{level:g}", "model": model, "example": index, "noise_rms": level, "noise_std": std,
            "tokens": adapter.token_strings(batch.token_ids[0]),
            "predicted": {m: list(p.token_probability[0]) for m, p in predictions.items()},
            "measured": {name: hits for name, hits in measured.items() if hits is not None},
            "map_gradient": max(open_part for _, open_part in maps),
            "linear_seconds": linear - started, "table_seconds": substituted - linear,
            "table_gradients": predictor.table.gradients,
        })  # fmt: skip
    return rows


# All texts ------------------------------------------------------------------------------------------------


def columns(rows: list[dict], method: str, attacker: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predicted probability, measured share over draws, and example of every token."""
    chosen = [r for r in rows if attacker in r["measured"]]
    predicted = [p for r in chosen for p in r["predicted"][method]]
    hit = [h for r in chosen for h in np.mean(r["measured"][attacker], axis=0)]
    example = [r["example"] for r in chosen for _ in r["predicted"][method]]
    return np.array(predicted), np.array(hit), np.array(example, dtype=int)


def undecided(rows: list[dict], attacker: str) -> list[dict]:
    """Return the rows of the levels at which an attacker's mean recall on a model lies in [.05, .95]."""
    kept = []
    for model, level in dict.fromkeys((r["model"], r["noise_rms"]) for r in rows):
        same = [r for r in rows if (r["model"], r["noise_rms"]) == (model, level) and attacker in r["measured"]]
        if same and 0.05 <= np.mean([h for r in same for h in np.ravel(r["measured"][attacker])]) <= 0.95:
            kept += same
    return kept


def summary(rows: list[dict], pairs, seed: int) -> list[dict]:
    """Return calibration of every pair of method and attacker, per model and over all, with bootstrap over texts."""
    found = []
    for model in [*dict.fromkeys(r["model"] for r in rows), "all"]:
        own = [r for r in rows if model in ("all", r["model"])]
        for method, attacker in pairs:
            for levels, kept in (("all", own), ("undecided", undecided(own, attacker))):
                predicted, hit, example = columns(kept, method, attacker)
                if not len(hit):
                    continue
                units, inverse = np.unique(example, return_inverse=True)
                generator = np.random.default_rng(seed)
                draws = generator.multinomial(len(units), np.full(len(units), 1 / len(units)), size=1000)
                errors = [calibration_error(predicted, hit, w[inverse].astype(float)) for w in draws]
                # What so few tokens would show if every prediction were exactly right.
                measured = len(next(r["measured"][attacker] for r in kept if attacker in r["measured"]))
                lots = generator.binomial(measured, predicted, size=(200, len(predicted))) / measured
                right = np.mean([calibration_error(predicted, lot, np.ones(len(hit))) for lot in lots])
                low, high = np.quantile(errors, [0.025, 0.975])
                found.append({
                    "model": model, "method": method, "attacker": attacker, "levels": levels, "tokens": len(hit),
                    "texts": len(units), "predicted": predicted.mean(), "measured": hit.mean(),
                    "calibration_error": calibration_error(predicted, hit, np.ones(len(hit))),
                    "low": low, "high": high, "if_calibrated": right,
                })  # fmt: skip
    return found


def level_means(rows: list[dict]) -> list[dict]:
    """Return mean predicted and measured recall per model and noise level."""
    found = []
    for model, level in dict.fromkeys((r["model"], r["noise_rms"]) for r in rows):
        same = [r for r in rows if (r["model"], r["noise_rms"]) == (model, level)]
        entry = {"model": model, "noise_rms": level}
        entry |= {m: np.mean([p for r in same for p in r["predicted"][m]]) for m in METHODS}
        for name in dict.fromkeys(name for r in rows for name in r["measured"]):
            hits = [h for r in same if name in r["measured"] for h in np.ravel(r["measured"][name])]
            entry[name] = np.mean(hits) if hits else None
        found.append(entry | {"map_gradient": max(r["map_gradient"] for r in same)})
    return found


def figure(rows: list[dict]) -> Figure:
    """Draw recall against noise per model, and below it predicted against measured probability per attacker."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    curves = (
        ("gaussian", "local-map", ORANGE, "s"),
        ("posterior-mean-field", None, PURPLE, None),
        ("substitution", "local-discrete", BLUE, "o"),
    )
    means = level_means(rows)
    with house_style():
        drawing = Figure(figsize=(4.2 * max(2, len(models)), 7.6), layout="constrained")
        for place, model in enumerate(models):
            axes = drawing.add_subplot(2, max(2, len(models)), place + 1, xscale="log")
            own = [m for m in means if m["model"] == model]
            for method, attacker, colour, marker in curves:
                levels = [m["noise_rms"] for m in own]
                axes.plot(levels, [m[method] for m in own], color=colour, label=f"predicted: {method}")
                if attacker:
                    axes.plot(levels, [m[attacker] for m in own], marker, color=colour, label=f"measured: {attacker}")
            axes.set_title(short(model))
            axes.set_xlabel("noise (multiples of the gradient's rms)")
            axes.set_ylabel("share of tokens recovered")
            axes.set_ylim(-0.04, 1.06)
            light_grid(axes)
        for place, (method, attacker, colour) in enumerate(
            (("substitution", "local-discrete", BLUE), ("gaussian", "local-map", VERMILION))
        ):
            axes = drawing.add_subplot(2, max(2, len(models)), max(2, len(models)) + place + 1)
            predicted, hit, _ = columns(rows, method, attacker)
            bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
            for b in np.unique(bins):
                inside = bins == b
                axes.scatter(predicted[inside].mean(), hit[inside].mean(), s=12 + 20 * np.sqrt(inside.sum() / 10),
                             color=colour, alpha=0.7, linewidths=0)  # fmt: skip
                axes.annotate(str(inside.sum()), (predicted[inside].mean(), hit[inside].mean()), fontsize=8, color=INK,
                              textcoords="offset points", xytext=(6, -8))  # fmt: skip
            axes.set_title(f"{method} against {attacker}")
            axes.set_xlabel("predicted probability (number: tokens in the bin)")
            axes.set_ylabel("measured share recovered")
            light_grid(axes)
        handles, labels = drawing.axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=3)
    return drawing


def short(model: str) -> str:
    """Return a model's name for people: of a directory its last part, the format's folder left out."""
    return os.path.basename(model.removesuffix("/hf"))


def console_table(entries: list[dict]) -> Table:
    """Return the final table."""
    table = Table(
        "model",
        "method",
        "attacker",
        "levels",
        "tokens",
        "predicted",
        "measured",
        "calibration error",
        "if calibrated",
    )
    for e in entries:
        table.add_row(
            short(e["model"]), e["method"], e["attacker"], e["levels"], str(e["tokens"]),
            f"{e['predicted']:.3f}", f"{e['measured']:.3f}",
            f"{e['calibration_error']:.3f} [{e['low']:.3f}, {e['high']:.3f}]", f"{e['if_calibrated']:.3f}",
        )  # fmt: skip
    return table


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(RecoveryConfig, argv, prog="predicted_recovery.py")
    state = process_state()
    torch.set_num_threads(1)
    examples = load_examples(config.data, limit=config.samples)
    labels = examples.labels or [None] * len(examples.texts)
    texts = list(zip(examples.texts, labels, strict=True))
    items = [(model, text, label) for model in config.models for text, label in texts]
    weights = {model: identity(adapter_of(model, config.seed), items) for model in config.models}
    settings = {k: v for k, v in asdict(config).items() if k != "output"}
    folder = ResultFolder(config.output, settings, identity=weights)
    rows = run_items(items, lambda i, item: text_rows(config, i, *item), folder, state, label="predicting")
    if state.is_main_process:
        pairs = [*PAIRS, *(("substitution", spec) for spec in config.attacks)]
        entries = summary(rows, pairs, config.seed)
        image = encode(figure(rows), "png")
        write_csv_atomically(folder.path / "calibration.csv", entries)
        write_csv_atomically(folder.path / "levels.csv", level_means(rows))
        write_bytes_atomically(folder.path / "calibration.png", image)
        Console(width=None if sys.stdout.isatty() else 160).print(console_table(entries))
        print(f"table and figure: {folder.path}")
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
