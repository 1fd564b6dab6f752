# SPDX-License-Identifier: Apache-2.0
"""The tables of results in `model_card.md` and README.md are what `training/evaluate.py` measured."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from testing_utils import ROOT

from diffsketching_pipeline.hub.model_card import read_metrics


RESULTS = ROOT / "training" / "results" / "garments-64"
# `<!-- results: FILE METRIC METRIC ... -->`, then a table with a system per row and its measurements in that order.
TABLE = re.compile(r"<!-- results: (\S+) (.+?) -->\n\|.*\n\|[-| ]+\n((?:\|.*\n)+)")
CELL = re.compile(r"(-?[\d.]+)(?: \[(-?[\d.]+), (-?[\d.]+)\])?")


def agrees(shown: str, value: float) -> bool:
    """Return whether a number as shown is that value, rounded to as many decimals."""
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5001 * 10**-decimals


def tables():
    for name in ("README.md", "model_card.md"):
        for match in TABLE.finditer((ROOT / name).read_text(encoding="utf-8")):
            yield pytest.param(*match.groups(), id=f"{name}-{match[1]}")


def test_there_are_tables():
    assert len(list(tables())) >= 3


@pytest.mark.parametrize(("file", "metrics", "rows"), list(tables()))
def test_a_table_is_what_was_measured(file, metrics, rows):
    measured = json.loads((RESULTS / file).read_text())["systems"]
    for row in rows.splitlines():
        system, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        system = re.search(r"`(\S+)`", system)[1]
        for metric, cell in zip(metrics.split(), cells, strict=True):
            measurement = measured[system].get(metric)
            if not cell:
                assert measurement is None or measurement["value"] is None, (system, metric)
                continue
            value, low, high = CELL.fullmatch(cell).groups()
            assert agrees(value, measurement["value"]), (system, metric, cell, measurement["value"])
            if low is not None:
                assert agrees(low, measurement["interval"][0]) and agrees(high, measurement["interval"][1]), cell


def test_the_metadata_is_what_was_measured():
    evaluation = read_metrics(RESULTS / "report.json")
    own = evaluation.systems[evaluation.own]
    results = ModelCard((ROOT / "model_card.md").read_text(encoding="utf-8")).data.eval_results
    assert {result.metric_type for result in results} == {k for k, m in own.items() if m["value"] is not None}
    for result in results:
        assert result.metric_value == pytest.approx(own[result.metric_type]["value"], rel=1e-3, abs=1e-9)
