"""TensorFlow, for its tf.data alone: imported late (it takes 4–6 s), quietly, and kept off the accelerators."""

import contextlib
import logging
import os
from typing import Any


def import_tensorflow() -> Any:
    """The tensorflow module.

    Raises:
      ImportError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with contextlib.suppress(RuntimeError):  # someone else has started tensorflow already
        tf.config.set_visible_devices([], "GPU")  # they are JAX's
    return tf
