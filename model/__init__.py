"""Pixels to embeddings: PyTorch; no HTTP and no FAISS."""

import sys as _sys

# OpenVINO tells its makers how it is used wherever this package is found. Nothing that runs where
# people are filmed is to tell anybody anything.
_sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
