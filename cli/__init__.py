"""The command line: parse, call one library function, print."""

from __future__ import annotations


def main() -> None:
    """Run the command line; the console script enters here, so nothing heavy is imported before it is needed."""
    from streamlens.cli.app import main as group

    group(prog_name="streamlens")
