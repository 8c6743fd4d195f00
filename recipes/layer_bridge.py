"""Do the metrics of layers agree with what attacks restricted to a layer recover?

The sum over layers of ||J_l||_F^2 is tr(J J^T), so "sensitivity" divides the Fisher information of the whole gradient
among layers. A trace is dominated by large eigenvalues and recovery of the input by small ones, so its order of layers
need not be that of the damage. Here, per layer and private image, under Gaussian noise of one level:
  attack, this layer alone     Levenberg-Marquardt on the noisy gradient of one layer (the others by ``hide-layers``)
  attack, all but this layer   the same with that layer hidden
once from a random start, as an attacker must, and once from the truth, which an attacker cannot: a search that fails
protects nobody, and the second run shows what the first missed. Beside them, per layer: the predicted MAP errors
(layer-wise I2F), sensitivity, V-information about pixels and about the mark, subspace distance and mean difference of
the mark. Spearman's correlation over the layers of every metric with either attack, larger meaning more leakage in
both; intervals by bootstrap over the images (metrics of the whole data set stay fixed).

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/layer_bridge.py
        --config configs/layer_bridge/digits.yaml

(on one line). Errors are root mean squares per normalised pixel. The attacker knows the noise level and the prior, and
weighs it by sigma^2 / tau^2, as the prediction assumes. A killed run continues where it stopped.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from image_study_parts import LocalAttacker
from image_tables import publish
from layer_cases import (
    LayerStudyConfig,
    Prepared,
    halves,
    information,
    measured_rows,
    of_layers,
    prepare_all,
    study_folder,
    trained,
    training_cases,
)
from layer_models import MODELS, adapter_of
from matplotlib.figure import Figure
from scipy.stats import rankdata

from lmleak.attacks.image_newton import GaussNewton
from lmleak.config import check_positive, parse_config
from lmleak.data.attributes import COIN
from lmleak.defenses import GaussianNoise, HideLayers, derived_seed
from lmleak.errors import ConfigError
from lmleak.evaluation import exit_status, finish, process_state, run_items
from lmleak.evaluation.image_attack import scored_image_attack
from lmleak.evaluation.layers import Row
from lmleak.files import write_csv_atomically
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian
from lmleak.influence.layers import influence_of_layers
from lmleak.leakage import input_sensitivity
from lmleak.report.drawing import BLUE, GREY, ORANGE, PURPLE, VERMILION, house_style, light_grid, whiskers

GROUPS = ("subspace", "mean-difference", "latent", "original")
SIDES = ("only", "without")
RESAMPLES = 1000
UNPUBLISHED = (  # columns of an attack that no image or layer changes, and the order of the rows
    "key", "group", "place", "dropout", "defense", "batch_size", "local_steps", "noise_multiplier", "model_loss",
    "model_accuracy",
)  # fmt: skip
TOLERANCE = 1e-6  # of the predictions' solves; dx products end them exactly


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(LayerStudyConfig):
    """Attack single layers, and compare with every metric of layers."""

    cases: list[str] = field(default_factory=lambda: ["digits:lenet", "digits:cnn"])
    """SOURCE:MODEL each, of images."""
    images: int = 5
    """Private images attacked per case."""
    noise: float = 1e-2
    """sigma of the noise, in multiples of the root mean square of the whole shared gradient."""
    iterations: int = 25
    """Most steps of the attack."""
    max_products: int = 300
    """Most products per solve of the prediction; as many as pixels end every solve exactly."""
    output: str = "runs/layer_bridge"
    """Folder for rows, tables and figures; stores and trained models lie beside it."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "images", "iterations", "noise")
        if any(MODELS[case.partition(":")[2]].kind != "images" for case in self.cases):
            raise ConfigError(f"single layers are attacked for images only, got cases={self.cases}")


