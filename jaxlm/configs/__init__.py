"""The packaged configurations, `jaxlm.configs.base` and others: files of a wheel's, or of a checkout's `configs/`."""

from pathlib import Path

_OWN = Path(__file__).parent
FOLDER = _OWN if (_OWN / "base.py").is_file() else Path(__file__).parents[2] / "configs"
__path__ = [str(FOLDER)]
