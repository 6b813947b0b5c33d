"""A byte-level BPE tokenizer for Python source, and the files that travel with it.

Byte-level means that every string has an encoding and every sequence of ids decodes to bytes. The
pre-tokenizer keeps a run of indentation together, lets one leading sign join a name (`.append`, `(self`)
and a line end join the signs before it (`):` + newline), which is what makes 4096 entries enough for about
3.5 bytes of source per token.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"
SEPARATOR_ID = 0
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Turns of the system and the user become comments and turns of the assistant stay code, because that is the
# text the model knows: a comment, then what it announces.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- message['content'] | trim + '\\n\\n\\n' -}}
{%- else -%}
{{- '# ' + (message['content'] | trim | replace('\\n', '\\n# ')) + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\\n' -}}
{%- endif -%}
"""


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer with exactly `vocab_size` entries, the separator being entry 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size or tokenizer.token_to_id(SEPARATOR) != SEPARATOR_ID:
        raise ValueError(
            f"tokenizer: expected {vocab_size} entries with {SEPARATOR} as number {SEPARATOR_ID}"
        )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, window_tokens: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": window_tokens,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
