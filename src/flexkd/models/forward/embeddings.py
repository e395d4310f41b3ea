"""How many tokens a model embeds."""

from transformers import PreTrainedModel


def num_embedded_tokens(model: PreTrainedModel) -> int | None:
    """Rows of a model's table of tokens; None for a model without one, such as CANINE, which hashes characters."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return int(next(embeddings.parameters()).shape[0])
