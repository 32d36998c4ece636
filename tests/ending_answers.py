"""A tiny model whose greedy answers end, as those of real models do."""

from __future__ import annotations

from typing import Any

import torch
from character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tiny import tiny_model

from mediator_peft.evaluation.generation import answer_prompts


def model_of_letters() -> Any:
    """A model that writes characters only, no special tokens."""
    model = tiny_model()
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[:4] = head[len(character_tokenizer()) :] = 0  # never the most probable ones
    return model


def ending_answer(model: Any, prompt: str) -> tuple[Any, str]:
    """A tokenizer whose end of text is a letter that the model writes after this prompt, and the answer before it."""
    tokenizer = character_tokenizer(CHAT_TEMPLATE, adds_bos=True)
    text = answer_prompts(model, tokenizer, [prompt], max_new_tokens=40)[0]
    place = next(place for place in range(3, 40) if text[place].isalnum() and text[place] not in text[:place])
    tokenizer.add_special_tokens({"eos_token": text[place]})
    return tokenizer, text[:place]
