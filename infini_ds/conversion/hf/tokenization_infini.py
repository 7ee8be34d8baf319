"""The tokenizer of an Infini-Transformer, for transformers: plain bytes, or a sentencepiece model.

A tokenizer.model needs the package sentencepiece. Text is taken as it is: what is written like BOS
or EOS is text, whereas added tokens are recognised. BOS comes first unless add_special_tokens is
false.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

SPACE = "\u2581"  # how sentencepiece writes a space


class InfiniTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: Any = None, **kwargs):
        self.vocab_file = vocab_file
        self._processor: Any = None
        if vocab_file:
            from sentencepiece import SentencePieceProcessor

            self._processor = model = SentencePieceProcessor(model_file=str(vocab_file))
            self._tokens = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
            self._bytes = {token: _bytes_of(model, i) for i, token in enumerate(self._tokens)}
            self._marks = [f"<0x{byte:02X}>" for byte in SPACE.encode()]
            self._has_bytes = all(model.IsByte(model.PieceToId(mark)) for mark in self._marks)
            for name in ("bos", "eos", "unk"):
                kwargs.setdefault(f"{name}_token", self._tokens[getattr(model, f"{name}_id")()])
        else:
            self._tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["<s>", "</s>"]
            self._bytes = {self._tokens[byte]: bytes([byte]) for byte in range(256)}
            kwargs.setdefault("bos_token", "<s>")
            kwargs.setdefault("eos_token", "</s>")
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        kwargs.setdefault("split_special_tokens", True)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self._tokens)

    def get_vocab(self):
        return {**self._ids, **self.added_tokens_encoder}

    def tokenize(self, text, **kwargs):
        if not kwargs.get("split_special_tokens", self.split_special_tokens):
            return super().tokenize(text, **kwargs)
        added = [token for i, token in self.added_tokens_decoder.items() if i >= self.vocab_size]
        added.sort(key=lambda token: len(token.content), reverse=True)
        tokens, begin = [], 0
        for found in re.finditer("|".join(map(_pattern, added)), text) if added else ():
            tokens += self._tokenize(text[begin : found.start()])
            tokens.append(found[found.lastindex or 0])
            begin = found.end()
        return tokens + self._tokenize(text[begin:])

    def _tokenize(self, text, **kwargs):
        if self._processor is None:
            return [self._tokens[byte] for byte in text.encode()]
        if not self._has_bytes:
            return self._pieces(text)
        # A mark in a text would come back as a space, so it is encoded as bytes.
        first, *rest = text.split(SPACE)
        pieces = self._pieces(first)
        for part in rest:
            pieces += self._marks + self._pieces(part)
        return pieces

    def _pieces(self, text):
        return [self._tokens[i] for i in self._processor.EncodeAsIds(text)]

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self.unk_token_id)

    def _convert_id_to_token(self, index):
        # A model may have more ids than its tokenizer has tokens.
        return self._tokens[index] if index < len(self._tokens) else ""

    def convert_tokens_to_string(self, tokens):
        parts = [self._bytes.get(token, token.encode()) for token in tokens]
        return b"".join(parts).decode("utf-8", errors="replace")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self, token_ids_0, token_ids_1=None, already_has_special_tokens=False
    ):
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        return [1] + [0] * (len(token_ids_0) + len(token_ids_1 or []))

    def apply_chat_template(self, conversation, *args, **kwargs):
        # BOS and EOS that a template writes are meant as tokens.
        options = {"split_special_tokens": False, **(kwargs.pop("tokenizer_kwargs", None) or {})}
        return super().apply_chat_template(conversation, *args, tokenizer_kwargs=options, **kwargs)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        if self._processor is None:
            return ()
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}tokenizer.model"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def _bytes_of(model, i):
    """Returns the bytes that a token stands for; a special token stands for its own name."""
    piece = model.IdToPiece(i)
    if model.IsControl(i) or model.IsUnknown(i):
        return piece.encode()
    return bytes([int(piece[3:5], 16)]) if model.IsByte(i) else piece.replace(SPACE, " ").encode()


def _pattern(token):
    """Returns a pattern for an added token in a text, with the spaces that it absorbs."""
    content = re.escape(token.content)
    if token.single_word:
        content = rf"(?<!\w){content}(?!\w)"
    left, right = (r"\s*" if strips else "" for strips in (token.lstrip, token.rstrip))
    return f"{left}({content}){right}"
