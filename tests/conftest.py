"""What all tests share: they do not see the developer's own settings."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("PASSERBY_"):
            monkeypatch.delenv(name)
