"""Which attack works against which defense on which model? Generates recipes/results/attacks.md.

Part one says what every registered attack assumes, straight from its ``Assumptions``. Part two is measured: every
attack against every way of sharing, on the embedded models.

    python recipes/attack_table.py                      (everything)
    python recipes/attack_table.py --attacks span dlg   (measures these, keeps the others' numbers)
    python recipes/attack_table.py --no-measure         (part one alone; the numbers stay as they are)

The numbers are kept in a csv file beside the document. A killed run continues where it stopped; after a change of an
attack's code delete its folder in runs/attack_table, or what was measured before is kept.
"""

import csv
import io
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from lmleak.adapters import TextAdapter, adapt
from lmleak.attacks import ATTACKS, Attack, parse_attack
from lmleak.config import check_counts, parse_config
from lmleak.defenses import derived_seed, parse_defense
from lmleak.errors import ConfigError
from lmleak.evaluation import AuditConfig, ResultFolder, exit_status, finish, process_state, run_items
from lmleak.evaluation.attacks import Sharing, attack_result, attack_specs, model_of
from lmleak.evaluation.audit import identity, make_items
from lmleak.evaluation.circumstances import decisive_settings
from lmleak.evaluation.model import ModelConfig, load_text_model
from lmleak.evaluation.scored import seeded_batch
from lmleak.files import write_text_atomically
from lmleak.types import Aggregation

ROOT = Path(__file__).resolve().parents[1]
DEFENSES = (
    "none", "gaussian(std=0.1, unit=rms)", "gaussian(std=1, unit=rms)", "gaussian(std=10, unit=rms)",
    "gaussian(std=1000, unit=rms)", "bf16", "quantize(bits=8)", "prune(ratio=0.9)", "topk(fraction=0.01)", "sign",
    "clip(max_norm=1)", "clip(max_norm=1)+gaussian(std=0.01)",
)  # fmt: skip
SHARINGS = (
    *(Sharing(spec, parse_defense(spec)) for spec in DEFENSES),
    Sharing("dropout(on)", dropout=True),
    Sharing("FedAvg, 4 local steps at 1e-3, shared=all", shared="all", aggregation=Aggregation(1, 4, 1, 1e-3)),
    Sharing("embeddings frozen", parse_defense("hide-layers(names='embeddings|wte|wpe')")),
    Sharing("first block hidden", parse_defense(r"hide-layers(names='\.(layer|h)\.0\.')")),
    Sharing("shared=all", shared="all"),
    Sharing("shared=block:0-1", shared="block:0-1"),
    Sharing("shared=head", shared="head"),
    Sharing("lengths and labels withheld", reveal_lengths=False, reveal_labels=False),
    Sharing("LoRA of rank 32 at the attention inputs, shared=lora", shared="lora"),
)
LORA_RANK = 32
WORKS, WEAK = 0.8, 0.2  # mean token recall from which an attack is said to work, or to work weakly
COLUMNS = (
    "attack", "options", "model", "sharing", "messages", "attacked", "max_length", "seed", "token_recall", "rougeL",
    "refused",
)  # fmt: skip


@dataclass(frozen=True)
class AttackTableConfig:
    """Write the table of attacks, and of what each does against every way of sharing."""

    attacks: list[str] = field(default_factory=list)
    """Attacks to measure, with options if wanted: span "tag(iterations=500)"; every registered one if not given."""
    iterations: int = 60
    """Most iterations of attacks that are named without options and have that option."""
    models: list[str] = field(default_factory=lambda: ["reference-bert", "reference-gpt2"])
    """Models; all of them are measured whenever an attack is."""
    samples: int = 2
    """Sample messages, one gradient each."""
    max_length: int = 10
    """Truncate texts to this many tokens."""
    measure: bool = True
    """Whether anything is measured, or the document is only written again."""
    seed: int = 0
    """Seed of noise, dropout masks and attacks."""
    threads: int = 1
    """CPU threads per process."""
    processes: int | None = None
    """Refuse to run unless this many processes are running."""
    output: str = "runs/attack_table"
    """Folder for the rows, one folder per attack."""
    document: str = str(ROOT / "recipes" / "results" / "attacks.md")
    """The document; the numbers go to a .csv file of the same name."""

    def __post_init__(self):
        check_counts(self, "iterations", "samples", "max_length", "threads")
        if not self.models:
            raise ConfigError("models is empty; give at least one")
        specs = attack_specs(self.attacks, self.iterations)
        names = [parse_attack(spec).name for spec in specs]
        if len(set(names)) < len(names):
            raise ConfigError(f"the table has one column per attack; got {', '.join(specs)}")


