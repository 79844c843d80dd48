"""One optimizer step, as one device sees it, and the loop around it: optimizers, schedules, the guard against bad
numbers, where a state lives on the devices, evaluation.

With `sync`, the only room that names the pmap axis. Each module is imported by its own name.

May import: config, host, model, sync, data.
"""
