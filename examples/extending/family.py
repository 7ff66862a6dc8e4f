"""A model family of one's own: Seed-OSS (ByteDance-Seed/Seed-OSS-36B-Instruct).

transformers derives it from Llama: queries, keys and values have a bias, the output projection has
none, and the names of its tensors are Llama's. Its dropout is left out, as that of any model here.
`environment.modules=[examples/extending/family.py]` makes it known.
"""

from __future__ import annotations

from rest_mega.trainer.families import Family, add_family

add_family("seed_oss", Family(qkv_bias=True))
