"""Writes the model card of an export: what the model is, how it was made, how to use it."""

import math
from pathlib import Path
from typing import Any

import torch

from infini_ds.config import RunConfig
from infini_ds.data import store
from infini_ds.data.tokenizer_base import ByteTokenizer, Tokenizer
from infini_ds.data.tokenizer_json import TokenizerJson
from infini_ds.memory import RULES
from infini_ds.model.layers import count_parameters
from infini_ds.runs.directory import REPORT, TASKS
from infini_ds.runs.export import Model
from infini_ds.system.figures import read_figures

_PAPER = "[Infini-attention](https://arxiv.org/abs/2404.07143)"


def model_card(name: str, model: Model, tokenizer: Tokenizer | None, dtype: torch.dtype) -> str:
    """Formats the README.md of an export as Markdown.

    Args:
        name: name of the model.
        tokenizer: None if there is none, or if it is of no kind that we read.
        dtype: dtype of the weights.
    """
    config = model.config
    parameters = count_parameters(config)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "tags:\n- infini-attention\n---",
        f"# {name}",
        f"An Infini-Transformer of {parameters:,} parameters, pretrained with infini-ds: each layer"
        f" attends inside segments of {config.segment_length:,} tokens and reads a compressive "
        f"memory of all earlier segments ({_PAPER}). The state it keeps of a text has one size, "
        "however long the text is.",
        _use(name, tokenizer),
        "## Model\n\n" + _table(_settings(model, dtype)),
    ]
    if model.checkpoint and isinstance(model.settings, RunConfig):
        parts.append("## Training\n\n" + _table(_training(model.settings, model.checkpoint)))
        figures = read_figures(model.checkpoint.parent.parent / REPORT)
        if "held_out/bits_per_byte" in figures and figures["step"] == _step(model.checkpoint):
            parts.append("## Held-out text\n\n" + _table(_quality(figures)))
        tasks = read_figures(model.checkpoint.parent.parent / TASKS)
        if tasks and tasks["step"] == _step(model.checkpoint):
            parts.append("## Tasks\n\n" + _tasks(tasks))
    return "\n\n".join(parts) + "\n"


def _use(name: str, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        note = "The tokenizer is that of the original model, if its files are here."
    elif isinstance(tokenizer, TokenizerJson):
        note = (
            "The tokenizer is that of the original model. In training every text began with "
            f"BOS (id {tokenizer.bos_id}): put it first if the tokenizer does not."
        )
    elif isinstance(tokenizer, ByteTokenizer):
        note = "Tokens are UTF-8 bytes, BOS and EOS; the tokenizer is code beside the weights."
    else:
        note = (
            "The tokenizer is code around the sentencepiece model tokenizer.model, and needs the "
            "package sentencepiece; it gives the same tokens as in training."
        )
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
text = tokenizer(open("book.txt").read(), return_tensors="pt").input_ids  # of any length
print(tokenizer.decode(model.generate(text, max_new_tokens=100)[0, text.shape[1]:]))
```

A text is read a segment at a time. To read it once and ask several questions, keep the cache:

```python
import copy, torch

with torch.no_grad():
    cache = model(text, logits_to_keep=1).past_key_values
question = tokenizer("What ...", add_special_tokens=False, return_tensors="pt").input_ids
asked = torch.cat((text, question), dim=1)  # all tokens; those in the cache are not read again
answer = model.generate(asked, past_key_values=copy.deepcopy(cache), max_new_tokens=100)
```

This needs only transformers 5 and PyTorch. Texts of a batch may have different
lengths: pass the tokenizer's `attention_mask`. {note}"""


def _settings(model: Model, dtype: torch.dtype) -> dict[str, Any]:
    config = model.config
    states = RULES[config.memory_rule].specs(config.kv_heads, config.head_dim)
    kept = 4 * len(config.memory_layers) * sum(map(math.prod, states.values()))
    where = []
    if config.memory.layers is not None:
        where = [f"layers {list(config.memory.layers)} of 0 to {config.num_layers - 1}"]
    yes = [name for name, value in config.memory.model_dump().items() if value is True]
    return {
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_heads} of {config.head_dim}, {config.kv_heads} key-value",
        "feed-forward": f"{config.mlp_size}, {config.hidden_act}",
        "vocabulary": config.vocab_size,
        "segment": f"{config.segment_length} tokens",
        "memory": ", ".join((f"{config.memory_rule} rule", *where, *yes)),
        "memory of a text": f"{kept:,} bytes",
        "tied embeddings": "yes" if config.tie_embeddings else "no",
        "dtype": str(dtype).removeprefix("torch."),
    }


def _training(settings: RunConfig, checkpoint: Path) -> dict[str, Any]:
    state = read_figures(checkpoint / "state.json")
    train, data = settings.train, settings.data
    sources = []
    for name, corpus in data.corpora.items():
        source = read_figures(Path(corpus.store) / store.MANIFEST).get("source", {})
        share = f" ({name}, weight {data.weights[name]:g})" if name else ""
        sources.append(source.get("description", corpus.source) + share)
    rows = {
        "steps": f"{state['step']:,}",
        "tokens": f"{state['tokens']:,}",
        "data": "; ".join(sources),
        "lanes": f"{train.batch_size}, windows of {train.window_segments} segments",
        "learning rate": f"{settings.optimizer.learning_rate:g}, {settings.optimizer.schedule}",
    }
    if settings.init_from:
        rows["started from"] = Path(settings.init_from).name
    return rows


def _quality(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        title: f"{figures[key]:.4f} bits per byte"
        for title, key in (
            ("with memory", "held_out/bits_per_byte"),
            ("without memory", "held_out_without_memory/bits_per_byte"),
            ("frequencies of tokens alone", "held_out_unigram/bits_per_byte"),
        )
    }


def _tasks(figures: dict[str, Any]) -> str:
    rows = [
        f"| {row['task']} | {row['metric']} | {row['with_memory']:.4f} | {row['ablated']:.4f} |"
        for row in figures["results"]
    ]
    limit = f", at most {figures['limit']} examples of each" if figures["limit"] else ""
    return "\n".join(
        (
            f"By lm-evaluation-harness {figures['harness']}{limit}; without memory, each segment "
            "is read alone.\n",
            "| task | measure | with memory | without |",
            "|---|---|---|---|",
            *rows,
        )
    )


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(("| | |", "|---|---|", *lines))


def _step(checkpoint: Path) -> int:
    return read_figures(checkpoint / "state.json")["step"]
