"""Making an adapter from a name, a folder, a shape file or a model in memory."""

import os
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizerFast,
    GPT2TokenizerFast,
)

from lmleak.adapters.base import ModelAdapter, refuse_unfit
from lmleak.adapters.image_load import (
    checkpoint_images,
    from_image_shape,
    image_shape_of,
    is_image_source,
    load_image_model,
    normalization_of,
)
from lmleak.adapters.image_models import ARCHITECTURES
from lmleak.adapters.targets import IMAGE_TASK, TEXT_TASKS
from lmleak.adapters.text import TextAdapter
from lmleak.adapters.vision import VisionAdapter
from lmleak.data.embedded import REFERENCE_MODELS
from lmleak.errors import ConfigError, UnsupportedModelError
from lmleak.lookup import lookup, suggest
from lmleak.types import Normalization

MODEL_CLASSES = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    IMAGE_TASK: AutoModelForImageClassification,
}
CLASS_SUFFIXES = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForImageClassification": IMAGE_TASK,
}
PEFT_TASKS = {
    "SEQ_CLS": "sequence-classification", "TOKEN_CLS": "token-classification", "CAUSAL_LM": "causal-lm",
}  # fmt: skip
TOKENIZER_DESCRIPTIONS = ("tokenizer.json", "tokenizer_config.json", "config.json")
BARE_VOCABULARIES = {"merges.txt": GPT2TokenizerFast, "vocab.txt": BertTokenizerFast}  # as GPT-2 and BERT ship them
SHAPE_KEYS = {"model_type", "task", "config", "seed"}
IMAGE_KEYS, TEXT_KEYS = {"image_shape", "normalization"}, {"tokenizer"}


def load_adapter(
    name: str, *, task: str | None = None, tokenizer: str | None = None, device: str = "cpu", seed: int = 0
) -> ModelAdapter:
    """Load a model in float32 with eager attention, ready for derivatives.

    Args:
        name: An embedded name ("reference-bert", "reference-gpt2"), an image classifier of ours ("lenet", "resnet18",
            ``lmleak.adapters.ARCHITECTURES``; random weights) or a file of its trained weights, a local directory, a
            shape file (YAML with model_type, config and task, or with architecture; random weights unless it names
            weights), or a hub id.
        task: One of ``TEXT_TASKS`` or "image-classification"; by default what the model's architecture says.
        tokenizer: Name or directory of the tokenizer, if it is not beside the model.
        device: Where to put the model.
        seed: Seed of random weights (shape files, and heads that the checkpoint lacks).

    Returns:
        The adapter.

    Raises:
        ConfigError: If the name leads nowhere, or a shape file, a task or a tokenizer is wrong. A model that cannot be
            audited is refused as ``UnsupportedModelError``.
    """
    if task is not None:
        lookup("task", task, MODEL_CLASSES)
    refuse_absent_device(str(device))
    source = str(REFERENCE_MODELS.get(name, name))
    is_shape = Path(source).suffix in (".yaml", ".yml")
    with torch.random.fork_rng(devices=[]):  # weights are drawn from the global generator by transformers
        _seed_weights(seed)
        if is_image_source(source):
            model, task = load_image_model(source, seed), _image_task(name, task)
        elif is_shape:
            model, task, tokenizer = _from_shape(source, task, tokenizer, seed)
        else:
            model, task, tokenizer = _from_weights(source, name, task, tokenizer)
    if task == IMAGE_TASK and tokenizer is not None:
        raise ConfigError(f"{name!r} classifies images and reads no text; drop tokenizer={tokenizer!r}")
    model = model.eval().to(device)
    return adapt(model, tokenizer=_load_tokenizer(tokenizer), task=task, name=name)


