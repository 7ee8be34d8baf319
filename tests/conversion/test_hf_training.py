"""Training an export with the libraries that people have for it: Trainer, PEFT, accelerate."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from infini_ds import cli
from infini_ds.config import MemoryConfig
from infini_ds.runs.export import load_model
from tests.conversion.test_to_hf import N, make_export

torch.set_num_threads(1)

LENGTHS = (3 * N + 5, N - 3, 2 * N, 5)
RATE = 0.1


@pytest.fixture(scope="module")
def export(tmp_path_factory, hf_modules) -> Path:
    folder = tmp_path_factory.mktemp("training")
    settings = {
        "memory_rule": "gated_delta", "num_kv_heads": 2, "tie_embeddings": True,
        "memory": MemoryConfig(write_gate=True, write_gate_sees_keys=True, short_conv=4),
    }  # fmt: skip
    make_export(folder / "source", None, **settings)
    assert cli.main(["convert", "to-hf", str(folder / "source"), str(folder / "export")]) == 0
    return folder / "export"


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 250, (length,), generator=generator) for length in LENGTHS]


def load(export: Path, **options):
    return AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, **options)


def padded(rows: list[dict]) -> dict[str, Tensor]:
    """What DataCollatorForLanguageModeling makes of texts, with padding at the right."""
    most = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids = torch.as_tensor(row["input_ids"])
        room = most - len(ids)
        ones = torch.ones_like(ids)
        parts = {"input_ids": (ids, 0), "attention_mask": (ones, 0), "labels": (ids, -100)}
        for name, (value, fill) in parts.items():
            batch[name].append(torch.nn.functional.pad(value, (0, room), value=fill))
    return {name: torch.stack(parts) for name, parts in batch.items()}


def test_a_padded_and_accumulated_step_of_the_trainer_is_ours(export, texts, tmp_path):
    model = load(export)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    steps = torch.optim.SGD(model.parameters(), lr=RATE)
    rows = [{"input_ids": text} for text in texts]
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=padded, optimizers=(steps, None)
    )
    trainer.train()

    ours = load_model(export).model.train()
    count = sum(LENGTHS) - len(LENGTHS)
    sum(ours.loss(text[None]) * (len(text) - 1) / count for text in texts).backward()
    after = dict(model.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        expected = parameter.detach() - RATE * parameter.grad
        torch.testing.assert_close(after[name].detach(), expected, rtol=1e-5, atol=1e-5)


def test_peft_trains_and_merges_low_ranks(export, texts, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = load(export)
    before = copy.deepcopy(model.state_dict())
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    batch = padded([{"input_ids": text} for text in texts])
    steps = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(**batch).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path)
    logits = adapted.eval()(texts[0][None]).logits
    again = PeftModel.from_pretrained(load(export), str(tmp_path))
    torch.testing.assert_close(again.eval()(texts[0][None]).logits, logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(texts[0][None]).logits, logits, rtol=1e-4, atol=1e-4)
    written = merged.generate(texts[0][None], max_new_tokens=3, do_sample=False)
    assert written.shape == (1, len(texts[0]) + 3)
    changed = [
        name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert len(changed) == 2 * len(targets)


def test_accelerate_places_it_by_itself(export, texts):
    placed = load(export, device_map="auto")
    expected = load(export)(texts[0][None]).logits
    torch.testing.assert_close(placed(texts[0][None]).logits.cpu(), expected)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_moves_blocks_in_when_they_are_used(export, texts, tmp_path, where):
    """On a machine with two places, of which the second is slow."""
    from accelerate import cpu_offload, disk_offload

    batch = padded([{"input_ids": text} for text in texts])
    expected = load(export)(**batch).logits
    model = load(export)
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    torch.testing.assert_close(model(**batch).logits, expected)
