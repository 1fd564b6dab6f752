# SPDX-License-Identifier: Apache-2.0
"""The drawing page in a browser, with a mouse, and by its API; all over the loopback."""

import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import runpy
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw, ImageOps
from testing_utils import ROOT


gradio_client = pytest.importorskip("gradio_client", reason="Gradio is not installed: pip install .[demo]")

from diffsketching_pipeline import DiffSketchingPipeline, SketchProcessor, bundled_checkpoint  # noqa: E402
from diffsketching_pipeline.demo import guard, serving  # noqa: E402
from diffsketching_pipeline.demo import page as demo_page  # noqa: E402
from diffsketching_pipeline.demo.service import CANVAS_SIZE, DemoService, PhotoRequest, example_drawings  # noqa: E402


# The outline of the pants among the examples, in pixels of the canvas.
PANTS = [(150, 48), (366, 46), (402, 462), (304, 466), (258, 194), (214, 466), (112, 464), (150, 48)]
SQUARE = [(120, 120), (400, 120), (400, 400), (120, 400), (120, 120)]
CIRCLE = [(256 + 150 * np.sin(t), 256 + 90 * np.cos(t)) for t in np.linspace(0, 2 * np.pi, 13)]


@pytest.fixture(scope="module", autouse=True)
def pixel_limit():
    """A page that is launched lowers Pillow's limit for its whole process."""
    before = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = before


@pytest.fixture(scope="module")
def service(tiny_pipeline_factory):
    recommended = {"num_inference_steps": 12, "sketch_guidance_scale": 2.0, "classifier_guidance_scale": 1.0}
    return DemoService(tiny_pipeline_factory(recommended=recommended))


@pytest.fixture(scope="module")
def address(service):
    page = serving.launch(service)
    yield page.local_url
    page.close()