def refuse_absent_device(device: str) -> None:
    """Refuse a CUDA device where there is none.

    Args:
        device: cpu, cuda or cuda:N.

    Raises:
        ConfigError: If it is absent.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, but no CUDA device is available; use device=cpu")


def adapt(
    model: nn.Module,
    *,
    tokenizer=None,
    task: str | None = None,
    name: str = "",
    image_shape: tuple[int, int, int] | None = None,
    normalization: Normalization | None = None,
) -> ModelAdapter:
    """Make an adapter for a model in memory. The model itself is left exactly as it is.

    Args:
        model: A transformers language model, or any image classifier.
        tokenizer: The language model's tokenizer; None if batches will be token ids.
        task: One of ``TEXT_TASKS`` or "image-classification"; by default read from the class name.
        name: Name for reports.
        image_shape: (C, H, W) of the images that a classifier reads, if it does not say so itself; attacks need it.
        normalization: How pixel values in [0, 1] become what the classifier reads; None: as they are.

    Returns:
        The adapter.

    Raises:
        ConfigError: If the task is not one of those, or not one of this model.
        UnsupportedModelError: If the model cannot be audited, or its task cannot be told.
    """
    refuse_unfit(model)
    own_task = _task_of_class([base.__name__ for base in type(_innermost(model)).__mro__])
    if task in TEXT_TASKS and own_task is not None and task != own_task:
        raise ConfigError(f"{type(model).__name__} has the head of task {own_task!r}, not of {task!r}; drop task=")
    task = task or own_task
    if task is None:
        if hasattr(model, "get_input_embeddings"):
            raise UnsupportedModelError(
                f"cannot tell the task of {type(model).__name__}; it needs a head. Pass a "
                "...ForSequenceClassification, ...ForTokenClassification, ...ForCausalLM or ...ForMaskedLM model, or "
                f"task= (one of {', '.join(TEXT_TASKS)})"
            )
        task = IMAGE_TASK
    if task in TEXT_TASKS:
        adapter = TextAdapter(model, tokenizer, task=task, name=name)
        if task == "causal-lm" and not adapter.is_causal:
            raise ConfigError(
                f"task 'causal-lm' predicts every token from those before it, and {adapter.name} is an encoder: its "
                f"positions see the whole text ({type(_innermost(model)).__name__}, is_decoder="
                f"{getattr(adapter.config, 'is_decoder', False)}). Write task='masked-lm' or "
                "task='sequence-classification', or give a decoder such as reference-gpt2"
            )
        return adapter
    if task == IMAGE_TASK:
        return VisionAdapter(model, task=task, name=name, image_shape=image_shape, normalization=normalization)
    raise ConfigError(f"unknown task {task!r}. {suggest(task, [*TEXT_TASKS, IMAGE_TASK])}")


def _seed_weights(seed: int) -> None:
    """Seed the CPU generator alone: ``torch.manual_seed`` would reach the generators of all devices too."""
    torch.default_generator.manual_seed(seed)


def _innermost(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _task_of_class(class_names: list[str]) -> str | None:
    for class_name in class_names:
        for suffix, task in CLASS_SUFFIXES.items():
            if class_name.endswith(suffix):
                return task
    return None


def _from_weights(source: str, name: str, task: str | None, tokenizer: str | None):
    if (Path(source) / "adapter_config.json").is_file():
        return _from_peft(source, task, tokenizer)
    try:
        config = AutoConfig.from_pretrained(source)
        task = task or _task_of_class(config.architectures or [])
        if task is None:
            raise UnsupportedModelError(
                f"{name!r} does not say what it is for (architectures: {config.architectures}); "
                f"pass task=, one of {', '.join(MODEL_CLASSES)}"
            )
        model = MODEL_CLASSES[task].from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
        if task == IMAGE_TASK:
            model.image_shape, model.normalization = checkpoint_images(source, config)
    except (UnsupportedModelError, ConfigError):
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # absent, damaged, or not of its config
        if "Unrecognized configuration class" in str(error):
            raise ConfigError(
                f"{name!r} is a {config.model_type} model, which has no head for task {task!r} in transformers; drop "
                "task=, or give one that its architecture has"
            ) from error
        kind = "directory" if os.path.isdir(source) else "hub id (is the hub reachable?)"
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot load model {name!r} as a {kind}: {first_line}. "
            f"{suggest(name, [*REFERENCE_MODELS, *ARCHITECTURES])}, "
            "a local directory, a shape file (.yaml) or a hub id"
        ) from error
    return model, task, tokenizer or (source if task in TEXT_TASKS else None)


def _from_peft(folder: str, task: str | None, tokenizer: str | None):
    """Return the base model with the folder's trained weights (LoRA and such) on it, those alone trained."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"{folder} holds PEFT weights; install lmleak[lora] to load them") from error
    try:
        config = peft.PeftConfig.from_pretrained(folder)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder}/adapter_config.json is damaged: {error}") from error
    base = config.base_model_name_or_path
    if not base:
        raise ConfigError(f"{folder}/adapter_config.json does not name its base model (base_model_name_or_path)")
    model, task, tokenizer = _from_weights(base, base, task or PEFT_TASKS.get(config.task_type), tokenizer)
    try:
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True), task, tokenizer
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot put the weights of {folder} on {base}: {str(error).splitlines()[0]}") from error


