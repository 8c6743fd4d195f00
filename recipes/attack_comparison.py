"""Which attack recovers how much, at what cost?

Every attack on the same gradients: models x data sets x batch sizes x defenses x samples. ROUGE-1/2/L, token
precision, recall and exact match with 95 % bootstrap intervals over samples, the paired difference to the best attack,
and the cost in gradients of the same model in the same run. ROUGE as LAMP and DAGER count it is in the csv file.

    accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/attack_comparison.py
        --config configs/attack_comparison/default.yaml
    accelerate launch --config_file configs/accelerate/cpu2.yaml recipes/attack_comparison.py
        --config configs/attack_comparison/cola.yaml --data path/to/in_domain_dev.tsv --processes 2

(each command on one line). A killed run continues where it stopped. One process or several give the same rows.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from accelerate import PartialState
from rich.console import Console

from lmleak.attacks import parse_attack
from lmleak.config import check_counts, parse_config
from lmleak.defenses import derived_seed, parse_defense
from lmleak.errors import ConfigError
from lmleak.evaluation import (
    AuditConfig,
    ExampleEvaluator,
    ResultFolder,
    exit_status,
    finish,
    process_state,
    run_items,
)
from lmleak.evaluation.attacks import Sharing, attack_result, attack_specs, gradient_seconds, model_of
from lmleak.evaluation.audit import example_settings, identity, make_items
from lmleak.evaluation.circumstances import decisive_settings
from lmleak.evaluation.model import ModelConfig
from lmleak.evaluation.scored import seeded_batch
from lmleak.files import write_bytes_atomically, write_csv_atomically
from lmleak.report.comparison import compare, comparison_figure, comparison_table, refusal_lines
from lmleak.report.drawing import encode

EMBEDDED = "embedded"


@dataclass(frozen=True)
class ComparisonConfig:
    """Compare attacks over models, data sets, batch sizes and defenses."""

    models: list[str] = field(default_factory=lambda: ["reference-bert", "reference-gpt2"])
    """Embedded names, local directories, shape files (.yaml) or hub ids."""
    tasks: list[str] = field(default_factory=list)
    """Task of each model, if they are not to be read from the models."""
    data: list[str] = field(default_factory=lambda: [EMBEDDED])
    """Files (.txt, .csv, .tsv, .jsonl, .parquet), datasets ids, or "embedded" for the embedded samples."""
    text_columns: list[str] = field(default_factory=list)
    """Text column of each of data, a number in a file without a header; found by itself if not given or ""."""
    label_columns: list[str] = field(default_factory=list)
    """Class column of each of data, likewise."""
    splits: list[str] = field(default_factory=list)
    """Split of each of data that is a datasets id."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Texts per gradient."""
    samples: int = 4
    """Gradients per combination; sample i takes the i-th batch of the data."""
    max_length: int | None = None
    """Truncate texts to this many tokens; too long texts are refused otherwise."""
    shared: str = "no-word-embeddings"
    """Parameters whose gradient is shared: all, no-word-embeddings, embeddings, block:0-3, head, lora or a regex."""
    defenses: list[str] = field(default_factory=lambda: ["none"])
    """Chains of defenses: none "clip(max_norm=1)+gaussian(std=0.01)"."""
    attacks: list[str] = field(default_factory=list)
    """Attacks, with options if wanted: span "tag(iterations=500)"; every registered one if not given."""
    iterations: int | None = None
    """Most iterations of attacks that are named without options and have that option."""
    seed: int = 0
    """Seed of random weights, noise, masked positions and attacks."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    threads: int = 1
    """CPU threads per process."""
    processes: int | None = None
    """Refuse to run unless this many processes are running."""
    output: str = "runs/attack_comparison"
    """Folder for results.jsonl, attack_comparison.csv and attack_comparison.png."""

    def __post_init__(self):
        check_counts(self, "samples", "threads", "iterations")
        for name in ("models", "data", "batch_sizes", "defenses"):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name} is empty; give at least one")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} lists something twice: {values}")
        for name, of in (("tasks", "models"), ("text_columns", "data"), ("label_columns", "data"), ("splits", "data")):
            if getattr(self, name) and len(getattr(self, name)) != len(getattr(self, of)):
                raise ConfigError(
                    f"{name} must have one entry for each of {of} ('' where nothing is to be said): got "
                    f"{len(getattr(self, name))} for {len(getattr(self, of))}"
                )
        if min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes must be at least 1, got {min(self.batch_sizes)}")
        for spec in self.defenses:
            parse_defense(spec)
        attack_specs(self.attacks, self.iterations)


@dataclass(frozen=True)
class Item:
    """One gradient, on which every attack runs."""

    model: ModelConfig
    data: str
    defense: str
    sample: int
    texts: tuple[str, ...]
    labels: tuple[int, ...] | None


def _of(values: Sequence[str], place: int) -> str | None:
    """Return an entry of a list that goes along with another; None where it says nothing."""
    return (values[place] or None) if values else None


def items_of(config: ComparisonConfig, state: PartialState) -> tuple[list[Item], dict[str, str]]:
    """Return all gradients of the study, sorted by model, and digests of what their settings name but do not fix.

    Every text, label and defense is tried on its model here, before anything is written.
    """
    device = str(state.device) if config.device == "auto" else config.device
    items: list[Item] = []
    digests: dict[str, str] = {}
    for m, name in enumerate(config.models):
        model = ModelConfig(model=name, task=_of(config.tasks, m), weights_seed=config.seed, device=device)
        adapter = model_of(model)
        batches = []
        for d, source in enumerate(config.data):
            for size in config.batch_sizes:
                audit = AuditConfig(
                    data=None if source == EMBEDDED else source, text_column=_of(config.text_columns, d),
                    label_column=_of(config.label_columns, d), split=_of(config.splits, d), samples=config.samples,
                    batch_size=size, max_length=config.max_length, shared=config.shared, defenses=config.defenses,
                    noise_levels=[], attacks=[],
                )  # fmt: skip
                found, _ = make_items(audit, adapter)
                evaluator = ExampleEvaluator(adapter, example_settings(audit))
                for number, (texts, labels) in enumerate(found):
                    evaluator.check(texts, labels, thoroughly=number == 0)
                    batches.append((texts, labels))
                    labels = None if labels is None else tuple(labels)
                    items += [
                        Item(model, source, defense, number, tuple(texts), labels) for defense in config.defenses
                    ]
        digests |= {f"{name} {what}": digest for what, digest in identity(adapter, batches).items()}
    return items, digests


def item_rows(config: ComparisonConfig, number: int, item: Item) -> list[dict]:
    """Return one row per attack on one gradient; depends on the item and the settings alone.

    Noise, masks and attacks have the same seeds under every defense, so that defenses and attacks compare in pairs.
    """
    adapter = model_of(item.model)
    seed = derived_seed(config.seed, item.sample)
    batch = seeded_batch(adapter, item.texts, item.labels, max_length=config.max_length, seed=seed)
    sharing = Sharing(item.defense, parse_defense(item.defense), shared=config.shared)
    shared = sharing.release(adapter, batch, seed=seed)
    common = {
        "model": item.model.model,
        "data": item.data,
        "batch_size": batch.size,
        "defense": item.defense,
        "sample": item.sample,
        "gradient_seconds": gradient_seconds(adapter, batch, config.shared),
        "tokens": [len(ids) for ids in batch.token_ids],
        "texts": list(batch.texts),
    }
    return [
        {"key": f"{number}|{spec}"} | common | {"attack": spec}
        | attack_result(parse_attack(spec), adapter, shared, batch, seed=seed)
        for spec in attack_specs(config.attacks, config.iterations)
    ]  # fmt: skip


@exit_status
def main(argv: list[str]) -> None:
    """Run the study; exit status 2 if the input is refused."""
    config = parse_config(ComparisonConfig, argv, prog="attack_comparison.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    items, digests = items_of(config, state)
    settings = decisive_settings(config)
    settings["attacks"] = attack_specs(config.attacks, config.iterations)
    folder = ResultFolder(config.output, settings, identity=digests)
    rows = run_items(items, lambda i, item: item_rows(config, i, item), folder, state, label="attacking")
    if state.is_main_process:
        entries = compare(rows, seed=config.seed)
        write_csv_atomically(folder.path / "attack_comparison.csv", entries)
        image = encode(comparison_figure(entries), "png")
        write_bytes_atomically(folder.path / "attack_comparison.png", image)
        Console(width=None if sys.stdout.isatty() else 200).print(comparison_table(entries))
        print(*refusal_lines(entries), sep="\n")
        print(f"table and figure: {folder.path}")
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
