"""Likelihoods against the whole forward of the model, position by position."""

import math

import pytest
import torch

from flexkd.data.encoding.collation import Collator
from flexkd.evaluate import likelihood as likelihood_module
from flexkd.evaluate.likelihood import HeadStates, RowLikelihood, likelihood_metrics, likelihoods
from tests.closeness import assert_close
from tests.evaluate.language import STOP, language_model
from tests.tiny import tiny_batch, tiny_model
from tests.training.language_rows import answer_rows


def batches(model, count: int = 2) -> list[dict]:
    """Unequal rows; labels leave out prompts and padding."""
    found = []
    for index in range(count):
        # Learned positions count from the first column, so that only rotary ones may be padded at the left.
        padding = "left" if index and model.config.model_type == "llama" else "right"
        rows = tiny_batch(model, seed=index, rows=3 - index, padding=padding)
        if model.config.is_encoder_decoder:
            targets = torch.randint(4, 61, (3 - index, 6), generator=torch.Generator().manual_seed(index))
            targets[:, 4] = STOP
            targets[0, 3:] = targets[:, 5:] = -100
            rows = {**tiny_batch(model, seed=index, rows=3 - index), "labels": targets}
        found.append({**rows, "example_id": [f"{index}{row}" for row in range(3 - index)]})
    return found


def slow(model, teacher, batch, row: int, vocab_size: int | None = None) -> dict[str, float]:
    """One row alone, without padding, in float64 from the logits on."""
    keep = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][keep][None], batch["labels"][row]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            labels = labels[labels != -100]
            logits, taught = (one(input_ids=ids, labels=labels[None]).logits[0] for one in (model, teacher))
        else:
            labels = labels[keep]
            logits, taught = (one(input_ids=ids).logits[0, :-1][labels[1:] != -100] for one in (model, teacher))
            labels = labels[1:][labels[1:] != -100]
    p, q = (one[:, :vocab_size].double().log_softmax(-1) for one in (taught, logits))
    return {
        "tokens": len(labels),
        "nll": float(-q[torch.arange(len(labels)), labels].sum()),
        "agreements": int((p.argmax(-1) == q.argmax(-1)).sum()),
        "kl": float((p.exp() * (p - q)).sum()),
    }


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("vocab_size", [None, 57])
def test_sums_of_a_row_are_those_of_the_row_alone(model_type, vocab_size):
    model, teacher = language_model(model_type), language_model(model_type, 1)
    asked = batches(model)
    for batch in asked:
        batch["labels"] = batch["labels"].clamp(max=(vocab_size or 61) - 1)
    found = likelihoods(model, asked, teacher=teacher, vocab_size=vocab_size)
    assert [row.id for row in found] == ["00", "01", "02", "10", "11"]
    for one in found:
        expected = slow(model, teacher, asked[int(one.id[0])], int(one.id[1]), vocab_size)
        assert (one.tokens, one.agreements) == (expected["tokens"], expected["agreements"])
        assert one.kl is not None
        # Float32 logits of a padded and of a lone row differ by the order of sums.
        assert_close([one.nll, one.kl], [expected["nll"], expected["kl"]], dtype=torch.float32)


def test_metrics_weigh_tokens_alike_and_are_perfect_beside_oneself():
    model = language_model("llama")
    found = likelihoods(model, batches(model), teacher=model)
    metrics = likelihood_metrics(found)
    tokens = sum(row.tokens for row in found)
    assert metrics["nll"] == pytest.approx(sum(row.nll for row in found) / tokens)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["nll"]))
    assert (metrics["token_agreement"], metrics["kl"]) == (1, 0)
    assert set(likelihood_metrics(likelihoods(model, batches(model)))) == {"nll", "perplexity"}


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_E09_nll_is_the_loss_that_the_model_itself_reports(model_type):
    model = language_model(model_type)
    (batch,) = batches(model, 1)
    with torch.no_grad():
        loss = model(**{key: value for key, value in batch.items() if key != "example_id"}).loss
    assert_close(likelihood_metrics(likelihoods(model, [batch]))["nll"], float(loss), dtype=torch.float32)


