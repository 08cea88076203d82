"""Nothing that runs where people are filmed tells anybody of it."""

import subprocess
import sys

import pytest


def test_openvino_does_not_tell_its_makers_of_its_use() -> None:
    """Its package for that sends by itself, unless somebody has refused."""
    pytest.importorskip("openvino")
    code = "import model, openvino, sys; print(sys.modules.get('openvino_telemetry'))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "None"
