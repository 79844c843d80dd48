"""The optimizer step of one device and the loop around it: optimizers, schedules, the guard against bad numbers, the
placement of a state on the devices, evaluation.

Only this room and `sync` name the pmap axis. Import each module by its own name.

May import: config, host, model, sync, data.
"""
