"""Chat templates of model families, over small tokenizers that have their special tokens."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from rest_mega.data.chat import ChatFormat
from rest_mega.data.tokenizer import load_tokenizer

DATA = Path(__file__).parents[1] / "data"
FAMILIES = {
    "qwen2_5": ("<|im_end|>", "<|im_start|>"),
    "qwen3": ("<|im_end|>", "<|im_start|>"),
    "hermes_2_pro": ("<|im_end|>", "<|im_start|>"),
    "llama3_1": ("<|eot_id|>", "<|begin_of_text|>"),
    "mistral": ("</s>", "<s>"),
}
"""Family -> its end-of-turn token, and what its template calls bos_token."""
DIALECT = {"llama3_1": "llama3", "mistral": "mistral"}
SPECIAL = (
    "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>",
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
)  # fmt: skip


@lru_cache
def chat_of(family: str) -> ChatFormat:
    """The family's template, over the tiny BPE with its special tokens."""
    end, begin = FAMILIES[family]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.from_file(str(DATA / "tiny_bpe" / "tokenizer.json"))
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.save(f"{folder}/tokenizer.json")
        config = {"eos_token": end, "bos_token": begin}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        shutil.copy(DATA / "templates" / f"{family}.jinja", f"{folder}/chat_template.jinja")
        return ChatFormat(load_tokenizer(folder))
