# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from testing_utils import TRAINING
from transformers import ResNetConfig, ResNetForImageClassification

from diffsketching_pipeline import (
    DiffSketchingPipeline,
    NoisyImageClassifier,
    PhotoSketcher,
    SketchProcessor,
    unet_surgery,
)
from diffsketching_pipeline.evaluation import systems
from diffsketching_pipeline.evaluation.cost import CostMeter, count_evaluations, measure_memory
from diffsketching_pipeline.evaluation.generation import Plan
from diffsketching_pipeline.evaluation.image_sets import open_image, read_drawings, squash
from diffsketching_pipeline.evaluation.run import main
from diffsketching_pipeline.evaluation.systems import Job, System
from diffsketching_pipeline.losses import SketchPerceptualLoss


# Each generates and scores.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline():
    """Every component that guides, tiny and untrained."""
    torch.manual_seed(0)
    shape = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DModel(
        **shape,
        in_channels=4,
        out_channels=3,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )
    classifier = NoisyImageClassifier(
        **shape, num_classes=2, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), attention_head_dim=8
    )
    config = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    config.num_labels = 2
    pipe = DiffSketchingPipeline(
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=0, timestep_spacing="leading"),
        classifier=classifier,
        sketcher=PhotoSketcher(ngf=4, n_blocks=1),
        sketch_encoder=ResNetForImageClassification(config).eval(),
        id2label={0: "disc", 1: "square"},
        recommended={"num_inference_steps": 4, "sketch_guidance_scale": 2.0, "classifier_guidance_scale": 3.0},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def jobs(drawings_dir, tmp_path):
    drawings = [read_drawings(drawings_dir)[i] for i in (1, 9)]
    return [Job(drawing, drawing.path, 5 + i, tmp_path / f"{i}.png") for i, drawing in enumerate(drawings)]


def sample(system, pipeline, jobs, class_labels=None):
    return system.sample(system.build(pipeline), jobs, class_labels, output_type="pt").images


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# -- what the UNet is not told --


@torch.no_grad()
def test_a_unet_without_sketch_computes_what_the_null_sketch_gives(pipeline):
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([10, 700]), torch.tensor([0, 1])
    expected = pipeline.unet(torch.cat([x, torch.zeros(2, 1, 16, 16)], dim=1), t, y).sample
    narrow = unet_surgery.without_sketch(pipeline.unet)
    assert narrow.config.in_channels == 3 and pipeline.unet.config.in_channels == 4
    torch.testing.assert_close(narrow(x, t, y).sample, expected)


@torch.no_grad()
def test_a_unet_without_class_takes_all_classes_for_none(pipeline):
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 700])
    null = torch.full((2,), pipeline.null_class)
    expected = pipeline.unet(x, t, null).sample
    blind = unet_surgery.without_class(pipeline.unet, pipeline.null_class)
    torch.testing.assert_close(blind(x, t, torch.tensor([0, 1])).sample, expected)
    assert not torch.allclose(pipeline.unet(x, t, torch.tensor([0, 1])).sample, expected)


def test_unconditional_images_are_those_of_no_drawing_and_no_class(pipeline, jobs):
    system = System("floor", ("class", "sketch"), classifier_guidance_scale=0.0)
    images = sample(system, pipeline, jobs)
    expected = pipeline(
        None, [None, None], 1, classifier_guidance_scale=0.0, generator=generators(5, 6), output_type="pt"
    ).images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
    other = sample(system, pipeline, [job._replace(sketch=jobs[0].sketch) for job in jobs])
    assert torch.equal(images, other)
    built = system.build(pipeline)
    assert not system.uses_drawing(built) and not system.uses_class(built)


def test_a_withheld_drawing_still_starts_guides_and_names_the_class(pipeline, jobs):
    plain = System("x", ("class", "sketch"), classifier_guidance_scale=0.0)
    unconditional = sample(plain, pipeline, jobs)
    for change in (
        {"strength": 0.5},
        {"perceptual_guidance_scale": 0.5},
        {"classifier_guidance_scale": 20.0},
        {"drop": ("sketch",)},
    ):
        system = systems.replace(plain, **change)
        images = sample(system, pipeline, jobs)
        assert not torch.allclose(images, unconditional, atol=1e-3), change
        assert system.uses_drawing(system.build(pipeline))
    # SDEdit as it is written: noise the drawing, go on without it.
    narrow = DiffSketchingPipeline.from_pipe(pipeline, unet=unet_surgery.without_sketch(pipeline.unet))
    paths = [str(job.sketch) for job in jobs]
    expected = narrow(paths, ["disc", "square"], 1, strength=0.5, generator=generators(5, 6), output_type="pt").images
    images = sample(System("sdedit", ("sketch",), strength=0.5), pipeline, jobs, ["disc", "square"])
    torch.testing.assert_close(images, expected)


