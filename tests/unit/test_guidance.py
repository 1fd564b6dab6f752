# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from testing_utils import SIZE, along, cosine_alphas_cumprod, directional_derivatives, randn

from diffsketching_pipeline import ClassifierGuidanceCallback, GuidanceCallback, SketchGuidanceCallback
from diffsketching_pipeline.conditioning import Conditioning
from diffsketching_pipeline.denoising import checkpointed, predict_noise
from diffsketching_pipeline.guidance import GUIDANCE_TENSOR_INPUTS, GuidedPredictor, float32_call, is_guided_step


TIMESTEP = 300


def make_kwargs(pipe, sketch, owner=(0, 1), attached=False, clip_sample=False, labels=(0, 2), latents=None):
    """Make what the pipeline hands to a callback: the base prediction at `TIMESTEP` for two images."""
    latents = 0.2 * randn(2, 3, SIZE, SIZE, seed=7) if latents is None else latents
    owner = torch.tensor(owner)
    conditioning = Conditioning(torch.tensor(labels)[owner], sketch, owner)
    with torch.set_grad_enabled(attached):
        latents = latents.clone().requires_grad_(attached)
        base = predict_noise(
            *(pipe.unet, pipe.unet.config, pipe.scheduler, latents, torch.tensor(TIMESTEP)),
            conditioning,
            clip_sample=clip_sample,
        )
    return {
        "latents": latents,
        "noise_pred": base.noise_pred,
        "pred_original_sample": base.pred_original_sample,
        "alpha_prod": cosine_alphas_cumprod()[TIMESTEP].float().reshape(1, 1, 1, 1),
        "class_labels": conditioning.class_labels,
        "sketch": sketch,
        "owner": owner,
        "row_shares": 1 / torch.bincount(owner)[owner],
        "noise_pred_delta": torch.zeros_like(latents),
    }


def delta_of(callback, pipe, kwargs):
    return callback.noise_delta(pipe, torch.tensor(TIMESTEP), {**kwargs, "predictor": pipe.predictor})


def unit(x):
    return x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def norms(x):
    return x.flatten(1).norm(dim=1)


class AddConstant(PipelineCallback):
    """A callback as a user would write it, without anything of ours."""

    tensor_inputs = ["latents", "noise_pred_delta"]

    def __init__(self, value):
        super().__init__()
        self.value, self.seen = value, []

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.seen.append((step_index, int(timestep), sorted(callback_kwargs)))
        callback_kwargs["noise_pred_delta"] = callback_kwargs["noise_pred_delta"] + self.value
        return callback_kwargs


# ---- the gradients ----------------------------------------------------------------------------------------------------


