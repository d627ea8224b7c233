"""The Trainer of transformers steps, routes and resumes."""

import pytest
import torch
from small import lines, steps
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deepopt import rules
from torch_backend import M3

pytestmark = pytest.mark.integrations

OPTIONS = {"lr": 1e-2, "period": 2}
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)


def make() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def trainer(folder, model=None, **options) -> Trainer:
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        bf16=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": x, "labels": x} for batch, _ in lines(12) for x in batch]
    return Trainer(model or make(), args, train_dataset=data, **options)


def losses(done: Trainer) -> list[float]:
    return [x["loss"] for x in done.state.log_history if "loss" in x]


def rules_of(done: Trainer) -> dict[str, str]:
    """By the names of the model, whatever the optimizer was told of them."""
    by_tensor = {
        p: group["rule"] for group in done.optimizer.optimizer.param_groups for p in group["params"]
    }
    return {name: by_tensor[p] for name, p in done.model.named_parameters()}


def test_a_class_and_its_options_and_a_resumed_run(tmp_path):
    """Groups of bare tensors, with decay and without: matrices get the rule, vectors the rest."""
    given = {"optimizer_cls_and_kwargs": (M3, OPTIONS)}
    whole = trainer(tmp_path, **given)
    whole.train()
    groups = whole.optimizer.optimizer.param_groups
    assert [(x["rule"], x["weight_decay"]) for x in groups] == [("M3", 0.1), ("AdamW", 0.0)]
    ranks = {x["rule"]: {p.ndim for p in x["params"]} for x in groups}
    assert ranks == {"M3": {2}, "AdamW": {1}}
    assert steps(whole.optimizer) == {6.0} and losses(whole)[-1] < losses(whole)[0]

    again = trainer(tmp_path, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == losses(whole) and steps(again.optimizer) == {6.0}
    assert again.optimizer.state_dict().keys() == whole.optimizer.state_dict().keys()
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_optimizer_and_its_scheduler(tmp_path):
    """Made of the model, it knows embedding and head."""
    model = make()
    optimizer = M3(model, weight_decay=0.1, fallback=rules.AdamW(lr=1e-2), **OPTIONS)
    scheduler = LambdaLR(optimizer, lambda t: 1 / (t + 1))
    done = trainer(tmp_path, model, optimizers=(optimizer, scheduler))
    done.train()
    hidden = {name for name, rule in rules_of(done).items() if rule == "M3"}
    assert hidden and all("_proj" in name for name in hidden)
    assert steps(optimizer) == {6.0} and losses(done)[-1] < losses(done)[0]
    assert {x["lr"] for x in optimizer.param_groups} == {1e-2 / 7}


def test_a_factory_gets_the_model(tmp_path):
    done = trainer(tmp_path, optimizer_cls_and_kwargs=(lambda: M3, OPTIONS))
    done.train()
    routed = rules_of(done)
    assert routed["model.embed_tokens.weight"] == routed["lm_head.weight"] == "AdamW"
    assert routed["model.layers.0.mlp.up_proj.weight"] == "M3"
