"""What a report says of one section: tables, figures and where they come from, for its files and its page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from experiments import style


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes
    ----------
    name : str
        Of its files.
    what : str
        What it lists, in a few words.
    rows, shown : DataFrame
        Every number, and what people read.
    below : str
        What stands under it, in paragraphs.
    """

    name: str
    what: str
    rows: pd.DataFrame
    shown: pd.DataFrame
    below: str

    def markdown(self) -> str:
        return f"{self.shown.to_markdown(index=False, disable_numparse=True)}\n\n{self.below}\n"

    def write(self, folder: Path, title: str) -> list[Path]:
        """Markdown and LaTeX, as people read it, and CSV with every number."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = {kind: folder / f"{self.name}.{kind}" for kind in ("md", "csv", "tex")}
        paths["md"].write_text(f"**{title}**\n\n{self.markdown()}", encoding="utf-8")
        self.rows.assign(section=title).to_csv(paths["csv"], index=False)
        paths["tex"].write_text(self.shown.to_latex(index=False, escape=True, caption=title), encoding="utf-8")
        return list(paths.values())


@dataclass(frozen=True)
class Drawing:
    """One figure; ``name`` is of its files, ``what`` it shows in a line."""

    name: str
    what: str
    figure: Figure

    def write(self, folder: Path) -> list[Path]:
        """PNG and PDF."""
        return style.save(self.figure, folder, self.name)


@dataclass(frozen=True)
class Chapter:
    """One section's report.

    Attributes
    ----------
    title : str
        Experiment, model, dtype and device.
    facts : dict of str to str
        Where the numbers come from.
    tables : sequence of Table
        The main one first.
    drawings : sequence of Drawing
    """

    title: str
    facts: dict[str, str]
    tables: Sequence[Table]
    drawings: Sequence[Drawing] = field(default=())

    def write(self, root: Path) -> tuple[list[Path], list[Path]]:
        """Below ``root``, the files in ``tables/`` and those in ``figures/``."""
        tables = [path for table in self.tables for path in table.write(root / "tables", self.title)]
        figures = [path for drawing in self.drawings for path in drawing.write(root / "figures")]
        return tables, figures

    def main(self) -> str:
        """The title and the main table, for a terminal."""
        return f"\n{self.title}\n{self.tables[0].markdown()}"
