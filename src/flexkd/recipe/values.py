"""Types of the values in a recipe: text, whole numbers, numbers, shares, layers, sources."""

import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from flexkd.data.sources.table import is_encoding
from flexkd.facts.names import ALL_LAYERS, SOURCE_SEPARATOR
from flexkd.recipe.document import FLOAT, WHOLE, short_repr

LIST: Final = "[list]"
MAPPING: Final = "[mapping]"
"""Steps in the error paths of pydantic for the two ways of writing a value; they are in no recipe."""

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_METHOD_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")
_PARAMETERS: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMB]?)", re.IGNORECASE)

# What an editor may be told of a value that is checked by a function: pydantic does not look into it.
_TEXT: Final = {"type": "string", "minLength": 1}
_TEXTS: Final = {"type": "array", "items": _TEXT, "minItems": 1}
_LAYER: Final = {"type": "integer", "minimum": -1}
_SCALARS: Final = {"type": ["string", "number", "boolean", "null"]}


def _number(value: object) -> object:
    """A quoted number as a number; any other value unchanged, for the type to check."""
    if isinstance(value, str) and (FLOAT.match(value) or WHOLE.match(value)):
        return float(value.replace(".inf", "inf").replace(".nan", "nan"))
    return value


def _parameter_count(value: object) -> object:
    match = _PARAMETERS.fullmatch(value) if isinstance(value, str) else None
    if match:
        return round(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(value, str):
        raise ValueError(f"{short_repr(value)} is not a number of parameters. Write it as 30M, 1.5B or 30000000.")
    return value


def _source_or_share(value: object) -> str | float:
    number = _number(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        if not 0 < number < 1:
            raise ValueError(f"{number} is not a share of the training rows. Give one between 0 and 1, or a source.")
        return float(number)
    source = _source(value)
    if not isinstance(source, str) or not source:
        raise ValueError(
            f"{short_repr(value)} is neither a source nor a share. Give a file, a folder, a hub id or 0.1."
        )
    return source


def _source(value: object) -> object:
    """Several sources as one text, as they may be written as well; any other value unchanged, for the type to check."""
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise ValueError("[] names no source. Give at least one.")
    for part in value:
        if not isinstance(part, str) or not part:
            raise ValueError(f"{short_repr(part)} in the list is no source. Give files, folders or hub ids.")
        if len(value) > 1 and SOURCE_SEPARATOR in part:
            raise ValueError(f"{short_repr(part)} holds '{SOURCE_SEPARATOR}', which joins sources. Rename the file.")
    return SOURCE_SEPARATOR.join(value)


def _encoding(name: str) -> str:
    if not is_encoding(name):
        raise ValueError(f"{short_repr(name)} is no encoding that Python knows. Write auto, cp1252, utf-16-le, ...")
    return name


def _layers(value: object) -> str | int | tuple[int, ...]:
    if value == ALL_LAYERS:
        return ALL_LAYERS
    layers: list[int] = []
    for layer in value if isinstance(value, list | tuple) else (value,):
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < -1:
            raise ValueError(
                f"{short_repr(layer)} is no layer. Give -1 (what the head reads), 1..N (after a block), a list, or all."
            )
        layers.append(layer)
    if not layers:
        raise ValueError("[] names no layer. Give -1, or a list of layers.")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{layers} names a layer twice. Name each layer once.")
    return tuple(layers) if isinstance(value, list | tuple) else layers[0]


def _layer_keys(value: object) -> object:
    """The mapping with layers as numbers where they are text, as in a record or a card: JSON has no other keys."""
    if not isinstance(value, Mapping):
        return value
    layers = [int(key) if isinstance(key, str) and WHOLE.match(key) else key for key in value]
    if len(set(layers)) < len(layers):
        raise ValueError(f"{short_repr(dict(value))} names a layer twice. Name each layer once.")
    return dict(zip(layers, value.values(), strict=True))


def _chunk(value: object) -> int | str:
    if value in ("auto", "off") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        assert isinstance(value, int | str)
        return value
    raise ValueError(f"{short_repr(value)} is no size of chunks. Give auto, off, or a number of predictions above 0.")


def _method_name(name: str) -> str:
    if not _METHOD_NAME.fullmatch(name):
        raise ValueError(
            f"{short_repr(name)} cannot name a method, which is a folder as well. Use a letter or a digit, then up to "
            "59 letters, digits, '-', '_' and '.'."
        )
    return name


def _method_overrides(value: object) -> object:
    if value is None or isinstance(value, list | tuple):
        return value
    raise ValueError(
        f"{short_repr(value)} is no list of KEY=VALUE. Write a list, as [objective.features.weight=0.1], or null for "
        "the built-in method of this name."
    )


def _method_pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{short_repr(value)} is no pair. Write a method and its reference, as [flexkd, logit_kd].")
    return tuple(value)


def _scalar(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"{short_repr(value)} is no single value. Give text, a number, true, false or null.")


def _stored_values(value: object) -> object:
    """The mapping with keys as text, as files store labels: 0, '0' and 0.0 are one label, as are true and 'true'."""
    if not isinstance(value, Mapping):
        return value
    keys: dict[str, object] = {}
    for key, name in value.items():
        if key is None or not isinstance(key, str | int | float):
            raise ValueError(f"{short_repr(key)} is no stored label. Give text, a number, true or false.")
        number = int(key) if isinstance(key, float) and key.is_integer() else key
        text = str(number).lower() if isinstance(number, bool) else str(number).strip()
        if text in keys:
            raise ValueError(f"{short_repr(key)} appears twice. Name each stored label once.")
        keys[text] = name
    return keys


def _scalar_or_list(value: object) -> str | int | float | bool | list[str | int | float | bool | None] | None:
    return [_scalar(item) for item in value] if isinstance(value, list | tuple) else _scalar(value)


Text = Annotated[str, Field(strict=True, min_length=1)]
Switch = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
# Bounds stand before the function: after it, pydantic checks them but leaves them out of the JSON schema.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_number)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0), BeforeValidator(_number)]
NotNegative = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0), BeforeValidator(_number)]
Share = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1), BeforeValidator(_number)]
ShareBelowOne = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, lt=1), BeforeValidator(_number)]
UnitInterval = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1), BeforeValidator(_number)]
ParameterCount = Annotated[
    int,
    BeforeValidator(_parameter_count),
    Field(strict=True, ge=1),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9]+(\\.[0-9]+)? ?[KkMmBb]?$"}]}
    ),
]
Layer = Annotated[int, Field(strict=True, ge=-1)]
LayerMap = Annotated[
    dict[Layer, Layer],
    BeforeValidator(_layer_keys),
    WithJsonSchema(
        {"type": "object", "propertyNames": {"pattern": "^(-1|0|[1-9][0-9]*)$"}, "additionalProperties": _LAYER}
    ),
]
"""Student layer: teacher layer."""
Layers = Annotated[
    int | tuple[int, ...] | Literal["all"],
    BeforeValidator(_layers),
    WithJsonSchema(
        {
            "anyOf": [
                _LAYER,
                {"type": "array", "items": _LAYER, "minItems": 1, "uniqueItems": True},
                {"enum": [ALL_LAYERS]},
            ]
        }
    ),
]
LogitChunk = Annotated[
    int | str,
    PlainValidator(_chunk),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["auto", "off"]}]}),
]
Source = Annotated[Text, BeforeValidator(_source), WithJsonSchema({"anyOf": [_TEXT, _TEXTS]})]
SourceOrShare = Annotated[
    str | float,
    PlainValidator(_source_or_share),
    WithJsonSchema({"anyOf": [_TEXT, _TEXTS, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]}),
]
Encoding = Annotated[Text, AfterValidator(_encoding)]
MethodPair = Annotated[
    tuple[Text, Text],
    BeforeValidator(_method_pair),
    WithJsonSchema({"type": "array", "items": _TEXT, "minItems": 2, "maxItems": 2}),
]
LabelNames = Annotated[
    Annotated[tuple[Text, ...], Tag(LIST)] | Annotated[dict[Text, Text], BeforeValidator(_stored_values), Tag(MAPPING)],
    Discriminator(lambda value: MAPPING if isinstance(value, Mapping) else LIST),
]
_MethodName = Annotated[
    Text, AfterValidator(_method_name), WithJsonSchema({"type": "string", "pattern": f"^{_METHOD_NAME.pattern}$"})
]
_MethodOverrides = Annotated[tuple[Text, ...] | None, BeforeValidator(_method_overrides)]
Methods = Annotated[
    Annotated[tuple[Text, ...], Tag(LIST)] | Annotated[dict[_MethodName, _MethodOverrides], Tag(MAPPING)],
    Discriminator(lambda value: MAPPING if isinstance(value, Mapping) else LIST),
]
Scalar = Annotated[str | int | float | bool | None, PlainValidator(_scalar), WithJsonSchema(_SCALARS)]
ScalarOrList = Annotated[
    str | int | float | bool | list[str | int | float | bool | None] | None,
    PlainValidator(_scalar_or_list),
    WithJsonSchema({"anyOf": [_SCALARS, {"type": "array", "items": _SCALARS}]}),
]
