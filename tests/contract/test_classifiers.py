"""Every kind of classifier that transformers offers is scored and taught, or refused with an error of ours."""

import re
from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from flexkd.core.objective import Objective
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import DataError, FlexKDError, UnsupportedModelError
from flexkd.evaluate.classification import predict
from flexkd.facts.families.table import TRAITS
from flexkd.models.forward.hidden import model_inputs, num_layers, states_and_logits, supervised_mask
from flexkd.models.slicing.student import slice_student
from flexkd.scoring.units import score_units
from flexkd.teacher.live import LiveTeacher, batch_positions, read_signal, student_columns
from flexkd.teacher.signal import SignalRequest
from tests.tiny import tiny_model

END: Final = 2
READS_ROW_END: Final = sorted(name for name, traits in TRAITS.items() if traits.reads_row_end)
DEEP: Final = {"num_hidden_layers": 2, "num_attention_heads": 4}
SMALL: Final[dict[str, Any]] = {"encoder_layers": 2, "decoder_layers": 3, "num_layers": 2, "num_decoder_layers": 3}
HEADS: Final = {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "t5": {},
    "bart": {},
    "mbart": {},
    "mt5": {**SMALL, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0},
    "umt5": {**SMALL, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0},
    "mvp": {**SMALL, **HEADS, "d_model": 32, "decoder_start_token_id": 2},
    "plbart": {**SMALL, **HEADS, "d_model": 32},
    "bigbird_pegasus": {**SMALL, **HEADS, "d_model": 32, "attention_type": "original_full"},
    "albert": {**DEEP, "embedding_size": 16},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "longformer": {"attention_window": [4, 4], "num_hidden_layers": 2},
    "big_bird": {**DEEP, "attention_type": "original_full"},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
    "squeezebert": {**DEEP, "embedding_size": 32},
    "xmod": {**DEEP, "languages": ["en_XX", "de_DE"]},
    "canine": DEEP,
    "mpnet": DEEP,
    "fnet": {"num_hidden_layers": 2},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}
"""Configs of encoders, decoders and encoder-decoders, most of them without a row in the families table."""

REFUSED: Final = {
    # Their head reads what their body makes of its last state by itself.
    "albert": "its outputs do not depend on the state that is read",
    "canine": "its outputs do not depend on the state that is read",
    "fnet": "its outputs do not depend on the state that is read",
    "squeezebert": "its outputs do not depend on the state that is read",
    "xmod": "it does not take rows of tokens: Input language unknown",
}
"""Kinds without unit scores, and why."""


