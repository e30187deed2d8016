"""The command group: which commands there are, and how their errors reach the terminal."""

from __future__ import annotations

import difflib
import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click
from click.shell_completion import CompletionItem

from streamlens.cli.output import WIDTH, detail
from streamlens.cli.voice import Complaint, complaint, heard, show_traceback, switches
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
        """Import the command and add what every command takes: --quiet, --verbose, --debug."""
        module, attribute = self.target.split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{self.target} is not a click command"
        taken = {parameter.name for parameter in command.params}
        command.params += [switch for switch in switches() if switch.name not in taken]
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
    "completion": LazyCommand("streamlens.cli.completion:command", "Print the script that completes in your shell."),
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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which names are near to the one that was typed."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, COMMANDS)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"no such command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command, importing none."""
        names = [CompletionItem(n, help=c.summary) for n, c in COMMANDS.items() if n.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the options before the command's name; what is wrong with them is said in the one voice."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            raise complaint(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and turn the errors that are made on purpose into a message and an exit code."""
        started = time.perf_counter()
        try:
            with heard():
                done = super().invoke(ctx)
                detail(f"{ctx.invoked_subcommand or 'streamlens'}: {time.perf_counter() - started:.2f} s in all")
                return done
        except (StreamlensError, click.ClickException) as error:
            show_traceback(ctx)
            raise complaint(error) from error
        except KeyboardInterrupt as error:
            show_traceback(ctx)
            command = COMMANDS.get(ctx.invoked_subcommand or "")
            hint = ": the same command resumes" if command is not None and command.resumes else ""
            raise Complaint(f"interrupted{hint}", INTERRUPTED, label="") from error


@click.group(
    "streamlens",
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
)
@click.version_option(package_name="residual-streamlens", prog_name="streamlens")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Capture what every attention and MLP sublayer reads from and writes into the residual stream, prove that it
    adds up, and keep it in an HDF5 file.

    Without a command: what is in this folder, and what to do next.

    \b
    Example:
      streamlens capture model.pt
      streamlens inspect model.h5
    """  # noqa: D301 - click reads the \b
    if ctx.invoked_subcommand is None:
        from streamlens.cli.welcome import welcome

        welcome()


main.params += switches()
