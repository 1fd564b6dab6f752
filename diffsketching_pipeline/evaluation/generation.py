# SPDX-License-Identifier: Apache-2.0
"""Images of a model, for drawings, into files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from diffsketching_pipeline import DiffSketchingPipeline
from diffsketching_pipeline.evaluation.cost import CostMeter
from diffsketching_pipeline.evaluation.image_sets import save_png
from diffsketching_pipeline.evaluation.systems import Job, System


@dataclass
class Plan:
    """A system, the pipeline that generates for it, and the images it is to make."""

    system: System
    pipeline: DiffSketchingPipeline
    jobs: list[Job]

    @property
    def networks(self) -> dict[str, nn.Module]:
        return {name: c for name, c in self.pipeline.components.items() if isinstance(c, nn.Module)}


def labels_to_give(jobs: Sequence[Job], class_labels: str) -> list[str] | None:
    """The class of each drawing's folder, or `None` to let the pipeline guess."""
    return [job.drawing.label for job in jobs] if class_labels == "folder" else None


def generate(plan: Plan, class_labels: str, batch_size: int, accelerator: Accelerator) -> None:
    """Generates the images that do not exist yet, shared among the processes; each file says what it cost."""
    plan.pipeline.to(accelerator.device)
    uses_class = plan.system.uses_class(plan.pipeline)
    # Shared out before looking what exists, or a slow process would see a fast one's images and share differently.
    accelerator.wait_for_everyone()
    with accelerator.split_between_processes(plan.jobs) as share:
        share = [job for job in share if not job.path.is_file()]
        progress = tqdm(
            total=len(share),
            desc=f"Generating {plan.system.name}",
            unit="image",
            disable=not accelerator.is_local_main_process,
        )
        for first in range(0, len(share), batch_size):
            batch = share[first : first + batch_size]
            with CostMeter(plan.networks, len(batch), accelerator.device) as meter:
                output = plan.system.sample(plan.pipeline, batch, labels_to_give(batch, class_labels))
            for job, image, label in zip(batch, output.images, output.class_labels, strict=True):
                texts = {"seed": str(job.seed), "cost": json.dumps(meter.cost)}
                texts |= {} if label is None or not uses_class else {"class_label": str(label)}
                save_png(image, job.path, texts)
            progress.update(len(batch))
        progress.close()
    # A UNet of its own would count towards the next system's memory.
    plan.pipeline.unet.to("cpu")
    accelerator.wait_for_everyone()
