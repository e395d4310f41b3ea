"""The sizes of a student: what a teacher has, and what can be cut from it."""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from flexkd.errors import ShapeError
from flexkd.facts.families.row import PARTS, Axis, is_residual_embedding
from flexkd.models.forward.families import family_of


@dataclass(frozen=True)
class StudentShape:
    """Sizes of a transformer. Without grouped-query attention num_key_value_heads equals num_heads.

    Of an encoder-decoder num_layers counts the blocks of the decoder; the blocks of both have the same sizes.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_encoder_layers: int | None = None


def shape_of(config: PreTrainedConfig) -> StudentShape:
    """The sizes that a config describes."""
    family = family_of(config)
    heads = getattr(config, family.heads_key)
    kv_heads = None if family.kv_heads_key is None else getattr(config, family.kv_heads_key)
    hidden_size = getattr(config, family.hidden_key)
    units = getattr(config, family.intermediate_key)
    return StudentShape(
        hidden_size=hidden_size,
        num_layers=getattr(config, family.layers_key),
        num_heads=heads,
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        intermediate_size=(family.intermediate_multiple or 1) * hidden_size if units is None else units,
        num_encoder_layers=None if family.encoder is None else getattr(config, family.encoder.layers_key),
    )


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of one attention head. A sliced student keeps its teacher's."""
    family = family_of(config)
    explicit = None if family.head_dim_key is None else getattr(config, family.head_dim_key, None)
    shape = shape_of(config)
    return shape.hidden_size // shape.num_heads if explicit is None else int(explicit)


def axis_sizes(config: PreTrainedConfig, shape: StudentShape) -> dict[Axis, int]:
    """Length of every kind of axis in a model of this shape with the config's head_dim."""
    head_dim = head_dim_of(config)
    sizes: dict[Axis, int] = {
        "residual": shape.hidden_size,
        "pooled": shape.hidden_size,
        "heads": shape.num_heads * head_dim,
        "kv_heads": shape.num_key_value_heads * head_dim,
        "cross_heads": shape.num_heads * head_dim,
        "each_head": shape.num_heads,
        "query_key_value_by_head": 3 * shape.num_heads * head_dim,
        "feed_forward": shape.intermediate_size,
    }
    return sizes | {fused: sum(sizes[part] for part in parts) for fused, parts in PARTS.items()}


def resolve_shape(
    config: PreTrainedConfig,
    *,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    num_encoder_layers: int | None = None,
) -> StudentShape:
    """The shape of a student cut from a teacher with this config; sizes that are not given follow from the width.

    A head keeps the teacher's head_dim. Where the config cannot say so (BERT kind), the width must be a multiple of it
    and num_heads follows. Else the heads scale with the width: among all numbers that can be cut (and that divide the
    width where the config demands it) those that keep the queries of each key-value head come first, then those
    nearest to the proportion. Feed-forward units scale with the width, to the nearest multiple of 8 above 64. Layers
    stay; where only the decoder's are given, the encoder's scale alike.

    Raises:
        ShapeError: A size is larger than the teacher's, below 1, or cannot be cut.
    """
    teacher = shape_of(config)
    requested = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "intermediate_size": intermediate_size,
        "num_encoder_layers": num_encoder_layers,
    }
    for name, value in requested.items():
        _check_range(name, value, getattr(teacher, name))
    depth = teacher.num_layers if num_layers is None else num_layers
    width = teacher.hidden_size if hidden_size is None else hidden_size
    _check_embeddings(config, width)
    _check_encoder(config, depth, num_encoder_layers)
    fixed = replace(
        teacher,
        hidden_size=width,
        num_layers=depth,
        num_encoder_layers=_scaled_encoder(teacher, depth) if num_encoder_layers is None else num_encoder_layers,
        intermediate_size=_scaled_feed_forward(teacher, width) if intermediate_size is None else intermediate_size,
    )
    if family_of(config).head_dim_key is None:
        num_heads = _derived_heads(config, width, num_heads, num_key_value_heads)
    heads, kv_heads = _possible_heads(config, width, num_heads, num_key_value_heads)
    return replace(fixed, num_heads=heads, num_key_value_heads=kv_heads)


def _check_range(name: str, value: int | None, teacher: int | None) -> None:
    if value is None:
        return
    if teacher is None:
        raise ShapeError(f"slice_student.{name}: {value} asked, but the teacher has one stack of blocks. Leave it out.")
    if value > teacher:
        raise ShapeError(
            f"slice_student.{name}: {value} is larger than the teacher's {teacher}. Ask for at most {teacher}, or "
            "start the student from a model or a config (student.start: pretrained or config)."
        )
    if value < 1:
        raise ShapeError(f"slice_student.{name}: {value} is too small. Ask for 1 to {teacher}.")


