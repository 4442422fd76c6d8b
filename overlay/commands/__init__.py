"""The commands beside `run`: each is a module that gives a parser its options and does the command's work.

A module owns the composition of its command, `fill(parser)` and `main(arguments)`, which returns the exit code; what
several compose alike is in `common`. Only agent.py imports them, and only the one that is called for.
"""


class Refusal(Exception):
    """The command cannot do its work; the text says why and how to mend it."""
