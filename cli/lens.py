"""`streamlens lens`: what the model would say at each state of the residual stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from streamlens.cli.analysis import OriginOptions, ShowOptions, analysis_options
from streamlens.cli.capture import Numbers
from streamlens.cli.options import Dtype, Sectioned
from streamlens.cli.output import human, print_notes
from streamlens.errors import UsageError
from streamlens.wording import counted

if TYPE_CHECKING:
    from streamlens.analyses.lens.door import LensResult
    from streamlens.analyses.source import Source

_FIRST = tuple(range(10))
_SETS = (1, 5, 10)


@click.command("lens", cls=Sectioned)
@analysis_options
@click.option("--grid", is_flag=True, help="Show the likeliest token at each state, token by token.")
@click.option("--writes", is_flag=True, help="Show what each write adds to the logits, its norm held fixed.")
@click.option("--doc", type=click.IntRange(min=0), help="Document of --grid and --writes. [default: the first]")
@click.option("--at", type=Numbers(), default=_FIRST, help="Positions of --grid and --writes. [default: 0-9]")
@click.option("--states", type=Numbers(), help="Look at these states only, such as 0,8-12. [default: all]")
@click.option("--top-k", type=Numbers(), default=_SETS, help="Overlap of so many likeliest tokens. [default: 1,5,10]")
@click.option("--jsd", is_flag=True, help="Also the Jensen-Shannon divergence; slower.")
@click.option(
    "--products",
    type=Dtype(["float32", "bfloat16"]),
    help="Precision of the products with the unembedding; the error is measured. [default: the model's own]",
)
@click.option("--affine-match", is_flag=True, help="Post-norm: every state with the gain and bias of the last norm.")
@click.option("--tuned", type=click.Path(path_type=Path), help="Apply this tuned lens (made with --train).")
@click.option("--train", type=click.Choice(["bias", "ridge", "kl"]), help="Train a tuned lens on these tokens.")
@click.option("--steps", type=click.IntRange(min=1), default=250, show_default=True, help="Steps of --train kl.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Where --train puts it: a .pt file.")
def command(
    origin: OriginOptions,
    show: ShowOptions,
    train: str | None,
    writes: bool,
    save: Path | None,
    steps: int,
    products: str | None,
    **options: Any,
) -> None:
    """Look at every state of SOURCE, a capture or a model, through the model's own head.

    kl is the divergence of the final distribution from that of the state, in nats; rank is the median rank of the
    token that came (0 is the likeliest); delta_log_p is what the step adds to the log-probability of that token.
    Means leave out the first token of each document; --json has all columns.

    \b
    Example:
      streamlens lens                          # the newest capture here
      streamlens lens model.h5 --plot lens.pdf
      streamlens lens model.h5 --dtype bf16
      streamlens lens model.h5 --grid --at 16-21
      streamlens lens model.pt --train ridge --save lens.pt
      streamlens lens model.h5 --tuned lens.pt
    """  # noqa: D301 - click reads the \b
    _demand_one_purpose(train, writes)
    if save is not None and (train is None or save.suffix != ".pt"):
        raise UsageError("--save names the .pt file that --train writes: give both, such as --train ridge --save l.pt")
    source = origin.open(takes_dtype=True)
    products = products or origin.model.dtype  # a capture is not cast, but what is computed from it can be
    if train is not None:
        _train(source, show, kind=train, steps=steps, dtype=products, save=save)
    elif writes:
        from streamlens.analyses.lens.writes import write_lens

        taken_apart = write_lens(source, doc=options["doc"], positions=options["at"])
        if taken_apart.capped:
            print_notes(["these are the logits before the model's soft-cap"])
        show.show("lens", taken_apart, taken_apart.short_rows())
    else:
        _look(source, show, dtype=products, **options)


def _demand_one_purpose(train: str | None, writes: bool) -> None:
    """Refuse options that would have no effect.

    Raises:
        UsageError: some were given; the message names them and the options that they go with.
    """
    looking = {"states", "top_k", "jsd", "tuned", "affine_match", "grid"}
    useless = {
        "--train": looking | {"writes", "doc", "at"} | (set() if train == "kl" else {"steps", "products"}),
        "--writes": looking | {"products", "steps", "save"},
        "a look at the states": {"steps"},
    }
    purpose = "--train" if train is not None else "--writes" if writes else "a look at the states"
    context = click.get_current_context()
    given = {
        p.name: p.opts[0]
        for p in context.command.params
        if p.name is not None and context.get_parameter_source(p.name) is ParameterSource.COMMANDLINE
    }
    if train is None and not writes and "grid" not in given:
        useless[purpose] |= {"doc", "at"}
    found = sorted(option for name, option in given.items() if name in useless[purpose])
    if found:
        what = f"--train {train}" if train is not None else purpose
        raise UsageError(f"{', '.join(found)} would have no effect in {what}: leave out one or the other")


def _look(
    source: Source, show: ShowOptions, *, at: tuple[int, ...], doc: int | None, grid: bool, **options: Any
) -> None:
    from streamlens.analyses.lens.door import logit_lens

    translators = options.pop("tuned")
    found = logit_lens(source, translators=translators, grid=grid, grid_doc=doc, grid_positions=at, **options)
    print_notes(_remarks(found))
    if found.grid is None:
        show.show("lens", found, _short(found, options["jsd"], options["top_k"]))
    else:
        show.show("lens", found.grid, found.grid.short_rows())


def _short(found: LensResult, jsd: bool, top_k: tuple[int, ...]) -> list[dict[str, Any]]:
    """The columns that fit a terminal; those that were asked for come first."""
    asked = ["jsd"] if jsd else []
    if top_k != _SETS:
        asked += [f"overlap_{k}" for k in top_k]
    more = {name: found.metrics[name].mean for name in asked}
    rows = []
    for i, row in enumerate(found.short_rows()):
        first = {name: row.pop(name) for name in ("state", "label", "kl")}
        rows.append(first | {name: float(values[i]) for name, values in more.items()} | row)
    return rows


def _train(source: Source, show: ShowOptions, *, kind: Any, steps: int, dtype: str | None, save: Path | None) -> None:
    from streamlens.analyses.lens.tuned import train_lens

    lens = train_lens(source, kind=kind, steps=steps, dtype=dtype)
    if save is not None:
        lens.save(save)
        print_notes([f"wrote {save}: apply it with --tuned {save}"])
    print_notes(
        [
            f"trained on {human(lens.train_tokens)} tokens, judged on {human(lens.held_out_tokens)} tokens of "
            f"{counted(lens.held_out_documents, 'other document')}"
        ]
    )
    show.show("lens", lens)


def _remarks(found: LensResult) -> list[str]:
    from streamlens.analyses.lens.head import OWN

    notes = [] if found.head == OWN else [f"looked through {found.head}"]
    if found.on_training_text:
        notes.append(
            "this is the text that the tuned lens was trained on, so these numbers are better than they would be on "
            "another: what --train prints is over the documents held out"
        )
    if found.precision is not None:
        notes.append(
            f"products in lower precision: on {found.precision['tokens']:.0f} tokens kl differs by "
            f"{found.precision['kl_error_mean']:.2g} nats on average "
            f"({100 * found.precision['kl_error_share']:.1f} % of it), "
            f"{found.precision['kl_error_max']:.2g} at most"
        )
    return notes