def test_dropping_a_class_needs_no_class(pipeline):
    unet = UNet2DModel.from_config(pipeline.unet.config, num_class_embeds=2)
    with pytest.raises(ValueError, match="'blind' has `drop` class, but the UNet has no 'no class'"):
        System("blind", ("class",)).build(DiffSketchingPipeline.from_pipe(pipeline, unet=unet))


def test_a_scheduler_keeps_the_noise_schedule_and_the_clipping(pipeline):
    system = System("dpm", scheduler="DPMSolverMultistepScheduler", timestep_spacing="linspace", num_inference_steps=3)
    built = system.build(pipeline)
    assert isinstance(built.scheduler, DPMSolverMultistepScheduler)
    assert built.scheduler.config.algorithm_type == "dpmsolver++"
    assert built.scheduler.config.clip_sample and built.scheduler.config.timestep_spacing == "linspace"
    assert torch.equal(built.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    settings = system.resolve(built)
    assert settings["num_inference_steps"] == 3 and settings["sketch_guidance_scale"] == 2.0
    assert isinstance(pipeline.scheduler, DDIMScheduler)


@pytest.mark.parametrize(
    ("system", "message"),
    [
        (System("b", scheduler="UniPCMultistepScheduler", eta=0.5), "'b'.*`eta=0.5`.*DDIM"),
        (System("c", strength=0.1, num_inference_steps=5), "'c'.*`strength=0.1`.* 5"),
        (
            System("d", ("sketch",), sketch_guidance_scale=2.0),
            "'d'.*`sketch_guidance_scale=2.0`",
        ),
        (System("e", timestep_spacing="linspace"), "'e'.*DDIMScheduler.*linspace"),
        (System("f", sketch_abstraction=0.5), "'f'.*`sketch_abstraction=0.5`"),
    ],
)
def test_what_cannot_be_generated_is_known_before(system, message, pipeline):
    with pytest.raises(ValueError, match=message):
        system.check(system.build(pipeline))


# -- files of systems --


def test_systems_are_read_in_order(tmp_path):
    path = tmp_path / "systems.yaml"
    path.write_text("full:\nfloor: {drop: [sketch, class], eta: 0}\nsdedit-0.5: {drop: sketch, strength: 0.5}\n")
    full, floor, sdedit = systems.read_systems(str(path))
    assert full == System("full")
    assert floor == System("floor", ("class", "sketch"), eta=0)
    assert sdedit == System("sdedit-0.5", ("sketch",), strength=0.5)
    # What the file says wins over what the script is given.
    assert systems.with_defaults(floor, {"eta": 0.7, "num_inference_steps": 9}).eta == 0
    assert systems.with_defaults(floor, {"eta": 0.7, "num_inference_steps": 9}).num_inference_steps == 9
    # Nobody can be told how far off a drawing is that they are not shown.
    assert systems.with_defaults(full, {"sketch_abstraction": 0.5}).sketch_abstraction == 0.5
    assert systems.with_defaults(sdedit, {"sketch_abstraction": 0.5}).sketch_abstraction is None


def test_the_abstraction_of_a_system_is_that_of_its_images(latent_pipeline, large_sketches, tmp_path):
    from torchvision.utils import save_image

    jobs, images = [], {}
    for i in range(2):
        save_image((large_sketches[i] + 1) / 2, tmp_path / f"{i}.png")
        jobs.append(Job(None, tmp_path / f"{i}.png", i, tmp_path / f"out{i}.png"))
    for value in (None, 0.75):
        system = System("told", sketch_abstraction=value, num_inference_steps=2, sketch_guidance_scale=1.0)
        built = system.build(latent_pipeline)
        system.check(built)
        assert system.resolve(built)["sketch_abstraction"] == (value or 0.0)
        images[value] = system.sample(built, jobs, ["a", "b"], output_type="pt").images
        assert built.sketch_abstraction == (value or 0.0)
    assert (images[None] - images[0.75]).abs().max() > 1e-3


def test_the_old_name_of_a_setting_is_read_with_a_warning(tmp_path):
    path = tmp_path / "systems.yaml"
    path.write_text("floor: {withhold: [sketch, class], eta: 0}\n")
    with pytest.warns(FutureWarning, match="`withhold` is now `drop`"):
        assert systems.read_systems(str(path)) == [System("floor", drop=("class", "sketch"), eta=0)]
    path.write_text("floor: {withhold: sketch, drop: class}\n")
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="'floor'.*`withhold`.*`drop`"):
        systems.read_systems(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a, b]", "`systems`.* list"),
        ("a: {b", "is not YAML"),
        ("a/b: {}", "'a/b' must be a name"),
        ("a: 3", "'a'.*`setting: value`.* 3"),
        ("a: {strenght: 0.5}", "'a'.*'strenght'.*`strength`"),
        ("a: {drop: photo}", r"'a'.*`drop`.*'photo'"),
        ("a: {scheduler: Euler}", "'a'.*`scheduler` 'Euler'.*DDIMScheduler"),
        ("a: {strength: half}", "'a'.*`strength`.*'half'"),
    ],
)
def test_unreadable_systems_are_errors(text, message, tmp_path):
    path = tmp_path / "systems.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        systems.read_systems(str(path))
    with pytest.raises(ValueError, match="`systems` must be a YAML file"):
        systems.read_systems(str(tmp_path / "none.yaml"))


