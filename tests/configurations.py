"""What tests of the configuration share."""

from pathlib import Path

import pytest

from jaxlm.config import UserError, files

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "base.py"


def refusal(*overrides: str, path: Path = BASE) -> str:
    """The one line with which the overrides are refused."""
    with pytest.raises(UserError) as caught:
        files.load(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message
