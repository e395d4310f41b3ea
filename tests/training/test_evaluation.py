"""Evaluations of one process: every row, in order, once; what cannot be given is refused with what can."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate import skip_first_batches
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import RandomSampler

from flexkd.core.objective import Objective, Signal, StepCounts
from flexkd.core.outputs import Head, HeadOutputs, TopOutputs
from flexkd.core.terms import TaskTerm
from flexkd.data.encoding.collation import Collator
from flexkd.errors import DataError, RecipeError
from flexkd.evaluate.classification import predict
from flexkd.evaluate.likelihood import likelihood_metrics, likelihoods
from flexkd.teacher.signal import BatchPositions
from flexkd.training.micro_batches import MicroBatch
from flexkd.training.row_sharing import ROUND, EvaluationLoader, training_loader
from flexkd.training.trainer import DistillationTrainer
from tests.closeness import assert_close
from tests.training.language_rows import answer_rows, collator_of
from tests.training.test_distillation_trainer import arguments, objective, rows, trainer_of
from tests.training.test_text_trainer import goal_of, student_of
from tests.training.test_text_trainer import trainer_of as text_trainer_of


def accelerator_of(process: int, processes: int) -> Any:
    return SimpleNamespace(process_index=process, num_processes=processes, use_seedable_sampler=True)


def as_batch(rows: list[int]) -> dict[str, Any]:
    return {"rows": rows}


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_R05_each_row_is_one_processes_in_one_round_in_order(processes: int) -> None:
    for count in (0, 1, 4, 7, 12):
        for size in (1, 2, 5):
            loaders = [
                EvaluationLoader(
                    list(range(count)), lambda rows: {"rows": rows}, size, accelerator_of(at, processes), {}
                )
                for at in range(processes)
            ]
            found = [list(loader) for loader in loaders]
            # As many forwards in each process: one may wait for those of the others.
            assert {len(batches) for batches in found} == {len(loaders[0])}
            read: list[int] = []
            for together in zip(*found, strict=True):
                assert all(0 < len(batch["rows"]) <= size for batch in together)
                counted = [batch["rows"][: batch[ROUND].num_local] for batch in together]
                assert sum(map(len, counted)) == together[0][ROUND].num_rows
                read += [row for part in counted for row in part]
            assert read == list(range(count))


@pytest.mark.parametrize("drops", [False, True])
def test_R05_an_epoch_is_shared_out_in_its_order_and_resumes_within_it(tmp_path: Path, drops: bool) -> None:
    """Eleven rows, three processes of two: the last round has five."""
    order, args = RandomSampler(range(11)), arguments(tmp_path, dataloader_drop_last=drops)
    torch.manual_seed(0)
    loaders = [
        training_loader(list(range(11)), as_batch, 2, order, accelerator_of(process, 3), args) for process in range(3)
    ]
    epochs = []
    for loader in loaders:
        loader.set_epoch(1)
        epochs.append([batch["rows"][: batch[ROUND].num_local] for batch in loader])
        loader.set_epoch(1)
        rest = skip_first_batches(loader, 1)
        assert [batch["rows"][: batch[ROUND].num_local] for batch in rest] == epochs[-1][1:]
    read = [row for together in zip(*epochs, strict=True) for part in together for row in part]
    assert len(read) == (6 if drops else 11)
    assert len(set(read)) == len(read)
    assert read != sorted(read)


def test_R05_predict_says_what_the_model_says_of_each_row_in_order(tmp_path: Path) -> None:
    """Settings of the training mix the rows and drop the last ones."""
    changes = {
        "per_device_eval_batch_size": 3,
        "train_sampling_strategy": "group_by_length",
        "dataloader_drop_last": True,
    }
    data = rows(7, unlabelled=[2])
    trainer = trainer_of(tmp_path, objective(), data, arguments=changes)
    found = trainer.predict(data)
    expected = predict(trainer.student, [Collator(0)([row]) for row in data])
    assert_close(torch.as_tensor(found.predictions), expected.logits)
    assert found.label_ids.tolist() == expected.labels.tolist()
    assert trainer.evaluation_loop(trainer.get_test_dataloader(data), "Prediction").num_samples == 7


@pytest.mark.parametrize("chunk", ["off", 3])
def test_R05_the_outputs_of_a_language_model_are_refused_by_name_and_what_can_be_given_is(
    tmp_path: Path, chunk: int | str
) -> None:
    trainer = text_trainer_of(tmp_path, "llama", goal_of(), chunk, per_device_eval_batch_size=5)
    with pytest.raises(RecipeError, match=re.escape("Prediction: the logits of a language model, a vocabulary for")):
        trainer.predict(answer_rows(7))
    # What the message names.
    nll = trainer.evaluate(answer_rows(7))["eval_nll"]
    found = likelihoods(trainer.student, [collator_of(trainer.student)(answer_rows(7))])
    assert len(found) == 7
    assert nll == pytest.approx(likelihood_metrics(found)["nll"])
    trainer.args.prediction_loss_only = True
    only = trainer.predict(answer_rows(7))
    assert only.predictions is None
    assert only.metrics["test_nll"] == pytest.approx(nll)


def test_R05_metrics_of_a_language_models_outputs_are_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    def make(**options: Any) -> DistillationTrainer:
        goal, args, data = Objective(TaskTerm()), arguments(tmp_path), answer_rows(4)
        model = student_of("llama")
        return DistillationTrainer(
            model=model, objective=goal, args=args, eval_dataset=data, data_collator=collator_of(model), **options
        )

    with pytest.raises(RecipeError, match=re.escape("compute_metrics: the logits of a language model")):
        make(compute_metrics=lambda _: {"accuracy": 1.0})
    assert make(further_metrics=lambda _: {"apt": 0.5}).evaluate()["eval_apt"] == 0.5


def test_R05_rows_without_labels_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, objective(), rows(4))
    bare = [{key: value for key, value in row.items() if key != "labels"} for row in rows(4)]
    with pytest.raises(DataError, match=re.escape("eval_dataset: its rows have no 'labels'. Give -100")):
        trainer.predict(bare)
    expected = trainer.predict(rows(4)).predictions
    assert_close(trainer.predict([{**row, "labels": -100} for row in bare]).predictions, expected)
    with pytest.raises(RecipeError, match=re.escape("args.label_names: ['target'], and the objective reads 'labels'")):
        trainer_of(tmp_path, objective(), rows(4), arguments={"label_names": ["target"]})


def test_R05_positions_that_are_too_few_for_a_statistic_are_in_no_mean_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last batch has one row of three tokens."""
    data = [*rows(4), {**rows(1)[0], "input_ids": [5, 6, 7]}]
    trainer = trainer_of(tmp_path, objective(), data, arguments={"per_device_eval_batch_size": 4})
    expected = trainer.evaluate(rows(4))
    with caplog.at_level(logging.WARNING, logger="flexkd"):
        found = trainer.evaluate()
    assert found["eval_features_raw"] == pytest.approx(expected["eval_features_raw"])
    assert "Evaluation: 3 positions are in no mean of the features" in caplog.text


