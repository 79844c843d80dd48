"""What a run writes and resumes from: checkpoints and their checksums, returns to earlier ones, the files of a workdir,
and weights from other runs.

Import each module by its own name.

May import: config, host, model, data, train.
"""
