"""The study behind ``docs/evidence.md``: experts, systems, ablations and conflict, each table by one sub-command."""
