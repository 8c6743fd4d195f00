"""Every family: the adapter computes what the caller's model computes, whatever the padding."""

from dataclasses import replace

import pytest
import torch

from lmleak.adapters.structure import weight_rows
from lmleak.errors import UnsupportedCombinationError
from lmleak.gradients import capture_gradient, gradient_of
from tests.families import FAMILIES, LABELS, SEQUENCES, build, make

READS_FIRST_POSITION = ("bert", "distilbert", "roberta", "unlisted-electra")
CASES = [
    pytest.param(name, side, id=f"{name}-{side}")
    for name in FAMILIES
    for side in ("right", "left")
    if side == "right" or name not in READS_FIRST_POSITION
]
families = pytest.mark.parametrize("name", FAMILIES)
families_and_sides = pytest.mark.parametrize(("name", "side"), CASES)


def eager(name, **keywords):
    """The caller's model: a second build of the same weights, with eager attention."""
    task, model = build(name, **keywords)
    model.set_attn_implementation("eager")
    return task, model


@families_and_sides
def test_logits_from_x_equal_logits_from_ids_without_padding(name, side, rows, plain_logits):
    adapter, batch = make(name, padding_side=side)
    _, model = eager(name)
    from_x = adapter.logits(adapter.input(batch), batch.layout)
    for i, row in enumerate(rows(batch)):
        expected = plain_logits(model, row.inputs["input_ids"])[0]
        real = batch.layout["attention_mask"][i].bool()
        got = from_x[i][real] if from_x.dim() == 3 else from_x[i]
        assert torch.allclose(got, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@families
def test_logits_agree_with_the_fused_attention_that_the_caller_runs(name):
    adapter, batch = make(name, dtype=torch.float32)
    _, model = build(name, dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.layout["attention_mask"]).logits
        got = adapter.logits(adapter.input(batch), batch.layout)
    if got.dim() == 3:
        real = batch.layout["attention_mask"].bool()
        got, expected = got[real], expected[real]
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@families_and_sides
def test_gradient_of_all_parameters_equals_backward_from_ids(name, side, plain_gradient, largest_difference):
    adapter, batch = make(name, padding_side=side)
    task, model = eager(name)
    expected = plain_gradient(model, task, batch)
    got = capture_gradient(adapter, batch, shared="all").gradient
    assert list(got) == list(expected)
    assert largest_difference(got, expected) < 1e-10


@families_and_sides
def test_gradient_without_word_embeddings_equals_backward_from_embeddings(
    name, side, plain_gradient, largest_difference
):
    adapter, batch = make(name, padding_side=side)
    task, model = eager(name)
    expected = plain_gradient(model, task, batch, embeds=True)
    got = capture_gradient(adapter, batch).gradient
    table = adapter.lookup_table()
    assert set(expected) - set(got) == (set() if adapter.lookup_table_is_tied() else {table})
    assert largest_difference(got, expected) < 1e-10


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "roberta", "gpt2", "gpt2-classifier", "opt", "llama"])
def test_gradient_equals_the_loss_of_transformers(name, largest_difference):
    """The model's own ``labels=`` path, padded as a batch; it takes the loss in float32."""
    adapter, batch = make(name)
    _, model = eager(name)
    model(input_ids=batch.inputs["input_ids"], labels=batch.targets, **batch.layout).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    got = capture_gradient(adapter, batch, shared="all").gradient
    assert largest_difference(got, expected) < 1e-6


@pytest.mark.parametrize("name", READS_FIRST_POSITION)
def test_left_padding_of_a_model_that_reads_the_first_position_is_refused(name):
    with pytest.raises(UnsupportedCombinationError, match="padding_side='right'"):
        make(name, padding_side="left")
    adapter, _ = make(name, size=1)
    assert adapter.batch(SEQUENCES[:1], LABELS[:1], padding_side="left").size == 1  # nothing to pad


@families_and_sides
def test_a_longer_neighbour_changes_no_gradient(name, side, rows, largest_difference):
    """A text's gradient, beside padding, equals its gradient alone."""
    adapter, batch = make(name, padding_side=side)
    for i, row in enumerate(rows(batch)):
        padded = replace(
            batch,
            inputs={"input_ids": batch.inputs["input_ids"][i : i + 1]},
            targets=batch.targets[i : i + 1],
            layout={key: t[i : i + 1] for key, t in batch.layout.items()},
        )
        beside, alone = (capture_gradient(adapter, b, shared="all").gradient for b in (padded, row))
        assert largest_difference(beside, alone) < 1e-10


