"""The names of LongBench v1's English and code tasks (arXiv 2308.14508)."""

from __future__ import annotations

import itertools

GROUPS = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique"),
    "summaries": ("gov_report", "qmsum", "multi_news"),
    "few-shot": ("trec", "triviaqa", "samsum"),
    "synthetic": ("passage_count", "passage_retrieval_en"),
    "code": ("lcc", "repobench-p"),
}
TASKS = tuple(itertools.chain.from_iterable(GROUPS.values()))
UNTEMPLATED = (*GROUPS["few-shot"], *GROUPS["code"])  # what a chat turn would break: examples and code to go on with