@pytest.fixture
def timesteps(service):
    """The timestep of each step that the network begins; they may be told apart."""
    begun = []
    with service.pipe.unet.register_forward_pre_hook(lambda unet, args: begun.append(int(args[1].max()))):
        yield begun


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def start_browser(downloads):
    """`start()`: a headless Chromium of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install .[test]")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    browsers = []

    def start():
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        arguments = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader")
        for argument in (*arguments, "--window-size=1280,1400"):
            options.add_argument(argument)
        browsers.append(webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver)))
        return browsers[-1]

    yield start
    for browser in browsers:
        browser.quit()


@pytest.fixture(scope="module")
def browser(start_browser):
    return start_browser()


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def open_page(browser, address):
    browser.get(address)
    canvas_of(browser)


def canvas_of(browser, name="draw"):
    """The canvas of a tab, once it is ready: the brush is chosen then."""
    wait_for(lambda: find(browser, f"#{name}-canvas button[aria-label=Brush].highlight"))
    return wait_for(lambda: [canvas for canvas in find(browser, f"#{name}-canvas canvas") if canvas.is_displayed()])[0]


def click(browser, selector):
    # A click by script: what floats over the page, such as a message, is not in its way.
    browser.execute_script("arguments[0].click()", wait_for(lambda: find(browser, selector))[0])


def stroke(browser, points, name="draw"):
    """One stroke with the mouse on the canvas of a tab."""
    from selenium.webdriver import ActionChains

    canvas = canvas_of(browser, name)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    # The page of the canvas is square, in the middle of its element.
    zoom = wait_for(lambda: find(browser, f"#{name}-canvas [aria-label='Zoom in'] ~ *"))[0].text
    shown = float(zoom.strip("%")) / 100
    moves = [(round((x - CANVAS_SIZE / 2) * shown), round((y - CANVAS_SIZE / 2) * shown)) for x, y in points]
    actions = ActionChains(browser, duration=20)
    actions.move_to_element_with_offset(canvas, *moves[0]).click_and_hold()
    for before, after in zip(moves, moves[1:], strict=False):
        actions.move_by_offset(after[0] - before[0], after[1] - before[1])
    actions.release().perform()


def draw(browser, points):
    """A stroke on the first tab, and the drawing as the model then sees it."""
    stroke(browser, points)
    return wait_for(lambda: find(browser, ".seen img"))[0]


def keep_seed(browser, seed, name="draw"):
    click(browser, f"#{name}-keep-seed input")
    set_number(browser, f"#{name}-seed", seed)


def set_number(browser, selector, value):
    field = find(browser, f"{selector} input[type=number]")[0]
    browser.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        field,
        str(value),
    )


def open_tab(browser, label):
    next(tab for tab in find(browser, "button[role=tab]") if tab.text == label).click()


def fetch(source):
    with urllib.request.urlopen(source) as response:
        return Image.open(io.BytesIO(response.read())).convert("RGB")


def photos_of(browser, count=4, name="draw"):
    """The photos, once they are finished: the line below them is empty then."""

    def finished():
        images = find(browser, f"#{name}-photos .grid-container img")
        return len(images) == count and not find(browser, f"#{name}-status progress") and images

    return [fetch(image.get_attribute("src")) for image in wait_for(finished)]


def download(browser, folder, name="draw"):
    """The pictures by name, and the document, of what the button of a tab saves."""
    click(browser, f"#{name}-download:not([disabled])")
    [path] = wait_for(lambda: [*folder.glob("*.zip")])
    with zipfile.ZipFile(path) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    path.unlink()
    document = json.loads(files.pop("metadata.json"))
    return {entry: Image.open(io.BytesIO(content)).convert("RGB") for entry, content in files.items()}, document


def pixels(image):
    return np.asarray(image, dtype=int)


def message_with(browser, text):
    """Return the message that pops up and contains `text`, else `None`."""
    told = [element.get_attribute("textContent") for element in find(browser, ".toast-body")]
    return next((message for message in told if text in message), None)


def test_strokes_become_photos_that_are_there_after_a_reload(browser, address, downloads):
    open_page(browser, address)
    seen = fetch(draw(browser, SQUARE).get_attribute("src"))
    assert seen.size == (16, 16) and 20 < (pixels(seen)[..., 0] < 128).sum() < 80
    keep_seed(browser, 21)
    click(browser, "#draw-make")
    first = photos_of(browser)
    assert len({image.tobytes() for image in first}) == 4
    wait_for(lambda: len(find(browser, "#earlier img")) == 1)
    files, document = download(browser, downloads)
    assert [*files] == ["drawing.png", "photo_21.png", "photo_22.png", "photo_23.png", "photo_24.png"]
    assert all((pixels(files[f"photo_{21 + k}.png"]) == pixels(photo)).all() for k, photo in enumerate(first))
    records = document["images"]
    asked = {"num_inference_steps": 12, "sketch_guidance_scale": 2.0, "classifier_guidance_scale": 1.0}
    assert [record["seed"] for record in records] == [21, 22, 23, 24]
    assert all({name: record[name] for name in asked} == asked for record in records)

    open_page(browser, address)
    click(browser, "#earlier button")
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(photos_of(browser), first, strict=True))
    click(browser, "#more")
    wait_for(lambda: len(find(browser, "#earlier img")) == 2)
    near = photos_of(browser)
    assert all((pixels(image) != pixels(first[0])).any() for image in near)
    # Nothing has come from anywhere else, and nothing went wrong.
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith((address, "data:", "blob:")) for name in loaded)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_stop_ends_it_within_a_step_and_says_so(browser, address, service, timesteps, monkeypatch):
    # Steps that take as long as those of a model, or a browser that is short of processor time comes too late.
    monkeypatch.setitem(service.pipe.recommended, "num_inference_steps", 500)
    forward = service.pipe.unet.forward
    monkeypatch.setattr(service.pipe.unet, "forward", lambda *args, **kw: (time.sleep(0.1), forward(*args, **kw))[1])
    begun_at_stop = []
    stop = service.stop
    monkeypatch.setattr(service, "stop", lambda owner: (stop(owner), begun_at_stop.append(len(timesteps))))
    open_page(browser, address)
    draw(browser, SQUARE)
    click(browser, "#draw-make")
    wait_for(lambda: find(browser, "#draw-status progress[max='500']"))
    click(browser, "#draw-stop")
    wait_for(lambda: find(browser, "#draw-status")[0].text == "Stopped.")
    wait_for(lambda: service._running == [], 10)
    assert begun_at_stop[0] <= len(timesteps) <= begun_at_stop[0] + 1 < 500


def test_live_photos_are_those_of_all_strokes(browser, address, downloads, service, timesteps):
    """Each stroke makes photos, and gives up those of the strokes before it."""
    open_page(browser, address)
    keep_seed(browser, 3)
    set_number(browser, "#num-images", 1)
    click(browser, "#live input")
    drawn_on = threading.Event()

    def wait_for_strokes(unet, args):
        if len(timesteps) == 3:
            drawn_on.wait(400)

    with service.pipe.unet.register_forward_pre_hook(wait_for_strokes):
        before = draw(browser, SQUARE).get_attribute("src")
        wait_for(lambda: len(timesteps) >= 3)
        stroke(browser, CIRCLE)
        wait_for(lambda: find(browser, ".seen img")[0].get_attribute("src") != before)
        # The second stroke has asked for the first one's end, which waits for the step that is held.
        wait_for(lambda: any(stopped.is_set() for _, stopped in [*service._running]))
        drawn_on.set()
        # There is nothing to download before photos are finished.
        drawing = download(browser, downloads)[0]["drawing.png"]
    [photo] = photos_of(browser, count=1)
    first, last = max(timesteps), min(timesteps)
    assert timesteps.count(first) >= 2 and timesteps.count(last) == 1
    assert all(pixels(drawing)[y - 4 : y + 4, x - 4 : x + 4].min() < 128 for x, y in ((120, 256), (256, 346)))
    *_, alone = service.make_photos(PhotoRequest(drawing, num_images=1, seed=3), "alone")
    assert np.abs(pixels(photo) - pixels(alone.images[0])).max() <= 2


def test_what_is_left_empty_in_the_drawer_is_the_models(browser, address, downloads):
    open_page(browser, address)
    click(browser, "#expert button")
    wait_for(lambda: find(browser, "#num_inference_steps textarea, #num_inference_steps input"))
    find(browser, "#num_inference_steps textarea, #num_inference_steps input")[0].send_keys("three")
    set_number(browser, "#num-images", 1)
    draw(browser, SQUARE)
    click(browser, "#draw-make")
    wait_for(lambda: message_with(browser, "\"Steps\" has to be a number, or empty, but is 'three'"))
    find(browser, "#num_inference_steps textarea, #num_inference_steps input")[0].clear()
    find(browser, "#num_inference_steps textarea, #num_inference_steps input")[0].send_keys("3")
    click(browser, "#draw-make")
    [record] = download(browser, downloads)[1]["images"]
    made_with = {"num_inference_steps": 3, "sketch_guidance_scale": 2.0, "classifier_guidance_scale": 1.0}
    made_with |= {"guidance_start": 0.0, "guidance_end": 1.0, "eta": 0.0}
    assert {name: record[name] for name in made_with} == made_with
    assert "strength" not in record and "clip_sample" not in record


def test_the_chosen_photo_is_edited_where_it_was_drawn_on(browser, address, downloads, service, monkeypatch):
    monkeypatch.setitem(service._edit_pipe.recommended, "num_inference_steps", 4)
    open_page(browser, address)
    draw(browser, SQUARE)
    set_number(browser, "#num-images", 1)
    click(browser, "#draw-make")
    [photo] = photos_of(browser, count=1)
    [label] = [record["class_label"] for record in download(browser, downloads)[1]["images"]]
    click(browser, "#start-edit")
    stroke(browser, [(200, 200), (320, 200), (320, 320), (200, 320), (200, 200)], "edit")
    click(browser, "#edit-make")
    edits = photos_of(browser, count=2, name="edit")
    shown = pixels(ImageOps.contain(photo, (CANVAS_SIZE, CANVAS_SIZE)))
    files, document = download(browser, downloads, "edit")
    assert (pixels(files["photo.png"]) == shown).all()
    # The class is the photo's own, and not guessed from a few strokes.
    assert [record["class_label"] for record in document["images"]] == [label] * 2
    assert not document["images"][0]["class_predicted"]
    for edit in edits:
        changed = (pixels(edit) != shown).any(axis=2)
        assert changed[202:319, 202:319].mean() > 0.9
        # Lines of 6 pixels, and the padding of 5% of the photo around them.
        changed[170:351, 170:351] = False
        assert not changed.any()
    assert (pixels(edits[0]) != pixels(edits[1])).any()


def test_frames_lead_from_one_canvas_to_the_other(browser, address, downloads, service):
    open_page(browser, address)
    draw(browser, SQUARE)
    open_tab(browser, "In between")
    stroke(browser, CIRCLE, "between")
    set_number(browser, "#num-frames", 3)
    keep_seed(browser, 8, "between")
    click(browser, "#between-make")
    frames = photos_of(browser, count=3, name="between")
    files, document = download(browser, downloads, "between")
    assert [record["seed"] for record in document["images"]] == [8, 8, 8]
    drawn = [pixels(files[f"drawing_{k}.png"])[..., 0] < 128 for k in (0, 1)]
    assert [lines[120, 256] for lines in drawn] == [True, False]
    for frame, lines in ((frames[0], "drawing_0.png"), (frames[2], "drawing_1.png")):
        *_, alone = service.make_photos(PhotoRequest(files[lines], num_images=1, seed=8), "alone")
        assert np.abs(pixels(frame) - pixels(alone.images[0])).max() <= 2
    assert (
        np.abs(pixels(frames[1]) - pixels(frames[0])).max() > 2 < np.abs(pixels(frames[1]) - pixels(frames[2])).max()
    )


def test_bad_uploads_are_told_and_good_ones_drawn(browser, address, tmp_path):
    page = Image.new("L", (200, 200), 255)
    page.save(tmp_path / "blank.png")
    ImageDraw.Draw(page).ellipse((40, 40, 160, 160), outline=0, width=4)
    page.save(tmp_path / "round.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "round.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "document.jpg").write_bytes(b"%PDF-1.7\n" + bytes(200))
    Image.new("1", (5001, 5000)).save(tmp_path / "poster.png")
    (tmp_path / "heavy.png").write_bytes(bytes(serving.MAX_UPLOAD_BYTES + 1))
    open_page(browser, address)
    seen = fetch(draw(browser, SQUARE).get_attribute("src"))
    drawn = canvas_of(browser).screenshot_as_png
    for name, message in {
        "blank.png": "blank.png holds no drawing",
        "half.png": "half.png is damaged or truncated",
        "text.png": "text.png cannot be read as an image",
        "document.jpg": "document.jpg cannot be read as an image",
        "poster.png": "The limit is 25 megapixels",
        "heavy.png": "maximum allowed size",
    }.items():
        find(browser, "input[data-testid$=upload-button]")[0].send_keys(str(tmp_path / name))
        told = wait_for(lambda text=message: message_with(browser, text))
        assert "/" not in told and len(find(browser, ".toast-body")) == 1
        click(browser, ".toast-close")
        wait_for(lambda: not find(browser, ".toast-body"))
    assert canvas_of(browser).screenshot_as_png == drawn
    before = fetch(find(browser, ".seen img")[0].get_attribute("src"))
    assert (pixels(before) == pixels(seen)).all()
    find(browser, "input[data-testid$=upload-button]")[0].send_keys(str(tmp_path / "round.png"))
    wait_for(lambda: (pixels(fetch(find(browser, ".seen img")[0].get_attribute("src"))) != pixels(seen)).any())


def test_two_browsers_at_once_get_their_own(browser, start_browser, address, service, monkeypatch):
    """Each ends up with what it gets alone for its drawing and seed."""
    monkeypatch.setitem(service.pipe.recommended, "num_inference_steps", 40)
    browsers = [browser, start_browser()]
    for one, points, seed in zip(browsers, (SQUARE, CIRCLE), (5, 6), strict=True):
        open_page(one, address)
        draw(one, points)
        keep_seed(one, seed)
    runs = []
    for together in (True, False):
        for one in browsers:
            click(one, "#draw-make")
            wait_for(lambda one=one: find(one, "#draw-status progress"))
            if not together:
                photos_of(one)
        runs.append([photos_of(one) for one in browsers])
    for together, alone in zip(*runs, strict=True):
        assert all(np.abs(pixels(a) - pixels(b)).max() <= 2 for a, b in zip(together, alone, strict=True))
    assert (pixels(runs[0][0][0]) != pixels(runs[0][1][0])).any()


def test_phone_width_keyboard_and_labels(browser, address):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        open_page(browser, address)
        width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1] == 360
        controls = (
            "#draw-make, #draw-stop, #more, #start-edit, #upload, #draw-seed input, #num-images input, #live input"
        )
        states = browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => [e.tabIndex, Boolean(e.offsetParent),"
            " Boolean(e.innerText || e.ariaLabel || e.labels?.[0]?.innerText)])",
            controls,
        )
        # The slider has a number beside it.
        assert len(states) == 9 and states == [[0, True, True]] * 9
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_drawn_shape_is_followed(start_browser, browser, monkeypatch):
    """The photo's contours are nearest to the one of the examples that was drawn; with the bundled model."""
    from diffsketching_pipeline.evaluation import metrics

    pipe = DiffSketchingPipeline.from_pretrained(bundled_checkpoint())
    page = serving.launch(DemoService(pipe))
    try:
        open_page(browser, page.local_url)
        draw(browser, PANTS)
        set_number(browser, "#num-images", 1)
        click(browser, "#draw-make")
        [photo] = photos_of(browser, count=1)
    finally:
        page.close()
    sketches = SketchProcessor(metrics.CONTOUR_RESOLUTION).preprocess(example_drawings())[:, 0].numpy() < 0
    distances = metrics.contour_distances(metrics.edge_map(photo)[None], sketches)[0]
    assert example_drawings()[int(distances.argmin())].stem == "pants"