@families
def test_batch_gradient_is_the_mean_of_the_examples(name, rows, largest_difference):
    """Over examples for classes; weighted by their number of targets for language models."""
    adapter, batch = make(name)
    whole = capture_gradient(adapter, batch, shared="all").gradient
    single = list(rows(batch))
    if batch.targets.dim() == 1:
        weights = [1] * len(single)
    else:
        skip = 1 if adapter.task == "causal-lm" else 0
        weights = [int((row.targets[:, skip:] >= 0).sum()) for row in single]
    gradients = [capture_gradient(adapter, row, shared="all").gradient for row in single]
    mean = {n: sum(w * g[n] for w, g in zip(weights, gradients, strict=True)) / sum(weights) for n in whole}
    assert largest_difference(whole, mean) < 1e-10


@families
def test_soft_targets_of_certainty_are_hard_targets(name):
    adapter, batch = make(name)
    x, parameters = adapter.input(batch), adapter.parameters()
    logits = adapter.logits(x, batch.layout)
    hard = adapter.loss(x, batch.targets, batch.layout, parameters)
    soft = torch.zeros_like(logits)
    real = batch.targets >= 0
    soft[real] = torch.nn.functional.one_hot(batch.targets[real], logits.shape[-1]).to(logits)
    assert torch.allclose(adapter.loss(x, soft, batch.layout, parameters), hard, rtol=1e-12)


@families
def test_attacker_at_the_truth_computes_the_captured_gradient(name, largest_difference):
    adapter, batch = make(name)
    captured = capture_gradient(adapter, batch).gradient
    gradient, loss = gradient_of(adapter, adapter.input(batch), batch.targets, batch.layout, tuple(captured))
    assert largest_difference(gradient, captured) < 1e-12
    assert torch.isfinite(loss)


@families
def test_roles_partition_the_parameters_in_order(name):
    adapter, _ = make(name)
    roles = adapter.roles()
    members = [n for names in roles.values() for n in names]
    assert sorted(members) == sorted(adapter.parameters())
    blocks = [role for role in roles if role.startswith("block")]
    assert blocks == ["block 0", "block 1"]
    assert next(iter(roles)) == "embeddings"
    assert adapter.lookup_table() in roles["embeddings"]
    assert all(".0." in n for n in roles["block 0"])
    assert all(".1." in n for n in roles["block 1"])


ATTENTION_INPUTS = {
    "bert": {"query", "key", "value"}, "bert-mlm": {"query", "key", "value"}, "roberta": {"query", "key", "value"},
    "distilbert": {"q_lin", "k_lin", "v_lin"}, "opt": {"q_proj", "k_proj", "v_proj"},
    "gpt2": {"c_attn"}, "gpt2-untied": {"c_attn"}, "gpt2-classifier": {"c_attn"}, "gpt-neox": {"query_key_value"},
    "llama": {"q_proj", "k_proj", "v_proj"}, "llama-tied": {"q_proj", "k_proj", "v_proj"},
    "unlisted-gemma": {"q_proj", "k_proj", "v_proj"}, "unlisted-electra": {"query", "key", "value"},
}  # fmt: skip


@families
def test_attention_inputs_are_the_projections_of_that_block(name):
    adapter, _ = make(name)
    for block in (0, 1):
        paths = adapter.attention_inputs(block)
        assert {path.rpartition(".")[2] for path in paths} == ATTENTION_INPUTS[name]
        assert all(f".{block}." in path for path in paths)
        assert not any(module._forward_pre_hooks for module in adapter.model.modules())


def test_rows_of_attention_weights_lie_in_the_span_of_their_inputs():
    """What ``weight_rows`` promises for both storage orders."""
    for name in ("bert", "gpt2"):
        adapter, batch = make(name, size=1)
        path = adapter.attention_inputs(0)[0]
        module = adapter.model.get_submodule(path)
        inputs = []
        handle = module.register_forward_pre_hook(lambda _, arguments, inputs=inputs: inputs.append(arguments[0]))
        gradient = capture_gradient(adapter, batch, shared="all").gradient[f"{path}.weight"]
        handle.remove()
        rows_ = weight_rows(module, gradient)
        basis = inputs[0][0].detach().T  # (d_in, T)
        residual = rows_.T - basis @ torch.linalg.lstsq(basis, rows_.T).solution
        assert residual.norm() < 1e-10 * rows_.norm()


@families
def test_prior_is_that_of_the_table(name):
    adapter, _ = make(name)
    _, model = build(name)
    table = model.get_input_embeddings()(torch.arange(60)).detach()  # Gemma scales its rows inside the module
    prior = adapter.prior()
    assert torch.allclose(prior.mean, table.mean(0))
    assert prior.std == pytest.approx((table - table.mean(0)).pow(2).mean().sqrt().item(), rel=1e-12)


def test_a_family_needs_no_entry_of_its_own():
    """Two of the families above run on the generic defaults."""
    for name in ("unlisted-gemma", "unlisted-electra"):
        adapter, _ = make(name)
        assert adapter.family is None