# Measuring ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One text, shared in one way."""

    model: ModelConfig
    sharing: Sharing
    sample: int
    texts: tuple[str, ...]
    labels: tuple[int, ...] | None

    @property
    def lora(self) -> bool:
        """Whether the client trains LoRA weights instead of the model's own."""
        return self.sharing.shared == "lora"


def items_of(config: AttackTableConfig) -> tuple[list[Item], dict[str, str]]:
    """Return all gradients that every attack sees, sorted by model, and digests of weights and texts."""
    items, digests = [], {}
    for name in config.models:
        model = ModelConfig(model=name, weights_seed=config.seed, device="cpu")
        adapter = model_of(model)
        found, _ = make_items(AuditConfig(samples=config.samples), adapter)
        digests |= {f"{name} {what}": digest for what, digest in identity(adapter, found).items()}
        for sharing in SHARINGS:
            for number, (texts, labels) in enumerate(found):
                items.append(Item(model, sharing, number, tuple(texts), labels and tuple(labels)))
    return sorted(items, key=lambda item: item.lora), digests


@lru_cache(maxsize=1)
def with_lora(model: ModelConfig) -> TextAdapter:
    """Return a model with LoRA at the attention inputs of every block, as at the first step of a fine-tuning."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("the row LoRA needs peft; install lmleak[lora]") from error
    adapter = load_text_model(model)  # one of its own: peft changes the model it is given
    sites = [path for block in range(len(adapter.blocks)) for path in adapter.attention_inputs(block)]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of maps stored as (d_in, d_out), which peft recognises by itself
        torch.default_generator.manual_seed(model.weights_seed)  # peft draws from the global generator
        settings = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=sites)
        changed = peft.get_peft_model(adapter.model, settings)
    return adapt(changed, tokenizer=adapter.tokenizer, task=adapter.task, name=adapter.name)


def item_row(config: AttackTableConfig, spec: str, number: int, item: Item) -> dict:
    """Return what one attack does to one gradient; depends on the item and the settings alone."""
    adapter = with_lora(item.model) if item.lora else model_of(item.model)
    seed = derived_seed(config.seed, item.sample)
    batch = seeded_batch(adapter, item.texts, item.labels, max_length=config.max_length, seed=seed)
    shared = item.sharing.release(adapter, batch, seed=seed)
    result = attack_result(parse_attack(spec), adapter, shared, batch, seed=seed)
    return {
        "key": f"{number}",
        "model": item.model.model,
        "sharing": item.sharing.name,
        "sample": item.sample,
    } | result


def measure(config: AttackTableConfig, spec: str, items: Sequence[Item], digests: dict[str, str], state) -> list[dict]:
    """Return the csv rows of one attack: the mean over samples per model and way of sharing."""
    name = parse_attack(spec).name
    settings = decisive_settings(config, without=("document", "measure"))
    settings |= {"attacks": [spec], "sharings": [sharing.name for sharing in SHARINGS]}
    folder = ResultFolder(Path(config.output) / name, settings, identity=digests)
    rows = run_items(items, lambda i, item: [item_row(config, spec, i, item)], folder, state, label=name)
    means = []
    for model in config.models:
        for sharing in SHARINGS:
            own = [row for row in rows if (row["model"], row["sharing"]) == (model, sharing.name)]
            ran = [row for row in own if "refused" not in row]
            refused = next((row["refused"] for row in own if "refused" in row), "")
            scores = {k: f"{fmean(row[k] for row in ran):.3f}" if ran else "" for k in ("token_recall", "rougeL")}
            means.append({
                "attack": name, "options": spec, "model": model, "sharing": sharing.name,
                "messages": str(len(own)), "attacked": str(len(ran)), "max_length": str(config.max_length),
                "seed": str(config.seed), "refused": refused, **scores,
            })  # fmt: skip
    return means


def as_csv(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the rows as a csv file's text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows measured earlier, of attacks that are still registered."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["attack"] in ATTACKS]


# Writing --------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def assumptions_markdown(attacks: Mapping[str, type[Attack]]) -> str:
    """Return part one: what every attack assumes, from its ``Assumptions``."""

    def word(value: bool) -> str:
        return "yes" if value else "no"

    header = (
        "attack", "paper", "tasks", "decoders", "encoders", "needs lengths", "needs labels", "local steps",
        "reads the gradient of", "prior",
    )  # fmt: skip
    lines = []
    for name, attack in sorted(attacks.items()):
        assumes = attack.assumes
        encoders = assumes.encoders and assumes.tasks != ("causal-lm",)
        lines.append([
            f"`{name}`", attack.paper, ", ".join(assumes.tasks), word(assumes.decoders), word(encoders),
            word(assumes.lengths), word(assumes.labels), word(assumes.local_steps), assumes.parameters, assumes.prior,
        ])  # fmt: skip
    return markdown_table(header, lines)


def cell(row: Mapping[str, str] | None, reasons: list[str]) -> str:
    """Return one cell of the matrix; a new reason of refusal is added to the list."""
    if row is None:
        return "–"
    note = ""
    if row["refused"]:
        reason = re.sub(r"attack '[\w-]+'", "the attack", row["refused"])
        kinds = [without_numbers(known) for known in reasons]
        if without_numbers(reason) not in kinds:
            reasons.append(reason)
            kinds.append(without_numbers(reason))
        note = f" [{kinds.index(without_numbers(reason)) + 1}]"
    if not row["token_recall"]:
        return f"impossible{note}"
    recall = float(row["token_recall"])
    return ("works" if recall >= WORKS else "weak" if recall >= WEAK else "fails") + f" {recall:.2f}" + note


def without_numbers(reason: str) -> str:
    """Return a reason by which refusals that differ in measured numbers alone are one."""
    return re.sub(r"\d+(\.\d+)?(e[-+]?\d+)?", "#", reason)


def matrix_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Return part two: one table per model, ways of sharing against attacks, and the reasons of refusals."""
    attacks = [name for name in sorted(ATTACKS) if any(row["attack"] == name for row in rows)]
    by_place = {(row["model"], row["sharing"], row["attack"]): row for row in rows}
    parts, reasons = [], []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = [
            [f"`{sharing.name}`", *(cell(by_place.get((model, sharing.name, attack)), reasons) for attack in attacks)]
            for sharing in SHARINGS
        ]
        parts.append(f"### {model}\n\n" + markdown_table(["shared", *(f"`{name}`" for name in attacks)], lines))
    if reasons:
        parts.append(
            "### Why impossible\n\nNumbers are those of one case.\n\n"
            + "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))
        )
    return "\n\n".join(parts)


