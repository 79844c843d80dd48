"""Where data comes from. `opening.py` has the table of sources; each is a file of its own."""
