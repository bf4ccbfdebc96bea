"""A tokenizer with special tokens, and chat templates in the style of published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron.data.fast_tokenizers import HuggingFaceTokenizer
from megatron.data.tokenizer import byte_symbols

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]")
VOCAB = 256 + len(SPECIAL)
EOS, IM_END = 257, 259

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls is defined %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}
"""
INST = """\
{% if messages[0]['role'] == 'system' %}
    {% set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{% else %}
    {% set loop_messages = messages %}{% set system_message = false %}
{% endif %}
{{ bos_token }}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if loop.index0 == 0 and system_message %}
    {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}
    {% set content = message['content'] %}
{% endif %}
{% if message['role'] == 'user' %}
    {{ '[INST] ' + content.strip() + ' [/INST]' }}
{% else %}
    {% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.first = message['content'] + '\n\n' %}{% else %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + (ns.first if loop.index0 == 1 else '') + message['content'] | trim "
    "+ '<end_of_turn>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, template: str | None = CHATML, *, as_file: bool = False, **config: Any) -> Path:
    """Write a directory as Hugging Face's, with bytes as tokens.

    Args:
        folder: made.
        template: of chats; None for none.
        as_file: the template lies in a file of its own.
        config: further fields of tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backend = Backend(models.BPE(vocab={symbol: i for i, symbol in enumerate(byte_symbols())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    (folder / "tokenizer.json").write_text(backend.to_str())
    end = {"__type": "AddedToken", "content": "</s>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": end, **config}
    if template is not None and as_file:
        (folder / "chat_template.jinja").write_text(template)
    elif template is not None:
        about["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def open_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(str(folder))
