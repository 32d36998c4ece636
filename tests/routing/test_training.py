"""The router is tuned on the language-model loss by a plain Trainer; nothing else changes; checkpoints resume."""

import copy

import pytest
import torch
from fitting import fit_once
from transformers import Trainer, TrainingArguments

from mediator_peft import MediatorConfig, get_mediator_model
from mediator_peft.tuner.forward import without_answers


def items(tokenizer, topics, count=16):
    """Prompts of one topic whose answers are tokens of it; the loss is on the answer."""
    rows = []
    for name in ("math", "code"):
        for text in topics[name][:count]:
            prompt = tokenizer(text, add_special_tokens=False)["input_ids"][:3]
            ids = (prompt + prompt)[:6]
            rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:], "attention_mask": [1] * len(ids)})
    return [row for row in rows if len(row["input_ids"]) == 6]


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def trainer_of(model, folder, data, steps, **settings):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=settings.pop("learning_rate", 0.05),
        logging_steps=1, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)


def soften(model):
    """A fitted router is sure of itself; an unsure one has something to learn."""
    with torch.no_grad():
        model.router.temperature.mul_(1e3)


def test_only_the_router_changes_and_the_loss_falls(build, topics, tokenizer, tmp_path):
    model = build(is_trainable=True)
    fit_once(model, {name: topics[name] for name in ("math", "code")}, tokenizer)
    soften(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("mediator_router" in name for name in trainable)
    trainer = trainer_of(model, tmp_path / "run", items(tokenizer, topics), 8)
    trainer.train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("mediator_router" in key for key in changed)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_training_resumes_where_it_stopped(build, topics, tokenizer, tmp_path):
    model = build(is_trainable=True)
    fit_once(model, {name: topics[name] for name in ("math", "code")}, tokenizer)
    soften(model)
    other = copy.deepcopy(model)
    data = items(tokenizer, topics)
    trainer_of(model, tmp_path / "run", data, 6).train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert {path.suffix for path in checkpoint.iterdir()} & {".safetensors"}
    resumed = trainer_of(other, tmp_path / "again", data, 6)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for (name, ours), theirs in zip(model.router.state_dict().items(), other.router.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_checkpoints_of_a_run_share_one_backbone(checkpoints, topics, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoints["base"], dtype=torch.float32)
    experts = {name: str(checkpoints[name]) for name in ("math", "code")}
    model = get_mediator_model(base, MediatorConfig(experts=experts, density=0.3))
    model.fit_router({name: topics[name] for name in ("math", "code")}, tokenizer)
    trainer_of(model, tmp_path / "run", items(tokenizer, topics), 4).train()
    backbones = sorted(path.parent.name for path in (tmp_path / "run").rglob("config.json"))
    assert backbones == ["backbone"]
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_gradients_are_those_of_finite_differences(build, topics, tokenizer):
    model = build(is_trainable=True)
    fit_once(model, {name: topics[name] for name in ("math", "code")}, tokenizer)
    soften(model)
    model.train()
    batch = collate(items(tokenizer, topics)[::8])
    model(**batch).loss.backward()
    bias = model.router.bias
    assert bias.grad.abs().max() > 0
    step = 50.0  # scores are divided by a temperature of thousands
    for place in range(2):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[place] += sign * step
            ends.append(model(**batch).loss.item())
            with torch.no_grad():
                bias[place] -= sign * step
        slope = (ends[0] - ends[1]) / (2 * step)
        assert bias.grad[place].item() == pytest.approx(slope, rel=0.05, abs=1e-8)


def test_the_router_does_not_see_the_answers(build, topics, tokenizer):
    model = build(is_trainable=True)
    fit_once(model, {name: topics[name] for name in ("math", "code")}, tokenizer)
    ids = torch.tensor([[5, 6, 7, 40, 41, 42]])
    labels = torch.tensor([[-100, -100, -100, 40, 41, 42]])
    assert without_answers(ids, None, labels).tolist() == [[1, 1, 1, 0, 0, 0]]
    assert without_answers(ids, None, ids).tolist() == [[1] * 6]
    assert without_answers(ids, None, None) is None
    with torch.no_grad():
        trained = model(input_ids=ids, labels=labels).logits
        asked = model(input_ids=ids, expert_weights=model.route(ids[:, :3]).expert_weights).logits
    torch.testing.assert_close(trained, asked)
