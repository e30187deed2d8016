"""`streamlens pack`: one model.pt that holds config and weights, and loads without running code."""

from __future__ import annotations

from pathlib import Path

import click

from streamlens.cli.options import ModelOptions, Sectioned, model_options, output_options
from streamlens.cli.output import print_record


@click.command("pack", cls=Sectioned)
@model_options
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The file to write.")
@output_options
def command(model: ModelOptions, out: Path, as_json: bool) -> None:
    """Write the config and weights of SOURCE into one file that loads without running code.

    SOURCE is anything that `streamlens capture` takes: a checkpoint, a Hugging Face folder, safetensors, GGUF.

    \b
    Example:
      streamlens pack ckpt.pt --out model.pt
    """  # noqa: D301 - click reads the \b
    from streamlens.checkpoint.packing import pack

    loaded = model.load()
    path = pack(loaded, out)
    row = {"source": loaded.source, "out": str(path), "bytes": path.stat().st_size, "sha256": loaded.sha256}
    print_record("pack", row, as_json=as_json)
