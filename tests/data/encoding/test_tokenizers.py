"""What is taken for a chat template, read from a file or of a loaded tokenizer."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flexkd.data.encoding.tokenizers import tokenizer_info
from flexkd.errors import VocabularyError
from flexkd.preflight.tokenizer_files import read_tokenizer_info
from tests.job_files import write_text_tokenizer


def test_R03_a_template_that_is_no_text_is_refused_by_check_and_run_alike(tmp_path: Path) -> None:
    write_text_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"chat_template": 5}), encoding="utf-8")
    said = "its chat_template is a int, not a Jinja template. Write one, or remove"
    with pytest.raises(VocabularyError, match=re.escape(said)):
        read_tokenizer_info(tmp_path, "teacher")
    with pytest.raises(VocabularyError, match=re.escape(said)):
        tokenizer_info(AutoTokenizer.from_pretrained(tmp_path))
