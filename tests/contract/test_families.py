"""One contract for every family row: a new architecture joins by its row and an entry in VARIANTS."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import UnsupportedModelError
from flexkd.facts.families.row import Family, module_pattern, with_block_number
from flexkd.facts.families.table import FAMILIES
from flexkd.models.forward.families import family_of, task_of
from flexkd.models.forward.hidden import model_inputs, prediction_labels
from flexkd.models.slicing.rotation import rotate_teacher
from flexkd.models.slicing.shape import shape_of
from flexkd.models.slicing.student import slice_student
from flexkd.scoring.units import score_units
from flexkd.teacher.live import LiveTeacher, batch_positions, read_signal, student_columns
from flexkd.teacher.signal import SignalRequest
from tests.closeness import assert_close
from tests.contract.variants import FIRST, ROWS, UNITS, VARIANTS, Variant, name_of, student_of, teacher_of
from tests.tiny import tiny_batch, tiny_model

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
MEANS: Final = [one for one in VARIANTS if one.name == "mean"]
every_family = pytest.mark.parametrize("variant", FIRST, ids=name_of)


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


@contextmanager
def state_into(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """The first input of a module in each forward."""
    states: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    try:
        yield states
    finally:
        handle.remove()


@every_variant
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


@pytest.mark.parametrize("variant", [row for row in ROWS if row.task == "classification"], ids=name_of)
def test_R01_the_head_of_a_classifier_is_where_the_row_says(variant: Variant) -> None:
    teacher = teacher_of(variant)
    head = family_of(teacher).classifier_head
    assert teacher.get_parameter(f"{head[-1]}.weight").shape[0] == teacher.config.num_labels
    body = {f"{teacher.base_model_prefix}.{name}" for name, _ in teacher.base_model.named_parameters()}
    assert all(name.startswith(tuple(head)) for name, _ in teacher.named_parameters() if name not in body)


@every_family
def test_the_basis_of_a_stream_can_be_turned_where_the_row_says_so(variant: Variant) -> None:
    teacher = teacher_of(variant)
    refused = nullcontext() if family_of(teacher).can_rotate else pytest.raises(UnsupportedModelError, match="basis")
    with refused:
        rotate_teacher(teacher, [tiny_batch(teacher)])


@every_family
def test_D17_rows_longer_than_the_positions_run_where_the_row_says_so(variant: Variant) -> None:
    traits = FAMILIES[variant.model_type].traits
    assert (traits.kind == "encoder_decoder") == (FAMILIES[variant.model_type].encoder is not None)
    absolute = {"position_biased_input": True} if variant.model_type == "deberta-v2" else {}
    model = tiny_model(variant.model_type, variant.task, max_position_embeddings=12, **absolute)
    has_no_end = traits.positions in ("rotary", "relative")
    with torch.no_grad(), nullcontext() if has_no_end else pytest.raises((IndexError, RuntimeError)):
        model(**tiny_batch(model, length=16))


@every_variant
def test_F13_A05_everything_kept_gives_the_teachers_logits(variant: Variant) -> None:
    teacher = teacher_of(variant)
    batch = tiny_batch(teacher)
    expected = logits_of(teacher, batch)
    whole = shape_of(teacher.config)
    sizes: dict[str, Any] = {
        "hidden_size": whole.hidden_size,
        "num_layers": whole.num_layers,
        "num_heads": whole.num_heads,
        "num_key_value_heads": whole.num_key_value_heads,
        "intermediate_size": whole.intermediate_size,
        "num_encoder_layers": whole.num_encoder_layers,
        "units": torch.arange(whole.hidden_size),
        "layers": range(1, whole.num_layers + 1),
    }
    for student in (slice_student(teacher), slice_student(teacher, **sizes, batches=[batch])):
        assert type(student) is type(teacher)
        torch.testing.assert_close(logits_of(student, batch), expected, rtol=0, atol=1e-6)


@every_family
def test_each_axis_is_cut_alone_and_what_is_left_learns(variant: Variant) -> None:
    teacher = teacher_of(variant)
    batch = tiny_batch(teacher)
    family = family_of(teacher)
    heads = {"num_heads": 4} if family.head_dim_key else {"hidden_size": 24}
    depth = shape_of(teacher.config).num_encoder_layers
    encoder = [] if depth is None else [{"num_encoder_layers": depth - 1}]
    for sizes in ({"hidden_size": 16}, {"num_layers": 2}, {"intermediate_size": 20}, heads, *encoder):
        student = slice_student(teacher, **sizes, batches=[batch] if sizes is heads else None)
        assert student.num_parameters() < teacher.num_parameters(), sizes
        student(**batch).loss.backward()
        for name, parameter in student.named_parameters():
            # PEGASUS computes its positions.
            assert parameter.requires_grad == ("embed_positions" not in name or variant.model_type != "pegasus"), name
            assert parameter.grad is not None or not parameter.requires_grad, (sizes, name)
            assert parameter.grad is None or parameter.grad.isfinite().all(), (sizes, name)


@every_variant
def test_S02_S09_a_cut_student_is_saved_and_reloaded_with_its_ties(variant: Variant, tmp_path: Path) -> None:
    teacher, student = teacher_of(variant), student_of(variant)
    batch = tiny_batch(teacher)
    student.save_pretrained(tmp_path)
    reloaded, info = type(teacher).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(reloaded, batch), logits_of(student, batch))
    assert reloaded.num_parameters() == student.num_parameters() < teacher.num_parameters() / 2
    ties = list(student.all_tied_weights_keys.items())
    assert ties == list(teacher.all_tied_weights_keys.items())
    for one, other in ties:
        assert student.get_parameter(one) is student.get_parameter(other)
    if variant.task != "classification":
        prompt = {key: value for key, value in tiny_batch(teacher, padding="left").items() if key != "labels"}
        greedy = {"do_sample": False, "min_new_tokens": 3, "max_new_tokens": 3}
        tokens = student.generate(**prompt, **greedy)
        read = 1 if variant.task == "seq2seq" else prompt["input_ids"].shape[1]
        assert tokens.shape[1] == read + 3
        assert torch.equal(reloaded.generate(**prompt, **greedy), tokens)


@every_variant
def test_S09_the_config_differs_in_its_sizes_alone(variant: Variant) -> None:
    teacher = teacher_of(variant)
    student = slice_student(teacher, units=UNITS, num_layers=3, intermediate_size=20)
    family = family_of(teacher)
    sizes = {family.hidden_key, family.kv_heads_key, *family.width_keys}
    for stack in (family.stack, family.encoder):
        sizes |= {stack.layers_key, stack.heads_key, stack.intermediate_key} if stack else set()
    if variant.name != "projected":
        sizes.add(family.embedding_key)
    before, after = teacher.config.to_dict(), student.config.to_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key]}
    assert changed - set(family.block_lists) <= sizes
    assert student.config._attn_implementation == teacher.config._attn_implementation


@every_variant
def test_embeddings_of_the_kept_units_are_the_teachers(variant: Variant) -> None:
    """Whatever the code multiplies embeddings by, the first block gets what the teacher's got."""
    teacher = teacher_of(variant)
    batch = tiny_batch(teacher)
    student = slice_student(teacher, units=UNITS)
    family = family_of(teacher)
    for place in first_places(variant, family):
        with state_into(teacher.get_submodule(place)) as wide, state_into(student.get_submodule(place)) as narrow:
            logits_of(teacher, batch)
            logits_of(student, batch)
        assert_close(narrow[0], wide[0][..., UNITS])


