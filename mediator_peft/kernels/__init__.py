"""Products with packed deltas and the inner loops of a build: one interface, several implementations."""
