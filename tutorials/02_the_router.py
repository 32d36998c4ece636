"""Fit a router, see why prompts go where they go, move its thresholds, and give it one more expert.

Runs by itself in seconds on tiny random models, without a download. With real models only the paths and texts change.
"""

import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mediator_peft import MediatorConfig, build_mediator, load_mediator

folder = Path(tempfile.mkdtemp())
draw = random.Random(0)

# A base and three "fine-tunes" of it, each with a vocabulary of its own. In real life these are trained checkpoints.
WORDS = {
    "maths": ["add", "times", "minus", "seven", "four", "plus", "half", "twice", "nine", "sum"],
    "code": ["print", "loop", "string", "list", "sort", "index", "return", "class", "while", "def"],
    "cooking": ["boil", "salt", "oven", "butter", "stir", "onion", "slice", "bake", "flour", "pan"],
    "anything": ["hello", "weather", "train", "river", "who", "when", "song", "letter", "green", "far"],
}
special = ["<pad>", "<s>", "</s>", "<unk>"]
vocabulary = [*special, *(word for words in WORDS.values() for word in words)]
words_model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
words_model.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words_model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LlamaForCausalLM(config).save_pretrained(folder / "base")
tokenizer.save_pretrained(folder / "base")
for name in ("maths", "code", "cooking"):
    expert = LlamaForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    expert.save_pretrained(folder / name)


def prompts(kind: str, count: int) -> list[str]:
    return [" ".join(draw.choices(WORDS[kind], k=6)) for _ in range(count)]


# Two experts. The router reads the hidden state after one block; only the blocks above it are routed. So a prompt is
# routed inside the forward pass that fills its cache: single-pass routing, without an extra forward pass.
experts = {"maths": folder / "maths", "code": folder / "code"}
settings = MediatorConfig(router_layer=1, routed_layers=[1, 2], ood_alpha=0.05)
build_mediator(folder / "base", experts, folder / "out", settings)
model, tokenizer = load_mediator(folder / "out")
print("single-pass routing:", model.single_pass_routing)

# Calibration: prompts of each expert, and background ones that belong to none. (For a real tokenizer the library
# has its own; add prompts that you see in use.)
rows = [{"prompt": text, "expert": name} for name in experts for text in prompts(name, 60)]
report = model.fit_router(Dataset.from_list(rows), tokenizer, background=prompts("anything", 40))
print(f"held out: {report.accuracy:.0%} to their expert, {report.false_fallback:.1%} flagged (5 % asked for)")
print("confusion:", report.confusion, "calibration error:", round(report.ece, 3))

# Why does a prompt go where it goes? One with words of both kinds, a clear one, and one of no expert's.
mixed = " ".join(WORDS["maths"][:3] + WORDS["code"][:3])
questions = [prompts("maths", 1)[0], mixed, "who hello song letter weather green"]
for question, answer in zip(questions, model.explain(questions, tokenizer), strict=True):
    print(f"{question!r}\n  -> {answer}")
clear, _, unknown = model.explain(questions, tokenizer)
assert clear.expert_weights == {"maths": 1.0}
assert unknown.is_ood
assert unknown.expert_weights["base"] > 0.5
others = model.explain(prompts("anything", 50), tokenizer)
base_weight = sum(one.expert_weights.get("base", 0) for one in others) / 50
print(f"weight of the base for what no expert knows: {base_weight:.2f}")

# Thresholds may be moved without a new fit: how many known prompts may be flagged, and how much is blended.
for ood_alpha in (0.01, 0.2):
    model.peft_config["default"].ood_alpha = ood_alpha
    print(f"at {ood_alpha}: flagged above an OOD score of {model.explain(questions[0], tokenizer)[0].threshold:.3g}")
model.peft_config["default"].routing_top_p = 1.0  # every expert takes part, by its probability
print(
    "blended:", {name: round(weight, 2) for name, weight in model.explain(mixed, tokenizer)[0].expert_weights.items()}
)

# One more expert: the others' deltas and held-out statistics stay as they are, bit for bit.
model.add_expert("cooking", folder / "cooking", prompts("cooking", 60), tokenizer)
cooking, maths = model.explain([prompts("cooking", 1)[0], questions[0]], tokenizer)
print("after adding:", cooking.nearest, "and", maths.nearest)
assert cooking.nearest == "cooking"
assert maths.nearest == "maths"

# Whoever knows better than the router says so; and what is saved is judged in the same way after loading.
inputs = tokenizer(questions, return_tensors="pt", padding=True, return_token_type_ids=False)
model.generate(**inputs, max_new_tokens=3)
model.generate(**inputs, max_new_tokens=3, expert_weights="cooking")
model.save_pretrained(folder / "out" / "mediator")
again, _ = load_mediator(folder / "out")
assert torch.equal(again.route(**inputs).expert_weights, model.route(**inputs).expert_weights)
