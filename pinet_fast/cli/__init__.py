"""The command line, ``pinet-fast``."""
