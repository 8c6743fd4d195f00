"""``lmleak score``: how right recovered texts or images are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from lmleak.errors import ConfigError, DataError
from lmleak.evaluation.image_records import ImageRecords, read_images
from lmleak.evaluation.records import TextRecords, read_records
from lmleak.files import refuse_unwritable
from lmleak.metrics import LampScores, TextScore, lamp_score_strings, score_strings
from lmleak.metrics.image_score import ImageScore, score_image_tensors
from lmleak.types import Normalization


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score recovered texts or images against the private ones."""

    recovered: str
    """What an attack recovered: the output of lmleak attack; or any .jsonl or .txt of texts, or .safetensors with
    pixels."""
    reference: str
    """The private texts or images: the private reference of lmleak capture, or a file of the same kinds."""
    lamp_compat: bool = False
    """Also print ROUGE as LAMP and DAGER do, special tokens counted as words."""
    words: Literal["latin", "unicode"] = "latin"
    """How texts are cut for ROUGE: latin (published numbers) or unicode (any script)."""
    any_gradient: bool = False
    """Score what was recovered from another gradient file than the reference's (you changed the file in between)."""
    picture: str | None = None
    """Images: the grid of originals, recovered images and differences; RECOVERED.comparison.png if not given."""

    @property
    def of_images(self) -> bool:
        """Whether the files hold images.

        Raises:
            DataError: If one of them does and the other does not.
        """
        paths = (self.recovered, self.reference)
        kinds = [Path(path).suffix == ".safetensors" for path in paths]
        if kinds[0] != kinds[1]:
            names = [f"{'images' if images else 'texts'} ({p})" for images, p in zip(kinds, paths, strict=True)]
            raise DataError(f"{names[0]} cannot be scored against {names[1]}; give the reference of the same capture")
        return kinds[0]

    @property
    def picture_path(self) -> Path:
        """Where the grid of images goes."""
        return Path(self.picture or self.recovered.removesuffix(".safetensors") + ".comparison.png")


@dataclass(frozen=True)
class ScoreResult:
    """The scores, by both conventions if asked."""

    score: TextScore
    references: tuple[str, ...]
    by_token_ids: bool
    """Whether tokens are the tokenizer's; else they are what white space separates."""
    lamp: LampScores | None = None
    special_tokens_known: bool = True
    """Whether the special tokens of the LAMP scores were put in place, or texts were taken as they stand."""


@dataclass(frozen=True)
class ImageScoreResult:
    """The scores of images, and what they are drawn from."""

    score: ImageScore
    original: Tensor
    """(B, C, H, W) private pixel values."""
    recovered: Tensor
    """The same of the recovered images, in the order of the private ones."""
    labels: Tensor | None
    """(B,) true classes."""
    normalization: Normalization
    """What errors in units of the model's input are measured by."""


def run_score(config: ScoreConfig) -> ScoreResult | ImageScoreResult:
    """Score a file of recovered texts or images against a file of private ones, in any order.

    Args:
        config: The settings.

    Returns:
        The scores.

    Raises:
        ConfigError: If a setting is for the other kind.
        DataError: If a file is damaged, a private text is empty, or the files hold different numbers of texts or
            belong to different gradients.
    """
    if config.of_images:
        return _score_images(config)
    if config.picture is not None:
        raise ConfigError(f"picture= is drawn of images, and {config.recovered} holds texts; drop it")
    recovered, reference = read_records(config.recovered), read_records(config.reference)
    if len(recovered.texts) != len(reference.texts):
        raise DataError(
            f"{config.recovered} holds {len(recovered.texts)} text(s) and {config.reference} {len(reference.texts)}; "
            "expected one recovered text per private one (an empty text where nothing was recovered): are they of the "
            "same batch?"
        )
    _refuse_other_gradient(config, recovered.gradient, reference.gradient)
    for number, text in enumerate(reference.texts, 1):
        if not text.strip():
            raise DataError(f"{config.reference}, line {number}: the private text is empty; there is nothing to score")
    by_ids = recovered.token_ids is not None and reference.token_ids is not None
    score = score_strings(
        recovered.texts,
        reference.texts,
        predicted_ids=recovered.token_ids if by_ids else None,
        true_ids=reference.token_ids if by_ids else None,
        words=config.words,
    )
    if not config.lamp_compat:
        return ScoreResult(score, reference.texts, by_ids)
    lamp, known = _lamp(recovered, reference, config)
    return ScoreResult(score, reference.texts, by_ids, lamp, known)


def _refuse_other_gradient(config: ScoreConfig, recovered: str | None, reference: str | None) -> None:
    """Refuse files that say they belong to different gradients."""
    if None not in (recovered, reference) and recovered != reference and not config.any_gradient:
        raise DataError(
            f"{config.recovered} was recovered from another gradient file ({recovered:.8}) than "
            f"{config.reference} belongs to ({reference:.8}): left from an earlier attack? If you changed "
            "the gradient file on purpose, pass --any-gradient"
        )


def _score_images(config: ScoreConfig) -> ImageScoreResult:
    if config.lamp_compat:
        raise ConfigError(f"lamp_compat is for texts, and {config.recovered} holds images; drop it")
    refuse_unwritable(config.picture_path, "picture")
    recovered, reference = read_images(config.recovered), read_images(config.reference)
    if recovered.pixels.shape != reference.pixels.shape:
        raise DataError(
            f"{config.recovered} holds images of shape {tuple(recovered.pixels.shape)} and {config.reference} of "
            f"{tuple(reference.pixels.shape)}; expected as many of the same size: are they of the same batch?"
        )
    if not reference.pixels.isfinite().all():
        raise DataError(f"{config.reference}: the private pixels hold NaN or Inf")
    _refuse_other_gradient(config, recovered.gradient, reference.gradient)
    normalization = _common_normalization(config, [recovered, reference])
    score = score_image_tensors(
        normalization.normalize(recovered.pixels), normalization.normalize(reference.pixels), normalization,
        labels=recovered.labels, true_labels=reference.labels,
    )  # fmt: skip
    return ImageScoreResult(
        score, reference.pixels, recovered.pixels[list(score.order)], reference.labels, normalization
    )


def _common_normalization(config: ScoreConfig, files: Sequence[ImageRecords]) -> Normalization:
    """Return the normalisation that the files name; pixel values themselves where neither does."""
    named = [file.normalization for file in files if file.normalization is not None]
    if len(set(named)) > 1:
        raise DataError(
            f"{config.recovered} and {config.reference} normalise pixels differently ({named[0]} and {named[1]}): the "
            "attack was given another model than the capture"
        )
    return named[0] if named else Normalization()


def _lamp(recovered: TextRecords, reference: TextRecords, config: ScoreConfig) -> tuple[LampScores, bool]:
    sides = recovered.with_special_tokens, reference.with_special_tokens
    if (sides[0] is None) != (sides[1] is None):
        without = config.recovered if sides[0] is None else config.reference
        raise DataError(
            f"lamp_compat counts special tokens, and {without} has no text_with_special_tokens while the other file "
            "has; give two files of lmleak, or two plain ones that keep their special tokens in the text"
        )
    if sides[0] is None:
        return lamp_score_strings(recovered.texts, reference.texts), False
    return lamp_score_strings(*sides), True