# -- by its API --


def test_the_api_makes_photos_and_tells_what_is_wrong(address, service, tmp_path):
    page = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(page).rectangle((30, 20, 90, 100), outline="black", width=4)
    page.save(tmp_path / "box.png")
    client = gradio_client.Client(address, verbose=False)
    canvas = {"background": gradio_client.handle_file(tmp_path / "box.png"), "layers": [], "composite": None}
    arguments = {"drawing": canvas, "class_label": "b", "num_images": 2, "seed": 9}
    gallery, status = client.predict(**arguments, api_name="/make_photos")[:2]
    settings = service.call_settings(0.5)
    generator = [torch.Generator().manual_seed(10)]
    alone = service.pipe(page, "b", num_images_per_sketch=1, generator=generator, **settings).images[0]
    assert np.abs(pixels(Image.open(gallery[1]["image"]).convert("RGB")) - pixels(alone)).max() <= 2 and status == ""
    with pytest.raises(gradio_client.exceptions.AppError, match="There is no drawing yet"):
        client.predict(drawing=None, api_name="/make_photos")
    with pytest.raises(gradio_client.exceptions.AppError, match="8"):
        client.predict(**{**arguments, "num_images": 900}, api_name="/make_photos")


def test_a_program_may_leave_the_composite_out():
    page, strokes, more = (Image.new("RGBA", (64, 64), fill) for fill in ("silver", (0, 0, 0, 0), (0, 0, 0, 0)))
    ImageDraw.Draw(strokes).line((5, 5, 60, 60), fill="black")
    ImageDraw.Draw(more).line((5, 60, 60, 5), fill="red")
    both = Image.alpha_composite(Image.alpha_composite(page, strokes), more)
    on_page = demo_page._drawing({"background": page, "layers": [strokes, more], "composite": None})
    assert np.array_equal(pixels(on_page), pixels(both))
    alone = demo_page._drawing({"background": None, "layers": [strokes], "composite": None})
    assert alone.getpixel((30, 30)) == (0, 0, 0, 255) and alone.getpixel((0, 30)) == (255, 255, 255, 255)
    assert demo_page._drawing({"background": page, "layers": [strokes], "composite": more}) is more
    with pytest.raises(ValueError, match=r"must have one size, but have \[\(9, 9\), \(64, 64\)\]"):
        demo_page._drawing({"background": page, "layers": [Image.new("RGBA", (9, 9))], "composite": None})
    with pytest.raises(ValueError, match="There is no drawing yet"):
        demo_page._drawing({"background": None, "layers": [], "composite": None})


