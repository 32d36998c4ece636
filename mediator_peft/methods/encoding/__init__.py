"""How the kept entries of a delta are stored: one file and one row an encoding."""
