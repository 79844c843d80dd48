"""The process and its surroundings: devices and XLA's flags, signals, other hosts, durable files.

This room knows nothing of models or data. Each module is imported by its own name.

May import: config.
"""
