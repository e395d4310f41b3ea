"""Chat templates as strangers' programs: what transformers renders, on one day, and no further than their limits."""

import datetime

import pytest
from transformers.utils import chat_template_utils

from flexkd.data.encoding import chat_templates
from flexkd.data.encoding.chat_templates import render, with_date
from flexkd.errors import DataError
from tests.data.encoding.byte_tokenizers import byte_tokenizer

USER = {"role": "user", "content": "Sort"}
DAY = datetime.date(2026, 1, 1)
DATED = (
    "{%- macro head() %}{{ 'On ' + strftime_now('%Y-%m-%d') }}{% endmacro %}"
    '{% if strftime_now is defined %}{{ head() }}, {{ strftime_now("%-d %b %Y") }}{% endif %}\n'
    "    {% for m in messages %}\n{% if m.role == 'user' %}{{ m.content | tojson }}{% continue %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
)


def test_R03_a_date_is_pinned_inside_the_template_for_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = with_date(DATED, DAY)
    assert render(pinned, [USER], {}, add_generation_prompt=True) == 'On 2026-01-01, 1 Jan 2026"Sort"'
    monkeypatch.setattr(chat_template_utils, "datetime", None)
    served = byte_tokenizer().apply_chat_template([USER], chat_template=pinned, tokenize=False)
    assert served == render(pinned, [USER], {}, add_generation_prompt=True)
    # A template that was pinned keeps its day, one without a clock stays as it is.
    assert with_date(pinned, datetime.date(2030, 5, 5)) == pinned
    assert with_date("{{ messages }}", DAY) == "{{ messages }}"
    begins = "\n  {% if true %}x{% endif %}" + "{{ strftime_now('%Y') }}"
    assert render(with_date(begins, DAY), [USER], {}, add_generation_prompt=True) == "\nx2026"
    assert render(with_date(begins[1:], DAY), [USER], {}, add_generation_prompt=True) == "x2026"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 0.2 sec"),
        ("{% for a in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}", "writes more than 1,000,016 charact"),
        ("{{ 'a' * 1000000000 }}", "a product that would fill the memory"),
        ("{{ 9 ** 9 ** 9 }}", "a product that would fill the memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"cannot write the turns user \(maximum recursion"),
        ("{{ messages[0].text.more }}", r"cannot write the turns user \('dict object' has no attribute 'text'\)"),
        ("{{ raise_exception('no') }}", r"^refuses the turns user \(no\)$"),
        ("{{ messages.append(1) }}", "cannot write the turns user"),
        ("{{ ''.__class__.__mro__ }}", "cannot write the turns user"),
        ("{% if %}", "is no Jinja template"),
    ],
)
def test_R03_a_template_is_stopped_and_says_why(source: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "takes longer" in reason:
        monkeypatch.setattr(chat_templates, "SECONDS", 0.2)
    with pytest.raises(DataError, match=reason):
        render(source, [USER], {}, add_generation_prompt=True, guarded=True)
