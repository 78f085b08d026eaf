"""Text: its sources, tokenizers and token files."""
