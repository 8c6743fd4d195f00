"""What the studies on layers share: settings, cases (data, model, training, release), their gradient stores, rows."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from layer_models import (
    MAX_LENGTH,
    MODELS,
    adapter_of,
    held_out,
    image_network,
    text_network,
    train,
    train_privately,
)
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from lmleak.adapters import ModelAdapter
from lmleak.config import check_counts
from lmleak.data.attributes import COIN, TEXT_SOURCES, AttributeData, load_texts
from lmleak.data.attributes_images import IMAGE_SOURCES, INJECTIONS, load_marked_images
from lmleak.defenses import parse_defense
from lmleak.errors import ConfigError, DataError
from lmleak.evaluation.attacks import Sharing
from lmleak.evaluation.circumstances import decisive_settings
from lmleak.evaluation.layers import ALL, LayerAnalysis, LayerSettings, Measure, Row
from lmleak.evaluation.layers_capture import CaptureSettings, capture_store
from lmleak.evaluation.layers_examples import LabelledExamples, image_examples, text_examples
from lmleak.evaluation.shards import ResultFolder
from lmleak.files import write_tensors_atomically
from lmleak.lookup import lookup
from lmleak.types import SINGLE_STEP, Aggregation

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(IMAGE_SOURCES, ("mark", COIN)),
    "messages": ("topic", "number", COIN), "cola": ("acceptable", "name", COIN),
    "sst2": ("positive", "long", COIN), "synthpai": ("sex", "older", COIN),
}  # fmt: skip
"""What is inferred in each source of examples."""
STORED = ("count", "train_batch_size", "mark", "strength", "image_size", "features", "seed")  # what decides gradients


@dataclass(frozen=True, kw_only=True)
class LayerStudyConfig:
    """Settings that studies on layers share."""

    cases: list[str] = field(default_factory=lambda: ["digits:cnn"])
    """SOURCE:MODEL each: digits, mnist, cifar (cnn, lenet, resnet); messages, cola, sst2, synthpai (bert, gpt2)."""
    data_folder: str = "../shared/data"
    """Where the folders mnist, cifar10-jpg, cola, sst2 and synthpai lie."""
    count: int = 1600
    """Examples read per source, at most; one half is private, a model is trained on the other."""
    epochs: list[int] = field(default_factory=lambda: [0, 5])
    """Trainings that are compared, in passes over the public half; 0 is the untrained network."""
    train_batch_size: int = 32
    """Examples per step of the training."""
    mark: str = "tint"
    """Attribute put into half of the images: tint, rotate or stroke."""
    strength: float = 1.0
    """Of the mark, in multiples of what lmleak.data.attributes_images.INJECTIONS says."""
    image_size: int | None = None
    """Resize images to this many pixels in height and width."""
    gradients: int = 600
    """Most gradients that information is estimated from."""
    features: int = 256
    """Random projections kept per layer."""
    families: list[str] = field(default_factory=lambda: ["linear"])
    """Predictive families."""
    scaling: Literal["direction", "raw"] = "direction"
    """What decoders read of each layer's gradient: its direction and the logarithm of its norm, or its features as
    they are. A trained network's gradients differ in norm by orders of magnitude, and few of them decide a raw fit."""
    folds: int = 3
    """Parts of the cross-fitting."""
    permutations: int = 49
    """Shuffles of every permutation test."""
    pairs: int = 200
    """Gradients of the tests that compare pairs of them (subspace distance, mean difference)."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 1
    """CPU threads per process."""
    processes: int | None = None
    """Refuse to run unless this many processes are running."""
    output: str = "runs/layers"
    """Folder for rows, tables and figures; stores and trained models lie beside it."""
    resume: bool = True
    """Continue a run of the same configuration that was interrupted."""

    def __post_init__(self):
        check_counts(self, "count", "gradients", "features", "folds", "threads", "train_batch_size", "pairs")
        if not self.cases or not self.epochs or min(self.epochs) < 0:
            raise ConfigError(f"expected cases and epochs >= 0, got {self.cases} and {self.epochs}")
        lookup("mark", self.mark, INJECTIONS)
        for case in self.cases:
            source, _, model = case.partition(":")
            kind = lookup("model", model, MODELS).kind
            lookup(f"source of {kind}", source, IMAGE_SOURCES if kind == "images" else TEXT_SOURCES)
            if (source, model) == ("synthpai", "bert"):
                raise ConfigError("synthpai has no classes for a classifier to learn; write synthpai:gpt2")


@dataclass(frozen=True)
class Case:
    """One store of gradients: whose, of what model, released how."""

    source: str
    model: str
    epochs: int
    dropout: float = 0.0
    """Of the model, in training; and in the released gradient if it is positive."""
    batch_size: int = 1
    defense: str = "none"
    aggregation: Aggregation = SINGLE_STEP
    private: tuple[float, float] | None = None
    """(C, z) if it is trained by DP-SGD."""

    @property
    def title(self) -> str:
        """What it is called in figures."""
        return f"{self.source} / {self.model}"


def training_cases(config: LayerStudyConfig) -> list[Case]:
    """Return every source and model at every training, released one by one and undefended."""
    pairs = [case.split(":") for case in config.cases]
    return [Case(source, model, epochs) for source, model in pairs for epochs in config.epochs]


@lru_cache(maxsize=4)
def _halves(settings: tuple) -> tuple[AttributeData, AttributeData]:
    source, folder, count, mark, strength, size, seed = settings
    data = (
        load_marked_images(source, folder=folder, count=count, mark=mark, strength=strength, size=size, seed=seed)
        if source in IMAGE_SOURCES else load_texts(source, folder=folder, count=count, seed=seed)
    )  # fmt: skip
    return data.halves(seed)


def halves(config: LayerStudyConfig, source: str) -> tuple[AttributeData, AttributeData]:
    """Return the private and the public half of a source."""
    return _halves((
        source, config.data_folder, config.count, config.mark, config.strength, config.image_size, config.seed
    ))  # fmt: skip


def trained(config: LayerStudyConfig, case: Case) -> nn.Module:
    """Return the model of a case, from its file if it was trained before; nothing private is used."""
    _, public = halves(config, case.source)
    content = public.pixels.numpy().tobytes() if public.pixels is not None else "\n".join(public.texts).encode()
    settings = [case.source, case.model, case.epochs, case.dropout, case.private, config.train_batch_size, config.seed]
    digest = hashlib.sha256(json.dumps(settings).encode() + content).hexdigest()[:16]
    file = Path(f"{config.output}-models") / f"{case.source}-{case.model}-{digest}.safetensors"
    network = (
        image_network(case.model, public, dropout=case.dropout, seed=config.seed)
        if MODELS[case.model].kind == "images"
        else text_network(case.model, public, pretrained=case.epochs > 0, dropout=case.dropout, seed=config.seed)
    )
    if file.exists():
        network.load_state_dict(load_file(file))
        return network.eval()
    options = {"epochs": case.epochs, "batch_size": config.train_batch_size, "seed": config.seed}
    if case.private:
        train_privately(public, network, clip=case.private[0], noise_multiplier=case.private[1], **options)
    else:
        train(case.model, public, network, **options)
    write_tensors_atomically(file, network.state_dict())
    return network


def examples_of(adapter: ModelAdapter, data: AttributeData) -> LabelledExamples:
    """Return the private half as the layer-wise audit reads it, with the attributes that are studied."""
    wanted = {name: data.attributes[name] for name in ATTRIBUTES[data.name] if name in data.attributes}
    if data.pixels is not None:
        return image_examples(adapter, data.pixels, data.labels, wanted, name=data.name)
    labels = data.labels if adapter.task == "sequence-classification" else None
    groups = None if data.groups is None else data.groups.tolist()
    return text_examples(
        adapter, data.texts, wanted, labels=labels, groups=groups, max_length=MAX_LENGTH, name=data.name
    )


def capture_of(config: LayerStudyConfig, case: Case) -> CaptureSettings:
    """Return how a case's gradients are released."""
    sharing = Sharing(
        "case", defense=parse_defense(case.defense), shared=MODELS[case.model].shared, dropout=case.dropout > 0,
        aggregation=case.aggregation,
    )  # fmt: skip
    return CaptureSettings(sharing=sharing, batch_size=case.batch_size, features=config.features, seed=config.seed)


