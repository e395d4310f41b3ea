"""Checks of what a loader reports: weights that are missing, of another shape, or unexpected."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn
from transformers import PreTrainedModel

from flexkd.errors import UnsupportedModelError
from flexkd.facts.families.row import module_pattern
from flexkd.facts.families.table import FAMILIES
from flexkd.models.loading.stored_weights import (
    blocks_error,
    brief,
    foreign_prefix,
    head_error,
    head_misfit_error,
    misfit_error,
    prefix_error,
    stack_of,
    stacks,
)

logger = logging.getLogger(__name__)

Head = Literal["stored", "trained", "adapter"]
"""Where the head of a model comes from: its checkpoint, a training that follows, an adapter that is loaded next."""

_FORMER_BUFFERS: Final = re.compile(
    r"(^|\.)(masked_bias|inv_freq|position_ids|version|_extra_state|num_batches_tracked|relative_position_index)$"
    r"|attn\.bias$|attention\.bias$"
)
"""What earlier versions of the libraries stored beside the weights: tables that every model computes itself."""


@dataclass(frozen=True)
class Report:
    """The relevant part of what a loader of transformers reports about one model.

    Attributes:
        missing: Weights that no file holds; ties and buffers do not count.
        mismatched: Weights of another shape in the file, as (name, shape in the file, shape of the model).
        unexpected: Weights of the file that the model does not know.
    """

    model: PreTrainedModel
    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unexpected: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, info: Mapping[str, Any]) -> "Report":
        """The report of `from_pretrained(..., output_loading_info=True)`."""
        counted = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(_ties(model))
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        return cls(
            model=model,
            missing=tuple(sorted(counted & set(info["missing_keys"]))),
            mismatched=tuple(
                sorted((name, tuple(stored), tuple(shape)) for name, stored, shape in info["mismatched_keys"])
            ),
            unexpected=tuple(
                sorted(
                    name for name in info["unexpected_keys"] if name not in buffers and not _FORMER_BUFFERS.search(name)
                )
            ),
        )


def check_loaded(
    model: PreTrainedModel, info: Mapping[str, Any], *, source: str, where: str, head: Head = "stored"
) -> list[str]:
    """Refuse a model that does not hold what its checkpoint and its config promise.

    Args:
        info: What the loader reports: `missing_keys`, `mismatched_keys`, `unexpected_keys`.
        source: The model as the user named it.
        where: Names the setting in errors.
        head: Where the head comes from; only one that is trained, or brought by an adapter, may be new.

    Returns:
        Names of the weights of the head that are new.

    Raises:
        UnsupportedModelError: Weights of the body, or of a head that is not to be trained, are random; or the file
            holds weights of the body that the config leaves out.
    """
    report = Report.of(model, info)
    body = _body_name(model)
    _check_body(report, body, source, where)
    unexpected = [name for name in report.unexpected if _is_of_body(name, model, body)]
    if unexpected:
        raise _unexpected_error(model, body, unexpected, source, where)
    lacking = [*report.missing, *(name for name, _, _ in report.mismatched)]
    if lacking and head == "stored":
        raise _head_error(report, source, where)
    if report.unexpected:
        # That the head of another task is left behind is what a new head means.
        level = logging.INFO if lacking else logging.WARNING
        logger.log(
            level, "%s: %d weights of '%s' are not used (%s)", where, len(report.unexpected), source,
            brief(report.unexpected),
        )  # fmt: skip
    if lacking and head == "trained":
        logger.warning(
            "%s: '%s' brings no head for this task: %d weights are new and will be trained (%s)", where, source,
            len(lacking), brief(lacking),
        )  # fmt: skip
    return sorted(lacking)


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight comes after the last state of the body: a pooler, a classifier, output embeddings."""
    body, module = _body_name(model), name.rpartition(".")[0]
    if body and not name.startswith(f"{body}."):
        return True
    row = FAMILIES.get(model.config.model_type)
    if row is not None and "pooled" in row.modules.get(module_pattern(module), ()):
        return True
    if _is_pooler(name, body):
        return True
    output = None if body else model.get_output_embeddings()
    return output is not None and any(model.get_submodule(module) is part for part in output.modules())


