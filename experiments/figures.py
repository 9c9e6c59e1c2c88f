"""The figures of a prompted experiment."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments import style
from experiments.results import METHOD, Section, table

DEPTHS = 10  # labels that fit beside a panel


@style.house
def curve(section: Section) -> Figure:
    """Accuracy against skip ratio, a panel a haystack, with dense as the line to hold."""
    rows = table(section, ["haystack"]).query("method != 'sdpa'")  # dense again: a baseline for time
    haystacks = sorted(rows["haystack"].unique())
    figure, axes = style.subplots(1, len(haystacks), 4.0, 3.2, sharey=True)
    series = list(dict.fromkeys(zip(rows["method"], rows["calibration"], strict=True)))
    for axis, haystack in zip(axes[0], haystacks, strict=True):
        panel = rows[rows["haystack"] == haystack]
        for number, (method, calibration) in enumerate(series):
            line = panel[(panel["method"] == method) & (panel["calibration"] == calibration)].sort_values("skip_ratio")
            score = 100 * line["score"]
            axis.errorbar(
                100 * line["skip_ratio"],
                score,
                yerr=[score - 100 * line["score_low"], 100 * line["score_high"] - score],
                label=f"{method}, calibrated on {calibration}" if calibration else method,
                capsize=2,
                linewidth=1.2,
                markersize=5,
                **style.look(number),
            )
        dense = panel[panel["method"] == "dense"]["score"]
        if len(dense):
            axis.axhline(100 * float(dense.iloc[0]), color=style.PASS_LINE, linestyle="--", linewidth=1)
        axis.set(title=haystack, xlabel="blocks skipped, %", ylim=(-4, 104))
    axes[0][0].set_ylabel("needles found, % (95% interval)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(section.title, fontsize=8)
    return figure


@style.house
def heatmap(section: Section) -> Figure:
    """Accuracy by length and depth, a panel a method."""
    names = table(section, [])[METHOD].itertuples(index=False)
    samples = section.samples.set_index(METHOD).sort_index()
    panels = [(name, samples.loc[[tuple(name)]]) for name in names]
    columns = min(4, len(panels))
    figure, axes = style.subplots(-(-len(panels) // columns), columns, 2.4, 2.2, sharex=True, sharey=True)
    image = None
    for axis, (name, panel) in zip(axes.flat, panels, strict=False):
        grid = panel.pivot_table(index="depth", columns="length", values="score", aggfunc="mean")
        image = axis.imshow(100 * grid, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        axis.set_xticks(range(grid.shape[1]), [f"{length / 1024:g}K" for length in grid.columns])
        labelled = range(0, len(grid), -(-len(grid) // DEPTHS))
        axis.set_yticks(labelled, [f"{grid.index[row]:g}" for row in labelled])
        axis.grid(False)
        data = f"({name.calibration})" if name.calibration else ""
        axis.set_title(" ".join(part for part in (name.method, name.strength, data) if part), fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("prompt length, tokens", fontsize=9)
    figure.supylabel("needle depth, %", fontsize=9)
    figure.colorbar(image, ax=axes, label="needles found, %")
    figure.suptitle(section.title, fontsize=8)
    return figure
