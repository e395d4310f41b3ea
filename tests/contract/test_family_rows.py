"""What a family row says of the model itself: its weights, its blocks, and the state that its head reads."""

from typing import Any, Final, Literal

import pytest
import torch
from torch import Tensor

from flexkd.models.families import FAMILIES, family_of, task_of
from flexkd.models.family import Family, module_pattern
from flexkd.models.shape import shape_of
from tests.contract.variants import ROWS, VARIANTS, Variant, name_of, teacher_of
from tests.tiny import tiny_batch

MEANS: Final = [one for one in VARIANTS if one.name == "mean"]


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_every_parameter_matches_a_pattern_that_fits_its_rank(variant: Variant) -> None:
    model = teacher_of(variant)
    family = family_of(model)
    assert task_of(model) == variant.task
    for name, parameter in model.named_parameters():
        assert len(family.parameter_axes(name, model.config)) == parameter.ndim, name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_pattern_of_a_row_is_a_module_of_some_variant(family: Family) -> None:
    """A pattern that matches nothing is a typing error that no other test would notice."""
    found = set()
    for variant in VARIANTS:
        if variant.model_type == family.model_type:
            for name, _ in teacher_of(variant).named_modules():
                found.add(module_pattern(name))
    assert not family.modules.keys() - found
    values = {stack.value for stack in (family.stack, family.encoder) if stack is not None}
    assert {*values, *family.transposed, *family.width_powers} <= family.modules.keys()
    assert family.cross_value is None or family.modules[family.cross_value] == ("cross_heads", "residual")
    assert family.final_norm is None or family.modules[family.final_norm] == ("residual",)


@pytest.mark.parametrize(
    ("variant", "padding"),
    # Position 0 of a row that is padded on the left is padding: encoders are padded on the right.
    [(row, "right") for row in (*ROWS, *MEANS)]
    + [(row, "left") for row in ROWS if FAMILIES[row.model_type].reads != "first"],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_F07_F15_the_head_reads_the_last_state_where_the_row_says(
    variant: Variant, padding: Literal["right", "left"]
) -> None:
    """`last_state` is on the path to the logits, and `reads` names exactly the positions that have a gradient."""
    teacher = teacher_of(variant)
    family = family_of(teacher)
    batch = tiny_batch(teacher, padding=padding)
    states: list[Tensor] = []

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    handle = teacher.get_submodule(family.path(family.last_state)).register_forward_hook(keep)
    logits = teacher(**batch).logits
    handle.remove()
    rows = batch["labels" if variant.task == "seq2seq" else "input_ids"].shape
    assert states[0].shape == (*rows, shape_of(teacher.config).hidden_size)
    (gradient,) = torch.autograd.grad(logits.square().sum(), states[0])
    read = gradient.abs().sum(-1) > 0
    reads = family.read_positions(teacher.config)
    real = batch["attention_mask"].bool()
    if variant.task != "classification":
        expected = torch.ones_like(read)
    elif reads == "all":
        expected = real
    else:
        expected = torch.zeros_like(read)
        last = torch.where(real, torch.arange(real.shape[1]), -1).amax(1)
        expected[torch.arange(len(real)), torch.zeros_like(last) if reads == "first" else last] = True
    assert torch.equal(read, expected)


@pytest.mark.parametrize("variant", ROWS, ids=name_of)
def test_F15_the_last_block_and_the_list_of_blocks_are_where_the_row_says(variant: Variant) -> None:
    teacher = teacher_of(variant)
    family = family_of(teacher)
    shape = shape_of(teacher.config)
    for stack, depth in ((family.stack, shape.num_layers), (family.encoder, shape.num_encoder_layers)):
        if stack is not None:
            blocks = teacher.get_submodule(stack.path)
            assert isinstance(blocks, torch.nn.ModuleList)
            assert len(blocks) == depth
    assert teacher.base_model is teacher.get_submodule(family.body)