def first_places(variant: Variant, family: Family) -> list[str]:
    """Where embeddings go in, of each stack: a norm over them, or the first block."""
    if variant.model_type in ("bart", "mbart"):
        return ["model.encoder.layernorm_embedding", "model.decoder.layernorm_embedding"]
    if variant.model_type == "modernbert":
        return ["model.embeddings.norm"]
    is_projected = family.embedding_key is not None and variant.name != "same-width"
    if family.reads == "first" and not (is_projected and variant.model_type == "electra"):
        return [f"{family.body}.embeddings.LayerNorm"]
    return [stack.block(0) for stack in (family.stack, family.encoder) if stack is not None]


def read_by_the_head(model: PreTrainedModel) -> Tensor:
    """What each unit of the last normed state, before the norm's own weight, adds to what is read of it."""
    family, parameters = family_of(model), dict(model.named_parameters(remove_duplicate=False))
    names = ("model.decoder.project_out.weight", "lm_head.weight", "score.weight")
    reader = next(parameters[name] for name in names if name in parameters)
    norm = parameters.get(f"{with_block_number(family.final_norm or '', shape_of(model.config).num_layers - 1)}.weight")
    # T5 scales what its tied head reads.
    scale = model.config.d_model**-0.5 if getattr(model.config, "scale_decoder_outputs", False) else 1.0
    return scale * reader.detach() * (1 if norm is None else norm.detach() + family.norm_offset)


@pytest.mark.parametrize(
    "variant", [one for one in VARIANTS if FAMILIES[one.model_type].reads == "last_token"], ids=name_of
)
def test_A01_the_head_reads_the_kept_units_as_the_teachers_did(variant: Variant) -> None:
    """A scale in tied embeddings is in the head too: the norm between takes it off again."""
    teacher = teacher_of(variant)
    student = slice_student(teacher, units=UNITS)
    assert_close(read_by_the_head(student), read_by_the_head(teacher)[:, UNITS])
    assert logits_of(student, tiny_batch(teacher)).std() > 0.1 * logits_of(teacher, tiny_batch(teacher)).std()