class RawAnalysis(LayerAnalysis):
    """The layer-wise audit whose decoders read the stored features as they are, instead of directions and norms."""

    def features(self, layers: Sequence[str], rows: NDArray) -> NDArray:
        """Return the stored features of some layers side by side, of some gradients."""
        return np.concatenate([self.store.features(layer, rows).numpy() for layer in layers], axis=1)


ANALYSES: dict[str, type[LayerAnalysis]] = {"direction": LayerAnalysis, "raw": RawAnalysis}


@dataclass(frozen=True)
class Prepared:
    """A case with its gradients captured."""

    case: Case
    analysis: LayerAnalysis
    held_out: Mapping[str, float | None]
    """Loss and accuracy of the model on the private half."""

    @property
    def columns(self) -> Row:
        """What every row says of its case."""
        c = self.case
        return {
            "source": c.source, "model": c.model, "epochs": c.epochs, "dropout": c.dropout, "defense": c.defense,
            "batch_size": c.batch_size, "local_steps": c.aggregation.steps,
            "noise_multiplier": c.private[1] if c.private else None,
            **{f"model_{name}": value for name, value in self.held_out.items()},
        }  # fmt: skip

    def follows_from_label(self, attribute: str | None) -> bool | None:
        """Return whether an attribute is a function of the class, which a classifier's gradient tells anyway."""
        data = self.analysis.examples
        if attribute not in data.attributes or self.case.model == "gpt2":
            return None
        labels = data.batch(range(data.size)).targets.tolist()
        pairs = set(zip(labels, data.attributes[attribute].tolist(), strict=True))
        return len(pairs) == len(set(labels))


