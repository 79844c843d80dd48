"""A run from its configuration to its last line: how its parts are made, what happens beside its steps, what people
see of it. `open_run` opens a finished one for the commands that read it.

Each module is imported by its own name.

May import: config, host, model, data, train, checkpoint.
"""
