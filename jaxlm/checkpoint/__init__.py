"""What a run leaves behind and goes on from: checkpoints and their checksums, returns to earlier ones, the files of a
workdir, and weights of other runs.

Each module is imported by its own name.

May import: config, host, data, train.
"""
