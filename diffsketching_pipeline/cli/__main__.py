# SPDX-License-Identifier: Apache-2.0
"""`python -m diffsketching_pipeline.cli`: the `diffsketching` command where it is not on the path."""

from diffsketching_pipeline.cli import main


if __name__ == "__main__":
    main()