def rows_of(*lengths: int, end: int = END) -> dict[str, Tensor]:
    """Rows that end with an end of text, padded on the right."""
    ids = torch.randint(4, 61, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = end
    return {
        "input_ids": ids.where(mask, 0), "attention_mask": mask.long(), "labels": torch.arange(len(lengths)) % 3
    }  # fmt: skip


def classifier(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model; two architectures take no setting but their own."""
    if kind not in ("xlnet", "funnel"):
        return tiny_model(kind, seed=seed, **KINDS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, vocab_size=61, num_labels=3, pad_token_id=0, **KINDS[kind])
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def refusal(call: Callable[[], Any]) -> FlexKDError | None:
    """The error of ours that a call ends in; any other one fails the test."""
    try:
        call()
    except FlexKDError as error:
        return error
    return None


def step(model: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Loss of one step of distillation, logits and states."""
    pair = LayerPair()
    goal = Objective(TaskTerm(), LogitTerm(), FeatureTerm("correlation", 1.0, "tokens", (pair,)))
    request = SignalRequest.of(goal)
    inputs = model_inputs(model, batch)
    positions = batch_positions(model, inputs, batch["labels"], request)
    student = read_signal(model, inputs, positions, ((-1, student_columns(pair)),))
    taught = LiveTeacher(teacher).signal(batch, request)
    assert isinstance(student.logits, Tensor)
    assert isinstance(taught.logits, Tensor)
    distance = (student.logits.log_softmax(-1) - taught.logits.log_softmax(-1)).square().mean()
    return distance + (student.features[0] - taught.features[0]).square().mean()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_R11_every_kind_of_classifier_is_scored_and_taught_or_refused_by_name(kind: str) -> None:
    teacher, student = (classifier(kind, seed) for seed in (1, 2))
    batch = rows_of(10, 7, 5, 8)
    if kind in REFUSED:
        with pytest.raises(UnsupportedModelError, match=f"^{type(teacher).__name__}: .*{re.escape(REFUSED[kind])}"):
            score_units(teacher, [batch])
    else:
        assert score_units(teacher, [batch]).values.shape == (32,)
    if kind in ("xmod", "funnel"):
        # Funnel shortens its rows on the way.
        error = refusal(lambda: step(student, teacher, batch))
        assert str(error).startswith(f"{type(teacher).__name__}: ")
        assert kind == "xmod" or "Teach it by its logits alone." in str(error)
        return
    assert predict(teacher, [batch]).logits.shape == (4, 3)
    step(student, teacher, batch).backward()
    assert any(parameter.grad is not None for parameter in student.base_model.parameters())
    for layer in (1, 2):
        error = refusal(lambda: score_units(teacher, [batch], layer=layer))  # noqa: B023 (called at once)
        assert error is None or type(teacher).__name__ in str(error)


@pytest.mark.parametrize("kind", READS_ROW_END)
def test_R11_encoder_decoders_read_the_last_end_of_a_row_and_show_the_layers_of_their_decoder(kind: str) -> None:
    model = classifier(kind)
    batch = rows_of(10, 7, 5, 8)
    decoder = model.base_model.get_decoder()
    assert num_layers(model) == len(decoder.block if "t5" in kind else decoder.layers)
    states, logits = states_and_logits(model, model_inputs(model, batch), (-1, num_layers(model)))
    (gradient,) = torch.autograd.grad(logits.square().sum(), states[-1])
    mask = supervised_mask(model, model_inputs(model, batch), batch["labels"])
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)
    assert mask.nonzero()[:, 1].tolist() == [9, 6, 4, 7]


@pytest.mark.parametrize("kind", READS_ROW_END)
def test_R11_rows_without_an_end_or_with_several_are_refused_before_the_forward(kind: str) -> None:
    model = classifier(kind)
    name = type(model).__name__
    reads = f"{name}: its head reads each row at the last end of text (id 2)"
    with pytest.raises(DataError, match=re.escape(f"{reads}, and 3 of 3 rows hold none (first row 0 of the batch).")):
        score_units(model, [rows_of(10, 7, 5, end=5)])
    several = rows_of(10, 7, 5)
    several["input_ids"][1, 3] = END
    said = f"{reads}, of which all rows must hold as many: 1 of 3 rows do not hold 1 (first row 1 of the batch)."
    with pytest.raises(DataError, match=re.escape(said)):
        predict(model, [several])
    model.config.eos_token_id = [2, 7]
    with pytest.raises(UnsupportedModelError, match=re.escape("config.eos_token_id is [2, 7]")):
        predict(model, [rows_of(10, 7, 5)])


def test_R11_no_classifier_is_cut_out_of_an_encoder_decoder() -> None:
    for kind in ("t5", "bart", "mbart"):
        model = tiny_model(kind)
        said = (
            f"no classifier can be cut out of a '{kind}' model ({type(model).__name__}). Start the student from a model"
        )
        with pytest.raises(UnsupportedModelError, match=re.escape(said)):
            slice_student(model, hidden_size=16)


def test_R11_a_decoder_without_a_padding_id_is_refused_by_name() -> None:
    model = tiny_model("gpt2")
    model.config.pad_token_id = None
    said = (
        "^GPT2ForSequenceClassification: it does not take rows of tokens: Cannot handle batch sizes > 1 if no padding"
    )
    for call in (predict, score_units):
        with pytest.raises(UnsupportedModelError, match=said):
            call(model, [rows_of(10, 7, 5)])
