"""Sources of data, one file each. `opening.py` has the table of them."""
