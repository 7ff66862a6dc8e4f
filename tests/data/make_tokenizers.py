"""Writes tests/data/tiny_bpe and tests/data/tiny_sentencepiece anew: `python
tests/data/make_tokenizers.py`."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = [
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = [
    "You may call one or more functions to assist with the user query. What is the weather in "
    "Paris tomorrow?",
    'system user assistant tool {"name": "get_weather", "arguments": {"city": "Paris", "days": '
    '3, "unit": "celsius"}}',
    "function type description parameters properties string number required object name value "
    '{"type": "function"}',
    "The weather in Paris is sunny, 21.5 degrees. Could you convert 300 kilometers to miles and "
    "save the result?",
    "# Tools\n\nFor each function call, return a json object within XML tags:\n\n- one\n- "
    "two\n\n\tindented   text",
]


def tiny_bpe() -> None:
    """Byte-level BPE with Qwen's pre-tokenizer and Qwen3's kind of added tokens; 512 ids and a few
    more."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    folder = HERE / "tiny_bpe"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def tiny_sentencepiece() -> None:
    """SentencePiece BPE as Mistral's: identity normalisation, byte fallback, dummy prefix, control
    tokens."""
    folder = HERE / "tiny_sentencepiece"
    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT),
            model_writer=model,
            model_type="bpe",
            vocab_size=400,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            control_symbols=["<|im_start|>", "<|im_end|>"],
            minloglevel=2,
        )


if __name__ == "__main__":
    tiny_bpe()
    tiny_sentencepiece()
