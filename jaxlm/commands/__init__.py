"""The commands, one file each: `main(argv)` runs `jaxlm NAME` and returns its exit code.

`jaxlm/__main__.py` has the table of commands; training is in `jaxlm/main.py`.

May import: config, host, model, sync, data, train, plan, checkpoint, run, interop.
"""
