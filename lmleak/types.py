"""The typed things that pass between stages; frozen, shapes documented per field.

Letters: B batch, T tokens, D width of an embedding, V vocabulary, P shared parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from torch import Tensor

from lmleak.errors import ConfigError, DataError

IGNORE = -100  # target value that carries no loss, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Batch:
    """What the data owner holds: one private training batch. Attacks never receive this type."""

    inputs: Mapping[str, Tensor]
    """The private tensors: {"input_ids": (B, T)} or {"pixel_values": (B, C, H, W)}."""
    targets: Tensor
    """(B,) class labels or (B, T) token targets with ``IGNORE`` where there is no loss."""
    layout: Mapping[str, Tensor] = field(default_factory=dict)
    """What shapes the computation but is not the secret: {"attention_mask": (B, T)} for text."""

    @property
    def size(self) -> int:
        """Number of examples B."""
        return len(self.targets)


@dataclass(frozen=True)
class TextBatch(Batch):
    """A batch of token sequences, with the reference that recovered text is scored against."""

    texts: tuple[str, ...] = ()
    """What the owner wrote, decoded from the tokens the model sees, special tokens removed."""
    token_ids: tuple[tuple[int, ...], ...] = ()
    """The private tokens of each text, special tokens and padding removed (unmasked, for masked LM)."""


@dataclass(frozen=True)
class Aggregation:
    """How the released update was formed from batches; the server runs the protocol, so it knows this.

    Several local steps (FedAvg) are released as a gradient too: the update divided by what scaled it,
    ``(theta_0 - theta_K) / (learning_rate K)``, averaged over clients. One client and one step is FedSGD.
    """

    clients: int = 1
    """Clients whose updates were averaged, with equal weight; each holds an equal share of the batch, in order."""
    epochs: int = 1
    """Passes of a client over its share."""
    steps_per_epoch: int = 1
    """Plain SGD steps per pass; consecutive examples share a step."""
    learning_rate: float | None = None
    """Of the local steps; None for a single step, where it cancels."""

    def __post_init__(self):
        for name in ("clients", "epochs", "steps_per_epoch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"aggregation: {name} must be an integer of at least 1, got {value!r}")
        rate = self.learning_rate
        if rate is None and self.steps > 1:
            raise ConfigError(
                f"aggregation: {self.steps} local steps need learning_rate=, by which the released update is divided"
            )
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < inf):
            raise ConfigError(f"aggregation: learning_rate must be a positive number, got {rate!r}")

    @property
    def steps(self) -> int:
        """Local steps K of a client."""
        return self.epochs * self.steps_per_epoch

    def schedule(self, batch_size: int) -> list[list[slice]]:
        """Return the rows of the batch that each client takes at each of its K local steps.

        Args:
            batch_size: B, over all clients and steps.

        Returns:
            ``clients`` lists of K slices, all of B / (clients steps_per_epoch) rows.

        Raises:
            DataError: If the batch cannot be divided so.
        """
        size, rest = divmod(batch_size, self.clients * self.steps_per_epoch)
        if rest or not size:
            raise DataError(
                f"a batch of {batch_size} cannot be divided into equal parts for {self.clients} client(s) with "
                f"{self.steps_per_epoch} step(s) per epoch; its size must be a multiple of "
                f"{self.clients * self.steps_per_epoch}"
            )
        starts = range(0, batch_size, size)
        per_client = [starts[c * self.steps_per_epoch :][: self.steps_per_epoch] for c in range(self.clients)]
        return [[slice(i, i + size) for _ in range(self.epochs) for i in share] for share in per_client]


SINGLE_STEP = Aggregation()  # FedSGD


@dataclass(frozen=True)
class Observation:
    """What an attacker sees: a released gradient and public facts. It has no field for the truth."""

    gradient: Mapping[str, Tensor]
    """Released gradient per parameter name, as in ``model.named_parameters()``."""
    task: str
    """"sequence-classification", "causal-lm", "masked-lm" or "image-classification"."""
    batch_size: int
    """B, over all clients and local steps."""
    shared: str = "all"
    """The ``shared=`` specification by which the parameters were chosen."""
    aggregation: Aggregation = SINGLE_STEP
    """How the update was formed."""
    defenses: tuple[str, ...] = ()
    """Public description of what was applied, in order; never the seed of the noise."""
    layout: Mapping[str, Tensor] | None = None
    """Lengths and padding (attention_mask (B, T), token_type_ids), only if the attack assumes them known."""
    labels: Tensor | None = None
    """(B,) class labels, only if the attack assumes them known. Token targets are never given."""


@dataclass(frozen=True)
class AttackCost:
    """What an attack spent."""

    seconds: float
    gradient_evaluations: int = 0
    """Full-model gradients; a double backward counts as three."""
    iterations: int = 0
    peak_bytes: int | None = None
    """Largest memory in use during the attack beyond that at its start; None where it was not measured."""


@dataclass(frozen=True)
class Reconstruction:
    """What an attack recovered; sequences are in no particular order."""

    attack: str
    token_ids: tuple[tuple[int, ...], ...]
    """Recovered tokens per sequence, special tokens and padding removed."""
    texts: tuple[str, ...]
    """The same, decoded."""
    confidence: tuple[tuple[float, ...], ...]
    """Per recovered token, in [0, 1], larger is surer; each attack documents its scale."""
    cost: AttackCost
    stopped: str
    """Why the attack ended, in words: "converged", "iteration limit", "no candidate left at position 7"."""
    objective: float | None = None
    """Final value of what the attack minimised, if it has one."""
    embeddings: tuple[Tensor, ...] | None = None
    """Recovered inputs per sequence, (T_i, D), special tokens included, if the attack works in that space."""
    notes: tuple[str, ...] = ()
    """What the user should know, e.g. "the last position never enters the loss"."""


@dataclass(frozen=True)
class ImageReconstruction:
    """What an attack recovered from the gradient of images, in no particular order."""

    attack: str
    images: Tensor
    """(B, C, H, W) on the CPU, normalised as the model reads them; pixel values: ``Normalization.pixels``."""
    labels: Tensor | None
    """(B,) the class of each image, given or inferred; None if the attack needed none."""
    cost: AttackCost
    stopped: str
    """Why the attack ended, in words."""
    objective: float | None = None
    """Final value of what the attack minimised, if it has one."""
    notes: tuple[str, ...] = ()
    """What the user should know."""


@dataclass(frozen=True)
class Normalization:
    """How pixel values in [0, 1] become what a model reads: (pixel - mean) / std, per channel."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    """One number per channel, or one for all."""

    def __post_init__(self):
        if len(self.mean) != len(self.std) or not self.mean or not all(0 < s < inf for s in self.std):
            raise ConfigError(
                f"normalization: mean and std need one finite number per channel, std positive; got mean={self.mean}, "
                f"std={self.std}"
            )

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return pixel values (..., C, H, W) in [0, 1] as the model reads them."""
        return (pixels - self._per_channel(self.mean, pixels)) / self._per_channel(self.std, pixels)

    def pixels(self, x: Tensor) -> Tensor:
        """Return pixel values of what the model reads, not clipped to [0, 1]."""
        return x * self._per_channel(self.std, x) + self._per_channel(self.mean, x)

    @staticmethod
    def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
        return like.new_tensor(values)[:, None, None]


@dataclass(frozen=True)
class Magnitude:
    """A vector's size in the two units that are never mixed."""

    l2: float
    """Euclidean norm, in units of x."""
    rms: float
    """``l2 / sqrt(dx)``: what an attack's RMSE compares with."""