def test_R05_packed_rows_count_as_padded_ones(tmp_path: Path) -> None:
    found = []
    for packed, size in ((False, 7), (True, 7), (True, 2)):
        trainer = text_trainer_of(tmp_path, "llama", goal_of(), 3, per_device_eval_batch_size=size)
        trainer.data_collator = collator_of(trainer.student, packed=packed)
        found.append(trainer.evaluate(answer_rows(7)))
    for other in found[1:]:
        for name in ("eval_loss", "eval_nll", "eval_logits_raw", "eval_features_raw"):
            assert_close(other[name], found[0][name], dtype=torch.float32)


def test_R05_an_evaluation_of_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape("eval_dataset: it has no rows.")):
        trainer_of(tmp_path, objective(), rows(4)).evaluate([])


def test_R05_a_data_set_that_is_split_by_processes_already_is_refused() -> None:
    stream = datasets.Dataset.from_list(rows(4)).to_iterable_dataset()
    EvaluationLoader(stream, as_batch, 2, accelerator_of(0, 2), {})
    split = split_dataset_by_node(stream, rank=0, world_size=2)
    with pytest.raises(DataError, match=re.escape("eval_dataset: it is split by processes already")):
        EvaluationLoader(split, as_batch, 2, accelerator_of(0, 2), {})


def outputs() -> list[Any]:
    logits = torch.randn(3, 5)
    top = TopOutputs(logits[:, :2], torch.zeros(3, 2, dtype=torch.int64), logits[:, 0])
    return [None, logits, HeadOutputs(torch.randn(3, 4), Head(lambda states: states)), top]


@pytest.mark.parametrize("at", range(4))
def test_R05_nothing_of_a_row_that_stands_in_is_counted(at: int) -> None:
    signal = Signal(outputs()[at], (torch.randn(6, 2),))
    none: Tensor = torch.zeros(0, dtype=torch.int64)
    for stands_in, counts in ((True, 0), (False, 6)):
        micro = MicroBatch(BatchPositions(None, None), none, StepCounts(1, 1, 1), stands_in)
        found = micro.counted(signal)
        assert len(found.features[0]) == counts
        assert found.logits is None or len(found.logits) == counts // 2
