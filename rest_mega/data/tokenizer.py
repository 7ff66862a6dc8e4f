"""Hugging Face and SentencePiece tokenizers behind one protocol that also gives the bytes of every
token.

- `b"".join(map(token_bytes, encode(text))) == text.encode()` for every lossless tokenizer: a
  byte-level BPE, or a SentencePiece model with byte fallback and identity normalisation, whose
  dummy prefix (one space before the text) is the one exception: it is put where the model's authors
  put it, at the start of a text and after the BOS token, and nowhere else.
- `decode(ids)` is the UTF-8 reading of those bytes, so text, bytes and ids never disagree.
- A Hugging Face tokenizer is read from its tokenizer.json alone: transformers' `AutoTokenizer` may
  pick a class that changes what the file says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from rest_mega.config import require

TEMPLATES = Path(__file__).parent / "templates"
"""Chat templates shipped with the package; `tokenizer.chat_template` may be the bare name of
one."""
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>")
"""Tokens that end an assistant turn wherever a vocabulary has them as special tokens."""
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""Appended to a serialised SentencePiece model: protobuf merges it as
normalizer_spec.add_dummy_prefix = false."""


class Tokenizer(Protocol):
    """What the rest of the package may ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""

    @property
    def pad_id(self) -> int:
        """An id to fill rows with; the first end-of-turn id where the tokenizer names none."""

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant turn; the first is the tokenizer's own eos token."""

    @property
    def chat_template(self) -> str:
        """Jinja source; empty where there is none."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """bos_token, eos_token, pad_token, unk_token -> text, as far as they exist; templates use
        them."""

    @property
    def control_texts(self) -> tuple[str, ...]:
        """Special tokens that `encode` recognises where they are written in a text."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; adds nothing, and recognises special tokens written in the text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' bytes as UTF-8 text, special tokens included; what is no UTF-8 becomes
        U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token stands for; of a special token its literal text.

        Models pad their vocabulary, and an untrained row of the padding can be sampled: it stands
        for no bytes.
        """


@dataclass(frozen=True, eq=False)
class LoadedTokenizer:
    """A `Tokenizer` made of a table of bytes and an encoding function."""

    pad_id: int
    end_of_turn_ids: tuple[int, ...]
    chat_template: str = field(repr=False)
    special_tokens: Mapping[str, str]
    control_texts: tuple[str, ...] = field(repr=False)
    table: Sequence[bytes] = field(repr=False)
    """Bytes of every id."""
    encoder: Callable[[str], list[int]] = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.table)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""
        return self.encoder(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The tokens' bytes as UTF-8 text."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes; none for ids of the model's padding. ValueError for a negative id."""
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative; ids start at 0")
        return self.table[token_id] if token_id < len(self.table) else b""


@dataclass(frozen=True)
class _Vocabulary:
    """What a file of either kind tells."""

    table: list[bytes]
    encoder: Callable[[str], list[int]]
    ids: Mapping[str, int]
    """Special tokens that may be written in a text -> id."""
    named: Mapping[str, str]
    """Defaults of `special_tokens`, for files that carry them."""