def _image_task(origin: str, task: str | None) -> str:
    if task not in (None, IMAGE_TASK):
        raise ConfigError(f"{origin!r} classifies images and has no task {task!r}; drop task=")
    return IMAGE_TASK


def _from_shape(path: str, task: str | None, tokenizer: str | None, seed: int):
    try:
        shape = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the shape file {path}: {error}") from error
    if isinstance(shape, dict) and "architecture" in shape:
        return from_image_shape(path, shape, seed), _image_task(path, task), tokenizer
    if not isinstance(shape, dict) or "model_type" not in shape:
        raise ConfigError(
            f"{path} is no shape file: expected a mapping with model_type and config, or with architecture (of images)"
        )
    of_images = (task or shape.get("task")) == IMAGE_TASK
    keys = SHAPE_KEYS | (IMAGE_KEYS if of_images else TEXT_KEYS)
    if unknown := set(shape) - keys:
        raise ConfigError(f"{path}: unknown key {min(unknown)!r}. {suggest(min(unknown), sorted(keys))}")
    task, settings = task or shape.get("task"), shape.get("config") or {}
    if task is None:
        raise ConfigError(f"{path} does not say its task; add task: (one of {', '.join(MODEL_CLASSES)})")
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: config must be a mapping, got a {type(settings).__name__}")
    model_class = lookup("task", str(task), MODEL_CLASSES)
    if "seed" in shape:
        if not isinstance(shape["seed"], int):
            raise ConfigError(f"{path}: seed must be an integer, got {shape['seed']!r}")
        _seed_weights(shape["seed"])
    try:
        known = AutoConfig.for_model(shape["model_type"])
        if absent := [key for key in settings if not hasattr(known, key)]:  # transformers would ignore it
            raise ConfigError(f"{path}: unknown key {absent[0]!r} in config. {suggest(absent[0], known.to_dict())}")
        config = AutoConfig.for_model(shape["model_type"], **settings)
        model = model_class.from_config(config, attn_implementation="eager")
        if of_images:
            model.image_shape, model.normalization = image_shape_of(path, shape), normalization_of(path, shape)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    return model, task, tokenizer or shape.get("tokenizer")


def _tokenizer_class(folder: Path) -> type:
    """Return the class that reads a tokenizer; a folder of bare vocabulary files does not name its own."""
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_DESCRIPTIONS):
        for file, tokenizer_class in BARE_VOCABULARIES.items():
            if (folder / file).exists():
                return tokenizer_class
    return AutoTokenizer


def _load_tokenizer(name: str | None):
    if name is None:
        return None
    source = str(REFERENCE_MODELS.get(name, name))
    try:
        tokenizer = _tokenizer_class(Path(source)).from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer {name!r}: {str(error).strip().splitlines()[0]}") from error
    # Beside a model without tokenizer files transformers makes one that knows special tokens only.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ConfigError(f"{name!r} holds no tokenizer; pass tokenizer= (a directory or hub id)")
    return tokenizer
