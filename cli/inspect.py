"""`streamlens inspect`: what a model or a capture is made of, and whether it can be trusted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamlens.cli.options import ModelOptions, Sectioned, model_options, output_options
from streamlens.cli.output import human, human_count, print_notes, print_rows, table, wrapped
from streamlens.errors import UsageError
from streamlens.wording import counted

if TYPE_CHECKING:
    from streamlens.anatomy import Anatomy
    from streamlens.reader.opening import Capture


@click.command("inspect", cls=Sectioned)
@model_options
@click.option("--cite", is_flag=True, help="Print what others need to make the same capture again.")
@output_options
def command(model: ModelOptions, cite: bool, as_json: bool) -> None:
    """Show the anatomy of SOURCE, a model or a capture: its streams, sublayers, sizes, proof and health.

    \b
    Example:
      streamlens inspect model.pt
      streamlens inspect model.h5
      streamlens inspect model.h5 --cite
      streamlens inspect --model mypackage.models:build
    """  # noqa: D301 - click reads the \b
    from streamlens.checkpoint.sniff import is_hdf5

    if model.source is not None and is_hdf5(Path(model.source)):
        from streamlens.reader.opening import open_capture

        with open_capture(model.source) as capture:
            _cite(capture, as_json) if cite else _capture(capture, as_json)
    elif cite:
        raise UsageError("only a capture can be cited: it names the model, the text, the versions and the command")
    else:
        _model(model, as_json)


def _model(options: ModelOptions, as_json: bool) -> None:
    from streamlens.corpus.windows import windows_for
    from streamlens.recorder.feed import PROBE_POSITIONS, probe_of_windows
    from streamlens.recorder.pilot import first_weight, fly, parameters_of
    from streamlens.tree import draw

    loaded = options.load()
    windows = windows_for(loaded, max_tokens=PROBE_POSITIONS, window=PROBE_POSITIONS, seed=options.seed)
    parameters = parameters_of(loaded.module)
    first = first_weight(parameters)
    pilot = fly(loaded.module, probe_of_windows(loaded.module, windows, False, first.device))
    count = sum(p.numel() for p in loaded.module.parameters())
    if as_json:
        about = {
            "source": loaded.source,
            "class": type(loaded.module).__name__,
            "parameters": count,
            "dtype": str(first.dtype).removeprefix("torch."),
            "vocab_size": loaded.vocab_size,
            "max_positions": loaded.max_positions,
            "sha256": loaded.sha256,
            **_anatomy(pilot.anatomy),
            "proof": {"exact": pilot.verdict.exact, "worst_error": pilot.verdict.worst},
            "head_exact": pilot.head_exact,
        }
        print_rows("inspect", _sublayers(pilot.anatomy), as_json=True, about=about)
        return
    limit = "no limit" if loaded.max_positions is None else f"{loaded.max_positions:,}"
    name = type(loaded.module).__name__
    click.echo(wrapped(f"{loaded.source}: {name}, {human_count(count)} parameters, {first.dtype}"))
    click.echo(f"vocabulary {human(loaded.vocab_size)}, positions {limit}, sha256 {loaded.sha256[:16]}")
    click.echo(draw(pilot.anatomy))
    click.echo(f"proof, on a few tokens: {_proved(pilot.verdict.exact, pilot.verdict.worst)}")
    click.echo(f"head applied to the last state: {'the model output, bit for bit' if pilot.head_exact else 'differs'}")


def _capture(capture: Capture, as_json: bool) -> None:
    from streamlens.reader.health import examine
    from streamlens.tree import draw

    rows: list[dict[str, Any]] = []
    for view in capture.streams.values():
        for health in examine(view):
            rows.append({"stream": view.name, **vars(health)})
    attrs = capture.attrs
    if as_json:
        proof = capture.proof
        named = ("dtype", "model_source", "model_sha256", "text", "text_sha256")
        about = {
            "path": capture.path,
            "tokens": capture.n_tokens,
            "bytes": capture.n_bytes,
            "compact": bool(attrs["compact"]),
            **{name: attrs[name] for name in named},
            **_anatomy(capture.anatomy),
            "stored": {view.name: len(view.labels) for view in capture.streams.values()},
            "proof": {
                "exact": proof.exact,
                "worst_error": proof.worst,
                "blocks": proof.blocks,
                "exact_blocks": proof.exact_blocks,
                "state": proof.where,
                "block": proof.worst_block,
            },
            "head_exact": bool(attrs["head_exact"]),
        }
        print_rows("inspect", rows, as_json=True, about=about)
        return
    kind = "compact" if attrs["compact"] else "full"
    size = f"{counted(capture.n_tokens, 'token')}, {human(capture.n_bytes)} bytes"
    click.echo(wrapped(f"{capture.path}: {size}, {attrs['dtype']}, {kind}"))
    for name, what in (("model", attrs["model_source"]), ("text", attrs["text"])):
        click.echo(wrapped(f"{name:<5}  {human(what)}", " " * 7))
        click.echo(f"       sha256 {str(attrs[f'{name}_sha256'])[:16]}")
    click.echo(draw(capture.anatomy))
    click.echo(f"proof  {capture.proof}")
    click.echo("health of each write, over all tokens:")
    shown = [{k: _health_cell(v) for k, v in row.items()} for row in rows]
    click.echo(table(shown))
    print_notes(_warnings(rows))


def _cite(capture: Capture, as_json: bool) -> None:
    from streamlens.reader.citing import citation, facts

    if as_json:
        print_rows("inspect", [], as_json=True, about=facts(capture))
    else:
        click.echo(citation(capture))  # a line for each fact, which others read again


def _health_cell(value: Any) -> Any:
    return ", ".join(map(str, value)) or None if isinstance(value, tuple) else value


def _warnings(rows: list[dict[str, Any]]) -> list[str]:
    notes = []
    broken = [r["label"] for r in rows if r["not_finite"]]
    if broken:
        notes.append(f"NaN or infinite entries in {', '.join(broken[:5])}: averages over them mean nothing")
    massive = [r["label"] for r in rows if r["massive"]]
    if massive:
        notes.append(
            f"massive activations in {', '.join(massive[:4])}{', ...' if len(massive) > 4 else ''}: report averages "
            "with and without position 0"
        )
    return notes


def _proved(exact: bool, worst: float) -> str:
    return "the writes add up bit for bit" if exact else f"largest relative error {worst:.3g}"


def _anatomy(anatomy: Anatomy) -> dict[str, Any]:
    """The anatomy in short: what the first lines of the drawing say."""
    return {
        "streams": [
            {
                "name": stream.name,
                "d_model": stream.d_model,
                "layers": stream.layers,
                "sublayers": len(stream.sublayers),
                "kinds": dict(Counter(s.kind for s in stream.sublayers)),
                "norms": dict(Counter(s.norm for s in stream.sublayers)),
                "embedding": [part.label for part in stream.parts],
            }
            for stream in anatomy.streams
        ],
        "head": {"stream": anatomy.head.stream, "vocab": anatomy.head.vocab},
    }


def _sublayers(anatomy: Anatomy) -> list[dict[str, Any]]:
    return [
        {
            "stream": stream.name,
            "index": s.index,
            "layer": s.layer,
            "kind": s.kind,
            "label": s.label,
            "norm": s.norm,
            "module": s.module,
            "heads": s.heads,
        }
        for stream in anatomy.streams
        for s in stream.sublayers
    ]
