"""Helpers of the configuration's tests."""

from pathlib import Path

import pytest

from jaxlm.config import UserError, files

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "base.py"


def refusal(*overrides: str, path: Path = BASE) -> str:
    """Returns the message, of one line, that refuses the overrides."""
    with pytest.raises(UserError) as caught:
        files.load(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message
