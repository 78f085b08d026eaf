"""Heads in other libraries: models of transformers, and search with faiss."""