def test_classifier_gradient_matches_finite_differences(tiny_pipeline, sketches):
    kwargs = make_kwargs(tiny_pipeline, sketches[:2])
    classifier = copy.deepcopy(tiny_pipeline.classifier).double()

    def log_prob(x, row):
        return classifier(x, TIMESTEP).logits.log_softmax(dim=-1)[:, (0, 2)[row]]

    directions, derivatives = directional_derivatives(log_prob, kwargs["latents"].double())
    expected = -3.0 * (1 - cosine_alphas_cumprod()[TIMESTEP]).sqrt() * derivatives
    found = delta_of(ClassifierGuidanceCallback(3.0), tiny_pipeline, kwargs)
    torch.testing.assert_close(along(found, directions), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def perceptual_loss(pipe, photo, sketch):
    """Eq. 5 of P(clamp(photo)) and one drawing, in float64."""

    def features(x):
        stem = pipe.sketch_encoder.resnet.embedder.embedder(x)
        maps = [stem, *pipe.sketch_encoder(x, output_hidden_states=True).hidden_states]
        return [m / (m.square().sum(dim=1, keepdim=True) + 1e-10).sqrt() for m in maps]

    pairs = zip(features(pipe.sketcher(photo.clamp(-1, 1))), features(sketch), strict=True)
    return sum((a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs)


def in_double(make, **kwargs):
    pipe = make(**kwargs)
    for name in ("unet", "sketcher", "sketch_encoder"):
        getattr(pipe, name).double()
    return pipe


@pytest.mark.parametrize("through_unet", [False, True])
def test_perceptual_gradient_matches_finite_differences(through_unet, tiny_pipeline_factory, sketches):
    pipe, double = tiny_pipeline_factory(), in_double(tiny_pipeline_factory)
    kwargs = make_kwargs(pipe, sketches[:2], attached=through_unet)
    assert kwargs["pred_original_sample"].abs().max() < 1
    alpha, noise_pred = cosine_alphas_cumprod()[TIMESTEP], kwargs["noise_pred"].detach().double()

    def loss(x, row):
        sketch = sketches[row : row + 1].double().expand(len(x), -1, -1, -1)
        if through_unet:
            v = double.unet(torch.cat([x, sketch], dim=1), TIMESTEP, torch.full((len(x),), (0, 2)[row])).sample
            photo = alpha.sqrt() * x - (1 - alpha).sqrt() * v
        else:
            photo = (x - (1 - alpha).sqrt() * noise_pred[row]) / alpha.sqrt()
        return perceptual_loss(double, photo, sketch)

    directions, expected = directional_derivatives(loss, kwargs["latents"].detach().double())
    found = delta_of(SketchGuidanceCallback(0.2, through_unet=through_unet), pipe, kwargs).double()
    # The norm is set, so that of the gradient cannot be read off: the derivatives agree up to one factor per image.
    ours = along(found, directions)
    factor = (ours * expected).sum(dim=1, keepdim=True) / ours.square().sum(dim=1, keepdim=True)
    assert (factor > 0).all()
    torch.testing.assert_close(factor * ours, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    size = 0.2 * (1 - alpha).sqrt() * norms(noise_pred)
    torch.testing.assert_close(norms(found), size, rtol=1e-4, atol=0)


def test_the_two_perceptual_gradients_differ(tiny_pipeline, sketches):
    kwargs = make_kwargs(tiny_pipeline, sketches[:2], attached=True)
    held, through = (
        delta_of(SketchGuidanceCallback(0.2, through_unet=through_unet), tiny_pipeline, kwargs)
        for through_unet in (False, True)
    )
    cosine = (unit(held) * unit(through)).flatten(1).sum(dim=1)
    assert (cosine < 0.999).all() and (cosine > 0).all()


def test_several_drawings_of_one_image_pull_by_their_mean(tiny_pipeline_factory, sketches):
    pipe, double = tiny_pipeline_factory(), in_double(tiny_pipeline_factory)
    kwargs = make_kwargs(pipe, sketches, owner=(1, 0, 1))
    assert kwargs["pred_original_sample"].abs().max() < 1
    photo = kwargs["pred_original_sample"].double().requires_grad_(True)
    total = perceptual_loss(double, photo[:1], sketches[1:2].double()) + sum(
        perceptual_loss(double, photo[1:], sketches[i : i + 1].double()) / 2 for i in (0, 2)
    )
    (expected,) = torch.autograd.grad(total.sum(), photo)
    found = delta_of(SketchGuidanceCallback(0.2), pipe, kwargs)
    torch.testing.assert_close(unit(found).double(), unit(expected), rtol=0, atol=1e-4)


def test_saturated_pixels_are_guided_and_do_not_flicker(tiny_pipeline, sketches):
    kwargs = make_kwargs(tiny_pipeline, sketches[:2])
    photo = kwargs["pred_original_sample"].clone()
    photo[:, :, :8] = 1.0
    found = []
    for offset in (-1e-6, 0.0, 1e-6):
        shifted = torch.where(photo == 1.0, photo + offset, photo)
        found.append(delta_of(SketchGuidanceCallback(0.2), tiny_pipeline, {**kwargs, "pred_original_sample": shifted}))
    assert norms(found[1][:, :, :8]).min() > 0.1 * norms(found[1]).max()
    for other in (found[0], found[2]):
        torch.testing.assert_close(other, found[1], rtol=0, atol=1e-3 * float(found[1].abs().max()))


def test_nothing_to_correct_adds_nothing(tiny_pipeline, sketches):
    kwargs = make_kwargs(tiny_pipeline, sketches[:2])
    with torch.no_grad():
        kwargs["sketch"] = tiny_pipeline.sketcher(kwargs["pred_original_sample"].clamp(-1, 1))
    found = delta_of(SketchGuidanceCallback(0.2), tiny_pipeline, kwargs)
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("clip_sample", [True, False])
def test_a_perceptual_gradient_does_not_depend_on_the_batch(clip_sample, tiny_pipeline, sketches):
    latents = 2 * randn(2, 3, SIZE, SIZE, seed=7)
    callback = SketchGuidanceCallback(0.2)
    both = make_kwargs(tiny_pipeline, sketches[:2], clip_sample=clip_sample, latents=latents)
    swapped = make_kwargs(
        *(tiny_pipeline, sketches[[1, 0]]), labels=(2, 0), clip_sample=clip_sample, latents=latents[[1, 0]]
    )
    found = delta_of(callback, tiny_pipeline, swapped)[[1, 0]]
    torch.testing.assert_close(found, delta_of(callback, tiny_pipeline, both), rtol=0, atol=1e-5)


# ---- precision and gradient modes -------------------------------------------------------------------------------------


def fingerprint(module):
    return {name: (x.dtype, x.data_ptr(), x.clone(), x.requires_grad) for name, x in module.named_parameters()}


CALLBACKS = {
    "classifier": lambda: ClassifierGuidanceCallback(3.0),
    "sketch": lambda: SketchGuidanceCallback(0.2),
    "sketch-through-unet": lambda: SketchGuidanceCallback(0.2, through_unet=True),
}


def call(pipe, sketches, generators, callback=None, **kwargs):
    return pipe(
        sketches[:2],
        class_labels=["a", "c"],
        num_images_per_sketch=1,
        num_inference_steps=3,
        guidance_callbacks=callback,
        generator=generators(2),
        output_type="latent",
        **kwargs,
    ).images


@pytest.mark.parametrize(("name", "dtype"), [("classifier", torch.float16), ("sketch", torch.bfloat16)])
def test_gradients_are_float32_whatever_the_weights(name, dtype, tiny_pipeline_factory, sketches):
    pipe, half = tiny_pipeline_factory(), tiny_pipeline_factory()
    kwargs = make_kwargs(pipe, sketches[:2])
    expected = delta_of(CALLBACKS[name](), pipe, kwargs)
    for component in ("classifier", "sketcher", "sketch_encoder"):
        getattr(half, component).to(dtype)
        rounded = getattr(pipe, component).load_state_dict(getattr(half, component).state_dict())
        assert not rounded.missing_keys
    exact = delta_of(CALLBACKS[name](), pipe, kwargs)
    before = {component: fingerprint(module) for component, module in half.components.items() if "cl" in component}
    found = delta_of(CALLBACKS[name](), half, kwargs)
    assert found.dtype == torch.float32
    # Only the weights are rounded: the computation is that of float32.
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))
    assert (unit(found) * unit(expected)).flatten(1).sum(dim=1).min() > 0.95
    for component, parameters in before.items():
        for parameter, (kind, pointer, value, requires_grad) in parameters.items():
            now = getattr(half, component).get_parameter(parameter)
            assert (now.dtype, now.data_ptr(), now.requires_grad) == (kind, pointer, requires_grad)
            assert torch.equal(now, value) and now.grad is None


@pytest.mark.parametrize("name", CALLBACKS)
def test_components_are_not_mutated_by_a_bfloat16_call(name, tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory()
    expected = call(pipe, sketches, generators, CALLBACKS[name]())
    modules = {name: x for name, x in pipe.components.items() if isinstance(x, torch.nn.Module)}
    for module in modules.values():
        module.bfloat16()
    before = {name: fingerprint(module) for name, module in modules.items()}
    found = call(pipe, sketches, generators, CALLBACKS[name]())
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.15 * expected.abs().mean()
    for component, parameters in before.items():
        for parameter, (kind, pointer, value, requires_grad) in parameters.items():
            now = modules[component].get_parameter(parameter)
            assert (now.dtype, now.data_ptr(), now.requires_grad) == (kind, pointer, requires_grad)
            assert torch.equal(now, value) and now.grad is None
        assert not modules[component].training


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("classifier", torch.float32), ("sketch", torch.bfloat16), ("sketch-through-unet", torch.float32)],
)
def test_guidance_works_below_inference_mode(name, dtype, tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory()
    for component in ("unet", "classifier", "sketcher", "sketch_encoder"):
        getattr(pipe, component).to(dtype)
    expected = call(pipe, sketches, generators, CALLBACKS[name]())
    with torch.inference_mode():
        assert torch.equal(call(pipe, sketches, generators, CALLBACKS[name]()), expected)


def test_weights_made_below_inference_mode_are_guided_with(tiny_pipeline_factory, sketches, generators):
    expected = call(tiny_pipeline_factory(), sketches, generators, [make() for make in CALLBACKS.values()])
    with torch.inference_mode():
        pipe = tiny_pipeline_factory()
        found = call(pipe, sketches, generators, [make() for make in CALLBACKS.values()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_float32_weights_are_used_without_a_copy(tiny_pipeline):
    assert float32_call(tiny_pipeline.classifier) is tiny_pipeline.classifier
    half = copy.deepcopy(tiny_pipeline.classifier).bfloat16()
    x = randn(2, 3, SIZE, SIZE)
    found = float32_call(half)(x, 10, return_dict=False)[0]
    torch.testing.assert_close(found, half.float()(x, 10).logits)


# ---- composition and gating -------------------------------------------------------------------------------------------


def test_deltas_are_summed_whatever_the_order(tiny_pipeline, sketches, generators):
    a, b = ClassifierGuidanceCallback(3.0), SketchGuidanceCallback(0.2)
    first = call(tiny_pipeline, sketches, generators, [a, b])
    for same in ([b, a], MultiPipelineCallbacks([a, b]), [MultiPipelineCallbacks([b]), a]):
        if isinstance(same, list) and isinstance(same[0], MultiPipelineCallbacks):
            same = same[0].callbacks + same[1:]
        torch.testing.assert_close(call(tiny_pipeline, sketches, generators, same), first, rtol=0, atol=1e-6)
    by_scale = call(tiny_pipeline, sketches, generators, b, classifier_guidance_scale=3.0)
    torch.testing.assert_close(by_scale, first, rtol=0, atol=1e-6)
    assert (call(tiny_pipeline, sketches, generators, a) - first).abs().max() > 1e-3


def test_a_step_adds_exactly_the_sum(tiny_pipeline, sketches, generators):
    seen = []

    def record(pipe, step_index, timestep, callback_kwargs):
        seen.append(callback_kwargs["noise_pred"])
        return {}

    options = {
        "callback_on_step_end": record,
        "callback_on_step_end_tensor_inputs": ["noise_pred"],
        "guidance_end": 1.0,
    }
    callbacks = {name: make() for name, make in CALLBACKS.items()}
    for some in ([], *([callback] for callback in callbacks.values()), list(callbacks.values())):
        call(tiny_pipeline, sketches, generators, some or None, **options)
    base, *alone, together = seen[::3]
    torch.testing.assert_close(together - base, sum(x - base for x in alone), rtol=0, atol=1e-5)


def test_a_callback_of_the_user_guides(tiny_pipeline, sketches, generators):
    class Expected(GuidanceCallback):
        def noise_delta(self, pipeline, timestep, callback_kwargs):
            return torch.full_like(callback_kwargs["latents"], self.config.scale)

    callback = AddConstant(0.25)
    found = call(tiny_pipeline, sketches, generators, callback)
    assert [step[:2] for step in callback.seen] == [(0, 666), (1, 333), (2, 0)]
    assert set(callback.seen[0][2]) == set(GUIDANCE_TENSOR_INPUTS)
    torch.testing.assert_close(call(tiny_pipeline, sketches, generators, Expected(0.25)), found)
    assert (call(tiny_pipeline, sketches, generators) - found).abs().max() > 0.1


def test_replacing_the_base_prediction_is_refused(tiny_pipeline, sketches, generators):
    class Replace(AddConstant):
        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {**callback_kwargs, "noise_pred": callback_kwargs["noise_pred"] + 1}

    with pytest.raises(ValueError, match="`noise_pred`.*`noise_pred_delta`"):
        call(tiny_pipeline, sketches, generators, Replace(1.0))


def test_unknown_tensor_inputs_and_callbacks_are_refused(tiny_pipeline, sketches, generators):
    class Wrong(AddConstant):
        tensor_inputs = ["prompt_embeds"]

    with pytest.raises(ValueError, match=r"`guidance_callbacks`.* Wrong .*'prompt_embeds'"):
        call(tiny_pipeline, sketches, generators, Wrong(1.0))
    for wrong in (lambda *_: {}, [lambda *_: {}], "classifier"):
        with pytest.raises(ValueError, match="`guidance_callbacks`.*`PipelineCallback`"):
            call(tiny_pipeline, sketches, generators, wrong)


def test_the_interval_is_counted_as_diffusers_counts_it():
    # The keeps of diffusers' ControlNet pipelines.
    for steps in (1, 3, 10, 25):
        for start, end in ((0.0, 1.0), (0.2, 0.7), (0.0, 0.3), (0.5, 1.0), (0.34, 0.66)):
            keeps = [1 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
            assert [float(is_guided_step(i, steps, start, end)) for i in range(steps)] == keeps


def test_fractions_gate_all_three_guidances(tiny_pipeline, sketches, generators):
    steps, runs = [], {"unet": [], "classifier": [], "sketcher": []}
    for name, log in runs.items():
        module = getattr(tiny_pipeline, name)
        module.register_forward_pre_hook(lambda _, args, log=log: log.append((len(steps), len(args[0]))))

    def count(pipe, step_index, timestep, callback_kwargs):
        steps.append(step_index)
        return {}

    tiny_pipeline(
        sketches[:2],
        class_labels="a",
        num_images_per_sketch=1,
        num_inference_steps=8,
        sketch_guidance_scale=2.0,
        classifier_guidance_scale=1.0,
        perceptual_guidance_scale=0.1,
        guidance_start=0.25,
        guidance_end=0.75,
        generator=generators(2),
        callback_on_step_end=count,
    )
    assert runs["unet"] == [(i, 4 if 2 <= i < 6 else 2) for i in range(8)]
    assert runs["classifier"] == runs["sketcher"] == [(i, 2) for i in range(2, 6)]


def test_a_callback_has_its_own_interval(tiny_pipeline, sketches, generators):
    whole = call(tiny_pipeline, sketches, generators, ClassifierGuidanceCallback(3.0))
    none = call(tiny_pipeline, sketches, generators)
    late = call(tiny_pipeline, sketches, generators, ClassifierGuidanceCallback(3.0, guidance_start=0.5))
    off = call(tiny_pipeline, sketches, generators, ClassifierGuidanceCallback(0.0))
    assert torch.equal(off, none)
    assert 0 < (late - none).abs().max() < (whole - none).abs().max()
    for start, end in ((-0.1, 1.0), (0.0, 1.1), (0.5, 0.5), (0.7, 0.2)):
        with pytest.raises(ValueError, match=f"`guidance_start`.*`guidance_end`.* {start} and {end}"):
            SketchGuidanceCallback(0.1, guidance_start=start, guidance_end=end)


def test_scale_0_is_exactly_unguided_and_a_small_scale_close_to_it(tiny_pipeline, sketches, generators):
    unguided = call(tiny_pipeline, sketches, generators)
    off = {"classifier_guidance_scale": 0.0, "perceptual_guidance_scale": 0.0, "sketch_guidance_scale": 1.0}
    assert torch.equal(call(tiny_pipeline, sketches, generators, **off), unguided)
    for name, off_value in (("classifier", 0.0), ("perceptual", 0.0), ("sketch", 1.0)):
        far, near = (
            (call(tiny_pipeline, sketches, generators, **{f"{name}_guidance_scale": off_value + by}) - unguided).abs()
            for by in (1e-2, 1e-4)
        )
        assert 0 < far.max() < 0.3
        assert near.max() < 0.03 * far.max()


def test_the_drawing_is_encoded_once_per_call(tiny_pipeline, sketches, generators):
    sizes = []
    tiny_pipeline.sketch_encoder.resnet.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    tiny_pipeline(
        [[sketches[0], sketches[1]], sketches[2]],
        class_labels="a",
        num_images_per_sketch=2,
        num_inference_steps=3,
        guidance_callbacks=[SketchGuidanceCallback(0.1), SketchGuidanceCallback(0.1, through_unet=True)],
        generator=generators(4),
    )
    # Six drawings stand for the four images; after that only what P makes of the images is encoded.
    assert sizes == [6] + [4] * 6
    assert tiny_pipeline._predictor is None


@pytest.mark.parametrize("through_unet", [False, True])
def test_where_gradients_are_recorded_the_base_stays_attached_and_guidance_is_a_constant(
    through_unet, tiny_pipeline, sketches
):
    pipe, latents = tiny_pipeline, randn(2, 3, SIZE, SIZE)
    conditioning = Conditioning(torch.tensor([0, 2]), sketches[:2])
    callbacks = [ClassifierGuidanceCallback(2.0), SketchGuidanceCallback(0.2, through_unet=through_unet)]

    def predict(unet, callbacks, latents=latents):
        told = (unet, pipe.unet.config, pipe.scheduler, conditioning)
        return GuidedPredictor(*told, callbacks=callbacks, components=pipe.components)(latents, TIMESTEP).noise_pred

    def gradients(noise_pred):
        pipe.unet.zero_grad()
        noise_pred.square().mean(dim=(1, 2, 3)).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in pipe.unet.parameters()])

    with torch.no_grad():
        unguided, expected = predict(pipe.unet, []), predict(pipe.unet, callbacks)
    assert not expected.requires_grad and (expected - unguided).abs().max() > 0.01
    constant = expected - unguided
    plain = gradients(predict(pipe.unet, []) + constant)
    later = latents.clone().requires_grad_(True)
    for unet in (pipe.unet, checkpointed(pipe.unet)):
        for given in (latents, later):
            found = predict(unet, callbacks, given)
            torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(gradients(found), plain, atol=1e-6, rtol=1e-4)
    assert later.grad.abs().max() > 0 and latents.grad is None


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "parameter", "scales", "message"),
    [
        ("classifier", "conv_in.bias", {"classifier_guidance_scale": 2.5}, "ClassifierGuidanceCallback .* scale 2.5"),
        ("sketcher", "conv_out.bias", {"perceptual_guidance_scale": 0.3}, "SketchGuidanceCallback .* scale 0.3"),
        ("unet", "conv_out.bias", {"sketch_guidance_scale": 4.0}, "noise prediction .*`sketch_guidance_scale=4.0`"),
    ],
)
def test_what_is_not_finite_names_the_timestep_and_the_scale(
    component, parameter, scales, message, tiny_pipeline, sketches, generators
):
    with torch.no_grad():
        getattr(tiny_pipeline, component).get_parameter(parameter)[0] = float("nan")
    with pytest.raises(ValueError, match=message) as error:
        call(tiny_pipeline, sketches, generators, **scales)
    assert "at timestep 666" in str(error.value)
    assert tiny_pipeline._predictor is None


def test_the_base_class_says_what_to_implement(tiny_pipeline, sketches, generators):
    with pytest.raises(NotImplementedError, match="GuidanceCallback.*`noise_delta`"):
        call(tiny_pipeline, sketches, generators, GuidanceCallback())


@pytest.mark.parametrize(
    ("callback", "component"),
    [(ClassifierGuidanceCallback(1.0), "classifier"), (SketchGuidanceCallback(0.1), "sketcher")],
)
def test_a_callback_without_its_component_is_refused(callback, component, tiny_pipeline_factory, sketches, generators):
    pipe = tiny_pipeline_factory(components=("sketch_encoder",))
    with pytest.raises(ValueError, match=f"needs the component `{component}`"):
        call(pipe, sketches, generators, callback)


def test_a_classifier_callback_needs_a_class(tiny_pipeline_factory, sketches):
    pipe = tiny_pipeline_factory(components=("classifier",))
    for callbacks, scale in ((ClassifierGuidanceCallback(1.5), None), (None, 1.5)):
        with pytest.raises(ValueError, match="`classifier_guidance_scale=1.5`.*class"):
            pipe(sketches, ["a", None, "b"], classifier_guidance_scale=scale, guidance_callbacks=callbacks)
