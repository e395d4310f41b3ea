"""A model that knows fewer tokens computes what it computed before, of every family."""

from pathlib import Path

import pytest
import torch

from flexkd.errors import VocabularyError
from flexkd.models.slicing.vocabulary import cut_vocabulary, named_ids
from tests.contract.variants import VARIANTS, Variant, name_of, teacher_of
from tests.tiny import VOCABULARY, tiny_batch, tiny_model

LEFT_OUT = (40, 47, 60)
"""Ids that no text of these tests holds."""
KEPT = [number for number in range(VOCABULARY) if number not in LEFT_OUT]


def renumbered(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch in new ids."""
    new_ids = torch.full((VOCABULARY,), -1)
    new_ids[KEPT] = torch.arange(len(KEPT))
    return {**batch, "input_ids": new_ids[batch["input_ids"]]}


def without_absent(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with other tokens in the place of those that are left out."""
    ids, absent = batch["input_ids"], torch.tensor(LEFT_OUT)
    return {**batch, "input_ids": torch.where(torch.isin(ids, absent), 5, ids)}


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_logits_of_the_tokens_that_stay_are_those_of_the_model_bit_for_bit(variant: Variant) -> None:
    model = teacher_of(variant)
    batch = without_absent(tiny_batch(model))
    del batch["labels"]
    if model.config.is_encoder_decoder and variant.task == "seq2seq":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    cut = cut_vocabulary(model, KEPT)
    new = renumbered(batch)
    if "decoder_input_ids" in new:
        new["decoder_input_ids"] = new["input_ids"][:, :4]
    with torch.no_grad():
        whole, logits = model(**batch).logits, cut(**new).logits
    assert torch.equal(logits, whole if variant.task == "classification" else whole[..., KEPT])
    assert cut.config.get_text_config().vocab_size == len(KEPT) < model.config.get_text_config().vocab_size
    assert cut.training == model.training


def test_weights_without_tokens_are_shared_and_tied_ones_stay_tied() -> None:
    model = tiny_model("llama", "causal", tie_word_embeddings=True)
    cut = cut_vocabulary(model, KEPT)
    assert cut.get_output_embeddings().weight is cut.get_input_embeddings().weight
    assert cut.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()
    assert cut.num_parameters() == model.num_parameters() - len(LEFT_OUT) * 32


def test_ids_in_the_configs_are_those_of_the_same_tokens() -> None:
    model = tiny_model("llama", "causal", eos_token_id=[2, 50], bos_token_id=48)
    model.generation_config.suppress_tokens = [40, 41, 49]
    model.generation_config.bad_words_ids = [[41, 40], [41, 42]]
    assert named_ids(model.config, model.generation_config, size=VOCABULARY) == {0, 2, 48, 50}
    cut = cut_vocabulary(model, KEPT)
    assert [KEPT[number] for number in cut.config.eos_token_id] == [2, 50]
    assert KEPT[cut.config.bos_token_id] == 48
    assert [KEPT[number] for number in cut.generation_config.eos_token_id] == [2, 50]
    assert [KEPT[number] for number in cut.generation_config.suppress_tokens] == [41, 49]
    assert [[KEPT[number] for number in entry] for entry in cut.generation_config.bad_words_ids] == [[41, 42]]
    assert model.config.eos_token_id == [2, 50]


def test_a_token_that_a_config_names_must_stay() -> None:
    model = tiny_model("llama", "causal", eos_token_id=40)
    with pytest.raises(VocabularyError, match="eos_token_id is token 40, which is not kept"):
        cut_vocabulary(model, KEPT)


def test_an_id_that_no_token_has_stays_where_no_text_can_meet_it() -> None:
    model = tiny_model("llama", "causal", bos_token_id=57, eos_token_id=[2, 60])
    cut = cut_vocabulary(model, KEPT[:-5], num_tokens=55)
    assert (cut.config.bos_token_id, cut.config.eos_token_id) == (57, [2, 60])
    with pytest.raises(VocabularyError, match="bos_token_id is token 57, which is not kept"):
        cut_vocabulary(model, KEPT[:-5])


def test_a_cut_model_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = tiny_model("t5", "seq2seq", tie_word_embeddings=False)
    cut = cut_vocabulary(model, KEPT)
    cut.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    batch = renumbered(without_absent(tiny_batch(model)))
    batch["labels"] = batch["input_ids"][:, :5].contiguous()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, cut(**batch).logits)