def test_batches_change_nothing_and_modes_are_left():
    model = language_model("gpt2")
    (batch,) = batches(model, 1)
    together = likelihoods(model, [batch])
    alone = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    model.train()
    apart = likelihoods(model, alone)
    assert model.training
    model.eval()
    assert [row.tokens for row in apart] == [row.tokens for row in together]
    assert_close([row.nll for row in apart], [row.nll for row in together], dtype=torch.float32)


def test_R05_packed_rows_have_the_sums_of_padded_ones():
    model, rows = tiny_model("llama", "causal"), answer_rows(5)
    expected, found = (likelihoods(model, [Collator(0, packed=packed)(rows)] * 2) for packed in (False, True))
    assert [(row.id, row.tokens) for row in found] == [(row.id, row.tokens) for row in expected]
    assert_close([row.nll for row in found], [row.nll for row in expected], dtype=torch.float32)


def test_heads_of_unequal_width_meet_in_the_shared_vocabulary():
    model, teacher = language_model("llama"), tiny_model("gpt2", "causal", 3, vocab_size=70)
    (batch,) = batches(model, 1)
    (row, *_) = likelihoods(model, [batch], teacher=teacher, vocab_size=61)
    expected = slow(model, teacher, batch, 0, 61)
    assert_close([row.nll, row.kl], [expected["nll"], expected["kl"]], dtype=torch.float32)


def test_E13_what_is_not_defined_is_null_with_its_reason(caplog):
    assert likelihood_metrics([RowLikelihood("a", 3, math.nan)]) == {"nll": None, "perplexity": None}
    assert "nll is not defined: a logit is not finite." in caplog.text
    assert likelihood_metrics([RowLikelihood("a", 0, 0.0, 0, 0.0)])["token_agreement"] is None
    assert "token_agreement is not defined: no row has a token to predict." in caplog.text
    assert likelihood_metrics([RowLikelihood("a", 1, 1e6)]) == {"nll": 1e6, "perplexity": None}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "granite", "gemma2", "t5", "bart"])
def test_the_states_of_a_teacher_stand_for_its_passes(model_type, precision, monkeypatch):
    """To the bit where its head is a matrix, within rounding where its logits are scaled or capped."""
    student, teacher = language_model(model_type), language_model(model_type, 1)
    asked = batches(student)
    of_student = likelihoods(student, asked, teacher=teacher, precision=precision)
    of_teacher = likelihoods(teacher, asked, teacher=teacher, precision=precision)
    states = HeadStates.read(teacher, asked, precision=precision)
    assert states is not None
    assert [part.shape[1] for part in states.of_batches] == [32, 32]
    monkeypatch.setattr(likelihood_module, "states_and_logits", _only(student))
    followed = likelihoods(student, asked, teacher=states, precision=precision)
    itself = likelihoods(states, asked, teacher=states, precision=precision)
    if model_type in ("granite", "gemma2"):
        for row, expected in zip([*followed, *itself], [*of_student, *of_teacher], strict=True):
            assert (row.nll, row.kl) == pytest.approx((expected.nll, expected.kl), rel=1e-5, abs=1e-6)
    else:
        assert followed == of_student
        assert itself == of_teacher


def _only(model):
    """The forward of one model; any other's is a failure."""
    plain = likelihood_module.states_and_logits

    def run(other, *args, **options):
        assert other is model, "the teacher ran"
        return plain(other, *args, **options)

    return run


def test_states_that_take_too_much_memory_or_whose_head_is_unknown_are_not_kept(monkeypatch):
    model = language_model("llama")
    monkeypatch.setattr(likelihood_module, "_MOST_STATES", 10)
    assert HeadStates.read(model, batches(model)) is None
    monkeypatch.undo()
    monkeypatch.setattr(likelihood_module, "head_is_known", lambda *_, **__: False)
    assert HeadStates.read(model, batches(model)) is None