def _is_pooler(name: str, body: str) -> bool:
    """By the name that transformers gives to what a body may end in."""
    return name.removeprefix(f"{body}.").startswith(("pooler.", "pooler_"))


def _ties(model: PreTrainedModel) -> Mapping[str, str]:
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return ties


def _body_name(model: PreTrainedModel) -> str:
    """Path of the body below the task model; empty where the task model is the body, too."""
    name: str = model.base_model_prefix
    return name if name and isinstance(getattr(model, name, None), nn.Module) else ""


def _check_body(report: Report, body: str, source: str, where: str) -> None:
    model = report.model
    missing = [name for name in report.missing if not is_head(model, name)]
    if missing:
        short = {form for name in report.missing for form in (name, name.removeprefix(f"{body}."))}
        prefix = foreign_prefix(report.unexpected, sorted(short, key=len, reverse=True))
        if prefix is not None:
            raise prefix_error(where, source, report.missing, prefix)
        error = _fewer_blocks(report, body, missing, source, where)
        raise error or UnsupportedModelError(
            f"{where}: '{source}' lacks {len(missing)} weights of a {type(model).__name__} ({brief(missing)}), and "
            "random ones would take their place. Give a model that was saved whole."
        )
    misfits = [entry for entry in report.mismatched if not is_head(model, entry[0])]
    if misfits:
        raise misfit_error(where, source, misfits)


def _fewer_blocks(
    report: Report, body: str, missing: list[str], source: str, where: str
) -> UnsupportedModelError | None:
    """The error of a config that says more blocks than there are; None where something else is missing."""
    places = [stack_of(name) for name in missing]
    paths = {place[0] for place in places if place is not None}
    if None in places or len(paths) != 1:
        return None
    path = paths.pop()
    blocks = stacks(name for name, _ in report.model.named_parameters())[path]
    stored = min(place[1] for place in places if place is not None)
    if stored == 0 or {place[1] for place in places if place is not None} != set(range(stored, len(blocks))):
        return None
    config, key = report.model.config.to_dict(), _blocks_key(report.model, path)
    return blocks_error(where, source, config, key, configured=len(blocks), stored=stored, names=missing)


def _blocks_key(model: PreTrainedModel, path: str) -> str:
    """Config key of the number of blocks at a path."""
    row = FAMILIES.get(model.config.model_type)
    if row is None:
        return str(type(model.config).attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    return row.encoder.layers_key if row.encoder is not None and row.encoder.path == path else row.layers_key


def _is_of_body(name: str, model: PreTrainedModel, body: str) -> bool:
    """Whether a weight that the model does not know lies where its body has weights; a pooler may stay unused."""
    inner: nn.Module = model.get_submodule(body)
    first, _, below = name.removeprefix(f"{body}.").partition(".")
    child = dict(inner.named_children()).get(first)
    if not below or child is None or next(child.parameters(), None) is None or _is_pooler(name, body):
        return False
    return bool(body) or not is_head(model, f"{first}.")


def _unexpected_error(
    model: PreTrainedModel, body: str, names: list[str], source: str, where: str
) -> UnsupportedModelError:
    """The error of weights that the config leaves out: whole blocks, or parts of what is there."""
    # A body that was saved alone leaves its own name out.
    named_whole = {f"{body}.{name.removeprefix(f'{body}.')}" if body else name: name for name in names}
    of_model = stacks(name for name, _ in model.named_parameters())
    for path, blocks in stacks(named_whole).items():
        configured = len(of_model.get(path, ()))
        if configured and min(blocks) >= configured:
            extra = [named_whole[name] for block in blocks.values() for name in block]
            options = {"configured": configured, "stored": max(blocks) + 1}
            return blocks_error(where, source, model.config.to_dict(), _blocks_key(model, path), names=extra, **options)
    return UnsupportedModelError(
        f"{where}: '{source}' has {len(names)} weights that its config leaves out ({brief(names)}), and it would "
        "compute without them. Correct config.json, or save the model again with it."
    )


def _head_error(report: Report, source: str, where: str) -> UnsupportedModelError:
    if report.mismatched:
        return head_misfit_error(where, source, *report.mismatched[0])
    is_classifier = report.model.get_output_embeddings() is None
    kind: Literal["classification", "language"] = "classification" if is_classifier else "language"
    return head_error(where, source, report.missing, kind)