def load_tokenizer(path: str | Path, chat_template: str = "") -> Tokenizer:
    """The tokenizer in a folder (tokenizer.json, else one *.model), or of such a file.

    `chat_template`: a Jinja file or a shipped name (`hermes`) that replaces the tokenizer's own
    template. Raises ConfigError that tells what was looked for.
    """
    file = _find(Path(path))
    config = _read_config(file.parent)
    vocabulary = (
        _hugging_face(file, config) if file.suffix == ".json" else _sentencepiece(file, config)
    )
    named = {**vocabulary.named, **_named_tokens(config)}
    ends = tuple(dict.fromkeys(_end_ids(vocabulary, named, file)))
    return LoadedTokenizer(
        pad_id=vocabulary.ids.get(named.get("pad_token", ""), ends[0]),
        end_of_turn_ids=ends,
        chat_template=_template(chat_template, file.parent, config),
        special_tokens=named,
        control_texts=tuple(vocabulary.ids),
        table=vocabulary.table,
        encoder=vocabulary.encoder,
    )


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    models = (
        [path / "tokenizer.model"]
        if (path / "tokenizer.model").is_file()
        else sorted(path.glob("*.model*"))
    )
    require(
        len(models) > 0,
        f"tokenizer.path={str(path)!r} holds neither tokenizer.json (Hugging Face) nor *.model "
        "(SentencePiece); "
        "name such a folder or file, or write one with transformers' "
        "tokenizer.save_pretrained(FOLDER)",
    )
    require(
        len(models) == 1,
        f"tokenizer.path={str(path)!r} holds several SentencePiece models "
        f"({', '.join(m.name for m in models)}); "
        "name the file",
    )
    return models[0]


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "tokenizer_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens named by tokenizer_config.json, each written as a string or as {"content":
    ...}."""
    found = {
        name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    return {
        name: str(t["content"] if isinstance(t, Mapping) else t) for name, t in found.items() if t
    }


def _added_tokens(config: Mapping[str, Any]) -> dict[str, int]:
    return {
        str(token["content"]): int(i) for i, token in config.get("added_tokens_decoder", {}).items()
    }


def _end_ids(vocabulary: _Vocabulary, named: Mapping[str, str], file: Path) -> Iterator[int]:
    texts = [t for t in (named.get("eos_token", ""), *END_OF_TURN) if t in vocabulary.ids]
    require(
        len(texts) > 0,
        f"{file} has no end-of-turn token: none of {', '.join(END_OF_TURN)} is a special token "
        "of it and "
        f"eos_token={named.get('eos_token')!r}; name one as eos_token in "
        f"{file.parent / 'tokenizer_config.json'}",
    )
    return (vocabulary.ids[t] for t in texts)


def _template(override: str, folder: Path, config: Mapping[str, Any]) -> str:
    """Jinja source: the override, else chat_template.jinja, else tokenizer_config.json's, else
    empty."""
    if override:
        shipped = TEMPLATES / f"{override}.jinja"
        file = shipped if shipped.is_file() else Path(override)
        known = ", ".join(sorted(t.stem for t in TEMPLATES.glob("*.jinja")))
        require(
            file.is_file(),
            f"tokenizer.chat_template={override!r} is neither a file nor a shipped template "
            f"({known})",
        )
        return file.read_text(encoding="utf-8")
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    own = config.get("chat_template") or ""
    if isinstance(own, str):
        return own
    named = {t["name"]: t["template"] for t in own}
    return str(named.get("tool_use", named.get("default", "")))


def _hugging_face(file: Path, config: Mapping[str, Any]) -> _Vocabulary:
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(file))
    # The file may order truncation or padding, which would silently change what `encode` returns.
    fast.no_truncation()
    fast.no_padding()
    vocabulary = fast.get_vocab(with_added_tokens=True)
    missing = [t for t in _added_tokens(config) if t not in vocabulary]
    require(
        not missing,
        f"{file} lacks {', '.join(missing)}, which its tokenizer_config.json adds; write both "
        "anew with "
        "transformers' tokenizer.save_pretrained(FOLDER)",
    )
    added = fast.get_added_tokens_decoder()
    to_bytes = _hugging_face_bytes(fast, file)
    table = [b""] * (max(vocabulary.values()) + 1)
    for piece, i in vocabulary.items():
        table[i] = piece.encode() if i in added else to_bytes(piece)
    ids = {token.content: i for i, token in added.items() if token.special}
    named = _named_tokens(config).values()
    return _Vocabulary(
        table=table,
        encoder=lambda text: list(fast.encode(text, add_special_tokens=False).ids),
        ids={**ids, **{t: vocabulary[t] for t in named if t in vocabulary}},
        named={},
    )


def _hugging_face_bytes(fast: Any, file: Path) -> Callable[[str], bytes]:
    decoder = json.loads(fast.decoder.__getstate__()) if fast.decoder else {}
    kinds = {d.get("type") for d in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        return _byte_level_bytes
    require(
        bool(kinds & {"ByteFallback", "Metaspace"}),
        f"{file}: a decoder made of {sorted(map(str, kinds))} does not tell the bytes of a token; "
        "byte-level BPE (ByteLevel) and SentencePiece style (ByteFallback, Metaspace) are "
        "supported",
    )
    return _sentencepiece_bytes


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[int, int]:
    """GPT-2's alphabet inverted: code point of the printable stand-in -> byte."""
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: b for b in plain}, **{256 + n: b for n, b in enumerate(rest)}}


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return piece.translate(_byte_alphabet()).encode("latin-1")
    except UnicodeEncodeError:  # not written in the byte alphabet: an unmarked special token
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _sentencepiece(file: Path, config: Mapping[str, Any]) -> _Vocabulary:
    from sentencepiece import SentencePieceProcessor

    model = file.read_bytes()
    own, bare = (
        SentencePieceProcessor(model_proto=model + tail) for tail in (b"", NO_DUMMY_PREFIX)
    )
    pieces = [own.id_to_piece(i) for i in range(own.get_piece_size())]
    literal = [own.is_control(i) or own.is_unknown(i) for i in range(len(pieces))]
    table = [
        p.encode() if lit else _sentencepiece_bytes(p)
        for p, lit in zip(pieces, literal, strict=True)
    ]
    ids = {p: i for i, p in enumerate(pieces) if own.is_control(i)}
    for text, i in _added_tokens(config).items():
        table.extend(b"" for _ in range(len(table), i + 1))
        if i >= len(pieces):
            ids[text], table[i] = i, text.encode()
    numbered = {"bos_token": own.bos_id(), "eos_token": own.eos_id(), "pad_token": own.pad_id()}
    return _Vocabulary(
        table=table,
        encoder=_splitting_encoder(own.encode, bare.encode, ids, own.bos_id()),
        ids=ids,
        named={name: pieces[i] for name, i in numbered.items() if i >= 0},
    )


def _splitting_encoder(
    own: Callable[[str], list[int]],
    bare: Callable[[str], list[int]],
    ids: Mapping[str, int],
    bos_id: int,
) -> Callable[[str], list[int]]:
    """SentencePiece does not look for control tokens in a text, so cut it there first; `bare` adds
    no dummy prefix."""
    specials = re.compile(
        "(" + "|".join(re.escape(t) for t in sorted(ids, key=len, reverse=True)) + ")"
    )

    def encode(text: str) -> list[int]:
        result: list[int] = []
        for n, part in enumerate(specials.split(text)):
            if n % 2:
                result.append(ids[part])
            elif part:
                result += own(part) if not result or result == [bos_id] else bare(part)
        return result

    return encode
