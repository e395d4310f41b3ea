"""What storing costs: rounding of states and predictions, and what is said of it."""

import pytest
import torch

from flexkd.core.losses import correlation, forward_kl
from flexkd.core.objective import Signal
from flexkd.core.outputs import TopRule
from flexkd.errors import ArtifactError
from flexkd.teacher.cache.quantization import read_tail, stored_columns, stored_outputs, stored_signal


def read_back(stored: dict[str, torch.Tensor]) -> torch.Tensor:
    values = stored["columns"].float()
    return values * stored["scale"] + stored["offset"] if "scale" in stored else values


def test_K06_log_probabilities_in_float16_cost_less_than_bfloat16_by_two_orders() -> None:
    """The case's trigger: a vocabulary of 151,936 and logits of N(20, 4^2)."""
    logits = 20 + 4 * torch.randn(4, 151_936)
    stored, rounding_error = stored_outputs(logits, writes_text=True, vocabulary=151_936)
    assert stored["log_probs"].dtype == torch.float16
    assert rounding_error.nats / 4 < 1e-4
    bfloat = float(forward_kl(logits.bfloat16().float(), logits).mean())
    assert bfloat > 20 * rounding_error.nats / 4
    # Said at build time is what it is.
    assert float(forward_kl(stored["log_probs"].float(), logits).sum()) == pytest.approx(rounding_error.nats, rel=0.05)


@pytest.mark.parametrize("k", [1, 8, 61])
def test_K03_the_mass_that_the_top_holds_is_said(k: int) -> None:
    logits = 3 * torch.randn(7, 61)
    stored, rounding_error = stored_outputs(TopRule(k)(logits), writes_text=True, vocabulary=61)
    assert rounding_error.held / 7 == pytest.approx(float(logits.softmax(-1).topk(k).values.sum(-1).mean()), rel=1e-5)
    assert rounding_error.predictions == 7
    assert abs(rounding_error.nats) / 7 < 1e-5
    assert stored["log_tail"].dtype == torch.float32


@pytest.mark.parametrize(("vocabulary", "kind"), [(65_536, torch.uint16), (65_537, torch.int32)])
def test_indices_are_as_short_as_the_vocabulary_allows(vocabulary: int, kind: torch.dtype) -> None:
    logits = torch.zeros(2, vocabulary)
    logits[:, -1] = 5
    stored, _ = stored_outputs(TopRule(1)(logits), writes_text=True, vocabulary=vocabulary)
    assert stored["indices"].dtype == kind
    assert stored["indices"].long().tolist() == [[vocabulary - 1]] * 2


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_states_come_back_up_to_the_steps_of_their_column(storage: str) -> None:
    values = torch.randn(200, 6) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1.0, 0.0]) + torch.tensor(
        [0.0, 0.0, 0.0, 300.0, -7.0, 2.5]
    )
    stored = stored_columns(values, storage)
    back = read_back(stored)
    steps = (values.amax(0) - values.amin(0)) / 254
    most = values.abs().amax(0) * 2**-11 + 1e-7 if storage == "float16" else 0.51 * steps + 1e-5 * values.abs().amax(0)
    assert ((back - values).abs() <= most).all()
    if storage == "int8":
        assert stored["columns"].dtype == torch.int8
        # The middle of a column's range is not the middle of float16: a large mean costs nothing.
        assert float((1 - correlation(back, values)[:5].sqrt()).min()) > 0.999


def test_a_state_that_no_float16_holds_is_refused_and_int8_holds_it() -> None:
    values = torch.tensor([[1.0, 2.0], [1e5, 3.0]])
    with pytest.raises(ArtifactError, match=r"a state holds 100000, which float16 does not. Use teacher.cache_storage"):
        stored_columns(values, "float16")
    assert torch.allclose(read_back(stored_columns(values, "int8")), values, rtol=1e-2, atol=1e-2)
    for storage in ("float16", "int8"):
        with pytest.raises(ArtifactError, match="a state"):
            stored_columns(torch.tensor([[float("nan")]]), storage)


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_batch_without_positions_is_stored_as_nothing(storage: str) -> None:
    stored, rounding_error = stored_signal(Signal(None, (torch.zeros(0, 3),)), storage, writes_text=True, vocabulary=9)
    assert stored["columns.0"].shape == (0, 3)
    assert rounding_error.predictions == 0


@pytest.mark.parametrize("k", [None, 1, 3, 6])
def test_R06_what_a_teacher_rules_out_stays_ruled_out_and_what_it_finds_unlikely_does_not_become_so(
    k: int | None,
) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, -7e4, -float("inf"), -3e38]])
    outputs = logits if k is None else TopRule(k)(logits)
    stored, rounding_error = stored_outputs(outputs, writes_text=True, vocabulary=6)
    expected = torch.tensor([[False, False, False, False, True, False]])
    if k is not None:
        assert not isinstance(outputs, torch.Tensor)
        expected = expected.gather(1, outputs.indices)
    assert torch.equal(stored["log_probs"].isinf(), expected)
    assert abs(rounding_error.nats) < 1e-5
    if k is not None:
        assert stored["log_tail"].isinf().tolist() == [k == 6]
        assert k != 3 or float(stored["log_tail"]) == pytest.approx(-7e4, rel=1e-3)


def test_R06_an_older_cache_without_mass_beside_its_top_reads_as_such() -> None:
    assert read_tail(torch.tensor([-1e30, -70.0])).tolist() == [-float("inf"), -70.0]


def test_a_classifiers_predictions_stay_as_they_are() -> None:
    logits = 40 * torch.randn(5, 3)
    stored, _ = stored_outputs(logits, writes_text=False, vocabulary=0)
    assert torch.equal(stored["logits"], logits)
