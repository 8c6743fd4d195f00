"""What every study on images needs: settings, the i-th private batch, its seed, its release, and rows of attacks."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from lmleak.adapters import ARCHITECTURES, ModelAdapter, VisionAdapter, adapt, image_model, load_adapter
from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.config import check_counts
from lmleak.data.images import ImageData, load_images
from lmleak.defenses import Release, derived_seed, parse_defense
from lmleak.errors import ConfigError, DataError, UnsupportedModelError
from lmleak.evaluation.audit import identity
from lmleak.evaluation.circumstances import decisive_settings
from lmleak.evaluation.image_attack import scored_image_attack
from lmleak.evaluation.model import device_of
from lmleak.evaluation.shards import ResultFolder
from lmleak.gradients import capture_gradient
from lmleak.influence import GradientJacobian
from lmleak.types import SINGLE_STEP, Aggregation, Batch

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class ImageStudyConfig:
    """Settings that studies on images share; a recipe's settings extend them."""

    data: str = "digits"
    """Where the private images are from: digits (scikit-learn's), a file or folder of images, or a datasets id
    (:func:`lmleak.data.load_images`)."""
    split: str | None = None
    """Which part of the data, where it has several; an empty word where it has none."""
    image_size: int | None = None
    """Resize images to this height and width."""
    normalization: str | None = None
    """How models read pixels that do not say so themselves: mnist, cifar10, cifar100, imagenet, or none ([0, 1]); by
    default mean and deviation of all the images of the data."""
    samples: int = 4
    """Number of gradients; sample i takes the i-th batch_size images of the data."""
    batch_size: int = 1
    """Images per gradient."""
    shared: str = "all"
    """Parameters whose gradient is shared: all, head, or a regular expression."""
    precision: str = "float32"
    """float32, or float64 for the linear regime at noise below the rounding of float32."""
    seed: int = 0
    """Seed of weights, noise and attacks."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int = 1
    """CPU threads per process."""
    processes: int | None = None
    """Refuse to run unless this many processes are running."""
    output: str = "runs/images"
    """Folder for results.jsonl, tables and figures."""
    resume: bool = True
    """Continue a run of the same configuration that was interrupted."""

    def __post_init__(self):
        check_counts(self, "samples", "batch_size", "threads")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be float32 or float64, got {self.precision!r}")


@dataclass(frozen=True)
class ImageStudy:
    """One model and its private images: everything of sample i depends on i and these settings alone."""

    adapter: VisionAdapter
    data: ImageData
    samples: int
    batch_size: int = 1
    shared: str = "all"
    aggregation: Aggregation = SINGLE_STEP
    seed: int = 0

    def __post_init__(self):
        needed, held = self.samples * self.batch_size, len(self.data)
        if needed > held:
            raise DataError(
                f"{self.data.name} holds {held} image(s); {self.samples} sample(s) of batch size {self.batch_size} "
                f"need {needed}"
            )

    def indices(self, sample: int) -> list[int]:
        """Return the places in the data of the images of a sample."""
        return list(range(sample * self.batch_size, (sample + 1) * self.batch_size))

    def sample_seed(self, sample: int) -> int:
        """Return the seed of a sample, the same under every defense and attack, so that they compare in pairs."""
        return derived_seed(self.seed, sample)

    def batch(self, sample: int) -> Batch:
        """Return the private batch of a sample, normalised as the model reads it."""
        places = self.indices(sample)
        pixels = self.data.pixels[places].to(self.adapter.dtype)
        return self.adapter.batch(self.adapter.normalization.normalize(pixels), self.data.labels[places])

    def release(self, sample: int, defense: str = "none", *, batch: Batch | None = None) -> Release:
        """Return what the server receives of a sample, with delta = released - true for the influence function.

        Args:
            sample: Number of the sample.
            defense: Specification of the defense, whose noise has the sample's seed.
            batch: The sample's batch, if it is at hand.

        Returns:
            The release.
        """
        batch = self.batch(sample) if batch is None else batch
        true = capture_gradient(self.adapter, batch, shared=self.shared, aggregation=self.aggregation)
        return parse_defense(defense).with_seed(self.sample_seed(sample)).release(true)

    def check(self, defenses: Sequence[str], attacks: Sequence[str]) -> None:
        """Refuse what cannot be studied, before any work: every batch, defenses and products of the first, attacks.

        Args:
            defenses: Specifications of the defenses.
            attacks: Specifications of the attacks.
        """
        for sample in range(self.samples):
            self.batch(sample)
        for defense in defenses:
            self.release(0, defense)
        GradientJacobian(self.adapter, self.batch(0), shared=self.shared).verify(seed=self.seed)
        for attack in attacks:
            parse_attack(attack, task=IMAGE_TASK)

    def identity(self) -> dict[str, str]:
        """Return digests of what the settings name but do not fix: weights, images with labels, and this version."""
        batches = []
        for sample in range(self.samples):
            places = self.indices(sample)
            pixels = self.data.pixels[places].contiguous().numpy().tobytes()
            batches.append((self.data.labels[places].tolist(), hashlib.sha256(pixels).hexdigest()))
        found = identity(self.adapter, batches)
        return {"weights": found["weights"], "images": found["texts"], "lmleak": found["lmleak"]}


def study_images(config: ImageStudyConfig) -> ImageData:
    """Return the images that the settings name; all of them, since their statistics normalise them."""
    return load_images(config.data, split=config.split or None, size=config.image_size)


def image_study(
    config: ImageStudyConfig,
    model: str | nn.Module,
    data: ImageData,
    state: PartialState,
    *,
    initialization: str | None = None,
    name: str = "",
    aggregation: Aggregation = SINGLE_STEP,
) -> ImageStudy:
    """Put a model and its data together as the settings say.

    Args:
        config: The settings.
        model: As for :func:`image_adapter`, with weights of ``config.seed``.
        data: Private images.
        state: This process's place, for the device.
        initialization: How an architecture's weights are drawn.
        name: Name of the model in results; that of ``model`` if not given.
        aggregation: How the update is formed.

    Returns:
        The study, its model in the settings' precision on their device.
    """
    adapter = image_adapter(
        model, data, normalization=config.normalization, initialization=initialization, name=name, seed=config.seed,
        device=device_of(config.device, state),
    )  # fmt: skip
    adapter.model.to(PRECISIONS[config.precision])
    return ImageStudy(adapter, data, config.samples, config.batch_size, config.shared, aggregation, config.seed)


def image_adapter(
    model: str | nn.Module,
    data: ImageData,
    *,
    normalization: str | None = None,
    initialization: str | None = None,
    name: str = "",
    seed: int = 0,
    device: str = "cpu",
) -> VisionAdapter:
    """Return a model that reads the images of a data set.

    Args:
        model: One of ``ARCHITECTURES``, made for the data's image shape and classes; any other name that
            :func:`lmleak.load_adapter` knows; or a classifier in memory, which is copied.
        data: The images. They are normalised as the model says, else as ``normalization`` does.
        normalization: A data set's name, or None for the statistics of the data.
        initialization: How an architecture's weights are drawn.
        name: Name of the model in results; that of ``model`` if not given.
        seed: Seed of the weights.
        device: Where the model is put.

    Returns:
        The adapter.

    Raises:
        ConfigError: If weights that exist are to be initialised.
        UnsupportedModelError: If the model is no image classifier.
    """
    if initialization is not None and model not in ARCHITECTURES:
        raise ConfigError(
            f"initialization={initialization!r} draws the weights of an architecture; {model!r} has some"
        )
    if isinstance(model, nn.Module):
        adapter = _adapter_of(copy.deepcopy(model), data, normalization, name or type(model).__name__)
    elif model in ARCHITECTURES:
        shape, classes = data.image_shape, len(data.class_names)
        network = image_model(model, shape, classes, initialization=initialization, seed=seed)
        adapter = _adapter_of(network, data, normalization, name or model)
    else:
        adapter = load_adapter(model, task=IMAGE_TASK, device=device, seed=seed)
    if not isinstance(adapter, VisionAdapter):
        raise UnsupportedModelError(
            f"{adapter.name} is of task {adapter.task!r}; a study on images needs {IMAGE_TASK!r}"
        )
    adapter.model.to(device)
    return adapter


def _adapter_of(model: nn.Module, data: ImageData, normalization: str | None, name: str) -> ModelAdapter:
    normalization = getattr(model, "normalization", None) or data.normalization(normalization)
    return adapt(model, name=name, image_shape=data.image_shape, normalization=normalization)


def attack_rows(
    study: ImageStudy,
    sample: int,
    *,
    defenses: Sequence[str],
    attacks: Sequence[str],
    common: Mapping[str, object] | None = None,
    measure: Callable[[Batch, Release], dict] | None = None,
    keep_images: bool = False,
) -> list[dict]:
    """Return one row per defense and attack on one sample; depends on the sample and the settings alone.

    Args:
        study: Model and data.
        sample: Number of the sample.
        defenses: Specifications of the defenses.
        attacks: Specifications of the attacks.
        common: What every row says besides, such as the model; its values begin the row's key.
        measure: Returns what else is measured of a batch and its release (risk numbers), once per defense.
        keep_images: Whether rows hold the recovered images.

    Returns:
        Rows for :func:`lmleak.evaluation.run_items`: ``key``, ``common``, ``sample``, ``indices``, ``labels``,
        ``defense``, ``attack``, the gradient's and the perturbation's root mean square, what was measured, and what
        :func:`scored_image_attack` says.
    """
    batch, seed, common = study.batch(sample), study.sample_seed(sample), dict(common or {})
    rows = []
    for defense in defenses:
        release = study.release(sample, defense, batch=batch)
        squares = sum(delta.double().square().sum().item() for delta in release.perturbation.values())
        measured = {
            "sample": sample,
            "indices": study.indices(sample),
            "labels": batch.targets.tolist(),
            "defense": defense,
            "released_rms": release.shared.rms,
            "perturbation_rms": (squares / release.shared.num_coordinates) ** 0.5,
        } | ({} if measure is None else measure(batch, release))
        for spec in attacks:
            key = "|".join(map(str, (*common.values(), sample, defense, spec)))
            attack = parse_attack(spec, task=IMAGE_TASK)
            scored = scored_image_attack(
                attack, study.adapter, release.shared, batch, seed=seed, keep_images=keep_images
            )
            rows.append({"key": key} | common | measured | {"attack": spec} | scored)
    return rows


def study_folder(config: ImageStudyConfig, studies: Mapping[str, ImageStudy]) -> ResultFolder:
    """Return the folder of a study's results, which refuses results of other settings, weights or images.

    Args:
        config: The recipe's settings.
        studies: Every study of the run by its name.

    Returns:
        The folder, for :func:`lmleak.evaluation.run_items`.
    """
    digests = {f"{name} {what}": d for name, study in studies.items() for what, d in study.identity().items()}
    return ResultFolder(Path(config.output), decisive_settings(config), identity=digests, resume=config.resume)
