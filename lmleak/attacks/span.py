"""The span attack: exact recovery of a batch from the row spaces of two linear maps' gradients."""

import time
from dataclasses import dataclass
from typing import ClassVar

from lmleak.adapters.base import ModelAdapter
from lmleak.attacks.base import Assumptions, Attack, reconstruction
from lmleak.attacks.span_encoder import recover_encoder
from lmleak.attacks.span_filter import FirstLayerFilter, by_position
from lmleak.attacks.span_head import Ending, Unreadable, read_head
from lmleak.attacks.span_layers import PrefixModel, Site, first_site, forward, prefix_sites, random_ids
from lmleak.attacks.span_sentence_test import sentence_sites
from lmleak.attacks.span_subspace import RowSpace, row_space, stacked_gradient
from lmleak.attacks.span_tree import Prefix, PrefixTree, grow_tree
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients.readout_rank import machine_epsilon
from lmleak.gradients.shared import SharedGradient
from lmleak.types import AttackCost, Observation, Reconstruction


@dataclass(frozen=True)
class Span(Attack):
    """Exact recovery of whole batches, while the batch has fewer tokens than the hidden size.

    The inputs of a linear map lie in the row space of its weight gradient (:mod:`lmleak.attacks.span_subspace`).
    1. The attention input of block 0 depends on one token and its position: test the whole vocabulary
       (:mod:`lmleak.attacks.span_filter`).
    2. The attention input of block 1 depends on a prefix: grow the prefixes token by token
       (:mod:`lmleak.attacks.span_tree`).
    3. The output head tells which prefixes are whole texts, how often, and the last token of a language model
       (:mod:`lmleak.attacks.span_head`), if its gradient is released.

    On encoders a position sees the whole text, so steps 2 and 3 differ: whole sentences are searched and accepted
    (:mod:`lmleak.attacks.span_sentences`), copies and masked tokens read from the head
    (:mod:`lmleak.attacks.span_encoder`). What was not accepted is returned as a guess, with a note and low confidence.

    Assumes the weights and the batch size; no lengths, labels, prior or padding. No gradient is evaluated.
    Differs from the paper: the gradients of Q, K and V are stacked and their rows equilibrated; what is accepted
    follows from the rounding expected for each input (``RowSpace.rounding``), not from thresholds set per batch
    size; the first-layer test is separable; a prefix grows by one cached row; step 3 is ours.

    A text whose last token the model predicts with certainty (p > 1 - 1e-6 in float32) leaves no trace of that token
    above rounding, and comes out one token short.

    Confidence per token: 1 - residual / null, where the residual is the relative distance of the block-1 input from
    its span and null the median of the same for random prefixes; 1 is exact up to rounding, 0 no better than chance.
    For a last token read from the head, 1 - 2 x the distance of its count from an integer. ``objective`` is the mean
    residual of the recovered tokens, ``cost.iterations`` the number of (prefix, next token) pairs that were run.
    """

    name: ClassVar[str] = "span"
    paper: ClassVar[str] = "Petrov et al. 2024, arXiv:2405.15586 (DAGER)"
    assumes: ClassVar[Assumptions] = Assumptions(
        tasks=("causal-lm", "sequence-classification", "masked-lm"), lengths=False, labels=False,
        parameters="the attention inputs of block 0, and a map behind its attention",
    )  # fmt: skip

    beam: int = 256
    """How many prefixes are kept alive per position; more than the batch size only if the gradient is ambiguous."""

    restarts: int = 64
    """Encoders: random starts per sentence length."""

    evaluations: int = 400_000
    """Encoders: sentences that may be scored per batch, some 40 s on one core for four sentences at a BERT of width
    384. When they are spent, the best guesses are returned and ``stopped`` says so."""

    def __post_init__(self):
        self._check_counts("beam", "restarts", "evaluations")

    def check(self, adapter: ModelAdapter, shared: SharedGradient) -> None:
        """Refuse gradients without the attention inputs, and models whose gradient spans too little.

        Args:
            adapter: The model.
            shared: The released gradient.

        Raises:
            UnsupportedCombinationError: With the reason.
        """
        super().check(adapter, shared)
        self._check_blocks(adapter)
        if not adapter.is_causal:
            _first_site(adapter, shared.gradient)
            sentence_sites(adapter, shared.gradient)
            return
        one_block = len(adapter.blocks) == 1
        if one_block and adapter.task == "sequence-classification":
            raise UnsupportedCombinationError(
                f"{adapter.name} has one block, of which only the last position reaches the classifier: the gradient "
                "spans at most one direction per head and text, less than the tokens. Use a matching attack (dlg, tag)"
            )
        _first_site(adapter, shared.gradient)
        _prefix_site(adapter, shared.gradient)

    def recover(self, adapter: ModelAdapter, observation: Observation, *, seed: int) -> Reconstruction:
        """Return the texts that the gradient's row spaces allow.

        Args:
            adapter: The model.
            observation: The released gradient and the batch size.
            seed: Chooses the random tokens that thresholds are checked on.

        Returns:
            The reconstruction; texts that cannot be told apart from others are left out, with a note.
        """
        start = time.perf_counter()
        first = _first_site(adapter, observation.gradient)
        tokens = FirstLayerFilter(adapter, first.paths[0], _span(adapter, observation, first), seed=seed)
        if not adapter.is_causal:
            sites = [(s, _span(adapter, observation, s)) for s in sentence_sites(adapter, observation.gradient)]
            return recover_encoder(
                self.name, adapter, observation, tokens, sites,
                restarts=self.restarts, evaluations=self.evaluations, seed=seed,
            )  # fmt: skip
        second = _prefix_site(adapter, observation.gradient)
        span = _span(adapter, observation, second)
        null = span.null(forward(adapter, random_ids(adapter, 64, 4, seed=seed), stop_at=second.paths[0])[:, 1:])
        tree = grow_tree(PrefixModel(adapter, second.paths[0]), span, by_position(tokens), beam=self.beam)
        endings, notes = _texts(adapter, observation, tree)
        if not second.where.startswith("the attention input"):
            notes.append(f"prefixes were tested at {second.where}")
        if tree.cut_at is not None:
            notes.append(f"more than {self.beam} prefixes were alive at position {tree.cut_at}; the best were kept")
        notes.append(f"rank {tokens.span.rank} at {first.where}, {span.rank} at {second.where}, of {span.width}")
        return reconstruction(
            self.name, adapter,
            [(*e.prefix, *_known(e.last)) for e in endings],
            [_confidence(e, tree, null) for e in endings],
            cost=AttackCost(time.perf_counter() - start, iterations=tree.rows),
            stopped=_stopped(tree, adapter.max_positions()),
            objective=_mean_residual(endings, tree),
            notes=tuple(notes),
        )  # fmt: skip


