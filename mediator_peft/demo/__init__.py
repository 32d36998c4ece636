"""The demonstration on real input: a small model, experts fine-tuned on the spot, and a table of what merging kept."""
