"""The command line ``mediator-peft``, one file a command."""