def document(rows: Sequence[Mapping[str, str]]) -> str:
    """Return the whole document."""
    measured = list(dict.fromkeys(row["options"] for row in rows))
    missing = sorted(set(ATTACKS) - {row["attack"] for row in rows})
    settings = sorted({(row["messages"], row["max_length"], row["seed"]) for row in rows})
    runs = "; ".join(f"{n} messages of at most {length} tokens, seed {seed}" for n, length, seed in settings)
    return "\n\n".join([
        "<!-- Generated by `python recipes/attack_table.py`; do not edit. -->",
        "# Attacks",
        "Every attacker knows the architecture, the weights, the tokenizer, the batch size and how the update was "
        "formed; what else each one must be told is listed here. A combination outside its assumptions is refused.",
        assumptions_markdown(ATTACKS),
        "# Attack x defense x model",
        f"Mean token recall of one attack on gradients of single embedded sample messages ({runs}): **works** from "
        f"{WORKS:g} on, **weak** from {WEAK:g} on, else **fails**; **impossible** is a refusal, its reason below. "
        "So few messages show what can happen, not how often; 'fails' speaks of this attack at this effort, on these "
        "small models, and is no proof of safety; noise of 1000 RMS shows what guessing alone gives. Gaussian noise "
        "in `rms` is in multiples of the gradient's root mean square. All parameters but the word table's looked-up "
        "rows are shared unless the row says otherwise; "
        "'embeddings frozen' withholds the tables of words and positions, and with GPT-2's the tied head.",
        "Attacks as run: " + ", ".join(f"`{spec}`" for spec in measured) + "."
        + (f" Not measured yet: {', '.join(f'`{name}`' for name in missing)}." if missing else ""),
        matrix_markdown(rows),
    ]) + "\n"  # fmt: skip


@exit_status
def main(argv: list[str]) -> None:
    """Measure and write; exit status 2 if the input is refused."""
    config = parse_config(AttackTableConfig, argv, prog="attack_table.py")
    state = process_state(config.processes)
    torch.set_num_threads(config.threads)
    target = Path(config.document)
    numbers = target.with_suffix(".csv")
    rows = read_csv(numbers)
    if config.measure:
        items, digests = items_of(config)
        for spec in attack_specs(config.attacks, config.iterations):
            new = measure(config, spec, items, digests, state)
            rows = [row for row in rows if row["attack"] != new[0]["attack"]] + new
    if state.is_main_process:
        rows.sort(key=lambda row: row["attack"])  # stable: models and ways of sharing stay in order
        write_text_atomically(numbers, as_csv(rows))
        write_text_atomically(target, document(rows))
        print(f"written: {target}")
    finish(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
