# SPDX-License-Identifier: Apache-2.0
"""A slice of `fuzz_folders.py`; all of it with `FUZZ_CASES=600`."""

import os

import pytest
from fuzz_folders import KINDS, make_bases, run_kind


pytestmark = pytest.mark.slow

CASES = int(os.environ.get("FUZZ_CASES", 40))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = make_bases(tmp_path_factory.mktemp("bases"))
    for kind in KINDS:
        list(run_kind(kind, range(2), root))  # what is imported at the first use is no part of what a case costs
    return root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, count", [("folder", CASES), ("checkpoint", CASES // 2)])
def test_whatever_is_wrong_with_a_file_is_one_clear_error(kind, count, bases):
    outcomes = list(run_kind(kind, range(count), bases))
    assert [f"{o.what}: {o.case}: {o.message}" for o in outcomes if o.what not in ("read", "refused")] == []
    # Mutations that change nothing, or nothing but, would test nothing.
    assert {"read", "refused"} == {o.what for o in outcomes}
