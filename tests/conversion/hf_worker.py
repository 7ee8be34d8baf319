"""Loads exports with transformers alone and writes what they compute.

    python -I hf_worker.py FOLDER

Every folder of FOLDER is an export, with question.safetensors (tokens) and text.txt beside its
weights; answer.safetensors and answer.json go there.
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# An editable installation puts the repository on the path, or a finder of its own.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != REPOSITORY]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

NEW_TOKENS = 40


def numbers(cache) -> int:
    """How many numbers a cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in vars(layer).values()]
    return sum(tensor.numel() for tensor in tensors if tensor is not None)


@torch.no_grad()
def answer(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = load_file(folder / "question.safetensors")["tokens"]
    n = model.config.segment_length
    found = {"logits": model(tokens).logits}

    cache, parts, sizes = None, [], []
    for piece in tokens.split(n // 2 + 1, dim=1):
        out = model(piece, past_key_values=cache)
        cache = out.past_key_values
        parts.append(out.logits)
        sizes.append(
            max(0 if layer.keys is None else layer.keys.shape[1] for layer in cache.layers)
        )
    found["in_pieces"] = torch.cat(parts, dim=1)
    for part in ("kv", "norm", "keys", "values"):
        tensors = [getattr(layer, part) for layer in cache.layers]
        if tensors[0] is not None:
            found[part] = torch.stack(tensors)
    if model.config.write_gate:
        found["weights"] = torch.stack([layer.weights for layer in cache.layers])
    rounded = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16
    )
    found["bf16"] = rounded(tokens).logits
    at_ends = [numbers(model(tokens[:, : k * n], use_cache=True).past_key_values) for k in (1, 4)]

    options = {"max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(tokens)}
    found["greedy"] = model.generate(tokens, do_sample=False, **options)[:, tokens.shape[1] :]
    first = model(tokens[:, :-5], logits_to_keep=1)
    cache = copy.deepcopy(first.past_key_values)
    asked = model.generate(tokens, do_sample=False, past_key_values=cache, **options)
    found["greedy_from_cache"] = asked[:, tokens.shape[1] :]
    beams = model.generate(tokens, do_sample=False, num_beams=2, **options)
    torch.manual_seed(0)
    sampled = model.generate(tokens, do_sample=True, top_k=9, temperature=0.7, **options)
    loss = model(tokens, labels=tokens).loss
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0
    found["padded"] = model(tokens, attention_mask=padded).logits[0, 3:]
    hidden = model(tokens, output_hidden_states=True, logits_to_keep=1).hidden_states
    found["embedded"], found["from_hidden"] = hidden[0], model._head(hidden[-1])
    save_file({name: t.contiguous() for name, t in found.items()}, folder / "answer.safetensors")

    try:
        model(tokens, output_attentions=True)
        no_attentions = ""
    except ValueError as error:
        no_attentions = str(error)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = (folder / "text.txt").read_text()
    ids = tokenizer(text).input_ids
    told = {
        "kept_logits": list(first.logits.shape),
        "open_tokens": max(sizes),
        "numbers_at_ends": at_ends,
        "beams": list(beams.shape),
        "sampled": list(sampled.shape),
        "loss": float(loss),
        "no_attentions": no_attentions,
        "hidden_states": len(hidden),
        "ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "unknown": tokenizer.decode([*ids, model.config.vocab_size - 1]),
        "eos": model.generation_config.eos_token_id,
    }
    (folder / "answer.json").write_text(json.dumps(told))


if __name__ == "__main__":
    assert importlib.util.find_spec("infini_ds") is None
    torch.set_num_threads(1)
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        answer(folder)
