"""The models of the studies on layers: made small, trained briefly on public examples, adapted."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from private_training import FlatGradients
from private_training import train as fit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification, GPT2LMHeadModel

from lmleak.adapters import ModelAdapter, adapt, image_model, load_adapter
from lmleak.adapters.image_resnet import CifarResNet
from lmleak.data.attributes import AttributeData
from lmleak.lookup import lookup
from lmleak.types import Normalization

AT_ONCE = 250  # held-out examples whose loss is computed together
MAX_LENGTH = 32  # tokens
LEARNING_RATES = {"images": 2e-3, "texts": 5e-4}  # of Adam


class ClassicCNN(nn.Module):
    """LeNet-5 with ReLU: two 5x5 convolutions with mean pooling, three linear layers (LeCun et al. 1998).

    Args:
        image_shape: (C, H, W).
        num_classes: Classes.
        dropout: Probability of dropout after the first two linear layers.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, dropout: float = 0.0):
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = image_shape
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5, padding=2)
        self.fc1 = nn.Linear(16 * (height // 4) * (width // 4), 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        x = F.avg_pool2d(self.conv1(x).relu(), 2)
        x = F.avg_pool2d(self.conv2(x).relu(), 2).flatten(1)
        x = self.drop(self.fc1(x).relu())
        return self.fc3(self.drop(self.fc2(x).relu()))


@dataclass(frozen=True)
class StudyModel:
    """A kind of model."""

    kind: str
    """"images" or "texts"."""
    shared: str
    """Parameters whose gradient is shared. BatchNorm's few, and BERT's and GPT-2's word table, stay private."""
    classifier: tuple[str, ...]
    """The fully connected layers after the feature extractor; none in a language model."""


MODELS: dict[str, StudyModel] = {
    "cnn": StudyModel("images", "conv|fc", ("fc1", "fc2", "fc3")),
    "lenet": StudyModel("images", "body|fc", ("fc",)),
    "resnet": StudyModel("images", "conv|linear", ("linear",)),
    "bert": StudyModel("texts", "no-word-embeddings", ("head",)),
    "gpt2": StudyModel("texts", "no-word-embeddings", ()),
}
"""CNN: :class:`ClassicCNN`. LeNet: the sigmoid network of the gradient-inversion papers, from its U(-1/2, 1/2).
ResNet: three stages of one block, width 16. BERT, GPT-2: the shape of the embedded reference models (two blocks of
width 128), GPT-2 with a head of its own, so that the table's two uses are two layers."""


def image_network(model: str, data: AttributeData, *, dropout: float, seed: int) -> nn.Module:
    """Return an untrained image classifier that knows how its pixels are normalised."""
    shape, classes = tuple(data.pixels.shape[1:]), len(data.class_names)
    makers = {
        "cnn": lambda: ClassicCNN(shape, classes, dropout),
        "lenet": lambda: image_model("lenet", shape, classes, seed=seed),
        "resnet": lambda: CifarResNet(shape[0], classes, depths=(1, 1, 1), width=16),
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = makers[model]()
    network.image_shape = shape
    channels = data.pixels.double().transpose(0, 1).flatten(1)
    spread = channels.std(1).clamp(min=1e-3)
    network.normalization = Normalization(tuple(channels.mean(1).tolist()), tuple(spread.tolist()))
    return network


def text_network(model: str, data: AttributeData, *, pretrained: bool, dropout: float, seed: int) -> nn.Module:
    """Return a language model in the shape of the reference model: its weights and a new head, or all random."""
    reference = load_adapter(f"reference-{model}")
    config = reference.model.config.__class__(**reference.model.config.to_dict())
    config.tie_word_embeddings = False
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, dropout)
    if model == "bert":
        config.num_labels = max(2, len(data.class_names))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = (BertForSequenceClassification if model == "bert" else GPT2LMHeadModel)(config)
    if pretrained:
        state, own = reference.model.state_dict(), network.state_dict()
        own |= {n: t for n, t in state.items() if n in own and own[n].shape == t.shape and "classifier" not in n}
        if model == "gpt2":
            own["lm_head.weight"] = state["transformer.wte.weight"].clone()
        network.load_state_dict(own)
    return network


def adapter_of(model: str, network: nn.Module, name: str) -> ModelAdapter:
    """Return the network ready for derivatives."""
    if lookup("model", model, MODELS).kind == "images":
        return adapt(network, name=name, image_shape=network.image_shape, normalization=network.normalization)
    tokenizer = load_adapter(f"reference-{model}").tokenizer
    return adapt(network, tokenizer=tokenizer, name=name)


def batch_maker(model: str, data: AttributeData, network: nn.Module) -> Callable[[list[int]], Tensor]:
    """Return numbers of examples -> their mean loss, as the network is (training mode or not)."""
    labels = None if data.labels is None else torch.as_tensor(data.labels)
    if data.pixels is not None:
        images = network.normalization.normalize(data.pixels)
        return lambda rows: F.cross_entropy(network(images[rows]), labels[rows])
    tokenizer, pad = load_adapter(f"reference-{model}").tokenizer, network.config.pad_token_id
    ids = [tokenizer(text)["input_ids"][:MAX_LENGTH] for text in data.texts]

    def loss(rows: list[int]) -> Tensor:
        longest = max(len(ids[i]) for i in rows)
        tokens = torch.tensor([ids[i] + [pad] * (longest - len(ids[i])) for i in rows])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (longest - len(ids[i])) for i in rows])
        targets = labels[rows] if model == "bert" else tokens.masked_fill(mask == 0, -100)
        return network(input_ids=tokens, attention_mask=mask, labels=targets).loss

    return loss


