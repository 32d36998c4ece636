"""Checkpoints in, backbone and bank out; one tensor at a time."""
