"""What this process is, and who its neighbours are: devices and XLA's flags, signals, other hosts, durable files.

Knows nothing of models or data. Each module is imported by its own name.

May import: config.
"""