def train(
    model: str, data: AttributeData, network: nn.Module, *, epochs: int, batch_size: int, seed: int
) -> nn.Module:
    """Train a network in place by Adam, and return it in evaluation mode.

    Args:
        model: One of ``MODELS``.
        data: The public half, marks included: what is in the world is in the training.
        network: The network, on the CPU.
        epochs: Passes over the data; 0 trains nothing.
        batch_size: Examples per step.
        seed: Seed of the order and of dropout.

    Returns:
        The network.
    """
    loss_of, generator = batch_maker(model, data, network), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATES[MODELS[model].kind])
    network.train()
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.default_generator.manual_seed(seed)
        for _ in range(epochs):
            for places in torch.randperm(len(data), generator=generator).split(batch_size):
                loss = loss_of(places.tolist())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


def train_privately(
    data: AttributeData,
    network: nn.Module,
    *,
    clip: float,
    noise_multiplier: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train an image classifier in place by Adam on DP-SGD gradients: (sum_i clip(g_i, C) + z C n) / B.

    Args:
        data: The public half.
        network: The network, on the CPU.
        clip: C, largest norm of one example's gradient.
        noise_multiplier: z.
        epochs: Passes over the data.
        batch_size: B.
        seed: Seed of the order and of the noise.
    """
    adapter = adapter_of("cnn", network, "private")
    images, labels = network.normalization.normalize(data.pixels), torch.as_tensor(data.labels)
    generator = torch.Generator().manual_seed(seed)
    batches = [b for _ in range(epochs) for b in torch.randperm(len(data), generator=generator).split(batch_size)]

    def update(flat: FlatGradients, step: int) -> Tensor:
        own = flat(images[batches[step]], labels[batches[step]])  # (n, P)
        total = (own * (clip / own.norm(dim=1, keepdim=True).clamp(min=clip))).sum(0)
        return (total + noise_multiplier * clip * torch.randn(total.shape, generator=generator)) / batch_size

    fit(adapter, update, steps=len(batches), learning_rate=LEARNING_RATES["images"])
    network.eval()


@torch.no_grad()
def held_out(model: str, data: AttributeData, network: nn.Module) -> dict[str, float | None]:
    """Return loss (nats per example, or per token of a language model) and accuracy on private examples."""
    loss_of = batch_maker(model, data, network)
    parts = torch.arange(len(data)).split(AT_ONCE)
    loss = sum(loss_of(part.tolist()).item() * len(part) for part in parts) / len(data)
    accuracy = None
    if data.pixels is not None:
        images, labels = network.normalization.normalize(data.pixels), torch.as_tensor(data.labels)
        right = [(network(images[part]).argmax(1) == labels[part]).sum().item() for part in parts]
        accuracy = sum(right) / len(data)
    elif model == "bert":
        adapter, right = adapter_of(model, network, model), 0
        for part in parts:
            batch = adapter.batch(
                [data.texts[i] for i in part.tolist()], data.labels[part].tolist(), max_length=MAX_LENGTH
            )
            right += (adapter.logits(adapter.input(batch), batch.layout).argmax(1) == batch.targets).sum().item()
        accuracy = right / len(data)
    return {"loss": loss, "accuracy": accuracy}
