"""A word tokenizer over the tiny vocabulary, made on the spot."""

from __future__ import annotations

from tiny import VOCAB_SIZE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w5`` … ``w95`` are single tokens."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<x>": 4}
    vocabulary.update({f"w{number}": number for number in range(5, VOCAB_SIZE)})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def topic_texts(low: int, high: int, count: int, seed: int = 0, length: int = 8) -> list[str]:
    """Texts of words ``w{low}`` to ``w{high}``, of different lengths."""
    from random import Random

    rng = Random(seed)
    return [" ".join(f"w{rng.randint(low, high)}" for _ in range(rng.randint(3, length))) for _ in range(count)]
