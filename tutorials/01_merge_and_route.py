"""Merge two experts of one base, route prompts between them, save and load.

Runs by itself in seconds on tiny random models, without a download. With real models only the paths change.
"""

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mediator_peft import MediatorConfig, build_mediator, load_mediator

folder = Path(tempfile.mkdtemp())

# A base, and two "fine-tunes" of it. In real life these are the folders that Trainer.save_model() wrote.
special = ["<pad>", "<s>", "</s>", "<unk>"]
words = [*special, *("add", "times", "minus", "seven", "four", "plus"), *("print", "loop", "string", "list", "sort")]
tokenizer_model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
tokenizer_model.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer_model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
)  # fmt: skip
base.save_pretrained(folder / "base")
tokenizer.save_pretrained(folder / "base")
for name in ("maths", "code"):
    expert = LlamaForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    expert.save_pretrained(folder / name)

# One call merges them: an averaged backbone in `out`, the sparse deltas in `out/mediator`.
experts = {"maths": folder / "maths", "code": folder / "code"}
report = build_mediator(folder / "base", experts, folder / "out", MediatorConfig(density=0.2))
print("conflict of each block:", [round(score, 2) for score in report.conflict["sign"]])
print("routed blocks:", report.routed_blocks, "- bytes per parameter and delta:", round(report.bytes_per_parameter, 3))

# The model is a PeftModel. Its router learns from a few prompts per expert; nothing else is trained.
model, tokenizer = load_mediator(folder / "out")
prompts = {
    "maths": ["add seven four", "seven times four", "four minus seven", "plus seven four", "times four four"],
    "code": ["print list", "sort string list", "loop list loop", "print string", "print sort list"],
}
model.fit_router(prompts, tokenizer)

# Each prompt is routed once, before its first token.
inputs = tokenizer(["add four four", "sort list"], return_tensors="pt", padding=True, return_token_type_ids=False)
route = model.route(**inputs)
for row, weights in enumerate(route.expert_weights.tolist()):
    mix = {name: round(weight, 2) for name, weight in zip(model.expert_names, weights, strict=True)}
    print("prompt", row, "->", mix, "uncertainty", round(route.uncertainty[row].item(), 2))
print(model.generate(**inputs, max_new_tokens=3).tolist())

# Or say yourself which expert answers: for a call, per row, or for a block.
model.generate(**inputs, max_new_tokens=3, expert_weights=["maths", {"code": 0.7, "base": 0.3}])
with model.use_experts("code"):
    model.generate(**inputs, max_new_tokens=3)

# Save router and deltas; one mix can also leave as a plain transformers model.
model.save_pretrained(folder / "out" / "mediator")
again, _ = load_mediator(folder / "out")
assert torch.equal(again.route(**inputs).expert_weights, route.expert_weights)
plain = again.merge_and_unload(expert_weights="code")
print("merged into a", type(plain).__name__)
