"""The command group: which commands there are, and how their errors reach the terminal."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from streamlens.errors import StreamlensError

INTERRUPTED = 130
"""The exit code of a program that was stopped from the keyboard."""


@dataclass(frozen=True)
class LazyCommand:
    """A command that is imported when it is run, or asked for its own help, and not before."""

    target: str
    """`module:attribute` of the click command."""
    summary: str
    """Its line in the group's help, kept here so that the help imports no command (and so no torch)."""
    resumes: bool = False
    """Whether the command, interrupted and typed again, goes on where it was."""

    def load(self) -> click.Command:
        """Import the command."""
        module, attribute = self.target.split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{self.target} is not a click command"
        return command


COMMANDS: Mapping[str, LazyCommand] = {
    "capture": LazyCommand(
        "streamlens.cli.capture:command", "Run a model on text and keep its residual stream in an HDF5 file.", True
    ),
    "inspect": LazyCommand("streamlens.cli.inspect:command", "Show what a model or a capture is made of."),
    "verify": LazyCommand("streamlens.cli.verify:command", "Check every byte of a capture and that its writes add up."),
    "norms": LazyCommand("streamlens.cli.norms:command", "Measure what every sublayer adds to the stream."),
    "lens": LazyCommand("streamlens.cli.lens:command", "Look at every state through the model's own head."),
    "ablate": LazyCommand("streamlens.cli.ablate:command", "Leave layers out and measure what the model loses."),
    "position": LazyCommand("streamlens.cli.position:command", "Measure position in every state, and who carries it."),
    "gradient": LazyCommand(
        "streamlens.cli.gradient:command", "Split the gradient into what came over the skip and through the branch."
    ),
    "compare": LazyCommand(
        "streamlens.cli.compare:command", "Set two captures side by side: what differs, and by how much."
    ),
    "report": LazyCommand("streamlens.cli.report:command", "Write everything about a capture on one HTML page."),
    "pack": LazyCommand("streamlens.cli.pack:command", "Write config and weights into one model.pt that loads safely."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which a newcomer meets the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, or None where there is none of this name."""
        return COMMANDS[cmd_name].load() if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from their summaries, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and turn the errors that streamlens raises on purpose into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except StreamlensError as error:
            _show_traceback(ctx)
            click.echo("\n".join([f"Error: {error}", *getattr(error, "__notes__", [])]), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            _show_traceback(ctx)
            command = COMMANDS.get(ctx.invoked_subcommand or "")
            hint = ": the same command resumes" if command is not None and command.resumes else ""
            click.echo(f"interrupted{hint}", err=True)
            ctx.exit(INTERRUPTED)


def _show_traceback(ctx: click.Context) -> None:
    if ctx.params["debug"]:
        click.echo(traceback.format_exc(), err=True, nl=False)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="residual-streamlens", prog_name="streamlens")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Capture what every attention and MLP sublayer reads from and writes into the residual stream, prove that it
    adds up, and keep it in an HDF5 file.

    \b
    Example:
      streamlens capture model.pt
      streamlens inspect model.h5
    """  # noqa: D301 - click reads the \b
