"""Statistics of a teacher on calibration rows that cutting it needs: means over all real tokens."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexkd.errors import DataError, ScoreError, UnsupportedModelError
from flexkd.facts.families.row import Family
from flexkd.models.forward.families import family_of
from flexkd.models.forward.hidden import is_encoder_decoder, model_inputs, token_mask
from flexkd.models.forward.modes import eval_mode
from flexkd.models.slicing.shape import head_dim_of, shape_of
from flexkd.processes import gathered, num_processes, share_of

_TINY: Final = torch.finfo(torch.float32).tiny


class _Mean:
    """A mean that is added up in float64 on the CPU."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, total: Tensor, count: int) -> None:
        total = total.double().cpu()
        self.total = total if self.total is None else self.total + total
        self.count += count


Reduce = Callable[[Tensor, Any], Tensor]
"""Sum over tokens, from the input `[tokens, width]` of a module and from its whole output."""


class TokenMask:
    """Which tokens of the batch in progress are real: those that lead to the head, and those of a source.

    Attributes:
        is_source: Whether the module that runs now works on the source.
    """

    tokens: Bool[Tensor, "batch seq"]
    source: Bool[Tensor, "batch source"]
    is_source: bool

    def rows(self, states: Tensor) -> Tensor:
        """Real tokens, or every row of a tensor that has one row an example."""
        mask = self.source if self.is_source else self.tokens
        if states.ndim == 2 and len(states) == mask.numel():
            # OPT lays all tokens of a batch under one another.
            return states[mask.flatten()]
        return states if states.ndim == 2 else states[mask]


Observers = Callable[[TokenMask], Iterable[tuple[str, nn.Module, Reduce]]]
"""Names of means, the modules that feed them, and how, given the tokens of the batch in progress."""


def measure(
    teacher: PreTrainedModel, batches: Iterable[Mapping[str, Any]], units: Int64[Tensor, " kept"]
) -> dict[str, Float64[Tensor, "*shape"]]:
    """Statistics of a teacher by module path; padding does not count.

    - a block: `1 - cosine similarity` of its input and output (Men et al., ShortGPT, 2024, arXiv:2403.03853, where it
      is called block influence);
    - the attention's output projection: second moment `[heads, head_dim, head_dim]` of what each head hands over;
    - the feed-forward's output projection, and the layer that makes the classes: mean absolute input of each unit;
    - a norm on the residual stream: share of its input's energy that the kept units hold (see `energy_share`);
    - a norm across all heads: share of its input's energy in each of their dimensions.

    The teacher runs in eval mode without gradient. Its mode and its hooks are put back, on an error too.

    Args:
        batches: Dicts of tensors as a collator makes them. Labels and keys that the model does not take are ignored;
            without `attention_mask` every token is real. The decoder of an encoder-decoder reads the labels.
        units: Units of the residual stream that the student keeps.

    Raises:
        DataError: No real token in all batches.
        ScoreError: A statistic is not finite.
        UnsupportedModelError: The feed-forward runs in chunks.
    """
    _check_chunks(teacher)
    family = family_of(teacher)
    return means_over_tokens(teacher, batches, lambda mask: _observers(teacher, family, units, mask))


def _check_chunks(teacher: PreTrainedModel) -> None:
    if getattr(teacher.config, "chunk_size_feed_forward", 0):
        raise UnsupportedModelError(
            f"slice_student.batches: the teacher's chunk_size_feed_forward is {teacher.config.chunk_size_feed_forward},"
            " and its units cannot be matched with tokens in chunks. Load it with chunk_size_feed_forward=0."
        )


@dataclass(frozen=True)
class Calibration:
    """What calibration rows show of a teacher, whichever directions of its residual stream a student will keep.

    Attributes:
        means: As from `measure`, but for the norms on the stream.
        moments: Second moment of the input of each norm on the stream, every token scaled to the same length, by the
            norm's path; float32, since there is a matrix for each norm.
        num_tokens: Tokens that each norm saw.
    """

    means: Mapping[str, Float64[Tensor, "*shape"]]
    moments: Mapping[str, Float[Tensor, "hidden hidden"]]
    num_tokens: Mapping[str, int]

    @property
    def stream_moment(self) -> Float64[Tensor, "hidden hidden"]:
        """Second moment of the normalised stream: mean over the tokens of all norms."""
        total = sum(self.num_tokens[name] * moment.double() for name, moment in self.moments.items())
        assert isinstance(total, Tensor), "a residual stream has norms"
        return total / sum(self.num_tokens.values())

    def along(self, directions: Float64[Tensor, "hidden kept"]) -> dict[str, Float64[Tensor, "*shape"]]:
        """What `measure` would give of the teacher in a basis of which these orthonormal directions are kept.

        The share of a token's energy that directions hold is `sum_i (x d_i)^2 / |x|^2`, whose mean over the tokens is
        `sum_i d_i^T M d_i`. What heads, feed-forward units and blocks do is the same in every basis.
        """
        shares = {name: (directions * (moment.double() @ directions)).sum() for name, moment in self.moments.items()}
        return {**self.means, **shares}


