"""Small tokenizers of the library `tokenizers`, as pretrained models bring them along."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

SOURCE = "".join(
    f"def function_{i}(first, second):\n    if first > {i}:\n        return second\n\n\n"
    for i in range(300)
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]


def byte_level() -> Tokenizer:
    """As Llama 3 and Qwen: 400 tokens of bytes, three special ones, one that is none."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SOURCE], trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    begin = (SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))
    tokenizer.post_processor = TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama 2 and Mistral: a space before the text, spaces as marks, bytes as a fallback."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    mark = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = mark
    trained.train_from_iterator(SOURCE.split("\n"), BpeTrainer(vocab_size=150, show_progress=False))
    tree = json.loads(trained.to_str())["model"]
    pieces = sorted(tree["vocab"], key=tree["vocab"].get)
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in tree["merges"]]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.normalizer = mark
    steps = [
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]  # fmt: skip
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write_byte_level(directory: Path) -> Path:
    """Writes one with BOS and EOS in tokenizer_config.json; its tokenizer.json."""
    file = directory / "tokenizer.json"
    byte_level().save(str(file))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": {"__type": "AddedToken", "content": SPECIAL[1], "special": True},
        "chat_template": "{{ messages }}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return file