def prepare(config: LayerStudyConfig, case: Case, groups: Sequence[str], **settings) -> Prepared:
    """Train (or load) a case's model, and capture (or open) its gradients.

    Args:
        config: The settings.
        case: The case.
        groups: Groups of metrics to be measured.
        **settings: Other fields of ``LayerSettings``.

    Returns:
        The case, ready to be measured.
    """
    private, _ = halves(config, case.source)
    network = trained(config, case)
    adapter = adapter_of(case.model, network, case.title)
    examples, capture = examples_of(adapter, private), capture_of(config, case)
    decisive = {name: getattr(config, name) for name in STORED} | {"case": asdict(case)}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
    store = capture_store(adapter, examples, Path(f"{config.output}-stores") / f"{case.source}-{digest}", capture)
    measured = LayerSettings(
        capture=capture, groups=tuple(groups), families=tuple(config.families), folds=config.folds,
        permutations=config.permutations, gradients=config.gradients, pairs=config.pairs, seed=config.seed, **settings,
    )  # fmt: skip
    analysis = ANALYSES[config.scaling](adapter, examples, store, measured)
    return Prepared(case, analysis, held_out(case.model, private, network))


def prepare_all(
    config: LayerStudyConfig, cases: Iterable[Case], groups: Sequence[str], state: PartialState, **settings
) -> list[Prepared]:
    """Prepare every case; the main process trains and captures, the others read what it wrote."""
    torch.set_num_threads(config.threads)
    with state.main_process_first():
        return [prepare(config, case, groups, **settings) for case in cases]


def measured_rows(prepared: Prepared, measure: Measure, prefix: str) -> list[Row]:
    """Return the rows of one piece of work, with what they say of their case."""
    common = prepared.columns | {"follows_from_label": prepared.follows_from_label(measure.target)}
    rows = prepared.analysis.rows(measure)
    return [{"key": f"{prefix}|{row['key']}"} | common | {k: v for k, v in row.items() if k != "key"} for row in rows]


def study_folder(config: LayerStudyConfig, prepared: Sequence[Prepared]) -> ResultFolder:
    """Return the folder of a study, which refuses results of other settings, weights or examples."""
    decisive = decisive_settings(config, without=["data_folder"])
    identity = {
        f"{p.case.source} {p.case.model} {i}": f"{p.analysis.adapter.weights_digest()} {p.analysis.examples.digest}"
        for i, p in enumerate(prepared)
    }
    return ResultFolder(Path(config.output), decisive, identity=identity, resume=config.resume)


def information(row: Row) -> tuple[float, float, float]:
    """Return a row's usable information and its interval in [0, 1] units that compare between cases.

    Latent: the fraction I_V / H_V(Y|0), 1 where the attribute is told with certainty, with the interval of the ratio
    itself. Original: R^2 = 1 - exp(-2 I_V / dx), 1 where the input is told exactly.

    Raises:
        DataError: If the rows are of a version that divided the interval of I_V by a fixed H_V(Y|0).
    """
    if row["group"] == "latent":
        if "fraction_high" not in row:
            raise DataError("these rows have no interval of the fraction; measure them again in another output folder")
        return row["nats"] / row["baseline_nats"], row["fraction_low"], row["fraction_high"]
    return tuple(-math.expm1(-2 * row[name] / row["num_coordinates"]) for name in ("nats", "low", "high"))


def unit_of(target: str) -> str:
    """Return what :func:`information` says of a target, for an axis."""
    return "R² of the input" if target == "pixels" else "share of the entropy told"


def of_layers(rows: Iterable[Row]) -> list[Row]:
    """Return rows of single layers in forward order, without that of all layers together."""
    return sorted((row for row in rows if row["layer"] != ALL), key=lambda row: row["place"])
