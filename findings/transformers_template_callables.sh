#!/usr/bin/env bash
# transformers 5.23.0: a function cannot be handed to a chat template.
#
# apply_chat_template documents "kwargs: Additional kwargs to pass to the template renderer. Will be accessible by the
# chat template", and keyword arguments take precedence over the names that transformers itself defines. So the usual way
# to render a template that asks for today's date (Llama 3, GPT-OSS and others call strftime_now) on a fixed day is
# strftime_now=that_day.strftime. Since every keyword argument is now made plain data first, the function arrives as its
# repr, a string, and the template fails as it calls it. Plain values still take precedence. A macro of that name in
# front of the template's text works.
#
# Output seen (transformers 5.23.0, jinja2 3.1):
#     function: TypeError: 'str' object is not callable
#     value: 29 Feb 2020
#     macro: 29 Feb 2020
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" -q install transformers==5.23.0 jinja2==3.1.6
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON' > "$place/out"
from datetime import datetime

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
messages, day = [{"role": "user", "content": "a"}], datetime(2020, 2, 29)
try:
    print("function:", tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=day.strftime))
except TypeError as error:
    print("function: TypeError:", error)
valued = "{{ date_string or strftime_now('%d %b %Y') }}"
print("value:", tokenizer.apply_chat_template(messages, chat_template=valued, tokenize=False, date_string="29 Feb 2020"))
macro = "{%- macro strftime_now(format) -%}29 Feb 2020{%- endmacro -%}" + tokenizer.chat_template
print("macro:", tokenizer.apply_chat_template(messages, chat_template=macro, tokenize=False))
PYTHON
cat "$place/out"
diff "$place/out" - <<'EXPECTED'
function: TypeError: 'str' object is not callable
value: 29 Feb 2020
macro: 29 Feb 2020
EXPECTED
