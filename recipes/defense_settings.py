"""What a client of ``defense_comparison.py`` does: which parameters it trains, and how it defends a gradient."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch

from lmleak.adapters import TextAdapter, adapt
from lmleak.defenses import DEFENSES, Chain, Defense, GaussianNoise, NoDefense
from lmleak.errors import ConfigError
from lmleak.gradients import SharedGradient, capture_gradient
from lmleak.specification import build_parts
from lmleak.types import TextBatch

EXAMPLE = "lora(rank=8)+dp(max_norm=1, noise_multiplier=1)"


@dataclass(frozen=True)
class FreezeEmbeddings:
    """Train everything but the embeddings: tables of words, positions and types, and their LayerNorm."""


@dataclass(frozen=True)
class Lora:
    """Train low-rank updates of the attention inputs, and the parts that start anew; alpha = 2 rank."""

    rank: int = 8


@dataclass(frozen=True)
class Dropout:
    """Take gradients with the model's dropouts on, all at one probability."""

    p: float = 0.1


@dataclass(frozen=True)
class DifferentialPrivacy:
    """Clip each example's gradient to norm C = ``max_norm``; add N(0, (z C / B)^2) to their sum over B."""

    max_norm: float
    noise_multiplier: float
    """z."""

    def __post_init__(self):
        if not (self.max_norm > 0 and self.noise_multiplier > 0):
            raise ConfigError(f"dp needs max_norm > 0 and noise_multiplier > 0, got {self}; write {EXAMPLE!r}")


TRAINING = {"freeze-embeddings": FreezeEmbeddings, "lora": Lora, "dropout": Dropout, "dp": DifferentialPrivacy}


@dataclass(frozen=True)
class Setting:
    """One way to train and to defend, read from a specification such as "freeze-embeddings+prune(ratio=0.9)"."""

    spec: str

    def __post_init__(self):
        kinds = [type(part) for part in self.parts]
        if repeated := [kind for kind in TRAINING.values() if kinds.count(kind) > 1]:
            raise ConfigError(f"setting {self.spec!r} names {repeated[0].__name__} twice; write it once")
        releasing = [kind for kind in kinds if kind in (DifferentialPrivacy, *DEFENSES.values())]
        if self.dp and releasing[0] is not DifferentialPrivacy:
            raise ConfigError(f"setting {self.spec!r}: dp comes before other defenses, or its epsilon may not hold")

    @cached_property
    def parts(self) -> tuple:
        """The parts, in order."""
        return build_parts(self.spec, "setting", DEFENSES | TRAINING, EXAMPLE)

    def part(self, kind: type):
        """Return the part of a kind, or None."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    @property
    def dp(self) -> DifferentialPrivacy | None:
        """Clipping per example and its noise."""
        return self.part(DifferentialPrivacy)

    @property
    def family(self) -> str:
        """The names of the parts; settings of one family differ in strength."""
        names = {kind: name for name, kind in (DEFENSES | TRAINING).items()}
        return "+".join(names[type(part)] for part in self.parts)

    def defense(self, batch_size: int, seed: int) -> Defense:
        """Return what is applied to the mean over a batch, clipped per example beforehand if ``dp`` says so."""
        parts = [part for part in self.parts if isinstance(part, Defense)]
        if self.dp:
            parts.insert(0, GaussianNoise(std=self.dp.noise_multiplier * self.dp.max_norm / batch_size))
        return Chain(tuple(parts) or (NoDefense(),)).with_seed(seed)

    def prepare(self, adapter: TextAdapter, fresh: tuple[str, ...], seed: int) -> TextAdapter:
        """Return the model that the client trains; the given one is used up.

        Args:
            adapter: The start.
            fresh: Roles whose parameters start anew, so that LoRA must train them whole.
            seed: Seed of LoRA's initial weights.

        Returns:
            The adapter of the model, ``requires_grad`` where it is trained.
        """
        if self.part(FreezeEmbeddings):
            for name in adapter.roles()["embeddings"]:
                adapter.model.get_parameter(name).requires_grad_(False)
        if dropout := self.part(Dropout):
            for module in adapter.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = dropout.p
                elif isinstance(getattr(module, "attention_dropout", None), float):
                    module.attention_dropout = dropout.p
        lora = self.part(Lora)
        return with_lora(adapter, lora.rank, fresh, seed) if lora else adapter

    def capture(self, adapter: TextAdapter, batch: TextBatch, seed: int) -> SharedGradient:
        """Return the gradient of all trained parameters, before the defense."""
        return capture_gradient(
            adapter, batch, shared="all", seed=seed, dropout=self.part(Dropout) is not None,
            max_example_norm=self.dp.max_norm if self.dp else None,
        )  # fmt: skip


def with_lora(adapter: TextAdapter, rank: int, fresh: tuple[str, ...], seed: int) -> TextAdapter:
    """Return the adapter of the model with LoRA on the attention inputs of every block that does not start anew."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("the setting lora needs peft; install lmleak[lora]") from error
    roles = adapter.roles()
    whole = {name.rpartition(".")[0] for role in fresh for name in roles[role]}
    blocks = [i for i in range(len(adapter.blocks)) if f"block {i}" not in fresh]
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[path for i in blocks for path in adapter.attention_inputs(i)],
        modules_to_save=sorted(whole),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of maps stored as (d_in, d_out), which peft recognises by itself
        torch.default_generator.manual_seed(seed)  # peft draws from the global generator
        model = peft.get_peft_model(adapter.model, config)
    return adapt(model, tokenizer=adapter.tokenizer, task=adapter.task, name=adapter.name)


def start_anew(adapter: TextAdapter, roles: tuple[str, ...], seed: int) -> None:
    """Draw the parameters of some roles anew, in place: matrices N(0, 0.02^2), LayerNorm 1, biases 0."""
    available = adapter.roles()
    if unknown := [role for role in roles if role not in available]:
        raise ConfigError(f"fresh={unknown[0]!r} is no part of {adapter.name}; it has {', '.join(available)}")
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter.parameters()
    for name in (name for role in roles for name in available[role]):
        p = parameters[name]
        p.copy_(0.02 * torch.randn(p.shape, generator=generator) if p.dim() > 1 else torch.full(
            p.shape, float(name.endswith("weight"))))  # fmt: skip
