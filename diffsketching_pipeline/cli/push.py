# SPDX-License-Identifier: Apache-2.0
"""The command `push`."""

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


def push(
    model: Annotated[str, MODEL_ARGUMENT],
    repo_id: Annotated[str, typer.Argument(help="Repository, user/name; made if there is none.")],
    private: Annotated[
        Optional[bool], typer.Option("--private/--public", help="For a new repository. [default: the account's]")
    ] = None,
    revision: Annotated[Optional[str], typer.Option(help="Branch; made if there is none. [default: main]")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose a pull request to main instead.")] = False,
    commit_message: Annotated[Optional[str], typer.Option(help="First line of the commit.")] = None,
    save_dtype: Annotated[DtypeName, DTYPE_OPTION] = DtypeName.float32,
    fp16_variant: Annotated[bool, FP16_OPTION] = False,
    max_shard_size: Annotated[str, SHARD_OPTION] = "10GB",
    model_card: Annotated[Optional[Path], CARD_OPTION] = None,
    metrics: Annotated[Optional[Path], METRICS_OPTION] = None,
    license: Annotated[Optional[str], LICENSE_OPTION] = None,
) -> None:
    """Export a model and upload it as one commit, with the token of `hf auth login` or HF_TOKEN."""
    from diffsketching_pipeline import push_pipeline

    with user_errors((ValueError, OSError)):
        address = push_pipeline(
            load_to_save(model, save_dtype),
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            fp16_variant=fp16_variant,
            max_shard_size=max_shard_size,
            model_card=model_card,
            metrics=metrics,
            license=license,
        )
    print(address)
