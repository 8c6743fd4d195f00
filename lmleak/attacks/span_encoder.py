"""The span attack on encoders: sentences found by search, copies and masked tokens read from the head's gradient.

With the sentences known, so are the inputs h of the output head, and its gradient C^T H gives C by least squares:

    classification:  c_tk = (m_t p_tk - n_tk) / B      m_t texts are t, n_tk of them of class k
    masked LM:       c_tv = (p_tv - [v = y_t]) / N     y_t the token that was masked at t; zero where there is no loss
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmleak.attacks.base import reconstruction
from lmleak.attacks.span_filter import FirstLayerFilter
from lmleak.attacks.span_head import Unreadable, head_coefficients, read_classes
from lmleak.attacks.span_layers import Site, forward, head_gradient
from lmleak.attacks.span_sentences import Sentence, SentenceSearch, search_sentences
from lmleak.attacks.span_subspace import RowSpace
from lmleak.types import AttackCost, Observation, Reconstruction

PREDICTED = 1e-3
"""Size of a row of C, relative to the largest, from which its position was predicted."""


@dataclass(frozen=True)
class _Text:
    tokens: list[int]
    confidence: list[float]
    """Per token."""


def recover_encoder(
    attack: str, adapter, observation: Observation, tokens: FirstLayerFilter, sites: Sequence[tuple[Site, RowSpace]],
    *, restarts: int, evaluations: int, seed: int,
) -> Reconstruction:  # fmt: skip
    """Return the texts that an encoder's gradient allows.

    Args:
        attack: Name of the attack.
        adapter: An encoder.
        observation: The released gradient and the batch size.
        tokens: The first-layer filter.
        sites: Sites behind the first attention with their row spaces.
        restarts: Random starts per sentence length.
        evaluations: Sentences that may be scored.
        seed: Seed of the starts.

    Returns:
        Accepted texts first; then, if some are missing, the best guesses, with a note that they are guesses.
    """
    search = search_sentences(
        adapter, observation, tokens, sites, restarts=restarts, evaluations=evaluations, seed=seed
    )
    guesses = search.guesses()
    accepted, notes = list(search.found), _search_notes(search, guesses, tokens)
    if adapter.task == "sequence-classification" and not guesses and accepted:
        accepted, note = _with_copies(adapter, observation, accepted)
        notes.append(note)
    sentences = [*accepted, *guesses]
    texts = [_Text(list(s), search.confidence(s)) for s in sentences]
    if adapter.task == "masked-lm" and accepted:
        texts, note = _unmask(adapter, observation, texts, len(accepted))
        notes.append(note)
    return reconstruction(
        attack, adapter,
        [text.tokens for text in texts],
        [text.confidence for text in texts],
        cost=AttackCost(0.0, iterations=search.budget.spent),
        stopped=_stopped(search),
        objective=torch.cat([search.residuals(s) for s in sentences]).mean().item() if sentences else None,
        notes=tuple(notes),
    )  # fmt: skip


def _stopped(search: SentenceSearch) -> str:
    if not search.survivors:
        return "no candidate left at position 0"
    if len(search.found) >= search.batch_size:
        return "all texts are found"
    if search.complete():
        return "the texts found explain the whole row space"
    if search.budget.exhausted:
        return f"search limit of {search.budget.limit} sentences"
    return f"all {search.restarts} restarts per length are spent"


def _search_notes(search: SentenceSearch, guesses: list[Sentence], tokens: FirstLayerFilter) -> list[str]:
    notes = [
        f"{len(search.found)} of {search.batch_size} texts are exact up to rounding, at every position of "
        f"{search.test.site.where}",
        f"rank {tokens.span.rank} at the attention input of block 0, {search.test.span.rank} of "
        f"{search.test.span.width} behind it",
    ]
    if guesses:
        notes.append(
            f"the last {len(guesses)} of {len(search.found) + len(guesses)} texts are guesses: the best of "
            f"{len(search.rejected)} local minima that were not accepted"
        )
    if not search.survivors:
        notes.append(
            "no token was accepted at position 0: the gradient was changed after it was computed, or too few maps are "
            "released (a key map alone lacks one direction per text)"
        )
    return notes


# The output head ------------------------------------------------------------------------------------------------


def _head(adapter, observation: Observation, sentences: list[Sentence]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the head's gradient (K, d), and its input (n, d) and output (n, K) for all sentences, joined."""
    path, gradient = head_gradient(adapter, observation.gradient)
    if gradient is None:
        raise Unreadable("the output head's gradient is not released")
    module = adapter.model.get_submodule(path)
    calls: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda module, arguments, output: calls.append((arguments[0], output)))
    try:
        for sentence in sentences:
            forward(adapter, torch.tensor([sentence]))
    finally:
        hook.remove()
    hidden, outputs = (torch.cat([t.reshape(-1, t.shape[-1]) for t in column]) for column in zip(*calls, strict=True))
    if len(hidden) >= gradient.shape[1]:
        raise Unreadable(f"{len(hidden)} inputs of the head are not fewer than its width {gradient.shape[1]}")
    return gradient, hidden, outputs


