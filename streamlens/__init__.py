"""streamlens: what every attention and MLP sublayer reads from and writes into the residual stream, and the proof.

    import streamlens as sl

    capture = sl.capture("model.pt", out="run.h5")     # run, record, prove
    capture = sl.open("run.h5")                        # lazy: slicing costs what is sliced
    capture.write("3_mlp_out")                         # (token, d_model)
    anatomy = sl.discover(module, inputs)              # the streams of any transformer

Nothing is imported before it is used, so that ``import streamlens`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from streamlens.analyses.ablation.blocks import BlocksResult as BlocksResult
    from streamlens.analyses.ablation.blocks import ablate_blocks as ablate_blocks
    from streamlens.analyses.ablation.greedy import GreedyResult as GreedyResult
    from streamlens.analyses.ablation.greedy import drop_greedily as drop_greedily
    from streamlens.analyses.ablation.orders import SwapResult as SwapResult
    from streamlens.analyses.ablation.orders import swap_neighbours as swap_neighbours
    from streamlens.analyses.ablation.pairs import PairsResult as PairsResult
    from streamlens.analyses.ablation.pairs import ablate_pairs as ablate_pairs
    from streamlens.analyses.ablation.repair import EffectsResult as EffectsResult
    from streamlens.analyses.ablation.repair import effects as effects
    from streamlens.analyses.ablation.sweep import AblationResult as AblationResult
    from streamlens.analyses.ablation.sweep import ablate as ablate
    from streamlens.analyses.compare.answer import Comparison as Comparison
    from streamlens.analyses.compare.answer import MovedResult as MovedResult
    from streamlens.analyses.compare.answer import Similarity as Similarity
    from streamlens.analyses.compare.door import compare as compare
    from streamlens.analyses.gradient.answer import GradientResult as GradientResult
    from streamlens.analyses.gradient.door import gradient_flow as gradient_flow
    from streamlens.analyses.gradient.paths import SpectrumResult as SpectrumResult
    from streamlens.analyses.gradient.paths import path_spectrum as path_spectrum
    from streamlens.analyses.lens.door import LensResult as LensResult
    from streamlens.analyses.lens.door import logit_lens as logit_lens
    from streamlens.analyses.lens.grid import LensGrid as LensGrid
    from streamlens.analyses.lens.tracks import TokenTracks as TokenTracks
    from streamlens.analyses.lens.tracks import token_tracks as token_tracks
    from streamlens.analyses.lens.tuned import TunedLens as TunedLens
    from streamlens.analyses.lens.tuned import load_lens as load_lens
    from streamlens.analyses.lens.tuned import train_lens as train_lens
    from streamlens.analyses.lens.writes import WriteLensResult as WriteLensResult
    from streamlens.analyses.lens.writes import write_lens as write_lens
    from streamlens.analyses.norms.answer import NormsResult as NormsResult
    from streamlens.analyses.norms.cosines import WriteCosinesResult as WriteCosinesResult
    from streamlens.analyses.norms.door import contribution_norms as contribution_norms
    from streamlens.analyses.norms.states import StateNormsResult as StateNormsResult
    from streamlens.analyses.position.answer import PositionResult as PositionResult
    from streamlens.analyses.position.damage import LesionResult as LesionResult
    from streamlens.analyses.position.door import positional_persistence as positional_persistence
    from streamlens.analyses.position.lesion import position_lesion as position_lesion
    from streamlens.analyses.position.probes import ProbeResult as ProbeResult
    from streamlens.analyses.position.probes import position_probes as position_probes
    from streamlens.analyses.report.door import report as report
    from streamlens.anatomy import Anatomy as Anatomy
    from streamlens.checkpoint.loading import load as load
    from streamlens.checkpoint.model import Model as Model
    from streamlens.checkpoint.packing import pack as pack
    from streamlens.discovery.streams import discover as discover
    from streamlens.edits import edit as edit
    from streamlens.edits import run_from as run_from
    from streamlens.observation import observe as observe
    from streamlens.progress import quiet as quiet
    from streamlens.reader.opening import Capture as Capture
    from streamlens.reader.opening import open_capture as open
    from streamlens.reader.verifying import verify as verify
    from streamlens.recorder.capturing import capture as capture

_HOMES = {
    "Anatomy": ("streamlens.anatomy", "Anatomy"),
    "Capture": ("streamlens.reader.opening", "Capture"),
    "Model": ("streamlens.checkpoint.model", "Model"),
    "contribution_norms": ("streamlens.analyses.norms.door", "contribution_norms"),
    "AblationResult": ("streamlens.analyses.ablation.sweep", "AblationResult"),
    "BlocksResult": ("streamlens.analyses.ablation.blocks", "BlocksResult"),
    "EffectsResult": ("streamlens.analyses.ablation.repair", "EffectsResult"),
    "GreedyResult": ("streamlens.analyses.ablation.greedy", "GreedyResult"),
    "PairsResult": ("streamlens.analyses.ablation.pairs", "PairsResult"),
    "SwapResult": ("streamlens.analyses.ablation.orders", "SwapResult"),
    "ablate": ("streamlens.analyses.ablation.sweep", "ablate"),
    "swap_neighbours": ("streamlens.analyses.ablation.orders", "swap_neighbours"),
    "effects": ("streamlens.analyses.ablation.repair", "effects"),
    "drop_greedily": ("streamlens.analyses.ablation.greedy", "drop_greedily"),
    "ablate_pairs": ("streamlens.analyses.ablation.pairs", "ablate_pairs"),
    "ablate_blocks": ("streamlens.analyses.ablation.blocks", "ablate_blocks"),
    "capture": ("streamlens.recorder.capturing", "capture"),
    "Comparison": ("streamlens.analyses.compare.answer", "Comparison"),
    "MovedResult": ("streamlens.analyses.compare.answer", "MovedResult"),
    "Similarity": ("streamlens.analyses.compare.answer", "Similarity"),
    "compare": ("streamlens.analyses.compare.door", "compare"),
    "discover": ("streamlens.discovery.streams", "discover"),
    "edit": ("streamlens.edits", "edit"),
    "GradientResult": ("streamlens.analyses.gradient.answer", "GradientResult"),
    "SpectrumResult": ("streamlens.analyses.gradient.paths", "SpectrumResult"),
    "gradient_flow": ("streamlens.analyses.gradient.door", "gradient_flow"),
    "path_spectrum": ("streamlens.analyses.gradient.paths", "path_spectrum"),
    "NormsResult": ("streamlens.analyses.norms.answer", "NormsResult"),
    "StateNormsResult": ("streamlens.analyses.norms.states", "StateNormsResult"),
    "WriteCosinesResult": ("streamlens.analyses.norms.cosines", "WriteCosinesResult"),
    "LensGrid": ("streamlens.analyses.lens.grid", "LensGrid"),
    "LensResult": ("streamlens.analyses.lens.door", "LensResult"),
    "TunedLens": ("streamlens.analyses.lens.tuned", "TunedLens"),
    "WriteLensResult": ("streamlens.analyses.lens.writes", "WriteLensResult"),
    "load_lens": ("streamlens.analyses.lens.tuned", "load_lens"),
    "logit_lens": ("streamlens.analyses.lens.door", "logit_lens"),
    "train_lens": ("streamlens.analyses.lens.tuned", "train_lens"),
    "write_lens": ("streamlens.analyses.lens.writes", "write_lens"),
    "LesionResult": ("streamlens.analyses.position.damage", "LesionResult"),
    "PositionResult": ("streamlens.analyses.position.answer", "PositionResult"),
    "ProbeResult": ("streamlens.analyses.position.probes", "ProbeResult"),
    "position_lesion": ("streamlens.analyses.position.lesion", "position_lesion"),
    "position_probes": ("streamlens.analyses.position.probes", "position_probes"),
    "positional_persistence": ("streamlens.analyses.position.door", "positional_persistence"),
    "load": ("streamlens.checkpoint.loading", "load"),
    "observe": ("streamlens.observation", "observe"),
    "open": ("streamlens.reader.opening", "open_capture"),
    "pack": ("streamlens.checkpoint.packing", "pack"),
    "quiet": ("streamlens.progress", "quiet"),
    "TokenTracks": ("streamlens.analyses.lens.tracks", "TokenTracks"),
    "report": ("streamlens.analyses.report.door", "report"),
    "run_from": ("streamlens.edits", "run_from"),
    "token_tracks": ("streamlens.analyses.lens.tracks", "token_tracks"),
    "verify": ("streamlens.reader.verifying", "verify"),
}

__all__ = [
    "AblationResult",
    "Anatomy",
    "BlocksResult",
    "Capture",
    "Comparison",
    "EffectsResult",
    "GradientResult",
    "GreedyResult",
    "LensGrid",
    "LensResult",
    "LesionResult",
    "Model",
    "MovedResult",
    "NormsResult",
    "PairsResult",
    "PositionResult",
    "ProbeResult",
    "Similarity",
    "SpectrumResult",
    "StateNormsResult",
    "SwapResult",
    "TokenTracks",
    "TunedLens",
    "WriteCosinesResult",
    "WriteLensResult",
    "ablate",
    "ablate_blocks",
    "ablate_pairs",
    "capture",
    "compare",
    "contribution_norms",
    "discover",
    "drop_greedily",
    "edit",
    "effects",
    "gradient_flow",
    "load",
    "load_lens",
    "logit_lens",
    "observe",
    "open",
    "pack",
    "path_spectrum",
    "position_lesion",
    "position_probes",
    "positional_persistence",
    "quiet",
    "report",
    "run_from",
    "swap_neighbours",
    "token_tracks",
    "train_lens",
    "verify",
    "write_lens",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'streamlens' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
