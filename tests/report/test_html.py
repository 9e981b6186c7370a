"""The page is well-formed, self-contained, escaped, accessible, and the same for the same run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from mlx_ft.errors import RunError
from mlx_ft.recipe.names import COLUMNS
from mlx_ft.report.html import report_html, write_report
from mlx_ft.runs.folder import update_record
from mlx_ft.text.safe import clean
from tests.support.run_folders import HOSTILE, TOKEN, write_mismatch

MakeRun = Callable[..., Path]
VOID = {"meta", "link", "br", "img", "hr", "input", "base", "embed", "source"}
ENDINGS = ["done", "gate_failed", "interrupted", "failed"]


class Page(HTMLParser):
    """Collects what the tests ask about, and every tag that does not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len({name for name, _ in attrs}) != len(attrs):
            self.faults.append(f"attribute given twice: {attrs}")
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at line {self.getpos()[0]}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def done_page(done_run: Path) -> str:
    return report_html(done_run)


def check_safe(page: Page) -> None:
    assert page.faults == []
    allowed = (
        "html head meta title style body header h1 h2 h3 h4 p strong span dl div dt dd nav ul li a "
        "main section table caption thead tbody tr th td details summary figure figcaption article "
        "pre footer mark svg g path defs use text clippath rect"
    )
    assert {tag for tag, _ in page.tags} <= set(allowed.split())
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not {"src", "srcset", "action", "background", "poster"} & set(attributes)
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#"), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
    csp = [a for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert csp[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.mark.parametrize("ended", ENDINGS)
@pytest.mark.parametrize("said", [None, HOSTILE], ids=["ordinary", "hostile"])
def test_every_page_is_well_formed_and_loads_nothing(
    make_run: MakeRun, ended: str, said: str | None
) -> None:
    text = report_html(make_run(ended, said))
    check_safe(Page(text))
    assert "<script" not in text.lower()
    assert TOKEN not in text
    assert not [c for c in text if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160]
    assert not set(text) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\ud800")


def test_hostile_text_is_shown_as_text(make_run: MakeRun) -> None:
    page = Page(report_html(make_run("done", HOSTILE)))
    assert any(clean(HOSTILE)[:200] in text for text in page.text)
    assert not [
        text for text in page.text if "49" in text and "{{" not in text and "x" * 50 in text
    ]


def test_no_file_that_is_written_holds_the_planted_token(make_run: MakeRun) -> None:
    run = make_run("done")
    before = set(run.rglob("*"))
    written = write_report(run)
    assert set(run.rglob("*")) - before == {written}
    assert TOKEN.encode() not in written.read_bytes()


@pytest.mark.parametrize("ended", ["done", "interrupted"])
def test_the_same_artifacts_elsewhere_give_the_same_bytes(
    make_run: MakeRun, tmp_path: Path, ended: str
) -> None:
    run = make_run(ended)
    copy = tmp_path / "elsewhere" / run.name
    shutil.copytree(run, copy)
    assert write_report(run).read_bytes() == write_report(copy).read_bytes()


def test_recording_that_the_report_was_made_does_not_change_it(make_run: MakeRun) -> None:
    run = make_run("failed")
    before = report_html(run)
    update_record(run, stages={"report": {"seconds": 1.5, "peak_memory_bytes": 1, "reused": False}})
    assert report_html(run) == before


@pytest.mark.slow
def test_another_process_without_mlx_gives_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run()
    code = (
        "import sys, pathlib; import mlx_ft.report.terminal; from mlx_ft.report.html import *; "
        "write_report(pathlib.Path(sys.argv[1])); names = {n.split('.')[0] for n in sys.modules}; "
        "print(names & {'mlx', 'mlx_lm', 'torch', 'transformers', 'click'}, "
        "'matplotlib.pyplot' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", code, str(run)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set() False"
    assert (run / "report.html").read_text() == report_html(run)


def test_headings_are_in_order_and_links_lead_somewhere(done_page: str) -> None:
    page = Page(done_page)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{name}" for name in ids} >= {a["href"] for a in page.named("a")}
    assert page.named("html") == [{"lang": "en"}]
    assert any(a.get("name") == "viewport" for a in page.named("meta"))


def test_tables_have_captions_and_scopes_and_scroll_in_a_box_of_their_own(done_page: str) -> None:
    page = Page(done_page)
    assert len(page.named("table")) == len(page.named("caption")) >= 12
    assert all(a.get("scope") in ("col", "row") for a in page.named("th"))
    boxes = [a for a in page.named("div") if (a.get("class") or "").split()[:1] == ["scroll"]]
    assert len(boxes) == len(page.named("table"))
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in boxes)
    assert len({a["aria-label"] for a in boxes}) == len(boxes)


def test_the_done_page_says_what_the_run_showed(done_page: str) -> None:
    text = " ".join("".join(Page(done_page).text).split())
    for evidence in (
        "code_mode 0.00 → 0.96, keep_talking 0.97 → 0.94 (base to quantized)",
        "0.82\N{EN DASH}0.99",
        "train.learning_rate 4e-4 line 9",
        "5 default or derived values",
        "1,222,656 of 135,737,472 (0.9 %)",
        "frozen layers run once a row",
        "not degenerate",
        "every layer has 5 bits ok 211 of 211",
        "The final model has 5 bits or more after pass 5 bits",
        "Outputs were looked at before anything was merged after pass 0 of 3 answers degenerate",
        "outcomes of base (rows) and of quantized (columns)",
        "93.4 MB",
        "validation size warn 48 rows",
        "Validation rows that are training rows too, token for token: 0.",
        "OpenBLAS 0.3.33",
        "model: size 96.3 MB",
        "git checkout 3f2c1e0d9b8a7f6e5d4c3b2a19080706f5e4d3c2",
        "mlx-ft run recipes/quickstart.yaml --set train.seed=1",
        "had uncommitted changes",
        "15 more samples of code_mode",
    ):
        assert evidence in text, evidence
    assert "not recorded" not in text
    assert 'class="missing"' not in done_page
    assert done_page.count("<svg") == 8
    assert all(f"key-{column}" in done_page for column in COLUMNS)


def test_another_chat_format_is_told_under_the_verdict_and_beside_the_scores(
    make_run: MakeRun,
) -> None:
    run = make_run()
    before = "".join(Page(report_html(run)).text)
    assert "Warning." not in before and "NOT the training's" not in before
    told = write_mismatch(run)
    text = "".join(Page(report_html(run)).text)
    assert text.index("Done.") < text.index(told) < text.index("What was asked")
    assert text.count("NOT the training's, which was allowed") == 1
    assert text.count("the training's") == len(COLUMNS)


@pytest.mark.parametrize(
    ("ended", "sentences"),
    [
        (
            "gate_failed",
            ["2 of 5 generations are degenerate", "degenerate: the same 4 words 31 times"],
        ),
        ("interrupted", ["iteration 90 of 240", "No exported model: the run was interrupted"]),
        ("failed", ["train.jsonl:118: not valid JSON", "No training: the run failed before"]),
    ],
)
def test_an_incomplete_page_says_what_is_missing_and_why(
    make_run: MakeRun, ended: str, sentences: list[str]
) -> None:
    text = "".join(Page(report_html(make_run(ended))).text)
    assert "No evaluation result: the run was" in text or ended == "failed"
    assert [sentence for sentence in sentences if sentence not in text] == []


def test_partial_evaluations_show_their_samples_without_inventing_scores(make_run: MakeRun) -> None:
    run = make_run()
    (run / "eval" / "results.json").unlink()
    page = report_html(run)
    check_safe(Page(page))
    assert "No evaluation result" in page
    assert "12 of 27 samples" in page


def test_a_broken_artifact_leaves_the_old_report_alone(make_run: MakeRun) -> None:
    run = make_run()
    old = write_report(run).read_bytes()
    path = run / "eval" / "code_mode" / "base.jsonl"
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(RunError, match=r"base\.jsonl:1"):
        write_report(run)
    assert (run / "report.html").read_bytes() == old


def test_a_report_that_cannot_be_written_leaves_nothing_behind(make_run: MakeRun) -> None:
    run = make_run("failed")
    (run / "report.html").mkdir()
    before = sorted(run.iterdir())
    with pytest.raises(RunError, match="cannot be written"):
        write_report(run)
    assert sorted(run.iterdir()) == before


def contrast(first: str, second: str) -> float:
    """WCAG 2.1's contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_texts_and_chart_colours_have_contrast_in_light_and_dark(done_page: str) -> None:
    palettes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{([^}]*)\}", done_page)
    ]
    light, dark = palettes[0], palettes[1]
    for palette in (light, dark):
        for name in ("ink", "muted", "ok", "warn", "fail", "link"):
            for ground in ("paper", "panel"):
                assert contrast(palette[name], palette[ground]) >= 4.5, (name, ground)
        assert contrast(palette["ink"], palette["marked"]) >= 4.5
        for name in COLUMNS:
            assert contrast(palette[name], palette["paper"]) >= 3, name
