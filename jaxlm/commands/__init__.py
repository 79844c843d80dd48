"""The command lines, one file each: `main(argv)` does what `jaxlm NAME` says, and returns its exit code.

`jaxlm/__main__.py` has the table of them; training's is `jaxlm/main.py`.

May import: config, host, model, sync, data, train, checkpoint, run.
"""
