"""Adapters from a directory, a shape file or a name, and what is refused on the way."""

import pytest
import torch
import transformers as tf
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from lmleak.adapters import TextAdapter, adapt, load_adapter
from lmleak.errors import ConfigError, UnsupportedModelError
from lmleak.gradients import capture_gradient
from tests.families import BERT, FAMILIES, GPT2, LABELS, SEQUENCES, build

SHAPE = {"model_type": "gpt2", "task": "causal-lm", "config": {k: GPT2[k] for k in ("n_embd", "n_layer", "n_head")}}


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model, with a word-level tokenizer of 60 words beside it."""

    def save(name, tokenizer=True):
        _, model = build(name, dtype=torch.float32)
        model.save_pretrained(tmp_path / name)
        if tokenizer:
            words = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 5} | {f"w{i}": i for i in range(60) if i not in (0, 1, 5)}
            backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
            backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            tf.PreTrainedTokenizerFast(
                tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
            ).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def shape_file(tmp_path):
    def write(content):
        path = tmp_path / "shape.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2", "gpt2-classifier", "llama-tied"])
def test_a_local_directory_gives_the_saved_model(name, saved):
    directory = saved(name)
    adapter = load_adapter(str(directory))
    task, model = build(name, dtype=torch.float32)
    assert adapter.task == task == FAMILIES[name][0]
    assert adapter.name == str(directory)
    labels = LABELS if task == "sequence-classification" else None
    reference = adapt(model, tokenizer=adapter.tokenizer, task=task)
    texts = [" ".join(f"w{t}" for t in sequence) for sequence in SEQUENCES]
    got, expected = (capture_gradient(a, a.batch(texts, labels), shared="all").gradient for a in (adapter, reference))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in got)
    assert adapter.batch(texts, labels).texts == tuple(texts)


def test_a_half_precision_checkpoint_is_loaded_in_float32(tmp_path, saved):
    directory = saved("gpt2")
    _, model = build("gpt2", dtype=torch.bfloat16)
    model.save_pretrained(directory)
    assert load_adapter(str(directory)).dtype == torch.float32


def test_the_task_can_be_chosen(saved):
    adapter = load_adapter(str(saved("gpt2")), task="sequence-classification", seed=3)
    assert adapter.task == "sequence-classification"
    again = load_adapter(str(saved("gpt2")), task="sequence-classification", seed=3)
    other = load_adapter(str(saved("gpt2")), task="sequence-classification", seed=4)
    head = "score.weight"
    assert torch.equal(adapter.parameters()[head], again.parameters()[head])
    assert not torch.equal(adapter.parameters()[head], other.parameters()[head])


def test_an_encoder_is_no_causal_language_model(saved, shape_file):
    for name in (str(saved("bert")), str(saved("bert-mlm"))):
        with pytest.raises(ConfigError, match=r"is an encoder.*BertLMHeadModel.*Write task='masked-lm'"):
            load_adapter(name, task="causal-lm")
    shape = {"model_type": "bert", "task": "causal-lm", "config": BERT}
    with pytest.raises(ConfigError, match="is_decoder=False"):
        load_adapter(shape_file(shape))
    decoder = load_adapter(shape_file(shape | {"config": BERT | {"is_decoder": True}}))  # masks what comes after
    assert decoder.task == "causal-lm"
    assert decoder.is_causal


def test_a_shape_file_gives_random_weights_by_seed(shape_file):
    path = shape_file(SHAPE | {"config": GPT2})
    one, again, other = (load_adapter(path, seed=s) for s in (1, 1, 2))
    assert isinstance(one, TextAdapter)
    assert one.tokenizer is None
    assert one.width == GPT2["n_embd"]
    assert one.model.training is False
    values = [torch.cat([p.flatten() for p in a.parameters().values()]) for a in (one, again, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert one.batch(SEQUENCES).size == 3


def test_the_seed_of_a_shape_file_wins(shape_file):
    path = shape_file(SHAPE | {"seed": 7})
    table = "transformer.wpe.weight"
    assert torch.equal(load_adapter(path, seed=1).parameters()[table], load_adapter(path, seed=2).parameters()[table])


def test_no_global_generator_is_touched(shape_file, saved, monkeypatch):
    """Neither the CPU's nor, on machines that have them, those of other devices."""
    reached, directory = [], str(saved("bert"))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: reached.append(seed))
    before = torch.get_rng_state()
    load_adapter(shape_file(SHAPE | {"seed": 7}))
    load_adapter(directory, task="masked-lm")
    assert torch.equal(torch.get_rng_state(), before)
    assert reached == []


