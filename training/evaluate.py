# SPDX-License-Identifier: Apache-2.0
"""Scores photos made from drawings: `diffsketching evaluate` as a script, for `accelerate launch`.

    accelerate launch training/evaluate.py --model PIPELINE --sketches DRAWINGS ...

`--help` says more; what is behind it is in `diffsketching_pipeline/evaluation`.
"""

from diffsketching_pipeline.evaluation.run import run
from diffsketching_pipeline.stopping import stoppable


if __name__ == "__main__":
    with stoppable(__file__):
        run()
