"""build_mediator(): checkpoints in; backbone and bank out."""