def layer_rows(config: BridgeConfig, prepared: Prepared, sample: int) -> list[Row]:
    """Return, for every layer, what is predicted of one image and what attacks recover of it."""
    case, layers = prepared.case, prepared.analysis.layers
    private, _ = halves(config, case.source)
    network, shared = trained(config, case).double(), MODELS[case.model].shared
    adapter = adapter_of(case.model, network, case.title)
    pixels = adapter.normalization.normalize(private.pixels[[sample]].double())
    batch = adapter.batch(pixels, private.labels[[sample]].tolist())
    seed = derived_seed(config.seed, sample)
    clean = capture_gradient(adapter, batch, shared=shared)
    sigma = config.noise * clean.rms
    noisy, weight = GaussianNoise(std=sigma, seed=seed)(clean), (sigma / adapter.prior().std) ** 2
    predicted = influence_of_layers(
        adapter, batch, noise_std=sigma, shared=shared, layers=layers, seed=seed, tol=TOLERANCE,
        max_products=config.max_products,
    )  # fmt: skip
    jacobian = GradientJacobian(adapter, batch, shared=shared)
    sensitivity = input_sensitivity(jacobian, layers, gradient=clean.gradient, num_probes=32, seed=seed)
    attackers = {
        "random": GaussNewton(iterations=config.iterations, prior_weight=weight),
        "truth": LocalAttacker(iterations=config.iterations, prior_weight=weight, truth=pixels),
    }
    rows = []
    for place, (layer, names) in enumerate(layers.items()):
        own = "|".join(re.escape(n) for n in names)
        rest = "|".join(re.escape(n) for n in clean.gradient if n not in names)
        row = {
            "key": f"{case.title}|{case.epochs}|{sample}|{layer}", **prepared.columns, "group": "attack",
            "layer": layer, "place": place, "sample": sample, "noise_std": sigma, "gradient_rms": clean.rms,
            "converged": predicted[layer].converged, "sensitivity": sensitivity.layers[layer].share,
            "relative_sensitivity": sensitivity.layers[layer].relative,
            "prior_rmse": (pixels - adapter.prior().mean).square().mean().sqrt().item(),
        }  # fmt: skip
        for side, hidden in zip(SIDES, (rest, own), strict=True):
            part = getattr(predicted[layer], side)
            row |= {f"{side}_map": part.map_error.rms, f"{side}_undetermined": part.undetermined}
            released = HideLayers(names=f"^(?:{hidden})$")(noisy)
            for start, attack in attackers.items():
                scored = scored_image_attack(attack, adapter, released, batch, seed=seed)
                row |= {f"{side}_{start}": scored.get("rmse"), f"{side}_{start}_stopped": scored.get("stopped")}
        rows.append(row)
    return rows


Metric = Callable[[Sequence[Row]], float]


def metrics_of(rows: Sequence[Row]) -> dict[str, dict[str, Metric]]:
    """Return metric -> layer -> function of that layer's attack rows, larger meaning more leakage."""
    attacked = of_layers(r for r in rows if r["group"] == "attack")
    layers = list(dict.fromkeys(r["layer"] for r in attacked))
    mean = lambda name, sign=1: lambda some: sign * float(np.mean([r[name] for r in some]))
    found = {
        "sensitivity (share of trace)": dict.fromkeys(layers, mean("sensitivity")),
        "relative sensitivity": dict.fromkeys(layers, mean("relative_sensitivity")),
        "MAP error, layer alone": dict.fromkeys(layers, mean("only_map", -1)),
        "MAP error, all but layer": dict.fromkeys(layers, mean("without_map")),
    }
    for row in of_layers(r for r in rows if r["group"] in GROUPS and r["target"] != COIN):
        if row["group"] in ("latent", "original"):
            name, value = f"V-information, {row['target']}, {row['family']}", information(row)[0]
        else:
            name, value = f"{row['group']} of {row['target']}, z", row["z"]
        if value is not None:
            found.setdefault(name, {})[row["layer"]] = lambda some, value=value: value
    return {name: by_layer for name, by_layer in found.items() if len(by_layer) == len(layers)}


def correlations(rows: Sequence[Row], seed: int) -> list[Row]:
    """Return, per case, attack and metric, the rank correlation over layers with its interval over images."""
    found = []
    for case in dict.fromkeys((r["source"], r["model"], r["epochs"]) for r in rows):
        own = [r for r in rows if (r["source"], r["model"], r["epochs"]) == case]
        attacked = of_layers(r for r in own if r["group"] == "attack")
        layers, samples = (list(dict.fromkeys(r[k] for r in attacked)) for k in ("layer", "sample"))
        by_layer = {layer: {r["sample"]: r for r in attacked if r["layer"] == layer} for layer in layers}
        generator = np.random.default_rng(seed)
        draws = [samples, *(generator.choice(samples, len(samples)).tolist() for _ in range(RESAMPLES))]
        for name, functions in metrics_of(own).items():
            for side in SIDES:
                for start in ("random", "truth"):
                    sign = -1 if side == "only" else 1
                    values = []
                    for draw in draws:
                        drawn = {layer: [by_layer[layer][s] for s in draw] for layer in layers}
                        leak = [sign * attack_error(drawn[layer], f"{side}_{start}") for layer in layers]
                        metric = [functions[layer](drawn[layer]) for layer in layers]
                        values.append(rank_correlation(metric, leak))
                    low, high = np.nanquantile(values[1:], [0.025, 0.975])
                    found.append({
                        "source": case[0], "model": case[1], "epochs": case[2], "metric": name, "attack": side,
                        "start": start, "layers": len(layers), "images": len(samples), "rho": values[0],
                        "low": float(low), "high": float(high),
                    })  # fmt: skip
    return found


