"""Encoders, decoders and encoder-decoders, distinguished by the content of a config.json."""

from collections.abc import Mapping
from typing import Any

from flexkd.errors import RecipeError, UnsupportedModelError
from flexkd.facts.families.table import traits_of


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether it reads a source with one stack of blocks and writes with another."""
    return bool(config.get("is_encoder_decoder", traits_of(config).kind == "encoder_decoder"))


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether it writes no text, whatever head it was saved with."""
    return traits_of(config).kind == "encoder" and not config.get("is_decoder", False)


def encoder_error(where: str, source: str, model_type: str) -> UnsupportedModelError:
    """The error for an encoder where a language model is needed."""
    return UnsupportedModelError(
        f"{where}: '{source}' is an encoder ({model_type}), which generates no text. Give a decoder-only or "
        "an encoder-decoder model, or use task.type: classification."
    )


def packing_error(who: str, class_name: str) -> RecipeError:
    """The error for rows in one sequence before a model that is no decoder."""
    return RecipeError(f"training.packing: the {who}, {class_name}, is no decoder. Set it to false.")


def no_linear_error(where: str, what: str) -> UnsupportedModelError:
    """The error for a model without linear layers, of which int8 would change nothing."""
    return UnsupportedModelError(
        f"{where}: {what} has no linear layers that torch could compute in int8. Set it to false."
    )


def check_kinds(kinds: Mapping[str, bool]) -> None:
    """Refuse a teacher and a student that see different positions.

    Args:
        kinds: Name of a model to whether it is an encoder-decoder.

    Raises:
        RecipeError: They differ.
    """
    if len(set(kinds.values())) > 1:
        raise RecipeError(
            f"student.model: an encoder-decoder and a decoder see different positions ({dict(kinds)}). Give two of one "
            "kind, or train on the teacher's answers: flexkd generate with this teacher, then a recipe with "
            "data.teacher_answers, objective.baseline: true and the student's own model as teacher."
        )
