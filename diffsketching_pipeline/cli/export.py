# SPDX-License-Identifier: Apache-2.0
"""The command `export`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from diffsketching_pipeline.cli.model_options import (
    CARD_OPTION,
    DTYPE_OPTION,
    FP16_OPTION,
    LICENSE_OPTION,
    METRICS_OPTION,
    MODEL_ARGUMENT,
    SHARD_OPTION,
    load_to_save,
)
from diffsketching_pipeline.cli.options import DtypeName, user_errors


def export(
    model: Annotated[str, MODEL_ARGUMENT],
    output_dir: Annotated[Path, typer.Argument(help="New folder.")],
    save_dtype: Annotated[DtypeName, DTYPE_OPTION] = DtypeName.float32,
    fp16_variant: Annotated[bool, FP16_OPTION] = False,
    max_shard_size: Annotated[str, SHARD_OPTION] = "10GB",
    model_card: Annotated[Optional[Path], CARD_OPTION] = None,
    metrics: Annotated[Optional[Path], METRICS_OPTION] = None,
    license: Annotated[Optional[str], LICENSE_OPTION] = None,
) -> None:
    """Write a folder that loads anywhere: with this package, or with its own code where that is not installed."""
    from diffsketching_pipeline import export_pipeline
    from diffsketching_pipeline.files import check_output_dir

    with user_errors((ValueError, OSError)):
        check_output_dir(output_dir)
        export_pipeline(
            load_to_save(model, save_dtype),
            output_dir,
            fp16_variant=fp16_variant,
            max_shard_size=max_shard_size,
            model_card=model_card,
            metrics=metrics,
            license=license,
        )
    print(output_dir)
