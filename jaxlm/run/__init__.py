"""A run from its configuration to its last line: setting up, evaluation, going back, metrics and the console.

`training` is the whole of it; `open_run` opens a run for the commands that read one.

Each module is imported by its own name.

May import: config, host, model, data, train, plan, checkpoint.
"""
