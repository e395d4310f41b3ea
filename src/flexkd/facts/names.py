"""Names that several packages share: splits, tasks, sizes, prefixes, hub ids, and the files of a saved model."""

from typing import Final, Literal

SPLITS: Final = ("train", "validation", "test")
"""Parts of the rows, in the order in which they are read."""

GENERATION_TASKS: Final = ("instruction", "summarization")
"""Tasks in which a model writes text; their problem is `generation`."""
TASKS: Final = ("classification", *GENERATION_TASKS)

SIZE_NAMES: Final = (
    "hidden_size", "num_layers", "num_encoder_layers", "num_heads", "num_key_value_heads", "intermediate_size",
)  # fmt: skip
"""Sizes of a student: keys of a recipe's section `student`, and arguments of `slice_student`."""

SINGLE_STACK_SIZES: Final = tuple(name for name in SIZE_NAMES if name != "num_encoder_layers")
"""Those of a model with one stack of blocks."""

ALL_LAYERS: Final[Literal["all"]] = "all"
"""In the place of a layer of the teacher: its residual stream behind every block."""

SOURCE_SEPARATOR: Final = " + "
"""Joins several sources of rows that are read as one."""

SEPARATORS: Final = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
"""Signs between the fields of a table in a text file, by their names in a recipe."""

SeparatorName = Literal["auto", "comma", "semicolon", "tab", "pipe", "none"]
"""What a recipe says of them: none for one column, auto where the file decides."""

TEACHER_PREFIX: Final = "teacher_"
"""Keys of a batch that hold the teacher's own encoding start with it."""

VALIDATION_PREFIX: Final = "validation_"
"""Names of metrics start with it where they are those of the validation rows."""

HUB_OWNER: Final = r"[A-Za-z0-9][\w.-]*"
HUB_NAME: Final = r"[\w.-]+"
HUB_ID: Final = rf"{HUB_OWNER}/{HUB_NAME}"
"""An id on the Hugging Face hub, as an ASCII regular expression; some old models have a name without an owner."""

AUTO: Final = "auto"
ALWAYS: Final = "always"
NEVER: Final = "never"
"""What a recipe says of the cache of the teacher's answers, where it names no folder."""

GGUF_ENDING: Final = ".gguf"

WEIGHT_ENDINGS: Final = (".safetensors", ".bin")
"""Endings of the files of weights that transformers and PEFT write."""

INDEX_ENDING: Final = ".index.json"
"""Appended to the name of a weights file: the index of its shards."""

MODEL_STEM: Final = "model"
ADAPTER_STEM: Final = "adapter_model"

SAFE_WEIGHTS: Final = f"{MODEL_STEM}.safetensors"
PICKLED_WEIGHTS: Final = "pytorch_model.bin"

WEIGHT_FILES: Final = tuple(
    f"{name}{ending}" for name in (SAFE_WEIGHTS, PICKLED_WEIGHTS) for ending in ("", INDEX_ENDING)
)
"""Those that transformers looks for in a folder, unless its config names another one."""

ADAPTER_WEIGHT_FILES: Final = tuple(f"{ADAPTER_STEM}{ending}" for ending in WEIGHT_ENDINGS)
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"

ADAPTERS_WITH_POSITIONS: Final = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE",
)  # fmt: skip
"""Kinds of PEFT (`peft_type`) that put positions before a row; a model cannot take them into its weights."""

CONFIG_FILE: Final = "config.json"
TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"

TOKENIZER_FILES: Final = (
    TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
"""Files of which a folder with a tokenizer holds at least one."""
