"""Data sources, one file for each kind. `opening.py` has the table of them."""
