"""A tokenizer of single characters that fits the vocabulary of the tiny models, made on the spot."""

from __future__ import annotations

import string

from tiny import VOCAB_SIZE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def character_tokenizer(chat_template: str | None = None, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Ids 0 to 3 are ``<pad> <s> </s> <unk>``; the rest are characters."""
    characters = (string.ascii_lowercase + string.digits + " .,:;?!*/+-=#'[]\n" + string.ascii_uppercase)[
        : VOCAB_SIZE - 4
    ]
    vocab = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=chat_template,
    )
