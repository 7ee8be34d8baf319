"""Reads a tokenizer.json of Hugging Face's library `tokenizers`, as pretrained models have it."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from infini_ds.config import TOKENIZER_FILES
from infini_ds.data.chat_template import TOKENIZER_CONFIG
from infini_ds.data.generation_settings import read_settings
from infini_ds.data.tokenizer_base import PIECE_CHARACTERS, SPACE_MARK, Exact, Tokenizer
from infini_ds.errors import UserError
from infini_ds.system.causes import one_line

# Encoding one text at a time needs no threads, and `prepare` already runs many processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Characters compared on each side to see whether a cut changes tokens, and number of cuts tried.
_AROUND = 500
_TRIED = 20


class TokenizerJson(Tokenizer):
    """A tokenizer.json, with the BOS and EOS that the files beside it name.

    Ids are those of transformers with `add_special_tokens=False, split_special_tokens=True`:
    anything written like a special token is text. That also holds where transformers still finds
    the token in the model's own vocabulary (Unigram, WordLevel, BPE with `ignore_merges`). A space
    mark is encoded as its bytes. Encoding is as lossless as the tokenizer is: where it normalises
    text, `token_bytes` counts the normalised text. Ids of `encode_rendered` are those of
    transformers with `add_special_tokens=False` alone.

    Args:
        file: the tokenizer.json. Beside it, tokenizer_config.json has `bos_token` and `eos_token`,
            or a model's config.json has `bos_token_id` and `eos_token_id`.

    Raises:
        UserError: a file cannot be read, BOS or EOS is missing, or the decoder's type is unknown,
            so that the bytes of its tokens are too.
    """

    def __init__(self, file: Path):
        content = file.read_bytes()
        try:
            model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library has no error class of its own
            reason = one_line(error)
            raise UserError(f"data.tokenizer.model {file}: no tokenizer.json ({reason})") from None
        self._model, self._content = model, content
        self._settings = read_settings(file.with_name(TOKENIZER_CONFIG))
        bos, eos = (_special_id(file, model, name) for name in ("bos", "eos"))
        tree = json.loads(model.to_str())  # complete, even where the file leaves out defaults
        vocabulary = model.get_vocab(with_added_tokens=True)
        bytes_ = _byte_tokens(tree, vocabulary)
        table = _table(file, tree, model, bytes_)
        table[bos] = table[eos] = b""
        ends = {str(model.id_to_token(i)) for i in (bos, eos)}
        self._encoder = _without_literals(tree, model, ends, bytes_)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.encode_special_tokens = True
        ids = [vocabulary[token] for token in bytes_]
        self._exact = Exact(self._encode_as_it_is, {table[i][0]: i for i in ids})
        for end in sorted(ends):
            if {bos, eos} & set(self._encode_as_it_is(end)):
                raise UserError(
                    f"data.tokenizer.model {file}: a text with {end!r} would have BOS or EOS "
                    "inside; name other tokens in " + TOKENIZER_CONFIG
                )
        digest = hashlib.sha256(content + f" {bos} {eos}".encode())
        super().__init__(table, bos, eos, digest.hexdigest())

    def save(self, directory: Path) -> None:
        """See Tokenizer. BOS and EOS go into tokenizer_config.json; its other entries stay."""
        (directory / TOKENIZER_FILES["tokenizers"]).write_bytes(self._content)
        tree = self._settings or {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name, i in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if not tree.get(name):
                tree = {**tree, name: self._model.id_to_token(i)}
        text = json.dumps(tree, indent=2, ensure_ascii=False)
        (directory / TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")
        super().save(directory)

    def encode_rendered(self, text: str, ends: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """See Tokenizer. The text is encoded as a whole, so tokens may cross its parts' ends."""
        found = self._chat_encoder.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.uint32), np.array(found.offsets, np.int64).reshape(-1, 2)

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """See Tokenizer."""
        added = self._model.get_added_tokens_decoder().items()
        # A token of a single character is found in texts even if it is special.
        special = {token.content: i for i, token in added if token.special and token.content[1:]}
        return special | {str(self._model.id_to_token(i)): i for i in (self.bos_id, self.eos_id)}

    @functools.cached_property
    def template_names(self) -> dict[str, str]:
        """See Tokenizer."""
        named = {name: token for name, token in self._settings.items() if name.endswith("_token")}
        contents = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in named.items()
        }
        texts = {name: text for name, text in contents.items() if isinstance(text, str)}
        ends = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return texts | {name: str(self._model.id_to_token(i)) for name, i in ends.items()}

    @functools.cached_property
    def _chat_encoder(self) -> tokenizers.Tokenizer:
        # Post-processors would leave the spaces before words out of the characters of tokens.
        tree = json.loads(self._content) | {"post_processor": None}
        encoder = tokenizers.Tokenizer.from_str(json.dumps(tree))
        encoder.no_truncation()
        encoder.no_padding()
        known = {token.content for token in encoder.get_added_tokens_decoder().values()}
        encoder.add_special_tokens([text for text in self.special_tokens if text not in known])
        return encoder

    def _encode_piece(self, text: str, begins: bool) -> list[int]:
        return self._exact.encode(text, begins)

    def _encode_as_it_is(self, text: str) -> list[int]:
        # This skips the offsets of tokens, which take most of the time of `encode`.
        return self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Cuts a text only at line ends where both sides keep the tokens of the whole."""
        begin = 0
        while begin < len(text):
            end = self._cut(text, begin + PIECE_CHARACTERS)
            yield text[begin:end]
            begin = end

    def _cut(self, text: str, place: int) -> int:
        """Finds a good cut at or after `place`; the end of the text if there is none."""
        for _ in range(_TRIED):
            place = text.find("\n", place) + 1
            if not place:
                break
            left, right = text[place - _AROUND : place], text[place : place + _AROUND]
            apart = self._encode_piece(left, False) + self._encode_piece(right, False)
            if apart == self._encode_piece(left + right, False):
                return place
        return len(text)


def _special_id(file: Path, model: tokenizers.Tokenizer, name: str) -> int:
    """Returns the id of `bos` or `eos`."""
    for beside in (file.with_name(TOKENIZER_CONFIG), file.with_name("config.json")):
        tree = read_settings(beside)
        token, i = tree.get(f"{name}_token"), tree.get(f"{name}_token_id")
        if token not in (None, ""):
            content = token.get("content") if isinstance(token, dict) else token
            said = f"{name}_token ({content})"
            i = model.token_to_id(content) if isinstance(content, str) else None
        elif i is not None:
            i = i[0] if isinstance(i, list) and i else i
            said = f"{name}_token_id ({i})"
            i = i if type(i) is int and i in model.get_vocab().values() else None
        else:
            continue
        if i is None:
            raise UserError(f"{beside}: {said} must be a token of {file.name}")
        return i
    raise UserError(
        f"data.tokenizer.model {file}: must have a {name.upper()}, has none; put `{name}_token` "
        f"into a {TOKENIZER_CONFIG} beside it"
    )


def _byte_tokens(tree: dict[str, Any], vocabulary: dict[str, int]) -> list[str]:
    """Lists tokens such as <0x0A> that stand for a byte."""
    if not tree["model"].get("byte_fallback") and "ByteFallback" not in _decoders(tree["decoder"]):
        return []
    tokens = (f"<0x{byte:02X}>" for byte in range(256))
    return [token for token in tokens if token in vocabulary]


def _unknown(model: dict[str, Any]) -> str:
    """Returns the token for whatever the model does not know; empty if it has none."""
    if model["type"] == "Unigram":
        return "" if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token") or ""


def _without_literals(
    tree: dict[str, Any], model: tokenizers.Tokenizer, ends: set[str], bytes_: list[str]
) -> tokenizers.Tokenizer:
    """Builds a tokenizer that takes what is written like a special or byte token as text.

    Args:
        tree: the JSON that `model` is made from.
        ends: BOS and EOS, whether or not the file marks them as special.
        bytes_: the byte tokens.
    """
    special = ends | {*bytes_, _unknown(tree["model"])}
    found = False  # whether BOS or EOS had to be marked as special
    for added in tree["added_tokens"]:
        found |= added["content"] in ends and not added["special"]
        added["special"] |= added["content"] in ends
        special |= {added["content"]} if added["special"] else set()
    rests: dict[str, list[str]] = {}
    for token in sorted(special & _found_in_text(tree["model"])):
        if len(token) > 1:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
    if rests:  # a cut after the first character makes two words
        cuts = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
        pattern = {"Regex": "|".join(cuts)}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        steps = [step for step in (tree["pre_tokenizer"], split) if step]
        tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return tokenizers.Tokenizer.from_str(json.dumps(tree)) if found or rests else model


def _found_in_text(model: dict[str, Any]) -> set[str]:
    """Lists the tokens of a model that a word of a text becomes if it is spelled like them."""
    vocabulary = model["vocab"]
    if model["type"] == "Unigram":
        return {piece for piece, _ in vocabulary}
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return set(vocabulary)
    return {"".join(pair) for pair in model["merges"]}


def _table(
    file: Path, tree: dict[str, Any], model: tokenizers.Tokenizer, bytes_: list[str]
) -> list[bytes]:
    """Lists the bytes that each id stands for; empty for special tokens and unused ids."""
    kinds = _decoders(tree["decoder"])
    if "ByteLevel" in kinds:
        bytes_of = _bytes_of_byte_level
    elif kinds & {"Metaspace", "ByteFallback"}:
        bytes_of = _bytes_of_sentencepiece
    else:
        found = ", ".join(sorted(kinds)) or "none"
        raise UserError(
            f"data.tokenizer.model {file}: its decoder ({found}) must have ByteLevel, Metaspace or "
            "ByteFallback; with others it is unknown which bytes a token stands for"
        )
    vocabulary = model.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        table[i] = bytes_of(token)
    for i, added in model.get_added_tokens_decoder().items():
        # A token of a single character is found in texts even if it is special.
        nothing = added.special and len(added.content) > 1
        table[i] = b"" if nothing else added.content.encode()
    for token in bytes_:  # trainers can only add byte tokens as special ones
        table[vocabulary[token]] = bytes([int(token[3:5], 16)])
    unknown = _unknown(tree["model"])
    if unknown in vocabulary:
        table[vocabulary[unknown]] = b""
    return table


def _decoders(tree: dict[str, Any] | None) -> set[str]:
    """Collects the types of a decoder, including those in a sequence."""
    if not tree:
        return set()
    if tree["type"] == "Sequence":
        return set().union(*map(_decoders, tree["decoders"]))
    return {tree["type"]}


def _bytes_of_sentencepiece(token: str) -> bytes:
    return token.replace(SPACE_MARK, " ").encode()


def _bytes_of_byte_level(token: str) -> bytes:
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


def _byte_of() -> dict[str, int]:
    """Inverts GPT-2's alphabet: printable bytes are themselves, the others begin at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF = _byte_of()
