# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "diffsketching_pipeline/__init__.py").read_text(), re.M).group(
    1
)

EVALUATE = [
    "lpips>=0.1.4",
    "matplotlib>=3.7",
    "pyyaml>=6.0",
    "torch-fidelity>=0.3",
    "torchmetrics>=1.4",
    "tqdm>=4.65",
]
TRAIN = [
    *EVALUATE,
    "datasets>=3.0",
    "h5py>=3.9",
    "peft>=0.15",
    "tensorboard>=2.14",
    "webdataset>=1.0",
]
DEMO = ["gradio>=6.31"]
TEST = [
    *TRAIN,
    *DEMO,
    "imageio-ffmpeg>=0.5",
    "mypy>=1.11",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "selenium>=4.11",
    "types-PyYAML",
]


class BuildWithModelCard(build_py):
    """Puts `model_card.md` beside the weights it describes, where an export of an installed checkpoint finds it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(
                str(HERE / "model_card.md"),
                str(Path(self.build_lib) / "diffsketching_pipeline/checkpoints/garments-64/README.md"),
            )


setup(
    name="diffsketching_pipeline",
    version=VERSION,
    description="DiffSketching: many photos from one drawing, as a diffusers pipeline",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The DiffSketching Pipeline Authors",
    packages=[
        *find_packages(include=["diffsketching_pipeline", "diffsketching_pipeline.*"]),
        "diffsketching_pipeline.drawings",
    ],
    # The drawings of the demo are the examples.
    package_dir={"diffsketching_pipeline.drawings": "examples/drawings"},
    package_data={
        "diffsketching_pipeline": ["py.typed", "checkpoints/**/*"],
        "diffsketching_pipeline.drawings": ["*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.1",
        "cssselect2>=0.8",
        "diffusers>=0.39",
        "filelock>=3.13",
        "fonttools>=4.50",
        "huggingface_hub>=0.34",
        "numpy>=1.26",
        "pillow>=10.1",
        "resvg-py>=0.5",
        "rich>=13.0",
        "safetensors>=0.8",
        "scikit-image>=0.22",
        "scipy>=1.11.2",
        "tinycss2>=1.4",
        "torch>=2.6",
        "torchvision>=0.21",
        "transformers>=4.56",
        "typer>=0.16",
    ],
    cmdclass={"build_py": BuildWithModelCard},
    extras_require={"demo": DEMO, "evaluate": EVALUATE, "train": TRAIN, "test": TEST},
    entry_points={"console_scripts": ["diffsketching=diffsketching_pipeline.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
