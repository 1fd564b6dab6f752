# SPDX-License-Identifier: Apache-2.0
"""Trains P, which turns a photo into a drawing, as "Photo-Sketching" (Li et al., WACV 2019) does.

    python training/train_sketcher.py training/configs/sketcher_garments64.yaml --train_data_dir DIR

A conditional GAN whose generator is `PhotoSketcher` and whose discriminator looks at patches of photo and drawing. One
photo has N valid drawings, and averaging them would blur: the L1 term counts the nearest of them only. The N drawings
are contours at several scales made by `images/contours.py`; no human drawing is needed. The result is `output_dir/sketcher`.

`--direction sketch_to_photo` trains the same networks the other way round; `train_gan_baseline.py` makes that a system that
can be evaluated.
"""

from diffsketching_pipeline.stopping import stoppable
from diffsketching_pipeline.training.arguments import parse_args
from diffsketching_pipeline.training.image_to_image import SketcherArguments, train


def main() -> None:
    train(parse_args(SketcherArguments, description=__doc__), "sketcher")


if __name__ == "__main__":
    with stoppable(__file__):
        main()
