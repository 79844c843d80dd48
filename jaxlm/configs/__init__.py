"""The packaged configurations, such as `jaxlm.configs.base`.

An installed wheel has their files in this folder; a checkout has them in `configs/` at its root.
"""

from pathlib import Path

_OWN = Path(__file__).parent
FOLDER = _OWN if (_OWN / "base.py").is_file() else Path(__file__).parents[2] / "configs"
__path__ = [str(FOLDER)]
