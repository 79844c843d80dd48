"""Imports TensorFlow for tf.data only: late (the import takes 4–6 s), quietly, and without the GPUs."""

import contextlib
import logging
import os
from typing import Any


def import_tensorflow() -> Any:
    """Returns the tensorflow module.

    Raises:
      ImportError: TensorFlow is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    with contextlib.suppress(RuntimeError):  # the program has already initialized TensorFlow's devices
        tf.config.set_visible_devices([], "GPU")  # the GPUs belong to JAX
    return tf
