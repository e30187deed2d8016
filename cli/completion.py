"""`streamlens completion`: the script that lets a shell complete commands, options and files."""

from __future__ import annotations

import os
from pathlib import Path

import click

from streamlens.cli.options import Sectioned
from streamlens.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", cls=Sectioned)
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def command(ctx: click.Context, shell: str | None) -> None:
    """Print the script with which SHELL completes commands, options and files; without SHELL, for the shell in use.

    \b
    To have it in every new shell, run one of these once:
      streamlens completion bash >> ~/.bashrc
      streamlens completion zsh >> ~/.zshrc        # below the line with compinit
      streamlens completion fish > ~/.config/fish/completions/streamlens.fish

    \b
    Example:
      streamlens completion bash
    """  # noqa: D301 - click reads the \b
    from click.shell_completion import get_completion_class

    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise UsageError(f"the shell in use is not known ($SHELL is {name!r}): name one of {', '.join(SHELLS)}")
    made = get_completion_class(name)
    assert made is not None, "click knows these three"
    click.echo(made(ctx.find_root().command, {}, "streamlens", "_STREAMLENS_COMPLETE").source())