@pytest.mark.slow
def test_a_full_queue_says_so(monkeypatch, service, tmp_path):
    monkeypatch.setattr(demo_page, "MAX_WAITING", 1)
    Image.linear_gradient("L").point(lambda level: 255 * (level > 100)).save(tmp_path / "half.png")
    page = serving.launch(service)
    busy = threading.Event()
    service._executor.submit(busy.wait, 60)
    try:
        client = gradio_client.Client(page.local_url, verbose=False)
        canvas = {"background": gradio_client.handle_file(tmp_path / "half.png"), "layers": [], "composite": None}
        jobs = [client.submit(drawing=canvas, num_images=1, api_name="/make_photos") for _ in range(4)]
        wait_for(lambda: sum(job.done() for job in jobs) >= 2)
        busy.set()
        failed = [str(job.exception(timeout=60)) for job in jobs if job.exception(timeout=60)]
        assert failed and all("queue is full" in message.lower() for message in failed)
        assert len(failed) < 4
    finally:
        busy.set()
        page.close()


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    from diffsketching_pipeline import cli

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["diffsketching", "demo"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "pip install 'diffsketching_pipeline[demo]'" in capsys.readouterr().err


def test_a_file_of_the_page_is_whole_at_any_time_and_stays_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    content = bytes(range(256)) * 4000
    path = Path(demo_page._cached(content, "photos_../../../up.zip"))
    assert path.name == "up.zip" and path.parents[1] == tmp_path / "cache"
    with path.open("rb") as reader:
        assert demo_page._cached(content, "up.zip") == str(path)
        # What is being read is not written over.
        assert reader.read() == content and os.fstat(reader.fileno()).st_ino != path.stat().st_ino


# -- against what is sent to harm --


def send(address, path, body=b"", **headers):
    """
    The status of a request, its headers, and the seconds until it was answered. A body may be a list of parts, which are sent
    until there is an answer.
    """
    port = int(address.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    began = time.monotonic()
    if isinstance(body, list):
        is_chunked = "Content-Length" not in names
        connection.putrequest("POST", path)
        for name, value in (names | ({"Transfer-Encoding": "chunked"} if is_chunked else {})).items():
            connection.putheader(name, value)
        connection.endheaders()
        for part in body:
            if select.select([connection.sock], [], [], 0)[0]:
                break
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.send(b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part)
    else:
        connection.request("POST" if body else "GET", path, body, names)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers, time.monotonic() - began


def post(port, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse().read()


def as_upload(content):
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return head + content + b"\r\n--x--\r\n"


MULTIPART = {"Content_Type": "multipart/form-data; boundary=x"}
JSON = {"Content_Type": "application/json"}


def test_attacks_are_answered_at_once_while_another_request_goes_on(address, service, monkeypatch, tmp_path):
    Image.linear_gradient("L").point(lambda level: 255 * (level > 100)).save(tmp_path / "half.png")
    client = gradio_client.Client(address, verbose=False)
    canvas = {"background": gradio_client.handle_file(tmp_path / "half.png"), "layers": [], "composite": None}
    arguments = {"drawing": canvas, "class_label": "b", "num_images": 1, "api_name": "/make_photos"}
    expected = [photo["image"] for photo in client.predict(**arguments)[0]]
    go_on = threading.Event()
    with service.pipe.unet.register_forward_pre_hook(lambda unet, inputs: go_on.wait(60) and None):
        others = client.submit(**arguments)
        megabyte = 2**20 * b"x"
        api = "/gradio_api"
        attacks = {
            "another name": (421, "/", b"", {"Host": "rebound.example:80"}),
            "another name of an address": (421, "/config", b"", {"Host": "10.0.0.9"}),
            "a long body": (413, f"{api}/queue/join", 420 * [megabyte], {**JSON, "Content_Length": str(420 * 2**20)}),
            "a body of no stated length": (400, f"{api}/component_server", 420 * [megabyte], JSON),
            "a length of no number": (400, f"{api}/queue/join", b"{}", {**JSON, "Content_Length": "-1"}),
            "a deep body": (None, f"{api}/queue/join", 2**20 * b"[", JSON),
            "a large upload": (413, f"{api}/upload", [as_upload(17 * megabyte)], {**MULTIPART, "Content_Length": str(18 * 2**20)}),
            "a call of nothing": (None, f"{api}/call/nothing", b'{"data": []}', JSON),
            "a crafted value": (None, f"{api}/call/make_photos", b'{"data": [{"background": 3}, 9]}', JSON),
        }  # fmt: skip
        try:
            for name, (expected_status, path, body, headers) in attacks.items():
                status, _, seconds = send(address, path, body, **headers)
                is_right = status in ([expected_status] if expected_status else range(200, 600))
                assert seconds < 2 and is_right, (name, status, seconds)
            assert not others.done()
        finally:
            go_on.set()
        gallery = others.result(timeout=60)[0]
    assert np.array_equal(*(pixels(Image.open(path)) for path in (gallery[0]["image"], expected[0])))


@pytest.mark.slow
def test_an_address_uploads_no_more_than_its_share(service, monkeypatch):
    monkeypatch.setattr(guard, "MAX_UPLOADED_BYTES", 10_000)
    monkeypatch.setattr(guard, "_UPLOAD_SECONDS", 5.0)
    page = serving.launch(service)
    try:
        path, began = "/gradio_api/upload", time.monotonic()
        statuses = [send(page.local_url, path, as_upload(3000 * b"x"), **MULTIPART)[0] for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        assert send(page.local_url, "/config")[0] == 200
        wait_for(lambda: time.monotonic() > began + 6)
        assert send(page.local_url, path, as_upload(3000 * b"x"), **MULTIPART)[0] == 200
    finally:
        page.close()


def test_an_uploaded_file_runs_nothing_in_a_browser(address, tmp_path):
    script = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    (tmp_path / "script.svg").write_text(script)
    body = as_upload(script.encode()).replace(b"a.png", b"a.svg").replace(b"image/png", b"image/svg+xml")
    port = int(address.rstrip("/").rpartition(":")[2])
    (stored,) = json.loads(post(port, "/gradio_api/upload", body, MULTIPART))
    status, headers, _ = send(address, f"/gradio_api/file={stored}")
    assert status == 200 and headers["X-Content-Type-Options"] == "nosniff"
    assert (
        "sandbox" in headers["Content-Security-Policy"] and "default-src 'none'" in headers["Content-Security-Policy"]
    )
    page = send(address, "/")[1]
    assert "default-src 'self'" in page["Content-Security-Policy"] and page["X-Content-Type-Options"] == "nosniff"


def test_nothing_is_fetched_from_elsewhere_for_who_asks(address, monkeypatch):
    async def fetch(*arguments, **options):
        raise AssertionError(f"a request: {arguments}")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    monkeypatch.setattr("httpx.AsyncClient.send", fetch)
    for path in ("/gradio_api/file=https://example.org/a.png", "/gradio_api/proxy=https://example.org/a.png"):
        assert send(address, path)[0] == 403
    client = gradio_client.Client(address, verbose=False)
    file = {
        "path": "https://example.org/a.png",
        "url": "https://example.org/a.png",
        "meta": {"_type": "gradio.FileData"},
    }
    for name in ("make_photos", "edit_photo"):
        with pytest.raises(gradio_client.exceptions.AppError, match="is an address, not a file: download it first"):
            client.predict({"background": file, "layers": [], "composite": None}, api_name=f"/{name}")


def test_the_names_of_a_page_are_those_it_listens_on(monkeypatch):
    monkeypatch.setenv("SPACE_HOST", "ana-page.hf.space")
    local, everywhere = guard.served_hosts("127.0.0.1", ["Page.Example"]), guard.served_hosts("0.0.0.0")
    cases = {"127.0.0.1:7860": 3, "localhost": 3, "[::1]:7860": 3, "ANA-page.hf.space": 3, "page.example:80": 1}
    cases |= {
        "10.0.0.9:7860": 2,
        "[fe80::1]:80": 2,
        socket.gethostname(): 2,
        "evil.example": 0,
        "": 0,
        "127.0.0.1.evil": 0,
    }
    for host, where in cases.items():
        found = [guard.Guard(None, hosts, 1)._is_ours(host) for hosts in (local, everywhere)]
        assert found == [bool(where & 1), bool(where & 2)], host


def test_of_the_cache_only_old_empty_folders_are_removed(tmp_path):
    for name in ("old", "used", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "photo.png").touch()
    for name in ("old", "used"):
        os.utime(tmp_path / name, (0, 0))
    serving.remove_empty_folders(tmp_path, 3600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]


def test_a_request_whose_sender_has_gone_is_not_computed(address, service, timesteps):
    busy = threading.Event()
    service._executor.submit(busy.wait, 60)
    port = int(address.rstrip("/").rpartition(":")[2])
    meta = {"_type": "gradio.FileData"}
    try:
        for gone in (True, False):
            client = gradio_client.Client(address, verbose=False)
            canvas = {"background": gradio_client.handle_file(example_drawings()[0]), "layers": [], "composite": None}
            if not gone:
                stays = client.submit(drawing=canvas, num_images=1, api_name="/make_photos")
                continue
            (stored,) = json.loads(
                post(port, "/gradio_api/upload", as_upload(example_drawings()[0].read_bytes()), MULTIPART)
            )
            canvas["background"] = {"path": stored, "meta": meta}
            body = json.dumps({"data": [canvas, "b", 8]}).encode()
            event = json.loads(post(port, "/gradio_api/call/make_photos", body, JSON))["event_id"]
            stream = socket.create_connection(("127.0.0.1", port))
            stream.sendall(f"GET /gradio_api/call/make_photos/{event} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            assert stream.recv(100)
            stream.close()
        time.sleep(2)
        busy.set()
        stays.result(timeout=60)
        assert len(timesteps) == 12
    finally:
        busy.set()


# -- as a Space --


@pytest.mark.slow
def test_the_space_answers_what_the_readme_asks(tiny_pipeline_factory, tmp_path, monkeypatch):
    space = ROOT / "examples" / "space"
    front_matter = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front_matter["sdk"] == "gradio" and (space / front_matter["app_file"]).is_file()
    tiny_pipeline_factory(recommended={"num_inference_steps": 2}).save_pretrained(tmp_path / "tiny")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "DIFFSKETCHING_MODEL": str(tmp_path / "tiny"), "GRADIO_SERVER_PORT": str(port)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    served = subprocess.Popen([sys.executable, front_matter["app_file"]], cwd=space, env=env)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: served.poll() is None and is_up(address), 120)
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        snippet = re.search(r"<!-- snippet: api -->\s*```python\n(.*?)```", readme, re.S)[1]
        assert "http://127.0.0.1:7860" in snippet and '"t-shirt"' in snippet
        names: dict = {}
        monkeypatch.chdir(ROOT)
        exec(snippet.replace("http://127.0.0.1:7860", address).replace('"t-shirt"', '"b"'), names)
        sizes = [Image.open(photo["image"]).size for photo in names["photos"]]
        assert sizes == [(16, 16), (16, 16)]
    finally:
        served.terminate()
        served.wait(20)


def test_a_space_has_what_the_package_needs_and_says_when_the_package_is_missing(monkeypatch):
    required = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.S)[1]
    space = ROOT / "examples" / "space"
    assert (space / "requirements.txt").read_text().split() == re.findall(r'"(.+?)"', required)
    monkeypatch.setitem(sys.modules, "diffsketching_pipeline", None)
    with pytest.raises(SystemExit, match="is not in this Space: put it beside app.py"):
        runpy.run_path(str(space / "app.py"))


def is_up(address):
    try:
        return urllib.request.urlopen(address).status == 200
    except OSError:
        return False
