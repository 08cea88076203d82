"""Embeddings to ranked identities: numpy, FAISS and SQLite; no torch and no HTTP."""
