"""The command line. Nothing but ``interrupts`` is imported before Ctrl-C is answered."""
