"""`python -m streamlens.cli`, where the `streamlens` command is not on the path."""

from streamlens.cli import main

main()
