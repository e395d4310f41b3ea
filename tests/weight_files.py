"""Files of weights that have the names a config promises and next to no content."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def write_weights(file: Path, config: Mapping[str, Any]) -> None:
    """One weight for each block of a config, and the head of a BERT with its labels."""
    count = config.get("num_hidden_layers", config.get("n_layers", 1))
    blocks = [f"bert.encoder.layer.{block}.output.dense" for block in range(count)]
    names = ["bert.embeddings.word_embeddings", *blocks, "bert.pooler.dense"]
    weights = {f"{name}.weight": np.zeros((2, 2), np.float32) for name in names}
    for head in ("pre_classifier", "classifier", "classifier.dense", "classifier.out_proj", "score"):
        labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
        weights[f"{head}.weight"] = np.zeros((labels, 2), np.float32)
    save_file(weights, file)
