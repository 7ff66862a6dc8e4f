"""Convert Hugging Face safetensors to a Megatron distributed checkpoint or back; the same as
`rest-mega convert`.

python tools/convert_checkpoint.py SOURCE TARGET [--dtype bf16] [--model FOLDER] [--logits]
"""

from __future__ import annotations

import sys

from rest_mega.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