def test_shipped_systems_are_readable_and_floors_see_no_drawing(pipeline):
    folder = TRAINING / "configs"
    paths = sorted(folder.glob("systems_*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        for system in systems.read_systems(str(path)):
            built = system.build(pipeline)
            system.check(built)
            assert system.uses_drawing(built) == (system.name != "unconditional")


# -- cost --


def test_evaluations_are_counted_for_every_network(pipeline, jobs):
    def evaluations(**settings):
        system = System("x", **settings)
        built = system.build(pipeline)
        networks = Plan(system, built, jobs).networks
        with CostMeter(networks, len(jobs), torch.device("cpu")) as meter:
            system.sample(built, jobs, None)
        assert meter.cost["seconds"] > 0 and meter.cost["batch_size"] == 2 and "cpu" in meter.cost["machine"]
        return meter.cost["network_evaluations"]

    off = {"sketch_guidance_scale": 1.0, "classifier_guidance_scale": 0.0}
    assert evaluations(**off) == {"unet": 4, "sketch_encoder": 1}
    assert evaluations(**off | {"sketch_guidance_scale": 3.0}) == {"unet": 8, "sketch_encoder": 1}
    assert evaluations(**off | {"classifier_guidance_scale": 1.0}) == {"unet": 4, "classifier": 4, "sketch_encoder": 1}
    # The drawing goes through F_s for its class and for its features, and what P draws at each step.
    perceptual = {"unet": 4, "sketcher": 4, "sketch_encoder": 6}
    assert evaluations(**off | {"perceptual_guidance_scale": 0.1}) == perceptual
    assert evaluations(**off, drop=("class", "sketch")) == {"unet": 4}
    assert evaluations(**off, strength=0.5) == {"unet": 2, "sketch_encoder": 1}
    # Where no class is used, none is guessed.
    assert evaluations(**off, strength=0.5, drop=("class", "sketch")) == {"unet": 2}


@pytest.mark.slow
def test_memory_is_that_of_one_batch_in_a_fresh_process(pipeline, jobs, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    memory = measure_memory(str(tmp_path / "model"), torch.float32, System("x"), jobs * 32, None, tmp_path / "small")
    assert memory["batch_size"] == 64
    if memory["peak_memory"] is None:
        pytest.skip(memory["reason"])
    # 128 rows of at least one map of 8 channels at 16 x 16 in float32; the machine's own noise is smaller.
    assert 128 * 8 * 16 * 16 * 4 < memory["peak_memory"] < 2**31
    (tmp_path / "small" / "memory.json").write_text(json.dumps({"batch_size": 1, "peak_memory": 7}))
    again = measure_memory(str(tmp_path / "model"), torch.float32, System("x"), jobs, None, tmp_path / "small")
    assert again["peak_memory"] == 7


# -- the whole script --


@pytest.mark.slow
def test_systems_become_columns_with_costs_and_losses(pipeline, arguments, drawings_dir, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    content = {
        "full": {"classifier_guidance_scale": 1.0},
        "floor": {"drop": ["sketch", "class"], "classifier_guidance_scale": 0},
        "unipc": {"scheduler": "UniPCMultistepScheduler", "classifier_guidance_scale": 0},
    }
    (tmp_path / "systems.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    args = arguments(
        model=str(tmp_path / "model"),
        systems=str(tmp_path / "systems.yaml"),
        num_images_per_sketch=3,
        num_inference_steps=3,
        perceptual_sketch_distance=True,
    )
    scores = main(args)
    out = tmp_path / "out"
    assert list(scores)[:3] == ["full", "floor", "unipc"] and list(scores)[-1] == "noise"
    assert {path.name for path in (out / "images").iterdir()} == {"full", "floor", "unipc"}

    # 1. Same drawings, seeds and N; each number says how its images were made.
    seeds = [
        [Image.open(path).info["seed"] for path in sorted((out / "images" / name).glob("*/*.png"))] for name in content
    ]
    assert len(seeds[0]) == 36 and seeds[0] == seeds[1] == seeds[2]
    names = {name: scores[name]["precision"].name for name in content}
    assert "DDIMScheduler, timestep_spacing=leading, num_inference_steps=3" in names["full"]
    assert "UniPCMultistepScheduler" in names["unipc"] and "the UNet is not told" not in names["unipc"]
    assert "the UNet is not told the sketch and the class" in names["floor"]
    assert "class predicted" in names["full"] and "class predicted" not in names["floor"]
    assert "conditioning_class_accuracy" not in scores["floor"] and scores["full"]["conditioning_class_accuracy"]

    # 2. Costs.
    assert scores["full"]["network_evaluations"].value == 3 * 2 + 3 + 1
    assert scores["floor"]["network_evaluations"].value == 3
    assert scores["unipc"]["network_evaluations"].value == 3 * 2 + 1
    assert "3 of classifier, 1 of sketch_encoder, 6 of unet" in scores["full"]["network_evaluations"].name
    assert (
        0 < scores["full"]["seconds_per_image"].value < 60
        and "batch: 4-32" in scores["full"]["seconds_per_image"].name
    )
    assert "seconds_per_image" not in scores["noise"] and "peak_memory" not in scores["full"]

    # 3. L_p is what the model's networks say of each stored image.
    drawings = read_drawings(drawings_dir)
    distances = []
    for drawing in drawings:
        for n in range(3):
            image = squash(open_image(out / "images" / "full" / drawing.label / f"{drawing.name}_{n}.png"), 16)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                sketch = SketchProcessor(16).preprocess(str(drawing.path))
                distances.append(
                    SketchPerceptualLoss(pipeline.sketch_encoder)(pipeline.sketcher(pixels), sketch).item()
                )
    measured = scores["full"]["perceptual_sketch_distance"]
    assert measured.value == pytest.approx(np.mean(distances), rel=1e-4) and "not a judge" in measured.title
    assert scores["noise"]["perceptual_sketch_distance"].value != pytest.approx(measured.value)

    # 4. What a second call may not mix up.
    saved = json.loads((out / "metrics.json").read_text())
    assert saved["settings"]["systems"]["floor"]["withhold"] == ["class", "sketch"]
    assert saved["settings"]["systems"]["unipc"]["num_inference_steps"] == 3
    content["floor"]["strength"] = 0.5
    (tmp_path / "systems.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match="images generated with another strength"):
        main(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": "nowhere.yaml", "images": ["{out}"]}, "`systems` needs a `model`"),
        ({"measure_memory": True, "images": ["{out}"]}, "`measure_memory` needs a `model`"),
        ({"model": "{model_dir}", "systems": "nowhere.yaml"}, "`systems`.*'nowhere.yaml'"),
        (
            {"model": "{model_dir}", "perceptual_sketch_distance": True},
            "`model`.*`sketcher`",
        ),
        ({"model": "{model_dir}", "systems": "noise: {{}}"}, "`systems`.*'noise'"),
    ],
)
def test_bad_systems_are_errors_before_any_work(changes, message, arguments, model_dir, tmp_path):
    def fill(value):
        if isinstance(value, list):
            return [fill(item) for item in value]
        return value.format(model_dir=model_dir, out=tmp_path) if isinstance(value, str) else value

    changes = {name: fill(value) for name, value in changes.items()}
    if "{" in str(changes.get("systems")):
        (tmp_path / "systems.yaml").write_text(changes["systems"])
        changes["systems"] = str(tmp_path / "systems.yaml")
    with pytest.raises(ValueError, match=message):
        main(arguments(**changes))
    assert not (tmp_path / "out").exists()


def test_what_an_autoencoder_decodes_is_counted():
    widths = {"encoder_block_out_channels": (4,), "decoder_block_out_channels": (4,)}
    vae = AutoencoderTiny(**widths, num_encoder_blocks=(1,), num_decoder_blocks=(1,), latent_channels=4)
    with count_evaluations({"vae": vae}) as counts, torch.no_grad():
        vae.decode(torch.zeros(3, 4, 8, 8))
        vae.decode(torch.zeros(1, 4, 8, 8))
        vae.encode(torch.zeros(2, 3, 8, 8))
    assert counts == {"vae": 6}
