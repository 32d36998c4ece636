"""``python -m mediator_peft.study``."""

from .app import main

main()
