"""The commands of ``mediator-peft``, one a file."""
