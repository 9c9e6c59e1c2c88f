"""One table in the forms people ask for."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def write_table(folder: Path, name: str, title: str, rows: pd.DataFrame, shown: pd.DataFrame, below: str) -> list[Path]:
    """One table as Markdown and LaTeX, as people read it, and as CSV with every number."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{name}.{kind}" for kind in ("md", "csv", "tex")}
    paths["md"].write_text(f"**{title}**\n\n{markdown(shown)}\n\n{below}\n", encoding="utf-8")
    rows.assign(section=title).to_csv(paths["csv"], index=False)
    paths["tex"].write_text(shown.to_latex(index=False, escape=True, caption=title), encoding="utf-8")
    return list(paths.values())


def markdown(rows: pd.DataFrame) -> str:
    return rows.to_markdown(index=False, disable_numparse=True)
