"""What stands under the tables."""

from __future__ import annotations

import pandas as pd

from experiments import paper

INTERVALS = "95%: Wilson's for scores of 0 and 1, bootstrap over samples otherwise"
REACH = "Percent of blocks skipped where a method's curve crosses the cut (nats a token), log-linear between strengths."
POINTS = (
    "KL from dense to the method in nats a token, with a 95% bootstrap interval over texts; means over texts. Needles: "
    "what the same method at the same strength and calibration found in haystacks of that source and length, "
    "experiment=niah; dense attention's own are in its row."
)
MEANS = (
    "Means over tasks, each with equal weight: over all that ran, and over those that dense attention is able to do, "
    "where it scores at least 50%. Intervals: bootstrap within tasks. TTFT: median of ratios over samples that one "
    "process ran through both."
)
UNFINISHED = (
    "'n of m tasks': a run that is not finished. Its mean is over other tasks than its neighbours' and not to be "
    "compared with theirs; its difference to dense is over its own prompts alone."
)
WEAK_TASK = "† dense scores under 50% here: the cell says nothing of a method."
BESIDE = (
    "Accuracy and TTFT in % of dense attention's. Our rows are of the tasks that dense attention is able to do. The "
    "paper's are of all its tasks, by its own prompts, on its own model and device, which were not run here."
)
LONGBENCH = (
    "Scores and intervals in points; means over the tasks that ran, each with equal weight. The paper's are of its own "
    "protocol, model and device, which were not run here. Our own scores' ROUGE-L and code similarity stand at another "
    "height than those of LongBench's scripts, task.scorer=lm_eval."
)
WEAK_SCORE = "† dense scores under 10% here: too little to lose."
WEAK_NEEDLES = "† dense scores under 90% here: too little to lose to tell methods apart. "


def needles(rows: pd.DataFrame) -> str:
    """Under a table of needles found."""
    marked = WEAK_NEEDLES if rows["weak_dense"].any() else ""
    return f"{marked}TTFT ratios are medians over samples that one process ran through both. {paper.headline('niah')}"


def means(rows: pd.DataFrame) -> str:
    """Under a table of means over tasks."""
    return f"{MEANS}\n\n{UNFINISHED}" if (rows["tasks"] < rows["of_tasks"]).any() else MEANS
