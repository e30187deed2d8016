"""The report: what stands on the page is what the analyses found, and it needs nothing but itself."""

from __future__ import annotations

import csv
import io
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import streamlens as sl
from streamlens.analyses.report.door import payload
from streamlens.analyses.source import source_of
from streamlens.checkpoint.model import wrap
from streamlens.cli import app
from streamlens.errors import UsageError
from tests.conftest import case

MODEL = Path(__file__).resolve().parents[1] / "fixtures" / "model.pt"
TOKENS = 1024


class Page(HTMLParser):
    """The links, identifiers and scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.ids, self.links, self.loaded = text, list[str](), dict[str, str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.ids.append(found["id"])
        if "download" in found:
            self.links[found["download"]] = found["href"]
        address = found.get("src") or (found.get("href") if tag in ("link", "script", "use", "image") else None)
        if address and not address.startswith(("data:", "#")):
            self.loaded.append(address)

    def table(self, file: str) -> list[dict[str, str]]:
        """The rows that the download of this name holds."""
        return list(csv.DictReader(io.StringIO(b64decode(self.links[file].partition(",")[2]).decode())))

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads."""
        (found,) = re.findall(r'id="lens-data">(.*?)</script>', self.text, re.DOTALL)
        return dict(json.loads(found))


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "model.h5"
    sl.capture(MODEL, out=out, max_tokens=TOKENS, progress=False).close()
    return out


