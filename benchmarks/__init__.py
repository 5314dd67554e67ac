"""How fast it is beside the tools one would script with: ``make bench``, or see ``README.md``."""
