"""`python -m autofunc` is the command line."""

from autofunc.cli.main import main

main()