@pytest.fixture(scope="module")
def other_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a louder layer."""
    out, louder = tmp_path_factory.mktemp("other") / "louder.h5", sl.load(MODEL)
    with torch.no_grad():
        louder.module.get_submodule("transformer.h.3.mlp.c_proj").get_parameter("weight").mul_(1.5)
    sl.capture(louder, out=out, max_tokens=TOKENS, progress=False).close()
    return out


@pytest.fixture(scope="module")
def page_file(capture_file: Path, other_file: Path) -> Path:
    return sl.report(capture_file, progress=False, tokens=TOKENS, positions=range(12), against=other_file)


@pytest.fixture(scope="module")
def page(page_file: Path) -> Page:
    return Page(page_file.read_text("utf-8"))


def same(shown: list[dict[str, str]], rows: list[dict[str, Any]]) -> None:
    assert len(shown) == len(rows)
    for left, right in zip(shown, rows, strict=True):
        for column, value in right.items():
            if isinstance(value, float):
                assert float(left[column]) == pytest.approx(value, rel=1e-9, nan_ok=True), column
            else:
                assert left[column] == ("" if value is None else str(value)), column


def test_the_page_needs_nothing_else_and_is_small(page: Page, page_file: Path) -> None:
    assert page.loaded == []
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#|['\"]?#)", page.text)
    assert page_file.stat().st_size < 5e6
    assert len(page.ids) == len(set(page.ids))


def test_each_download_holds_what_the_analysis_finds(page: Page, capture_file: Path) -> None:
    quiet: dict[str, Any] = {"progress": False}
    same(page.table("norms.csv"), sl.contribution_norms(capture_file, **quiet).rows())
    same(page.table("lens.csv"), sl.logit_lens(capture_file, grid=False, **quiet).rows())
    same(page.table("ablation.csv"), sl.ablate(capture_file, units="layers", **quiet).rows())
    same(page.table("position.csv"), sl.positional_persistence(capture_file, **quiet).rows())
    same(page.table("gradient.csv"), sl.gradient_flow(capture_file, **quiet).rows())


def test_the_comparison_is_that_of_both_captures(page: Page, capture_file: Path, other_file: Path) -> None:
    found = sl.compare(capture_file, other_file, progress=False)
    assert found.loss is not None
    assert found.similarity is not None
    assert found.moved is not None
    same(page.table("comparison.csv"), found.rows())
    same(page.table("similarity.csv"), found.similarity.rows())
    same(page.table("distance.csv"), found.moved.rows())
    assert f"a difference of {found.loss['difference']:.3g} " in page.text
    assert "What is other in louder.h5?" in page.text


def test_the_grid_is_what_the_lens_finds(page: Page, capture_file: Path) -> None:
    data, found = page.data, sl.token_tracks(capture_file, positions=range(12))
    assert data["top"] == found.top.tolist()
    torch.testing.assert_close(torch.tensor(data["kl"]), torch.from_numpy(found.kl).float(), rtol=0, atol=6e-4)
    for j, tokens in enumerate(found.followed):
        assert data["followed"][j] == tokens.tolist()
        assert data["tracks"][j]["rank"] == found.rank[j].tolist()
    cells = re.findall(r'<td role="gridcell"[^>]*data-s="(\d+)" data-p="(\d+)"[^>]*>(.*?)</td>', page.text)
    assert len(cells) == found.top[..., 0].size


def test_tokens_are_followed_as_a_plain_loop_follows_them() -> None:
    found = case("gemma2")
    tracks = sl.token_tracks(found.module, inputs=found.inputs, positions=(2, 5), top_k=3, doc=1)
    source = source_of(found.module, inputs=found.inputs)
    block = next(source.blocks())
    docs, positions = block.shape
    last = len(block.states) - 1
    for k, state in enumerate(block.states):
        with torch.no_grad():
            logits = sl.run_from(found.module, found.anatomy, last, state.reshape(docs, positions, -1), found.inputs)
        for j, position in enumerate((2, 5)):
            p = logits[1, position].double().softmax(-1)
            order = p.argsort(descending=True)
            assert tracks.top[k, j].tolist() == order[:3].tolist()
            for c, token in enumerate(tracks.followed[j]):
                assert tracks.rank[j][k, c] == int((p > p[token]).sum())
                assert tracks.probability[j][k, c] == pytest.approx(float(p[token]), rel=1e-3)
            assert tracks.entropy[k, j] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-3)
            assert tracks.targets[j] == block.ids.reshape(docs, positions)[1, position + 1]
            assert tracks.target_rank[k, j] == int((p > p[tracks.targets[j]]).sum())
    with pytest.raises(UsageError, match="no document 99"):
        sl.token_tracks(found.module, inputs=found.inputs, doc=99)


def test_the_stream_has_a_branch_for_every_sublayer(page: Page, capture_file: Path) -> None:
    with sl.open(capture_file) as capture:
        labels = [s.label for s in capture.stream().anatomy.sublayers]
    branches = re.findall(r"<path class='branch \w+' stroke-width='([\d.]+)'[^>]*><title>(\w+) ", page.text)
    assert [label for _, label in branches] == labels
    sizes = {r["label"]: r["relative_write_median"] for r in sl.contribution_norms(capture_file, progress=False).rows()}
    widths = {label: float(width) for width, label in branches}
    assert max(widths, key=lambda k: widths[k]) == max(labels, key=lambda k: sizes[k])
    assert len(set(widths.values())) > 2


def test_a_token_cannot_end_the_script(tmp_path: Path) -> None:
    found = case("gpt2")
    tracks = sl.token_tracks(found.module, inputs=found.inputs, positions=range(2), top_k=2)
    tracks.text[int(tracks.ids[0])] = "</script>"
    written = payload(tracks, causal=True)
    assert "<" not in written
    assert "</script>" in json.loads(written)["text"].values()


@pytest.mark.parametrize("name", ["bert", "t5", "gptj"])
def test_any_capture_has_a_page(name: str, tmp_path: Path) -> None:
    found, told = case(name), list[str]()
    options: dict[str, Any] = {"inputs": found.inputs, "streams": ("decoder",) if name == "t5" else None}
    with sl.capture(found.module, out=tmp_path / "a.h5", progress=False, **options) as capture:
        model = wrap(found.module, "x", {})
        object.__setattr__(model, "sha256", capture.attrs["model_sha256"])
        written = sl.report(
            capture, tmp_path / "a.html", model=model, progress=False, positions=range(4), tell=told.append
        )
    page = Page(written.read_text("utf-8"))
    assert "stream" in page.ids
    for name_of_section in ("stream", "lens", "ablation", "position", "gradient"):
        assert name_of_section in page.ids or any(name_of_section in text for text in told)


def test_a_model_without_a_head_is_read_through_its_embeddings(tmp_path: Path) -> None:
    found = case("bert_model")
    with sl.capture(found.module, inputs=found.inputs, out=tmp_path / "a.h5", progress=False) as capture:
        options: dict[str, Any] = {"progress": False, "positions": range(4), "sections": ["lens"]}
        text = sl.report(capture, tmp_path / "a.html", model=found.module, **options).read_text("utf-8")
    seen = text[: text.index('id="lens-data"')]
    assert "read through nearest-token lens: inner products with the word embeddings, not a head; bold where" in seen
    assert "bold where it is the token itself" in seen
    assert "rank of the token itself" in seen
    assert "Which word embeddings is each state nearest to?" in seen
    for untrue in ("own head", "would the model say", "token that came", "what came"):
        assert untrue not in seen


def test_what_the_page_says_in_numbers(page: Page) -> None:
    assert "bit for bit, in every block of tokens (1 block)." in page.text
    assert "On average over depth, and over 4 windows, " in page.text
    assert "within 0e+00" not in page.text
    assert not re.search(
        r"\d%", page.text[page.text.index("<main>") : page.text.index('id="lens-data"')].split("<svg")[0]
    )
    assert "Rank correlation with the score over layers: " in page.text
    assert "read through the model&#39;s own head; bold where it is the token that came." in page.text


@pytest.mark.filterwarnings("error")
def test_sections_that_can_say_nothing_of_single_tokens_are_left_out(tmp_path: Path) -> None:
    told = list[str]()
    module = case("gpt2").module
    tokens = torch.arange(30)[:, None]
    with sl.capture(module, tokens=tokens, out=tmp_path / "a.h5", progress=False) as capture:
        text = sl.report(capture, tmp_path / "a.html", model=module, progress=False, tell=told.append).read_text(
            "utf-8"
        )
    page = Page(text)
    for name in ("stream", "lens", "ablation", "position", "gradient"):
        assert name not in page.ids
        assert any(name in reason for reason in told)
        assert f"No section {name}: " in text


def test_only_a_capture_has_a_report(tmp_path: Path, capture_file: Path) -> None:
    with pytest.raises(UsageError, match="streamlens capture"):
        sl.report(MODEL, tmp_path / "a.html", progress=False)
    with pytest.raises(UsageError, match="no section 'lense'; there are stream, lens"):
        sl.report(capture_file, tmp_path / "a.html", sections=("lense",), progress=False)
    assert not (tmp_path / "a.html").exists()


def test_the_command_writes_the_page(capture_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    ran = CliRunner().invoke(app.main, ["report", str(capture_file), "-o", str(out), "--only", "stream", "--quiet"])
    assert ran.exit_code == 0, ran.output
    assert ran.stderr == ""
    page = Page(out.read_text("utf-8"))
    assert "stream" in page.ids
    assert "lens" not in page.ids
    assert "lens-data" not in page.ids


def test_a_capture_can_be_cited(capture_file: Path) -> None:
    ran = CliRunner().invoke(app.main, ["inspect", str(capture_file), "--cite"])
    assert ran.exit_code == 0, ran.output
    lines = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    with sl.open(capture_file) as capture:
        assert lines["model_sha256"] == capture.attrs["model_sha256"]
        assert lines["text_sha256"] == capture.attrs["text_sha256"]
    assert lines["tokens"] == f"{TOKENS:,}"
    as_json = CliRunner().invoke(app.main, ["inspect", str(capture_file), "--cite", "--json"])
    assert json.loads(as_json.stdout)["about"]["model_sha256"] == lines["model_sha256"]
    assert CliRunner().invoke(app.main, ["inspect", str(MODEL), "--cite"]).exit_code == 2


def test_the_page_cites_the_capture(page: Page, capture_file: Path) -> None:
    source = source_of(capture_file)
    assert source.n_tokens == TOKENS
    with sl.open(capture_file) as capture:
        for name in ("model_sha256", "text_sha256", "torch_version"):
            assert str(capture.attrs[name]) in page.text
