# SPDX-License-Identifier: Apache-2.0
"""Run analyze_user_study.py, whose former name this is; accepted for one version."""

import runpy
from pathlib import Path

from diffsketching_pipeline.deprecation import warn_renamed


if __name__ == "__main__":
    warn_renamed("analyse_user_study.py", "analyze_user_study.py", stacklevel=1)
    runpy.run_path(str(Path(__file__).with_name("analyze_user_study.py")), run_name="__main__")
