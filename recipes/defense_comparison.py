"""How much does each defense protect, at equal utility?

Every setting of the list (a defense, or a choice of what is trained) is judged twice, on the very same releases:
- utility: a short fine-tuning from a pretrained model, parts of which start anew. Every step, each of ``clients``
  clients draws texts from its own share (Poisson sampling, ``batch_size`` expected), and releases their gradient,
  defended; the server steps by the mean of the releases. Accuracy on held-out texts; the learning rate is the one of
  highest validation accuracy for that setting, so that no defense is judged by a bad rate;
- leakage: attacks on releases of ``batch_size`` held-out texts before the first step. A setting leaks what the attack
  of highest mean token recall recovers: a lower bound, because a stronger attack or more iterations may recover more.
  Where an attack refuses a release, it has recovered nothing of it.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/defense_comparison.py
        --config configs/defense_comparison/reference-bert.yaml

(one line). A killed run continues where it stopped. One process or several give the same rows. For ``dp`` the table
shows the epsilon of all releases of a run, and of one release to someone who knows that the text was in it (add or
remove one text; ``lmleak.defenses.privacy``). The search over learning rates is not accounted.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from defense_report import comparison, figure, tables
from defense_settings import Setting, start_anew
from rich.console import Console
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from lmleak.adapters import TextAdapter, load_adapter
from lmleak.attacks import parse_attack
from lmleak.config import check_counts, check_positive, parse_config
from lmleak.data import load_examples
from lmleak.data.embedded import messages
from lmleak.defenses import derived_seed
from lmleak.errors import ConfigError, DataError, UnsupportedCombinationError
from lmleak.evaluation import ResultFolder, exit_status, finish, process_state, run_items
from lmleak.evaluation.audit import identity
from lmleak.evaluation.labels import class_numbers
from lmleak.files import write_csv_atomically
from lmleak.metrics import score_text
from lmleak.types import IGNORE, TextBatch

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
NEW_WEIGHTS, NEW_TEXTS, SPLIT, DRAWS, RELEASES, ATTACKED, SEARCH = range(7)  # independent random streams
EVALUATED_TOGETHER = 64
Text = tuple[str, int | None]


@dataclass(frozen=True)
class ComparisonConfig:
    """Compare defenses by what attacks recover and by the accuracy that they cost."""

    settings: list[str]
    """What is compared: none, a defense, dp(max_norm=, noise_multiplier=), dropout(p=), freeze-embeddings,
    lora(rank=), or several joined by "+"; "none" must be among them."""
    attacks: list[str] = field(default_factory=lambda: ["bag(lengths=given)", "span", "gs(iterations=100)"])
    """Attacks on every setting; one that does not apply is recorded with its reason."""
    model: str = "reference-bert"
    """Embedded name, local directory, shape file or hub id of a classifier or causal language model."""
    task: str | None = None
    """sequence-classification or causal-lm; read from the model if not given."""
    fresh: list[str] = field(default_factory=lambda: ["head"])
    """Parts that start anew, so that there is something to learn: head, "block 1", ..."""
    data: str | None = None
    """File or datasets id of texts with labels; messages that the package writes if not given."""
    text_column: str | None = None
    """Column of the text."""
    label_column: str | None = None
    """Column of the class."""
    max_length: int | None = None
    """Truncate texts to this many tokens."""
    training_texts: int = 1000
    """Texts of all clients together."""
    validation_texts: int = 200
    """Texts on which the learning rate is chosen."""
    test_texts: int = 400
    """Texts on which accuracy is measured."""
    clients: int = 4
    """Releases per step; each client holds an equal share of the training texts."""
    batch_size: int = 1
    """Expected texts per release; exactly so many in a release that is attacked."""
    steps: int = 40
    """Steps of fine-tuning."""
    optimizer: str = "adam"
    """The server's: adam or sgd."""
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3])
    """Tried for every setting."""
    samples: int = 3
    """Releases attacked per setting."""
    delta: float = 1e-5
    """Of (epsilon, delta)-differential privacy."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "runs/defense_comparison"
    """Folder for rows, table and figure."""

    def __post_init__(self):
        counts = ("training_texts", "validation_texts", "test_texts", "clients", "batch_size", "steps", "samples")
        check_counts(self, *counts)
        if "none" not in self.settings or len(set(self.settings)) != len(self.settings):
            raise ConfigError(f"settings must hold none, which accuracy is lost from, and each once: {self.settings}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        check_positive(self, "learning_rates")
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta must lie between 0 and 1, got {self.delta}")
        if not self.attacks:
            raise ConfigError("a comparison needs at least one attack")
        if (share := self.training_texts // self.clients) < self.batch_size:
            raise ConfigError(f"a client holds {share} text(s), fewer than batch_size={self.batch_size}")
        for spec in self.settings:
            Setting(spec)
        for spec in self.attacks:
            parse_attack(spec)

    @property
    def sample_rate(self) -> float:
        """Probability that a text enters its client's release; of shares that differ by one text, the larger."""
        return self.batch_size / (self.training_texts // self.clients)


@dataclass(frozen=True)
class Splits:
    """Texts with labels; none is in two of the parts."""

    training: list[Text]
    validation: list[Text]
    test: list[Text]
    attacked: list[Text]


def load_splits(config: ComparisonConfig, adapter: TextAdapter) -> Splits:
    """Return the four parts of the data, without duplicates, in an order drawn from the seed."""
    sizes = (config.training_texts, config.validation_texts, config.test_texts, config.samples * config.batch_size)
    labelled = adapter.task == "sequence-classification"
    if config.data is None:
        known = {m.text for m in messages(12000, seed=0)}  # what the embedded models were trained on
        written = messages(3 * sum(sizes), seed=derived_seed(config.seed, NEW_TEXTS))
        rows, origin = [(m.text, m.label) for m in written if m.text not in known], "the embedded message writer"
    else:
        found = load_examples(config.data, text_column=config.text_column, label_column=config.label_column)
        labels = class_numbers(found.labels, adapter, found.origin) if labelled else [None] * len(found.texts)
        rows, origin = list(zip(found.texts, labels, strict=True)), found.origin
    distinct = list({text: (text, label if labelled else None) for text, label in rows}.values())
    if len(distinct) < sum(sizes):
        raise DataError(f"{origin} gives {len(distinct)} different texts, and {sum(sizes)} are asked for")
    order = torch.randperm(len(distinct), generator=generator_of(config.seed, SPLIT)).tolist()
    places = iter(order)
    return Splits(*([distinct[next(places)] for _ in range(size)] for size in sizes))


def generator_of(seed: int, stream: int) -> torch.Generator:
    """Return the generator of one random stream."""
    return torch.Generator().manual_seed(derived_seed(seed, stream))


def start(config: ComparisonConfig, setting: Setting) -> TextAdapter:
    """Return the model before the first step, the same for every setting but for what is trained."""
    adapter = load_adapter(config.model, task=config.task, seed=config.seed)
    if adapter.task not in ("sequence-classification", "causal-lm"):
        raise ConfigError(f"accuracy is measured for classifiers and causal language models, not for {adapter.task!r}")
    start_anew(adapter, tuple(config.fresh), derived_seed(config.seed, NEW_WEIGHTS))
    return setting.prepare(adapter, tuple(config.fresh), config.seed)


def batch_of(config: ComparisonConfig, adapter: TextAdapter, texts: list[Text]) -> TextBatch:
    """Return the batch of some texts."""
    labels = [label for _, label in texts] if adapter.task == "sequence-classification" else None
    return adapter.batch([text for text, _ in texts], labels, max_length=config.max_length)


# Utility ----------------------------------------------------------------------------------------------------


def fine_tune(
    config: ComparisonConfig, setting: Setting, training: list[Text], rate: float
) -> tuple[TextAdapter, int]:
    """Return the model after a training by releases alone, and the step at which it diverged (0: it did not)."""
    adapter = start(config, setting)
    trained = {name: p for name, p in adapter.model.named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[config.optimizer](trained.values(), lr=rate)
    shares = [training[c :: config.clients] for c in range(config.clients)]
    draws = generator_of(config.seed, DRAWS)
    for step in range(config.steps):
        optimizer.zero_grad()
        for client, share in enumerate(shares):
            drawn = (torch.rand(len(share), generator=draws) < config.batch_size / len(share)).nonzero()[:, 0]
            seed = derived_seed(derived_seed(config.seed, RELEASES), step * config.clients + client)
            batch = batch_of(config, adapter, [share[i] for i in drawn.tolist()]) if len(drawn) else None
            try:
                release = release_of(setting, adapter, batch, config.batch_size, seed)
            except DataError:  # a gradient that is not finite
                return adapter, step + 1
            for name, value in release.items():
                mean = value / config.clients
                trained[name].grad = mean if trained[name].grad is None else trained[name].grad + mean
        optimizer.step()
        if not all(p.isfinite().all() for p in trained.values()):
            return adapter, step + 1
    return adapter, 0


def release_of(
    setting: Setting, adapter: TextAdapter, batch: TextBatch | None, expected: int, seed: int
) -> dict[str, Tensor]:
    """Return one defended release: the gradient summed over the drawn texts, over their *expected* number.

    Dividing by the number that was drawn would tell it, and bound no text's influence. None stands for no text.
    """
    defense = setting.defense(expected, seed)
    if batch is None:
        return defense.apply({name: torch.zeros_like(p) for name, p in adapter.parameters().items()})
    gradient = setting.capture(adapter, batch, seed).gradient
    return defense.apply({name: g * (batch.size / expected) for name, g in gradient.items()})


def scores(config: ComparisonConfig, adapter: TextAdapter, texts: list[Text]) -> tuple[list[float], float]:
    """Return per text the share of targets that the model finds likeliest, and the mean loss."""
    right, losses = [], []
    for first in range(0, len(texts), EVALUATED_TOGETHER):
        batch = batch_of(config, adapter, texts[first : first + EVALUATED_TOGETHER])
        with torch.no_grad():
            logits = adapter.logits_from_ids(batch)
            losses += [adapter.loss(adapter.input(batch), batch.targets, batch.layout).item()] * batch.size
        if batch.targets.dim() == 1:
            right += (logits.argmax(-1) == batch.targets).double().tolist()
        else:
            logits, targets = logits[:, :-1], batch.targets[:, 1:]
            hits = ((logits.argmax(-1) == targets) & (targets != IGNORE)).sum(1)
            right += (hits / (targets != IGNORE).sum(1)).double().tolist()
    return right, sum(losses) / len(losses)


def utility_rows(config: ComparisonConfig, splits: Splits, spec: str, rate: float) -> list[dict]:
    """Return one row: a setting's accuracy after fine-tuning at one learning rate."""
    adapter, diverged = fine_tune(config, Setting(spec), splits.training, rate)
    validation, _ = scores(config, adapter, splits.validation)
    test, loss = scores(config, adapter, splits.test)
    row = {
        "key": f"{spec}|utility|{rate:g}", "kind": "utility", "setting": spec, "learning_rate": rate,
        "validation_accuracy": sum(validation) / len(validation), "test_scores": test,
        "test_loss": loss if math.isfinite(loss) else None, "diverged_at_step": diverged,
        "trained": sum(p.numel() for p in adapter.parameters().values()),
    }  # fmt: skip
    return [row]


# Leakage ----------------------------------------------------------------------------------------------------


def leakage_rows(config: ComparisonConfig, splits: Splits, spec: str, sample: int) -> list[dict]:
    """Return one row: what every attack recovers from one release of a setting."""
    setting = Setting(spec)
    adapter = start(config, setting)
    batch = batch_of(config, adapter, splits.attacked[sample * config.batch_size :][: config.batch_size])
    seed = derived_seed(derived_seed(config.seed, ATTACKED), sample)
    shared = setting.defense(config.batch_size, seed)(setting.capture(adapter, batch, seed))
    found = {}
    for attack in config.attacks:
        try:  # hashed: from its own seed no attack can compute that of the noise
            recovered = parse_attack(attack).run(adapter, shared, seed=derived_seed(seed, SEARCH))
        except UnsupportedCombinationError as error:
            found[attack] = {"refused": str(error)}
            continue
        score = score_text(recovered, batch)
        found[attack] = {name: getattr(score, name) for name in ("token_recall", "rouge1", "exact_match")}
        found[attack] |= {"seconds": recovered.cost.seconds, "texts": list(recovered.texts)}
    return [{"key": f"{spec}|leakage|{sample}", "kind": "leakage", "setting": spec, "sample": sample,
             "texts": list(batch.texts), "defenses": list(shared.defenses), "attacks": found}]  # fmt: skip


# The study --------------------------------------------------------------------------------------------------


def items_of(config: ComparisonConfig) -> Iterator[tuple[str, str, float | int]]:
    """Yield everything that is measured, setting by setting."""
    for spec in config.settings:
        yield from (("utility", spec, rate) for rate in config.learning_rates)
        yield from (("leakage", spec, sample) for sample in range(config.samples))


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(ComparisonConfig, argv, prog="defense_comparison.py")
    state = process_state()
    torch.set_num_threads(1)
    disable_progress_bar()  # of weight loading; the study has its own
    adapter = start(config, Setting("none"))
    splits = load_splits(config, adapter)
    measure = {"utility": utility_rows, "leakage": leakage_rows}
    items = list(items_of(config))
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    folder = ResultFolder(config.output, settings, identity=identity(adapter, list(vars(splits).values())))
    work = lambda _, item: measure[item[0]](config, splits, *item[1:])
    rows = run_items(items, work, folder, state, label="comparing")
    if state.is_main_process:
        entries = comparison(rows, config)
        write_csv_atomically(folder.path / "defense_comparison.csv", [asdict(entry) for entry in entries])
        figure(entries, folder.path / "defense_comparison.png")
        console = Console(width=None if sys.stdout.isatty() else 200)
        for table in tables(entries, config):
            console.print(table)
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
