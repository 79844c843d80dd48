"""What a run will need, before it runs: the step compiled for devices that need not be there, and what its program says
about memory, time and communication.

Import each module by its own name.

May import: config, host, model, sync, train.
"""