def attack_error(rows: Sequence[Row], name: str) -> float:
    """Return the mean error of an attack; one that diverged counts as the error of the prior's mean."""
    return float(np.mean([r["prior_rmse"] if r[name] is None else min(r[name], r["prior_rmse"]) for r in rows]))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's correlation; NaN where a column is constant."""
    return float("nan") if np.ptp(x) == 0 or np.ptp(y) == 0 else float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def layer_entries(rows: Sequence[Row]) -> list[Row]:
    """Return one line per case and layer, means over images."""
    found, attacked = [], [r for r in rows if r["group"] == "attack"]
    for key in dict.fromkeys((r["source"], r["model"], r["epochs"], r["layer"]) for r in attacked):
        own = [r for r in attacked if (r["source"], r["model"], r["epochs"], r["layer"]) == key]
        mean = lambda name, own=own: float(np.mean([r[name] for r in own]))
        found.append({
            "source": key[0], "model": key[1], "epochs": key[2], "layer": key[3], "images": len(own),
            "share of trace": mean("sensitivity"), "MAP alone": mean("only_map"),
            "attack alone": attack_error(own, "only_random"), "from truth, alone": attack_error(own, "only_truth"),
            "MAP without": mean("without_map"), "attack without": attack_error(own, "without_random"),
            "from truth, without": attack_error(own, "without_truth"), "prior": mean("prior_rmse"),
            "converged": all(r["converged"] for r in own),
        })  # fmt: skip
    return found


def image_entries(rows: Sequence[Row]) -> list[Row]:
    """Return one line per case, layer and image: what was predicted, and what the attacks left."""
    kept = lambda name: name not in UNPUBLISHED and not name.endswith("_stopped")
    return [{name: value for name, value in r.items() if kept(name)} for r in rows if r["group"] == "attack"]


def figure(entries: Sequence[Row]) -> Figure:
    """Draw the correlations: metrics downwards, one panel per attack, one colour per case."""
    metrics = list(dict.fromkeys(e["metric"] for e in entries))
    cases = list(dict.fromkeys((e["source"], e["model"], e["epochs"]) for e in entries))
    with house_style():
        drawing = Figure(figsize=(10.5, 1.4 + 0.5 * len(metrics)), layout="constrained")
        panels = drawing.subplots(1, 2, sharey=True)
        for axes, side in zip(panels, SIDES, strict=True):
            for number, (case, colour) in enumerate(zip(cases, (BLUE, VERMILION, ORANGE, PURPLE) * 9, strict=False)):
                for start, marker in (("random", "o"), ("truth", "x")):
                    own = [e for e in entries if (e["source"], e["model"], e["epochs"]) == case
                           and e["attack"] == side and e["start"] == start]  # fmt: skip
                    shift = (number - (len(cases) - 1) / 2) * 0.18 + (0.05 if start == "truth" else -0.05)
                    y = [metrics.index(e["metric"]) + shift for e in own]
                    rho, low, high = ([e[name] for e in own] for name in ("rho", "low", "high"))
                    stage = f"{case[2]} epochs" if case[2] else "untrained"
                    axes.errorbar(rho, y, xerr=whiskers(rho, low, high), fmt=marker, ms=4, color=colour, lw=0.9,
                                  label=f"{case[0]} / {case[1]}, {stage}, from {start}")  # fmt: skip
            axes.axvline(0, color=GREY, lw=0.8)
            axes.set_xlim(-1.08, 1.08)
            axes.set_title("attack on this layer alone" if side == "only" else "attack on all but this layer")
            axes.set_xlabel("Spearman's correlation over layers")
            light_grid(axes)
        panels[0].set_yticks(range(len(metrics)), metrics)
        panels[0].invert_yaxis()
        drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return drawing


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(BridgeConfig, argv, prog="layer_bridge.py")
    state = process_state(config.processes)
    cases = prepare_all(config, training_cases(config), GROUPS, state, subspace=4)
    items = [(i, work) for i, case in enumerate(cases) for work in (*case.analysis.measures(), *range(config.images))]

    def work(_: int, item: tuple) -> list[Row]:
        case, piece = cases[item[0]], item[1]
        return layer_rows(config, case, piece) if isinstance(piece, int) else measured_rows(case, piece, str(item[0]))

    folder = study_folder(config, cases)
    rows = run_items(items, work, folder, state, label="attacking layers")
    if state.is_main_process:
        write_csv_atomically(folder.path / "layer_bridge_images.csv", image_entries(rows))
        publish(folder.path, "layer_bridge_layers", layer_entries(rows))
        publish(folder.path, "layer_bridge", correlations(rows, config.seed), figure)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
