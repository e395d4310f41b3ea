"""One contract for every family row: a new architecture joins by its row and an entry in VARIANTS."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexkd.models.families import FAMILIES, Family, family_of, task_of
from flexkd.models.shape import shape_of
from flexkd.models.student import slice_student
from tests.closeness import assert_close
from tests.tiny import TinyTask, tiny_batch, tiny_model


class Variant(NamedTuple):
    """A config of a family that changes which parameters there are."""

    name: str
    model_type: str
    task: TinyTask
    changes: dict[str, Any]


ROWS: Final = [Variant("", name, task, {}) for name, family in FAMILIES.items() for task in family.tasks]
VARIANTS: Final = [
    *ROWS,
    Variant("tied", "llama", "causal", {"tie_word_embeddings": True}),
    Variant("biases", "llama", "causal", {"attention_bias": True, "mlp_bias": True}),
    Variant("multi-head", "llama", "classification", {"num_key_value_heads": 8}),
    Variant("sliding-window", "mistral", "causal", {"sliding_window": 4}),
    Variant("tied", "qwen2", "causal", {"tie_word_embeddings": True}),
    Variant("tied", "qwen3", "causal", {"tie_word_embeddings": True, "attention_bias": True}),
    Variant(
        "sliding-window", "qwen3", "causal", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    ),
    Variant("untied", "gemma2", "causal", {"tie_word_embeddings": False}),
    Variant(
        "untied-uncapped", "gemma3_text", "causal", {"tie_word_embeddings": False, "final_logit_softcapping": None}
    ),
    Variant("tied", "granite", "causal", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    Variant(
        "untied-sliding-window",
        "smollm3",
        "causal",
        {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 4},
    ),
    Variant("biases", "olmo2", "causal", {"attention_bias": True, "tie_word_embeddings": True}),
    Variant(
        "partial-rotary",
        "phi3",
        "causal",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ),
    Variant("multi-head", "phi3", "causal", {"num_key_value_heads": 8}),
    Variant("silent-sizes", "gpt2", "causal", {"n_inner": None, "tie_word_embeddings": False}),
    Variant("sequential", "gpt_neox", "causal", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    Variant("no-biases", "gpt_neox", "causal", {"attention_bias": False}),
    Variant("projected", "opt", "causal", {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    Variant("projected-pre-norm", "opt", "classification", {"word_embed_proj_dim": 20}),
    Variant("post-norm", "opt", "causal", {"do_layer_norm_before": False, "enable_bias": False}),
    Variant("untied-unscaled", "bart", "seq2seq", {"tie_word_embeddings": False}),
    Variant("scaled", "bart", "seq2seq", {"scale_embedding": True}),
    Variant("scaled", "mbart", "seq2seq", {"scale_embedding": True}),
    Variant("scaled", "pegasus", "seq2seq", {"scale_embedding": True}),
    Variant("v1.1", "t5", "seq2seq", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    Variant(
        "own-projections",
        "deberta-v2",
        "classification",
        {
            "share_att_key": False,
            "position_biased_input": True,
            "type_vocab_size": 2,
            "conv_kernel_size": 3,
            "embedding_size": 20,
            "attention_head_size": 8,
        },
    ),
    Variant("same-width", "deberta-v2", "classification", {"embedding_size": 32}),
    Variant(
        "mean",
        "modernbert",
        "classification",
        {"classifier_pooling": "mean", "norm_bias": True, "mlp_bias": True, "attention_bias": True},
    ),
    Variant("same-width", "electra", "classification", {"embedding_size": 32}),
    Variant("sinusoidal", "distilbert", "classification", {"sinusoidal_pos_embds": True}),
    Variant("regression", "bert", "classification", {"num_labels": 1, "problem_type": "regression"}),
    Variant("multi-label", "roberta", "classification", {"problem_type": "multi_label_classification"}),
]


def name_of(variant: Variant) -> str:
    return "-".join(filter(None, (variant.model_type, variant.task, variant.name)))


def teacher_of(variant: Variant) -> PreTrainedModel:
    return tiny_model(variant.model_type, variant.task, **variant.changes)


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def cuts_of(variant: Variant) -> dict[str, dict[str, int]]:
    """Each kind of cut alone, and all at once."""
    heads = {"num_heads": 4} if FAMILIES[variant.model_type].head_dim_key else {}
    return {
        "width": {"hidden_size": 16},
        "depth": {"num_layers": 2},
        "heads": heads or {"hidden_size": 24},
        "feed_forward": {"intermediate_size": 20},
        "all": {"hidden_size": 16, "num_layers": 3, "intermediate_size": 20},
    }


@contextmanager
def state_into(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """The first input of a module in each forward."""
    states: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    try:
        yield states
    finally:
        handle.remove()


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
                found.add(".".join("*" if part.isdigit() else part for part in name.split(".")))
    assert not family.modules.keys() - found
    assert family.value in family.modules


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
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
        "units": torch.arange(whole.hidden_size),
        "layers": range(1, whole.num_layers + 1),
    }
    for student in (
        slice_student(teacher),
        slice_student(teacher, batches=[batch]),
        slice_student(teacher, **sizes),
        slice_student(teacher, **sizes, batches=[batch]),
    ):
        assert type(student) is type(teacher)
        torch.testing.assert_close(logits_of(student, batch), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_S02_S09_each_cut_runs_learns_saves_and_reloads(variant: Variant, tmp_path: Path) -> None:
    teacher = teacher_of(variant)
    batch = tiny_batch(teacher)
    for kind, sizes in cuts_of(variant).items():
        student = slice_student(teacher, **sizes, batches=[batch] if kind in ("all", "heads") else None)
        assert student.num_parameters() < teacher.num_parameters(), kind
        student(**batch).loss.backward()
        for name, parameter in student.named_parameters():
            # DistilBERT freezes sinusoidal positions itself.
            if parameter.requires_grad or variant.name != "sinusoidal":
                assert parameter.grad is not None, (kind, name)
                assert parameter.grad.isfinite().all(), (kind, name)
        folder = tmp_path / kind
        student.save_pretrained(folder)
        reloaded, info = type(teacher).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), (kind, info)
        assert torch.equal(logits_of(reloaded, batch), logits_of(student, batch)), kind
        assert reloaded.num_parameters() == student.num_parameters(), kind
        ties = [(a, b) for a, b in student.all_tied_weights_keys.items()]
        assert ties == [(a, b) for a, b in teacher.all_tied_weights_keys.items()], kind
        for one, other in ties:
            assert student.get_parameter(one) is student.get_parameter(other), kind


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_S09_the_config_differs_in_its_sizes_alone(variant: Variant) -> None:
    teacher = teacher_of(variant)
    family = family_of(teacher)
    student = slice_student(teacher, hidden_size=16, num_layers=2)
    sizes = {family.hidden_key, family.layers_key, family.heads_key, family.kv_heads_key, family.intermediate_key}
    if variant.name == "same-width":
        sizes.add("embedding_size")
    before, after = teacher.config.to_dict(), student.config.to_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key]}
    assert changed - {"layer_types"} <= sizes
    assert student.config._attn_implementation == teacher.config._attn_implementation


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_embeddings_of_the_kept_units_are_the_teachers(variant: Variant) -> None:
    teacher = teacher_of(variant)
    batch = tiny_batch(teacher)
    units = torch.tensor([0, 2, 3, 5, 7, 11, 13, 14, 17, 19, 20, 23, 26, 29, 30, 31])
    student = slice_student(teacher, hidden_size=16, units=units)
    family = family_of(teacher)
    if variant.model_type == "electra" and variant.name != "same-width":
        place = f"{family.body}.{family.blocks}.0"
    else:
        place = f"{family.body}.embeddings.LayerNorm" if family.norm == "layer" else family.block_path(0)
    with state_into(teacher.get_submodule(place)) as wide, state_into(student.get_submodule(place)) as narrow:
        logits_of(teacher, batch)
        logits_of(student, batch)
    assert_close(narrow[0], wide[0][..., units])


@pytest.mark.parametrize(
    ("variant", "padding"),
    # Position 0 of a row that is padded on the left is padding: encoders are padded on the right.
    [(row, "right") for row in ROWS] + [(row, "left") for row in ROWS if FAMILIES[row.model_type].reads != "first"],
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

    teacher.get_submodule(f"{family.body}.{family.last_state}").register_forward_hook(keep)
    logits = teacher(**batch).logits
    assert states[0].shape == (*batch["input_ids"].shape, shape_of(teacher.config).hidden_size)
    (gradient,) = torch.autograd.grad(logits.square().sum(), states[0])
    read = gradient.abs().sum(-1) > 0
    if variant.task == "causal":
        expected = torch.ones_like(read)
    else:
        expected = torch.zeros_like(read)
        real = batch["attention_mask"].bool()
        last = torch.where(real, torch.arange(real.shape[1]), -1).amax(1)
        expected[torch.arange(len(real)), torch.zeros_like(last) if family.reads == "first" else last] = True
    assert torch.equal(read, expected)


@pytest.mark.parametrize("variant", ROWS, ids=name_of)
def test_F15_the_last_block_and_the_list_of_blocks_are_where_the_row_says(variant: Variant) -> None:
    teacher = teacher_of(variant)
    family = family_of(teacher)
    blocks = teacher.get_submodule(f"{family.body}.{family.blocks}")
    assert isinstance(blocks, torch.nn.ModuleList)
    assert len(blocks) == shape_of(teacher.config).num_layers
    assert teacher.base_model_prefix == family.body


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(row, torch.bfloat16) for row in ROWS] + [(ROWS[0], torch.float16), (ROWS[-1], torch.float16)],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else name_of(value),
)
def test_A13_a_student_has_its_teachers_dtype(variant: Variant, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = teacher_of(variant).to(dtype)
    student = slice_student(teacher, hidden_size=16, num_layers=2, batches=[tiny_batch(teacher)])
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    # Rotary frequencies are float32 in every dtype.
    fresh = {name: buffer.dtype for name, buffer in type(teacher)(student.config).named_buffers()}
    assert {name: buffer.dtype for name, buffer in student.named_buffers()} == fresh
    student.save_pretrained(tmp_path)
    assert type(teacher).from_pretrained(tmp_path).dtype == dtype


def test_S02_students_give_the_same_logits_in_a_fresh_process_that_has_only_transformers(tmp_path: Path) -> None:
    script = (
        "import json, sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification\n"
        "gaps = {}\n"
        "for name in sys.argv[2:]:\n"
        "    auto = AutoModelForCausalLM if '-causal' in name else AutoModelForSequenceClassification\n"
        "    model, info = auto.from_pretrained(f'{sys.argv[1]}/{name}', output_loading_info=True)\n"
        "    batch = torch.load(f'{sys.argv[1]}/{name}.pt')\n"
        "    logits = model(**batch['inputs']).logits\n"
        "    found = {key: sorted(map(str, value)) for key, value in info.items() if value}\n"
        "    gaps[name] = [(logits - batch['logits']).abs().max().item(), found]\n"
        "assert 'flexkd' not in sys.modules\n"
        "print(json.dumps(gaps))\n"
    )
    names = []
    for variant in [*ROWS, *(one for one in VARIANTS if one.name == "tied")]:
        teacher = teacher_of(variant)
        batch = tiny_batch(teacher)
        student = slice_student(teacher, hidden_size=16, num_layers=2, batches=[batch])
        student.save_pretrained(tmp_path / name_of(variant))
        torch.save({"inputs": batch, "logits": logits_of(student, batch)}, tmp_path / f"{name_of(variant)}.pt")
        names.append(name_of(variant))
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *names], capture_output=True, text=True, check=True
    )
    gaps = json.loads(run.stdout.splitlines()[-1])
    assert gaps == {name: [pytest.approx(0, abs=1e-6), {}] for name in names}
