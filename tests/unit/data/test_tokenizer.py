"""Tokenizers: the bytes of the tokens are the bytes of the text, whatever the kind of file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_mega.config import ConfigError
from rest_mega.data.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parents[2] / "data"
BPE, PIECES = load_tokenizer(DATA / "tiny_bpe"), load_tokenizer(DATA / "tiny_sentencepiece")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</s>", "<s>"]
TEXTS = st.lists(
    st.one_of(st.text(), st.sampled_from([*SPECIAL, " ", "\n", "\u2581", "<0x41>"]))
).map("".join)


def spelled(tokenizer: Tokenizer, text: str) -> bytes:
    return b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text))


@given(text=TEXTS)
def test_byte_level_tokens_spell_the_text(text: str) -> None:
    assert spelled(BPE, text) == text.encode()
    assert BPE.decode(BPE.encode(text)) == text


@given(text=TEXTS)
def test_sentencepiece_tokens_spell_the_text_after_a_special_token(text: str) -> None:
    # SentencePiece writes a space as U+2581, so it cannot tell the two apart.
    expected = "<|im_end|>" + text.replace("\u2581", " ")
    assert spelled(PIECES, "<|im_end|>" + text) == expected.encode()


@given(
    text=st.text(
        alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581<"), min_size=1
    )
)
def test_sentencepiece_puts_its_dummy_prefix_at_the_start_and_after_bos_only(text: str) -> None:
    assert spelled(PIECES, text) == b" " + text.encode()
    assert spelled(PIECES, "<s>" + text) == b"<s> " + text.encode()
    assert spelled(PIECES, "</s>" + text) == b"</s>" + text.encode()


@given(head=TEXTS, tail=TEXTS)
@pytest.mark.parametrize("tokenizer", [BPE, PIECES], ids=["bpe", "sentencepiece"])
def test_text_after_a_special_token_is_encoded_apart_from_what_precedes(
    tokenizer: Tokenizer, head: str, tail: str
) -> None:
    end = "<|im_end|>"
    alone = tokenizer.encode(end + tail)[1:]
    assert tokenizer.encode(head + end + tail) == [
        *tokenizer.encode(head),
        tokenizer.encode(end)[0],
        *alone,
    ]


@pytest.mark.parametrize(
    ("tokenizer", "ends"),
    [(BPE, ["<|im_end|>"]), (PIECES, ["</s>", "<|im_end|>"])],
    ids=["bpe", "sentencepiece"],
)
def test_end_of_turn_ids_are_single_tokens_the_own_eos_first(
    tokenizer: Tokenizer, ends: list[str]
) -> None:
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.end_of_turn_ids] == ends
    assert [tokenizer.encode(text) for text in ends] == [[i] for i in tokenizer.end_of_turn_ids]


@given(text=TEXTS)
@pytest.mark.parametrize("tokenizer", [BPE, PIECES], ids=["bpe", "sentencepiece"])
def test_every_id_is_below_the_vocabulary_size(tokenizer: Tokenizer, text: str) -> None:
    assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode(text))


def test_pad_id_is_the_tokenizers_or_the_first_end_of_turn_token() -> None:
    assert BPE.token_bytes(BPE.pad_id) == b"<|endoftext|>"
    assert PIECES.token_bytes(PIECES.pad_id) == b"</s>"  # the model says pad id -1


def llama_style(folder: Path) -> Tokenizer:
    """A tokenizer.json as Llama 2's: SentencePiece pieces and byte fallback in Hugging Face's file
    format."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "\u2581ab",
    ]
    merges = [("\u2581", "a"), ("\u2581a", "b")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    fast = Fast(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Replace(" ", "\u2581")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.add_special_tokens(["<s>", "</s>"])
    fast.enable_truncation(4)
    fast.enable_padding(length=64)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    return load_tokenizer(folder)


def test_byte_fallback_in_a_hugging_face_file(tmp_path: Path) -> None:
    tokenizer = llama_style(tmp_path)
    for text in ("ab a b", " ab é\n東京 <0x", "a</s> ab" * 9):
        assert spelled(tokenizer, text) == text.encode()
    assert tokenizer.token_bytes(tokenizer.encode(" ab")[0]) == b" ab"


def test_ids_of_a_models_padding_stand_for_no_bytes() -> None:
    assert BPE.token_bytes(BPE.vocab_size) == b""
    with pytest.raises(ValueError, match="-1 is negative"):
        BPE.token_bytes(-1)


def test_sentencepiece_takes_added_tokens_from_the_config(tmp_path: Path) -> None:
    shutil.copy(DATA / "tiny_sentencepiece" / "tokenizer.model", tmp_path / "my.model")
    added = {str(PIECES.vocab_size + 1): {"content": "<|eot_id|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<|eot_id|>b")[-2] == tokenizer.vocab_size - 1 == PIECES.vocab_size + 1
    assert spelled(tokenizer, "<|eot_id|>b") == b"<|eot_id|>b"


def test_templates_come_from_the_override_the_jinja_file_or_the_config(tmp_path: Path) -> None:
    shutil.copy(DATA / "tiny_bpe" / "tokenizer.json", tmp_path)
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with tools"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": named})
    )
    assert load_tokenizer(tmp_path).chat_template == "with tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template == "file"
    assert load_tokenizer(tmp_path, str(tmp_path / "chat_template.jinja")).chat_template == "file"
    assert "<tool_response>" in load_tokenizer(tmp_path, "hermes").chat_template


def test_errors_tell_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json .* nor \*\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="'hermess' is neither a file nor a shipped template"):
        load_tokenizer(DATA / "tiny_bpe", "hermess")
    for name in ("a.model", "b.model"):
        shutil.copy(DATA / "tiny_sentencepiece" / "tokenizer.model", tmp_path / name)
    with pytest.raises(ConfigError, match=r"a\.model, b\.model"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "b.model").vocab_size == PIECES.vocab_size


def test_a_hugging_face_file_without_an_end_of_turn_token_or_an_added_one_is_refused(
    tmp_path: Path,
) -> None:
    tree = json.loads((DATA / "tiny_bpe" / "tokenizer.json").read_text())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] != "<|im_end|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="no end-of-turn token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"513": {"content": "<|im_end|>"}}})
    )
    with pytest.raises(ConfigError, match=r"lacks <\|im_end\|>"):
        load_tokenizer(tmp_path)
