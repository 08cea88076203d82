"""Pixels to embeddings: PyTorch; no HTTP and no FAISS."""
