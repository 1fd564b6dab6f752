# SPDX-License-Identifier: Apache-2.0
"""A recipe takes days, so a misspelt argument in its last step would be found late: here all are read at once."""

import dataclasses
import importlib
import re
import shlex
import subprocess

import pytest
from testing_utils import TRAINING

from diffsketching_pipeline.training.arguments import TrainingArguments, parse_args


RECIPES = sorted((TRAINING / "recipes").glob("*.sh"))


def arguments_class(script):
    """The dataclass of arguments that a training script reads, the last that it defines or imports."""
    module = importlib.import_module(script.removesuffix(".py"))
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return [value for value in classes if issubclass(value, TrainingArguments)][-1]


def calls(recipe):
    """`(script, words)` of each training script that a recipe launches, with its variables filled in."""
    text = recipe.read_text().replace("\\\n", " ")
    lists = dict(re.findall(r"^(\w+)=\((.*)\)$", text, re.M))
    found = []
    for line in re.findall(r"^ *(?:accelerate launch|python) (train_\w+\.py .*)$", text, re.M):
        for _ in range(2):
            line = re.sub(r'"\$\{(\w+)\[@\]\}"', lambda match: lists[match[1]], line)
        line = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", line)
        script, *words = shlex.split(line.replace("$configs", str(TRAINING / "configs")))
        found.append((script, words))
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_step_of_a_recipe_has_arguments_that_its_script_knows(recipe):
    subprocess.run(["bash", "-n", str(recipe)], check=True)
    for script, words in calls(recipe):
        if "$" in words[0]:
            continue  # a config chosen in a loop
        args = parse_args(arguments_class(script), words)
        assert args.resume_from_checkpoint == "latest", script


def test_the_recipe_of_256_pixels_trains_what_goes_together():
    steps = [
        (script, parse_args(arguments_class(script), words))
        for script, words in calls(TRAINING / "recipes" / "garments256.sh")
    ]
    names = [script for script, _ in steps]
    assert names == ["train_autoencoder.py"] * 3 + ["train_unet.py", "train_classifier.py"]
    start, joint, decoder, unet, classifier = (args for _, args in steps)
    assert joint.pretrained_model_name_or_path == f"{start.output_dir}/vae" and not joint.freeze_encoder
    assert decoder.pretrained_model_name_or_path == f"{joint.output_dir}/vae" and decoder.freeze_encoder
    for args in (unet, classifier):
        assert args.pretrained_vae_model_name_or_path == f"{decoder.output_dir}/vae" and args.resolution == 256
    assert dataclasses.asdict(start)["optimizer"] == unet.optimizer == "muon"


def test_the_candidates_of_the_bake_off_differ_in_what_is_compared_alone():
    steps = [
        parse_args(arguments_class(script), words) for script, words in calls(TRAINING / "recipes/bake_off_256.sh")
    ]
    start, joint, base, *others = steps
    assert start.latent_channels == joint.latent_channels == 4
    assert joint.pretrained_model_name_or_path == f"{start.output_dir}/vae"
    assert base.max_train_minutes == 20
    differences = [
        {name for name, value in dataclasses.asdict(other).items() if value != dataclasses.asdict(base)[name]}
        for other in others
    ]
    autoencoder = "pretrained_vae_model_name_or_path"
    assert [sorted(names - {"output_dir"}) for names in differences] == [
        ["seed"],
        ["learning_rate", "optimizer"],
        [autoencoder],
        ["prediction_type", autoencoder, "snr_gamma"],
    ]
