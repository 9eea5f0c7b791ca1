"""Let `python -m filao` be the command line."""

from filao.cli import main

main()
