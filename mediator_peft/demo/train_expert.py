"""One fine-tuning as a process of its own: ``python -m mediator_peft.demo.train_expert JOB.json``.

Writes one JSON object a line to the standard output: ``{"step": 3, "loss": 0.71}`` after each step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .tasks import Item


def main(job_file: str) -> None:
    """Train as the job says and save the expert, bfloat16, under its final name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..checkpoints.adapter_files import give_usual_mode
    from ..checkpoints.output_folder import new_folder
    from .finetune import finetune

    logging.disable_progress_bar()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(job["num_threads"])
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32).to(job["device"])

    saved: Any = model
    if job.get("lora_rank"):
        from peft import LoraConfig, get_peft_model

        rank = job["lora_rank"]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        saved = get_peft_model(model, lora)  # puts its layers into the model, which is what is trained

    def tell(step: int, loss: float) -> None:
        print(json.dumps({"step": step, "loss": loss}), flush=True)

    losses = finetune(
        model,
        tokenizer,
        [Item(*item) for item in job["items"]],
        job["num_steps"],
        batch_size=job["batch_size"],
        learning_rate=job["learning_rate"],
        seed=job["seed"],
        on_step=tell,
    )
    with new_folder(Path(job["output"])) as folder:
        saved.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        give_usual_mode(folder)
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
