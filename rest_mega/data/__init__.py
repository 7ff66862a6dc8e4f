"""Prompts, tokenizers and chat formats: everything between a file on disk and token ids."""
