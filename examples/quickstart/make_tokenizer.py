"""Writes tokenizer/: a byte-level BPE of 600-odd entries, trained on the quick-start's own
dialogues.

    python examples/quickstart/make_tokenizer.py

Words carry no space and digits come in pairs, so that a word or a number of up to two digits is one
and the same token in a question, in JSON and in a tool's output: a tiny model learns to copy it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jinja2
from make_data import demonstrations
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
SPECIAL = [
    "<|pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]
VOCABULARY = 640


def texts(template: str, count: int) -> Iterator[str]:
    """Rendered dialogues, then every number of two digits."""
    environment = jinja2.Environment()
    environment.filters["tojson"] = json.dumps
    render = environment.from_string(template).render
    for example in demonstrations("tokenizer", count):
        yield render(messages=example["messages"])
    for number in range(100):
        yield f"{number:02d} " * 100


def train(template: str) -> Tokenizer:
    """A BPE over pieces that are a word, up to two digits, or a run of anything else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}|[A-Za-z_]+|[^A-Za-z_\d]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(template, 4000), trainer)
    return tokenizer


def main() -> None:
    """Train and write the two files."""
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    out = HERE / "tokenizer"
    out.mkdir(exist_ok=True)
    train(template).save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
