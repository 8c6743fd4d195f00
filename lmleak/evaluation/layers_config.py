"""The settings of ``lmleak layers``."""

from dataclasses import dataclass, field
from typing import Literal

from lmleak.adapters.targets import IMAGE_TASK
from lmleak.attacks import parse_attack
from lmleak.defenses import parse_defense
from lmleak.errors import ConfigError
from lmleak.evaluation.attacks import Sharing
from lmleak.evaluation.layers import GROUPS, LayerSettings
from lmleak.evaluation.layers_capture import CaptureSettings
from lmleak.evaluation.layers_protection import ProtectionSettings
from lmleak.types import Aggregation

TEXT_ATTACKS = ("span",)
IMAGE_ATTACKS = ("gs(iterations=150)",)


@dataclass(frozen=True)
class LayersConfig:
    """Measure which layer's gradient leaks what of labelled private data, and which layers to protect first."""

    model: str = "reference-bert"
    """Embedded name, architecture of images (lenet, resnet20, ...), local directory, shape file or hub id."""
    task: str | None = None
    """sequence-classification, causal-lm, masked-lm or image-classification; read from the model if not given."""
    tokenizer: str | None = None
    """Name or directory of the tokenizer, if it is not beside the model."""
    initialization: str | None = None
    """How the weights of an architecture of images are drawn."""
    data: str | None = None
    """A table or file of texts, or images (digits, MNIST files, .npz, .zip, folder); embedded data if not given."""
    split: str | None = None
    """Part of the data, where it has several."""
    text_column: str | None = None
    """Column that holds the text; a number in a file without a header."""
    label_column: str | None = None
    """Column that holds the class, for a classifier."""
    attribute_column: list[str] = field(default_factory=list)
    """Columns that hold private attributes of the text."""
    attribute: list[str] = field(default_factory=list)
    """Attributes made from the data itself. Texts: label, number, name, negation, question, long, coin; by default
    number and label. Images: mark, label, parity, coin; by default mark and parity. coin is a control."""
    mark: Literal["tint", "rotate", "stroke"] = "tint"
    """What the attribute mark puts into a random half of the images."""
    group_column: str | None = None
    """Column of the author or source, if texts of one author resemble each other."""
    samples: int = 400
    """Most examples."""
    max_length: int | None = None
    """Truncate texts to this many tokens; too long texts are refused otherwise."""
    image_size: int | None = None
    """Resize images to this height and width."""
    normalization: str | None = None
    """How an architecture reads pixels: mnist, cifar10, cifar100, imagenet or none; else by the data's statistics."""
    shared: str | None = None
    """Parameters whose gradient is shared; by default no-word-embeddings for texts, all for images."""
    granularity: Literal["role", "module"] = "role"
    """A layer is a role (embeddings, block i, head; of images a module), or each module that owns parameters."""
    batch_size: int = 1
    """Examples per gradient: the one that is attacked and others drawn at random."""
    defense: str = "none"
    """What is done to every gradient before it is shared, e.g. "clip(max_norm=1)+gaussian(std=0.01)"."""
    dropout: bool = False
    """Whether the model's dropout is on."""
    local_steps: int = 1
    """Local steps of the client, over the whole batch each."""
    learning_rate: float | None = None
    """Of the local steps."""
    metrics: list[str] = field(default_factory=lambda: list(GROUPS))
    """Groups of metrics: sensitivity, influence, subspace, mean-difference, discrepancy, latent, original."""
    families: list[str] = field(default_factory=lambda: ["linear"])
    """Predictive families of the V-information, the smallest first: linear, forest, mlp, ..."""
    features: int = 256
    """Features kept of each layer's gradient; they are part of the predictive family."""
    projection: Literal["random", "pca"] = "random"
    """How they are made; pca is fitted on the first shard, without attributes, and its gradients are tested on too."""
    folds: int = 5
    """Parts of the cross-fitting."""
    permutations: int = 100
    """Shuffles of the permutation tests."""
    subspace: int = 8
    """Dimensions of the gradient subspace of an attribute's value."""
    gradients: int = 5000
    """Most gradients that V-information is estimated from."""
    pairs: int = 600
    """Most gradients that are compared in pairs."""
    sensitivity_examples: int = 8
    """Examples whose Jacobians are measured."""
    probes: int = 16
    """Random directions per Jacobian of more than 256 input coordinates."""
    influence_examples: int = 2
    """Examples whose layer-wise I2F is solved for."""
    noise: float = 0.1
    """Noise of the layer-wise I2F, in multiples of the gradient's root mean square."""
    tolerance: float = 1e-2
    """Relative residual of its solves."""
    max_products: int = 100
    """Most products per solve; an unconverged number is marked."""
    attacks: list[str] | None = None
    """Attacks on the gradient with layers hidden; by default span for texts, gs(iterations=150) for images."""
    attack_examples: int = 8
    """Examples attacked per set of hidden layers."""
    protection_gradients: int = 1000
    """Most gradients that the information left by hidden layers is estimated from."""
    steps: int = 4
    """Most numbers of hidden layers tried per order of protection."""
    greedy: bool = True
    """Whether to add the greedy order of conditional information (at most 8 layers)."""
    seed: int = 0
    """Seed of weights, projection, folds, shuffles, probes and attacks."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int | None = None
    """CPU threads per process; if not given, one for small models, else torch's choice."""
    output: str = "lmleak-layers"
    """Folder for gradients, results.jsonl, protection, summary.json, config.yaml, figures and report.html."""
    resume: bool = True
    """Continue a run of the same configuration that was interrupted."""
    processes: int | None = None
    """Refuse to run unless this many processes are running."""

    def __post_init__(self):
        if self.samples < 2:
            raise ConfigError(f"samples must be at least 2, got {self.samples}")
        parse_defense(self.defense)
        Aggregation(epochs=self.local_steps, learning_rate=self.learning_rate)
        if not self.metrics or not self.families:
            raise ConfigError("nothing to measure: give metrics= and families=")

    def layer_settings(self, *, images: bool) -> LayerSettings:
        """Return what is measured of every layer."""
        sharing = Sharing(
            self.defense, parse_defense(self.defense), self.shared or ("all" if images else "no-word-embeddings"),
            dropout=self.dropout,
            aggregation=Aggregation(epochs=self.local_steps, learning_rate=self.learning_rate),
        )  # fmt: skip
        capture = CaptureSettings(
            sharing, self.batch_size, self.granularity, self.features, self.projection, self.seed
        )  # fmt: skip
        return LayerSettings(
            capture, tuple(self.metrics), tuple(self.families), self.folds, self.permutations, self.subspace,
            gradients=self.gradients, pairs=self.pairs, sensitivity_examples=self.sensitivity_examples,
            probes=self.probes, influence_examples=self.influence_examples, noise=self.noise,
            tolerance=self.tolerance, max_products=self.max_products, seed=self.seed,
        )  # fmt: skip

    def protection_settings(self, task: str) -> ProtectionSettings:
        """Return how orders of protection are verified."""
        usual = IMAGE_ATTACKS if task == IMAGE_TASK else TEXT_ATTACKS
        attacks = usual if self.attacks is None else tuple(self.attacks)
        for spec in attacks:
            parse_attack(spec, task=task)
        return ProtectionSettings(attacks, self.attack_examples, self.protection_gradients, self.steps, self.greedy)