@every_variant
def test_a_cut_student_is_scored_at_its_head_and_at_a_block(variant: Variant) -> None:
    student = student_of(variant)
    width = 20 if variant.model_type == "opt" and variant.name == "projected" else 16
    last, inner = score_units(student, [tiny_batch(student, rows=12)], target="logit", layer=[-1, 2])
    assert (len(last.values), len(inner.values)) == (width, 16)
    assert last.num_unused == inner.num_unused == 0


@every_variant
def test_a_cut_student_learns_from_its_teachers_logits_and_units(variant: Variant) -> None:
    teacher, student = teacher_of(variant), slice_student(teacher_of(variant), units=UNITS, num_layers=3)
    batch = tiny_batch(teacher, rows=12)
    kinds = {"regression": "mse", "multi_label_classification": "binary_cross_entropy"}
    loss = kinds.get(teacher.config.problem_type, "cross_entropy") if variant.task == "classification" else None
    pairs = [LayerPair.of_units(UNITS, student_layer=2, teacher_layer=3)]
    if variant.name != "projected":
        pairs.append(LayerPair.of_units(UNITS))
    objective = Objective(
        task=TaskTerm(loss=loss or "cross_entropy"),
        logits=LogitTerm(loss="mse" if loss == "mse" else "forward_kl"),
        features=FeatureTerm(layers=tuple(pairs), positions="supervised"),
    )
    request = SignalRequest.of(objective)
    signal = LiveTeacher(teacher).signal(batch, request)
    inputs = model_inputs(student, batch)
    positions = batch_positions(student, inputs, batch["labels"], request)
    reads = tuple((pair.student_layer, student_columns(pair)) for pair in pairs)
    labels = prediction_labels(student, batch["labels"], positions.supervised)
    before = objective(read_signal(student, inputs, positions, reads), signal, labels)
    before.loss.backward()
    assert all(before.parts[f"{term}_raw"] > 0 for term in ("task", "logits", "features"))
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad / norm
    assert objective(read_signal(student, inputs, positions, reads), signal, labels).loss < before.loss


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(row, torch.bfloat16) for row in FIRST] + [(FIRST[0], torch.float16), (FIRST[-1], torch.float16)],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else name_of(value),
)
def test_A13_a_student_has_its_teachers_dtype(variant: Variant, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = tiny_model(variant.model_type, variant.task).to(dtype)
    student = slice_student(teacher, hidden_size=16, num_layers=2, batches=[tiny_batch(teacher)])
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    # Rotary frequencies are float32 in every dtype.
    fresh = {name: buffer.dtype for name, buffer in type(teacher)(student.config).named_buffers()}
    fresh |= dict.fromkeys(student.state_dict().keys() & fresh.keys(), dtype)
    assert {name: buffer.dtype for name, buffer in student.named_buffers()} == fresh
    student.save_pretrained(tmp_path)
    assert type(teacher).from_pretrained(tmp_path).dtype == dtype


@pytest.mark.slow
def test_S02_students_give_the_same_logits_in_a_fresh_process_that_has_only_transformers(tmp_path: Path) -> None:
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification\n"
        "kinds = {'causal': AutoModelForCausalLM, 'seq2seq': AutoModelForSeq2SeqLM}\n"
        "gaps = {}\n"
        "for name in sys.argv[2:]:\n"
        "    auto = kinds.get(name.split('-')[-1], AutoModelForSequenceClassification)\n"
        "    model, info = auto.from_pretrained(f'{sys.argv[1]}/{name}', output_loading_info=True)\n"
        "    batch = torch.load(f'{sys.argv[1]}/{name}.pt')\n"
        "    logits = model(**batch['inputs']).logits\n"
        "    found = {key: sorted(map(str, value)) for key, value in info.items() if value}\n"
        "    gaps[name] = [(logits - batch['logits']).abs().max().item(), found]\n"
        "assert 'flexkd' not in sys.modules\n"
        "print(json.dumps(gaps))\n"
    )
    names = []
    for variant in [
        row for row in FIRST if row.model_type in ("bert", "llama", "gpt2", "gemma3_text", "opt", "bart", "t5")
    ]:
        student, batch = student_of(variant), tiny_batch(teacher_of(variant))
        student.save_pretrained(tmp_path / name_of(variant))
        torch.save({"inputs": batch, "logits": logits_of(student, batch)}, tmp_path / f"{name_of(variant)}.pt")
        names.append(name_of(variant))
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *names], capture_output=True, text=True, check=True
    )
    gaps = json.loads(run.stdout.splitlines()[-1])
    assert gaps == {name: [pytest.approx(0, abs=1e-6), {}] for name in names}
