"""The page of a report."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path

import pandas as pd
import pytest

from experiments import page
from experiments.chapters import Chapter, Table


@pytest.fixture
def written(finished: Path) -> str:
    return (finished / "report.html").read_text()


def test_the_page_has_the_figures_that_were_written_and_needs_nothing_beside_it(finished, written):
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', written)
    figures = {file.read_bytes() for file in (finished / "figures").glob("*.png")}
    assert {base64.b64decode(one) for one in embedded} == figures
    assert len(embedded) == written.count("<img ") == len(figures)
    assert not re.search(r"<(script|link|iframe)|url\(|@import", written)
    assert str(finished) not in written


def test_the_page_has_every_row_of_the_tables_that_were_written(finished, written):
    cells = [re.findall(r"<t[dh](?: [^>]*)?>(.*?)</t[dh]>", line) for line in written.splitlines()]
    rows = [[html.unescape(cell) for cell in line] for line in cells if line]
    tables = list((finished / "tables").glob("*.md"))
    assert written.count("<table>") == len(tables) == 3
    for table in tables:
        for line in table.read_text().splitlines():
            if line.startswith("| "):
                assert [cell.strip() for cell in line.strip("|").split("|")] in rows


def test_the_page_says_what_was_run_and_what_was_not(written):
    for word in ("tiny", "threads)", "8 answers a method and strength", "Wilson", "Llama-3.1-8B", "not run here"):
        assert word in written
    assert re.search("no record of: RULER, Reasoning, .*Time to first token", written)


def test_a_name_is_text_and_no_markup(tmp_path):
    rows = pd.DataFrame({"method": ["<b>x</b>", None], "n": ["< 3", "+1.5 [1, 2]"]})
    chapter = Chapter("a & b", {"model": "<script>"}, [Table("t", "All", rows, rows, "one\n\ntwo <i>")])
    text = page.write(tmp_path, {"niah": [chapter], "kernel": []}).read_text()
    for escaped in ("a &amp; b", "&lt;script&gt;", "&lt;b&gt;x", "two &lt;i&gt;"):
        assert escaped in text
    assert "None" not in text
    assert text.count('<td class="number">') == 2


def test_a_table_without_rows_has_its_heads(tmp_path):
    rows = pd.DataFrame({"method": [], "n": []})
    text = page.write(tmp_path, {"niah": [Chapter("t", {}, [Table("t", "All", rows, rows, "none")])]}).read_text()
    assert re.findall(r"<th [^>]*>(.*?)</th>", text) == ["method", "n"]
