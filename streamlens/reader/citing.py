"""How to cite a capture: what it was made from, by what, with which command."""

from __future__ import annotations

from streamlens.reader.opening import Capture


def facts(capture: Capture) -> dict[str, str]:
    """Return what others need to make the same capture again.

    The hashes are of the weights and of the tokens as the model saw them, so that a copy can be told from another
    model of the same name.
    """
    attrs = capture.attrs
    found = {
        "model": str(attrs["model_source"]),
        "model_sha256": str(attrs["model_sha256"]),
        "text": str(attrs["text"]),
        "text_sha256": str(attrs["text_sha256"]),
        "tokens": f"{capture.n_tokens:,}",
        "dtype": f"{attrs['dtype']} on {attrs['device']}",
        "seed": str(attrs["seed"]),
        "proof": str(capture.proof),
        "versions": f"streamlens {attrs['streamlens_version']}, torch {attrs['torch_version']}",
    }
    if attrs["command"]:  # there is none for a capture made in Python
        found["command"] = str(attrs["command"])
    if attrs["tokenizer"]:
        found["tokenizer"] = f"{attrs['tokenizer']} ({attrs['tokenizer_sha256']})"
    return found


def citation(capture: Capture) -> str:
    """Return the facts as text, one a line."""
    found = facts(capture)
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {value}" for name, value in found.items())