def _check_encoder(config: PreTrainedConfig, num_layers: int, num_encoder_layers: int | None) -> None:
    if family_of(config).encoder_is_deepest and num_encoder_layers is not None and num_encoder_layers < num_layers:
        raise ShapeError(
            f"slice_student.num_encoder_layers: {num_encoder_layers} is below num_layers = {num_layers}, and a "
            f"{config.model_type} cannot generate with a decoder that is deeper than its encoder. Ask for at least "
            f"{num_layers}, or for fewer num_layers."
        )


def _check_embeddings(config: PreTrainedConfig, width: int) -> None:
    """A projection between embeddings and stream exists only where their widths differ, so it cannot be cut away."""
    family = family_of(config)
    if family.embedding_key is None or is_residual_embedding(family, config):
        return
    if width == getattr(config, family.embedding_key):
        raise ShapeError(
            f"slice_student.hidden_size: {width} equals the teacher's {family.embedding_key} = {width}, and a "
            f"{family.model_type} model of equal widths has no projection between the two. Ask for another width."
        )


def _scaled_encoder(teacher: StudentShape, num_layers: int) -> int | None:
    if teacher.num_encoder_layers is None:
        return None
    return max(1, round(teacher.num_encoder_layers * num_layers / teacher.num_layers))


def _scaled_feed_forward(teacher: StudentShape, width: int) -> int:
    if width == teacher.hidden_size:
        return teacher.intermediate_size
    scaled = teacher.intermediate_size * width / teacher.hidden_size
    rounded = 8 * round(scaled / 8) if scaled > 64 else max(1, round(scaled))
    return min(rounded, teacher.intermediate_size)


def _derived_heads(config: PreTrainedConfig, width: int, num_heads: int | None, num_key_value_heads: int | None) -> int:
    """Number of heads where head_dim = hidden_size / heads always holds."""
    teacher, head_dim = shape_of(config), head_dim_of(config)
    heads, remainder = divmod(width, head_dim)
    if remainder or not heads:
        low = max(1, min(heads, teacher.num_heads - 1)) * head_dim
        nearest = f"{low} or {low + head_dim}" if teacher.num_heads > 1 else f"{head_dim}"
        raise ShapeError(
            f"slice_student.hidden_size: {width} is not a multiple of the teacher's head_dim = {head_dim}. "
            f"Nearest: {nearest}."
        )
    requested = {"num_heads": num_heads}
    if teacher.num_key_value_heads == teacher.num_heads:
        requested["num_key_value_heads"] = num_key_value_heads
    for name, value in requested.items():
        if value is not None and value != heads:
            raise ShapeError(
                f"slice_student.{name}: {value} does not fit hidden_size {width}: heads keep the teacher's head_dim = "
                f"{head_dim}, which makes {heads}. Leave it out, or ask for hidden_size {value * head_dim}."
            )
    return heads


def _possible_heads(
    config: PreTrainedConfig, width: int, num_heads: int | None, num_key_value_heads: int | None
) -> tuple[int, int]:
    """Some key-value heads, each with some of its queries."""
    teacher = shape_of(config)
    queries = teacher.num_heads // teacher.num_key_value_heads
    must_divide = family_of(config).heads_divide_width
    cuts = [
        (kv_heads * group, kv_heads)
        for kv_heads in range(1, teacher.num_key_value_heads + 1)
        for group in range(1, queries + 1)
        if not must_divide or width % (kv_heads * group) == 0
    ]
    possible = [
        (heads, kv_heads)
        for heads, kv_heads in cuts
        if num_heads in (None, heads) and num_key_value_heads in (None, kv_heads)
    ]
    if not possible:
        possible_pairs = ", ".join(f"{heads}/{kv_heads}" for heads, kv_heads in sorted(cuts)[:20])
        raise ShapeError(
            f"slice_student.num_heads: {num_heads or 'any'} with num_key_value_heads {num_key_value_heads or 'any'} "
            f"cannot be cut from the teacher's {teacher.num_heads}/{teacher.num_key_value_heads} at hidden_size "
            f"{width}. Possible (num_heads/num_key_value_heads): {possible_pairs}."
        )
    proportional = teacher.num_heads * width / teacher.hidden_size
    return min(
        possible,
        key=lambda cut: (abs(cut[0] // cut[1] - queries), abs(cut[0] - proportional), -cut[0]),
    )