def _first_site(adapter, gradient) -> Site:
    site = first_site(adapter)
    if not site.is_released(gradient):
        raise UnsupportedCombinationError(
            f"attack 'span' needs the gradient of {' or '.join(site.paths)} (the attention input of block 0) to tell "
            f"which tokens were where; released are {len(gradient)} others (first {next(iter(gradient))!r}). Share "
            "them (shared='all' or 'block:0-1') or use a matching attack (dlg, tag)"
        )
    return site


def _prefix_site(adapter, gradient) -> Site:
    sites = []
    for site in prefix_sites(adapter):
        if site.is_released(gradient):
            return site
        sites.append(site)
    raise UnsupportedCombinationError(
        "attack 'span' needs the gradient of a map that sees whole prefixes, to tell which tokens belong together: "
        f"one of {', '.join(path for site in sites for path in site.paths)}. None of them is released "
        "(shared='block:0-1' would do)"
    )


def _span(adapter, observation: Observation, site: Site) -> RowSpace:
    rows = stacked_gradient(adapter, observation.gradient, site.paths)
    return row_space(rows, machine_epsilon(adapter, rows, observation.defenses))


def _stopped(tree: PrefixTree, limit: int | None) -> str:
    length = max(map(len, tree.residual), default=0)
    return "all positions of the model are filled" if length == limit else f"no candidate left at position {length}"


def _known(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


def _texts(adapter, observation: Observation, tree: PrefixTree) -> tuple[list[Ending], list[str]]:
    """Return the texts by the head's gradient if it can be read, else the leaves of the tree."""
    if not tree.residual:
        return [], [
            "no prefix was accepted: the gradient was changed after it was computed, or too few maps are released (a "
            "query map alone tells nothing of first positions, a key map alone lacks one direction per text)"
        ]
    missing_last = "the last token of a text is no input that reaches the loss, and was left out"
    try:
        endings = read_head(adapter, observation, list(tree.residual))
    except Unreadable as reason:
        endings = _leaves(tree, observation.batch_size)
        notes = [f"texts are the leaves of the prefix tree: {reason}"]
        if len(endings) < observation.batch_size:
            notes.append(
                f"{len(endings)} distinct texts for a batch of {observation.batch_size}: the others repeat one, or "
                "are the beginning of one"
            )
        return endings, notes + ([missing_last] if adapter.task == "causal-lm" else [])
    if adapter.task != "causal-lm":
        return endings, ["endings and repetitions were read from the head's gradient"]
    unknown = sum(e.last is None for e in endings)
    notes = ["last tokens and repetitions were read from the head's gradient"]
    if unknown:
        notes.append(f"for {unknown} of {len(endings)} texts: {missing_last}; the table shared with the head hides it")
    return endings, notes


def _leaves(tree: PrefixTree, batch_size: int) -> list[Ending]:
    """Return at most B leaves: those that explain most (position, token) pairs not yet explained, then the surest."""
    leaves = [Ending(leaf, None, 1.0) for leaf in tree.leaves()]
    if len(leaves) <= batch_size:
        return leaves
    explained: set[tuple[int, int]] = set()
    chosen = []
    while len(chosen) < batch_size:
        best = min(leaves, key=lambda e: (-len({*enumerate(e.prefix)} - explained), _mean_residual([e], tree)))
        leaves.remove(best)
        chosen.append(best)
        explained |= set(enumerate(best.prefix))
    return chosen


def _residuals(prefix: Prefix, tree: PrefixTree) -> list[float]:
    return [tree.residual[prefix[: t + 1]] for t in range(len(prefix))]


def _confidence(ending: Ending, tree: PrefixTree, null: float) -> list[float]:
    tokens = [min(1.0, max(0.0, 1 - r / null)) for r in _residuals(ending.prefix, tree)]
    return tokens + [max(0.0, ending.certainty) for _ in _known(ending.last)]


def _mean_residual(endings: list[Ending], tree: PrefixTree) -> float | None:
    residuals = [r for e in endings for r in _residuals(e.prefix, tree)]
    return sum(residuals) / len(residuals) if residuals else None