class Observation:
    """Adds up what some modules of a teacher see, in the forwards that it is told of.

    Args:
        teacher: As in `measure`.
        observers: What is looked at, and how it is reduced, which no autocast touches.
    """

    def __init__(self, teacher: PreTrainedModel, observers: Observers) -> None:
        self._teacher, self._family = teacher, family_of(teacher)
        self._means: dict[str, _Mean] = {}
        self._mask = TokenMask()
        self._counts = False
        self._observed = list(observers(self._mask))

    @contextmanager
    def hooked(self) -> Iterator["Observation"]:
        """Within it the modules are watched; hooks are removed at its end, on an error too."""
        paths = {module: path for path, module in self._teacher.named_modules()}
        handles = []
        try:
            for name, module, reduce in self._observed:
                mean = self._means.setdefault(name, _Mean())
                hook = self._hook(reduce, mean, is_source=self._family.reads_source(paths[module]))
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reading(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the teacher's forward on these inputs counts.

        Args:
            inputs: What the forward gets, on the teacher's device.
        """
        self._mask.tokens = token_mask(inputs)
        self._mask.source = token_mask(
            {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        )
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    def read(self, batch: Mapping[str, Any]) -> None:
        """Run the teacher on a batch, in eval mode and without gradient."""
        with eval_mode(self._teacher), torch.no_grad():
            _forward(self._teacher, self._family, batch, self)

    def read_all(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Run the teacher on batches; several processes divide them, until `share` adds up what each has seen."""
        for batch in share_of(batches):
            self.read(batch)

    def share(self) -> None:
        """Add up what all processes have seen, so that each knows it."""
        if num_processes() == 1:
            return
        seen = gathered({name: (mean.total, mean.count) for name, mean in self._means.items()})
        for name in self._means:
            self._means[name] = _Mean()
            for of_process in seen:
                total, count = of_process[name]
                if total is not None:
                    self._means[name].add(total, count)

    def means(self) -> dict[str, Float64[Tensor, "*shape"]]:
        """Means over real tokens by name; modules of one name share a mean.

        Raises:
            DataError: As in `measure`.
            ScoreError: As in `measure`.
        """
        return {name: _mean_of(name, mean) for name, mean in self._means.items()}

    def num_tokens(self, name: str) -> int:
        """Tokens that a mean is taken over."""
        return self._means[name].count

    def _hook(self, reduce: Reduce, mean: _Mean, *, is_source: bool) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self._counts:
                return
            self._mask.is_source = is_source
            with torch.no_grad(), torch.autocast(self._teacher.device.type, enabled=False):
                states = self._mask.rows(args[0] if args else kwargs["hidden_states"])
                mean.add(reduce(states, output), states.shape[0])

        return hook


class CalibrationPass:
    """A pass of a teacher over calibration rows that gives a `Calibration`; other passes may share its forwards.

    Args:
        teacher: As in `measure`, of a family with RMSNorm.

    Raises:
        UnsupportedModelError: As in `measure`.
    """

    def __init__(self, teacher: PreTrainedModel) -> None:
        _check_chunks(teacher)
        family = family_of(teacher)
        self.observation = Observation(teacher, lambda mask: _observers(teacher, family, None, mask))
        self._norms = stream_norms(teacher, family)

    def result(self) -> Calibration:
        """What the pass has seen, in all processes together."""
        self.observation.share()
        means = self.observation.means()
        moments = {name: means.pop(name).float() for name in self._norms}
        return Calibration(means, moments, {name: self.observation.num_tokens(name) for name in moments})


def calibrate(teacher: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Calibration:
    """A `Calibration` of a teacher on batches, as in `measure`, in one pass of its own."""
    calibration = CalibrationPass(teacher)
    with calibration.observation.hooked() as observation:
        observation.read_all(batches)
    return calibration.result()


def stream_norms(teacher: PreTrainedModel, family: Family) -> dict[str, nn.Module]:
    """The norms on the residual stream, by path."""
    return {
        name: module
        for name, module in teacher.named_modules()
        if family.module_axes(name, teacher.config) == ("residual",)
    }


def length_one_moment(states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "hidden hidden"]:
    """Sum of the outer products of states, each of which has length 1 first."""
    normalised = nn.functional.normalize(states.float(), dim=1)
    return normalised.T @ normalised


def means_over_tokens(
    teacher: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    observers: Observers,
    *,
    precision: torch.dtype | None = None,
) -> dict[str, Float64[Tensor, "*shape"]]:
    """Means over real tokens of what observed modules see, by name; modules of one name share a mean.

    Args:
        teacher: As in `measure`.
        batches: As in `measure`.
        observers: What is looked at, and how it is reduced, which no autocast touches.
        precision: Autocast to this type while the teacher runs on the batches; None: as the weights are.

    Raises:
        DataError: As in `measure`.
        ScoreError: As in `measure`.
    """
    autocast = torch.autocast(teacher.device.type, precision, enabled=precision is not None)
    with Observation(teacher, observers).hooked() as observation, autocast:
        observation.read_all(batches)
    observation.share()
    return observation.means()


def energy_share(
    states: Float[Tensor, "tokens units"], units: Int64[Tensor, " kept"], *, centred: bool
) -> Float[Tensor, " tokens"]:
    """Share of each token's sum of squares that the kept units hold.

    A norm divides by the root of that sum over its units. With `centred`, as LayerNorm does, the mean over the units
    is taken off first: over all units in the whole, over the kept ones in the part, for that is what the student's
    norm will see. The share is taken token by token, so that a few tokens with huge states do not dominate.

    Example:
        >>> energy_share(torch.tensor([[3.0, 4.0, 0.0, 5.0]]), torch.tensor([0, 1]), centred=False)
        tensor([0.5000])
    """
    part = states.float().index_select(1, units.to(states.device))
    whole = states.float()
    if centred:
        part, whole = part - part.mean(1, keepdim=True), whole - whole.mean(1, keepdim=True)
    return part.square().sum(1) / whole.square().sum(1).clamp(min=_TINY)


def _observers(
    teacher: PreTrainedModel, family: Family, units: Int64[Tensor, " kept"] | None, mask: TokenMask
) -> Iterator[tuple[str, nn.Module, Reduce]]:
    """What `measure` looks at; without units, norms on the stream give moments in the place of shares."""
    head_dim = head_dim_of(teacher.config)
    centred = family.norm == "layer"

    def change(states: Tensor, output: Any) -> Tensor:
        after = mask.rows(output if isinstance(output, Tensor) else output[0])
        return (1 - torch.cosine_similarity(states.float(), after.float(), dim=-1)).double().sum()

    def moments(states: Tensor, _: Any) -> Tensor:
        heads = torch.unflatten(states.float(), 1, (-1, head_dim))
        return torch.einsum("thi,thj->hij", heads, heads)

    def magnitude(states: Tensor, _: Any) -> Tensor:
        return states.abs().sum(0, dtype=torch.float64)

    def share(states: Tensor, _: Any) -> Tensor:
        if units is None:
            return length_one_moment(states)
        return energy_share(states, units, centred=centred).double().sum()

    def shares(states: Tensor, _: Any) -> Tensor:
        energy = states.float().square()
        return (energy / energy.sum(1, keepdim=True).clamp(min=_TINY)).sum(0, dtype=torch.float64)

    reduces: dict[tuple[str | None, ...], Reduce] = {
        ("residual",): share,
        ("heads",): shares,
        ("kv_heads",): shares,
        ("residual", "heads"): moments,
        ("residual", "cross_heads"): moments,
        ("residual", "feed_forward"): magnitude,
        (None, "pooled"): magnitude,
    }
    shape = shape_of(teacher.config)
    blocks = {family.stack.block(block) for block in range(shape.num_layers)}
    if family.encoder is not None:
        blocks |= {family.encoder.block(block) for block in range(shape.num_encoder_layers or 0)}
    for name, module in teacher.named_modules():
        axes = family.module_axes(name, teacher.config)
        if name in blocks:
            yield name, module, change
        elif axes in reduces:
            yield name, module, reduces[axes]


def _forward(teacher: PreTrainedModel, family: Family, batch: Mapping[str, Any], observation: Observation) -> None:
    if "input_ids" not in batch:
        raise DataError(
            f"slice_student.batches: a batch has no input_ids, only {', '.join(batch) or 'nothing'}. "
            "Give batches as the collator makes them."
        )
    # Without a dense layer before the classes the body is enough, and the logits of the vocabulary are not computed.
    has_pooled = any("pooled" in axes for axes in family.modules.values())
    model = teacher if has_pooled else teacher.base_model
    assert isinstance(model, PreTrainedModel), family.body
    has_source = is_encoder_decoder(teacher)
    if has_source and "labels" not in batch and "decoder_input_ids" not in batch:
        raise DataError(
            f"slice_student.batches: a batch has no labels, which a {teacher.config.model_type}'s decoder reads, only "
            f"{', '.join(batch)}. Give batches as the collator makes them."
        )
    on_host = model_inputs(teacher if has_source else model, batch)
    inputs = {name: value.to(teacher.device) for name, value in on_host.items()}
    with observation.reading(inputs):
        model(**inputs)


def _mean_of(name: str, mean: _Mean) -> Float64[Tensor, "*shape"]:
    if mean.total is None or mean.count == 0:
        raise DataError(
            "slice_student.batches: they hold no real token. Give a few hundred calibration rows, or leave batches out."
        )
    if not mean.total.isfinite().all():
        raise ScoreError(
            f"slice_student.batches: the teacher's states at {name} are not finite. Load the teacher in float32."
        )
    return mean.total / mean.count
