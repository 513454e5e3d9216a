"""The command line's rooms: a module a command, with ``add_parser`` and ``run``; ``actions`` they share."""