def _with_copies(adapter, observation: Observation, sentences: list[Sentence]) -> tuple[list[Sentence], str]:
    """Return every text as often as the classifier's gradient says, with a note."""
    try:
        gradient, hidden, logits = _head(adapter, observation, sentences)
        coefficients, explained = head_coefficients(gradient, hidden)
        if not explained.all():
            raise Unreadable("the recovered texts do not explain it")
        endings = read_classes(sentences, coefficients, logits.double().softmax(-1), observation.batch_size)
    except Unreadable as reason:
        note = f"how often texts repeat could not be read from the head's gradient: {reason}"
        if len(sentences) < observation.batch_size:
            note += f"; {len(sentences)} distinct texts for a batch of {observation.batch_size}"
        return sentences, note
    return [ending.prefix for ending in endings], "repetitions were read from the head's gradient"


def _unmask(adapter, observation: Observation, texts: list[_Text], count: int) -> tuple[list[_Text], str]:
    """Return the texts, the first ``count`` of them accepted, with what was masked put back; and a note.

    A mask token whose word cannot be read stays, with confidence 0.
    """
    mask = adapter.tokenizer.mask_token_id
    try:
        targets = _targets(adapter, observation, [tuple(text.tokens) for text in texts[:count]])
        note = "masked tokens were read from the head's gradient"
    except Unreadable as reason:
        targets, note = [], f"masked tokens could not be read from the head's gradient: {reason}"
    unmasked = []
    for k, text in enumerate(texts):
        known = targets[k] if k < len(targets) else {}
        tokens = [known[i][0] if i in known else t for i, t in enumerate(text.tokens)]
        confidence = [max(0.0, 1 - known[i][1]) if i in known else c for i, c in enumerate(text.confidence)]
        unmasked.append(_Text(tokens, [0.0 if t == mask else c for t, c in zip(tokens, confidence, strict=True)]))
    hidden = sum(t == mask for text in unmasked for t in text.tokens)
    return unmasked, note + (f"; {hidden} of them stay hidden" if hidden else "")


def _targets(adapter, observation: Observation, sentences: list[Sentence]) -> list[dict[int, tuple[int, float]]]:
    """Return per sentence the predicted positions, with the target and how far C is from its form there.

    Args:
        adapter: A masked language model.
        observation: The released gradient.
        sentences: The accepted sentences.

    Returns:
        {position: (token, ||c - (p - onehot) a|| / ||c||)} per sentence.

    Raises:
        Unreadable: With the reason.
    """
    gradient, hidden, logits = _head(adapter, observation, sentences)
    c, readable = head_coefficients(gradient, hidden)
    if adapter.lookup_table_is_tied() and adapter.select(observation.shared).through_lookup:
        # Rows of looked-up tokens hold more than the head's part.
        readable[sorted({token for sentence in sentences for token in sentence})] = False
    elif not readable.all():
        raise Unreadable("the recovered texts do not explain it")
    c, p = c[:, readable], logits.double().softmax(-1)[:, readable]  # (n, K')
    lowest, which = c.min(dim=1)
    predicted = lowest < -PREDICTED * c.abs().max()
    form = p - torch.nn.functional.one_hot(which, c.shape[1])
    scale = (c * form).sum(dim=1, keepdim=True) / form.square().sum(dim=1, keepdim=True)
    off = (c - scale * form).norm(dim=1) / c.norm(dim=1).clamp(min=torch.finfo(c.dtype).tiny)
    tokens = readable.nonzero()[:, 0][which]
    rows = list(zip(predicted.tolist(), tokens.tolist(), off.tolist(), strict=True))
    found, start = [], 0
    for sentence in sentences:
        here = rows[start : start + len(sentence)]
        found.append({i: (token, error) for i, (is_target, token, error) in enumerate(here) if is_target})
        start += len(sentence)
    return found