def test_a_tokenizer_from_elsewhere(shape_file, saved):
    directory = str(saved("bert"))
    for path in (shape_file(SHAPE | {"config": GPT2, "tokenizer": directory}), shape_file(SHAPE | {"config": GPT2})):
        adapter = load_adapter(path, tokenizer=directory)
        assert adapter.batch(["w7 w8"]).token_ids == ((7, 8),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "is no shape file"),
        ("", "is no shape file"),
        ("model_type: [", "cannot read the shape file"),
        ({"task": "causal-lm", "config": {}}, "expected a mapping with model_type"),
        (SHAPE | {"confg": {}}, "unknown key 'confg'. Did you mean 'config'"),
        (SHAPE | {"task": "causal"}, "unknown task 'causal'. Did you mean 'causal-lm'"),
        ({"model_type": "gpt2"}, "does not say its task"),
        (SHAPE | {"model_type": "gpt-two"}, "gpt-two"),
        (SHAPE | {"config": {"n_embdd": 16}}, "unknown key 'n_embdd' in config. Did you mean 'n_embd'"),
        (SHAPE | {"config": {"n_embd": 16, "n_head": 3}}, "divisible"),
        (SHAPE | {"seed": "seven"}, "seed must be an integer"),
        (SHAPE | {"config": [1]}, "config must be a mapping"),
    ],
)
def test_a_wrong_shape_file_is_refused(content, message, shape_file):
    with pytest.raises(ConfigError, match=message):
        load_adapter(shape_file(content))


def test_a_shape_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the shape file"):
        load_adapter(str(tmp_path / "absent.yaml"))


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"reference-brt.*Did you mean 'reference-bert'") as raised:
        load_adapter("reference-brt")
    assert "local directory" in str(raised.value)
    with pytest.raises(ConfigError, match="cannot load model"):
        load_adapter("/no/such/directory")


def test_an_unknown_task_is_refused_before_loading():
    with pytest.raises(ConfigError, match="Did you mean 'masked-lm'"):
        load_adapter("anything", task="masked")


def test_a_directory_without_a_tokenizer_is_refused(saved):
    """transformers would make an empty one, for which every text is nothing."""
    with pytest.raises(ConfigError, match="holds no tokenizer; pass tokenizer="):
        load_adapter(str(saved("gpt2", tokenizer=False)))
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        load_adapter(str(saved("gpt2")), tokenizer="/no/such/directory")


def test_damaged_weights_are_refused(saved):
    directory = saved("gpt2")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"\x00" * 100):
        weights.write_bytes(damaged)
        with pytest.raises(ConfigError, match="cannot load model"):
            load_adapter(str(directory))
    weights.unlink()
    with pytest.raises(ConfigError, match="cannot load model"):
        load_adapter(str(directory))


def test_weights_of_another_shape_are_refused(saved):
    directory = saved("gpt2")
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 16', '"n_embd": 32'))
    with pytest.raises(ConfigError, match="cannot load model"):
        load_adapter(str(directory))


def test_a_damaged_configuration_is_refused(saved):
    directory = saved("gpt2")
    (directory / "config.json").write_text('{"model_type": "gp')
    with pytest.raises(ConfigError, match="cannot load model"):
        load_adapter(str(directory))


def test_a_checkpoint_without_a_head_needs_a_task(tmp_path):
    with torch.random.fork_rng():
        model = tf.GPT2Model(tf.GPT2Config(**GPT2))
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="pass task=, one of sequence-classification"):
        load_adapter(str(tmp_path))


@pytest.mark.parametrize(("name", "task"), [(name, entry[0]) for name, entry in FAMILIES.items()])
def test_the_task_is_read_from_the_class(name, task):
    assert adapt(build(name)[1]).task == task


@pytest.mark.parametrize(
    ("files", "text", "pieces"),
    [
        ({"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\n##s\n"}, "Reds", ["[CLS]", "red", "##s", "[SEP]"]),
        ({"vocab.json": '{"a": 0, "b": 1, "ab": 2}', "merges.txt": "#version: 0.2\na b\n"}, "aba", ["ab", "a"]),
    ],
)
def test_a_folder_of_bare_vocabulary_files_is_a_tokenizer(tmp_path, files, text, pieces):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    shape = tmp_path / "shape.yaml"
    sizes = "{n_embd: 8, n_layer: 2, n_head: 2, n_positions: 8, vocab_size: 6}"
    shape.write_text(f"{{model_type: gpt2, task: causal-lm, config: {sizes}}}")
    tokenizer = load_adapter(str(shape), tokenizer=str(tmp_path)).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == pieces


def test_a_task_that_the_architecture_has_no_head_for_is_refused():
    with pytest.raises(ConfigError, match=r"is a gpt2 model, which has no head for task 'masked-lm'"):
        load_adapter("reference-gpt2", task="masked-lm")
