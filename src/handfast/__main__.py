"""`python -m handfast` is the command `handfast`."""

from handfast.cli import main

main()
