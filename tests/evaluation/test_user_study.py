# SPDX-License-Identifier: Apache-2.0
import base64
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time

import analyze_user_study
import make_user_study
import numpy as np
import pytest
from analyze_user_study import AnalysisArguments
from make_user_study import StudyArguments
from PIL import Image
from testing_utils import ROOT

from diffsketching_pipeline.evaluation.image_sets import read_drawings, save_png


STRENGTHS = {"ours": 1.0, "gan": -0.2, "floor": -0.8}
COLORS = {"ours": (10, 200, 10), "gan": (200, 10, 10), "floor": (10, 10, 200)}


@pytest.fixture(scope="module")
def folders(drawings_dir, tmp_path_factory):
    """Three systems of one color each but for a pixel, whose files tell where they come from."""
    root = tmp_path_factory.mktemp("systems")
    for name, color in COLORS.items():
        for drawing in read_drawings(drawings_dir):
            for n in range(2):
                path = root / name / drawing.label / f"{drawing.name}_{n}.png"
                photo = Image.new("RGB", (16, 16), color)
                photo.putpixel((0, 0), (drawing.position, n, 0))
                save_png(photo, path, {"system": f"secret-{name}", "seed": str(n)})
    return [f"{name}={root / name}" for name in COLORS]


@pytest.fixture(scope="module")
def study(folders, drawings_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("study") / "study.html"
    settings = {"split": "all", "num_comparisons": 36, "num_attention_checks": 4, "title": "Photos <& drawings>"}
    page, key = make_user_study.main(StudyArguments(folders, str(drawings_dir), str(output), **settings))
    return page, json.loads(key.read_text())


def page_data(page):
    text = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.S)[1]
    return json.loads(text)


def decode(url):
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def judged(key, rng, strengths=STRENGTHS, careless=False, always=None):
    """The answers of a judge who knows strengths only, in the page's format; sides are drawn as the page does."""
    answers = []
    for number, entry in key["comparisons"].items():
        left, choices = int(rng.integers(2)), {}
        for question in make_user_study.QUESTIONS:
            if always is not None:
                choices[question] = left if always == "left" else 1 - left
            elif careless:
                choices[question] = int(rng.integers(2))
            elif entry["is_check"]:
                choices[question] = int(entry["systems"][0] is None)
            else:
                first, second = (strengths[system] for system in entry["systems"])
                choices[question] = int(rng.random() > 1 / (1 + math.exp(second - first)))
        answers.append({"comparison": int(number), "left": left, "choices": choices, "milliseconds": 900})
    return {"study": key["study"], "judge": rng.bytes(8).hex(), "answers": answers}


def results_of(key, judges, tmp_path, **settings):
    paths = []
    for i, answers in enumerate(judges):
        (tmp_path / f"{i}.json").write_text(json.dumps(answers))
        paths.append(str(tmp_path / f"{i}.json"))
    (tmp_path / "key.json").write_text(json.dumps(key))
    return analyze_user_study.main(AnalysisArguments(str(tmp_path / "key.json"), paths, str(tmp_path), **settings))


# -- the page --


def test_key_tells_which_photo_is_whose(study, drawings_dir):
    page, key = study
    drawings = read_drawings(drawings_dir)
    data = page_data(page)
    assert data["study"] == key["study"] and len(data["comparisons"]) == len(key["comparisons"]) == 40
    pairs, noise_first = [], 0
    for shown in data["comparisons"]:
        entry = key["comparisons"][str(shown["comparison"])]
        for url, system in zip(shown["photos"], entry["systems"], strict=True):
            photo = decode(url)
            assert photo.getpixel((8, 8)) == COLORS[system] if system else len(photo.getcolors()) > 100
            drawn = drawings[photo.getpixel((0, 0))[0]] if system else None
            assert drawn is None or f"{drawn.label}/{drawn.name}" == entry["drawing"]
        assert entry["is_check"] == (None in entry["systems"])
        if not entry["is_check"]:
            pairs.append(tuple(entry["systems"]))
        noise_first += entry["systems"][0] is None
    unordered = [tuple(sorted(pair)) for pair in pairs]
    assert {pair: unordered.count(pair) for pair in set(unordered)} == dict.fromkeys(
        itertools.combinations(sorted(COLORS), 2), 12
    )
    # Neither the order of the pair nor the place among the comparisons gives anything away.
    assert len(set(pairs)) == 6
    checks = [i for i, shown in enumerate(data["comparisons"]) if key["comparisons"][str(i)]["is_check"]]
    assert checks != list(range(36, 40)) and [s["comparison"] for s in data["comparisons"]] == list(range(40))


def test_all_pairs_are_judged_on_the_same_drawings(study):
    _, key = study
    by_pair = {}
    for entry in key["comparisons"].values():
        if not entry["is_check"]:
            by_pair.setdefault(tuple(sorted(entry["systems"])), []).append(entry["drawing"])
    drawings = [sorted(names) for names in by_pair.values()]
    assert drawings[0] == drawings[1] == drawings[2] and len(set(drawings[0])) == 12


def test_page_is_blind_and_self_contained(study):
    page, _ = study
    text = page.read_text()
    for name in COLORS:
        assert not re.search(rf"\b{name}\b", re.sub(r"base64,[^\"]*", "", text)), name
    urls = re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", text)
    assert len(urls) == 120 and not any("secret" in str(decode(url).info) or decode(url).info for url in urls)
    assert not re.search(r"(src|href)=.?https?:|@import|url\(", text)
    assert "default-src 'none'" in text and "<title>Photos &lt;&amp; drawings&gt;</title>" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["one"]}, "`images`.* two .* 1"),
        ({"num_comparisons": 0}, "`num_comparisons`.* 0"),
        ({"sketches": "nowhere"}, "`sketches`.*'nowhere'"),
        ({"output": "study"}, "`output`.* 'study'"),
        ({"images": ["a=nowhere", "b=nowhere"]}, "`images`.*'nowhere'"),
    ],
)
def test_what_makes_no_study_is_an_error(changes, message, folders, drawings_dir, tmp_path):
    values = {"images": folders, "sketches": str(drawings_dir), "output": str(tmp_path / "out" / "study.html")}
    with pytest.raises(ValueError, match=message):
        make_user_study.main(StudyArguments(**values | changes))
    assert not (tmp_path / "out").exists()


# -- what judges say --


def test_known_strengths_are_found(study, tmp_path):
    _, key = study
    rng = np.random.default_rng(0)
    results = results_of(key, [judged(key, rng) for _ in range(60)], tmp_path)
    assert results["judges"] == 60 and results["judges_left_out"] == 0
    for result in results["questions"].values():
        assert [entry["system"] for entry in result["ranking"]] == ["ours", "gan", "floor"]
        for entry in result["ranking"]:
            low, high = entry["interval"]
            assert entry["strength"] == pytest.approx(STRENGTHS[entry["system"]], abs=0.2)
            assert low < entry["strength"] < high and high - low < 0.5
        assert len(result["preferences"]) == 3
        for entry in result["preferences"]:
            first, second = (STRENGTHS[system] for system in entry["systems"])
            assert entry["rate"] == pytest.approx(1 / (1 + math.exp(second - first)), abs=0.06)
            assert entry["n"] == 720 and entry["interval_kind"] == "bootstrap over judges"
    report = (tmp_path / "results.md").read_text()
    assert "| 1 | ours | " in report and "60 judges; 0 more failed" in report


@pytest.mark.slow
def test_judges_who_click_are_left_out(study, tmp_path):
    _, key = study
    rng = np.random.default_rng(1)
    # All careful judges prefer the weakest: careless ones would drown them.
    opposite = {"ours": -5.0, "gan": 0.0, "floor": 5.0}
    careful = [judged(key, rng, opposite) for _ in range(12)]
    careless = [judged(key, rng, careless=True) for _ in range(30)]
    careless = [answers for answers in careless if _attention(answers, key) < 0.75]
    assert len(careless) > 20
    results = results_of(key, careful + careless, tmp_path)
    assert results["judges"] == 12 and results["judges_left_out"] == len(careless)
    assert results["questions"]["realism"]["ranking"][0]["system"] == "floor"
    rates = [entry["rate"] for entry in results["questions"]["realism"]["preferences"]]
    mixed = results_of(key, careful + careless, tmp_path, min_attention=0.0)
    assert mixed["judges"] == 12 + len(careless)
    # Alphabetical pairs: floor beats gan, floor beats ours, gan beats ours.
    assert min(rates) > 0.95 > max(entry["rate"] for entry in mixed["questions"]["realism"]["preferences"])
    with pytest.raises(ValueError, match="`min_attention` 0.75 is passed by none of 1 judges"):
        results_of(key, careless[:1], tmp_path)


def _attention(answers, key):
    given = {str(a["comparison"]): a["choices"] for a in answers["answers"]}
    return analyze_user_study.attention(given, key)


def test_a_hand_that_always_presses_left_says_nothing(study, tmp_path):
    _, key = study
    rng = np.random.default_rng(2)
    results = results_of(key, [judged(key, rng, always="left") for _ in range(80)], tmp_path, min_attention=0.0)
    for entry in results["questions"]["faithfulness"]["preferences"]:
        assert entry["rate"] == pytest.approx(0.5, abs=0.06)
        assert entry["interval"][0] < 0.5 < entry["interval"][1] or abs(entry["rate"] - 0.5) > 0.02


def test_few_judges_get_wilsons_interval(study, tmp_path):
    _, key = study
    rng = np.random.default_rng(3)
    results = results_of(key, [judged(key, rng) for _ in range(2)], tmp_path)
    entry = results["questions"]["realism"]["preferences"][0]
    n, share, z = entry["n"], entry["rate"], 1.959964
    # Wilson's bounds are the shares p with |share - p| = z sqrt(p (1 - p) / n).
    for bound in entry["interval"]:
        assert abs(share - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n))
    assert (
        entry["interval_kind"].startswith("Wilson")
        and results["questions"]["realism"]["ranking"][0]["interval"] is None
    )


def test_the_script_is_found_by_its_former_name(script_env):
    command = [sys.executable, str(ROOT / "training" / "analyse_user_study.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=script_env, check=True)
    assert "--min_attention" in done.stdout and "is now `analyze_user_study.py`" in done.stderr


def test_bradley_terry_is_the_maximum_of_its_likelihood():
    wins = np.array([[0, 7, 9], [3, 0, 6], [1, 4, 0]], dtype=float)
    strengths = analyze_user_study.bradley_terry(wins)
    half = analyze_user_study.PSEUDO_WINS

    def log_likelihood(s):
        pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
        return sum((wins[i, j] + half) * -math.log1p(math.exp(s[j] - s[i])) for i, j in pairs)

    assert strengths.sum() == pytest.approx(0, abs=1e-9)
    for direction in np.random.default_rng(0).normal(size=(20, 3)):
        moved = strengths + 0.01 * (direction - direction.mean())
        assert log_likelihood(moved) < log_likelihood(strengths)
    # Two systems: the log-odds of the share, with the pseudo-wins.
    a, b = analyze_user_study.bradley_terry(np.array([[0.0, 10.0], [0.0, 0.0]]))
    assert a - b == pytest.approx(math.log(10.5 / 0.5))
    with pytest.raises(ValueError, match="do not connect all systems"):
        analyze_user_study.bradley_terry(np.array([[0, 3, 0], [1, 0, 0], [0, 0, 0.0]]))


def test_files_of_other_studies_or_of_one_judge_twice_are_errors(study, tmp_path):
    _, key = study
    answers = judged(key, np.random.default_rng(4))
    with pytest.raises(ValueError, match="two files of one judge"):
        results_of(key, [answers, answers], tmp_path)
    with pytest.raises(ValueError, match="0.json' of the study other, but the key is of"):
        results_of(key, [{**answers, "study": "other"}], tmp_path)
    with pytest.raises(ValueError, match="whose comparisons are not those of the key"):
        results_of(key, [{**answers, "answers": answers["answers"][:-1]}], tmp_path)
    with pytest.raises(ValueError, match="which no page of a study has saved"):
        results_of(key, [{"a": 1}], tmp_path)


# -- in a browser --


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium at the width of a phone, with its downloads in a folder of ours."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install .[test]")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium or its driver is not installed: apt-get install chromium chromium-driver")
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.add_experimental_option(
        "mobileEmulation", {"deviceMetrics": {"width": 360, "height": 740, "pixelRatio": 1}}
    )
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield started, downloads
    started.quit()


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def answer_by_keyboard(browser, key, data):
    """Goes through the page without a mouse: of every pair the stronger system, by the color that is seen."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    press(browser, Keys.TAB, Keys.ENTER)
    sides, orders, questions = [], [], len(make_user_study.QUESTIONS)
    for position in range(len(data["comparisons"])):
        heading = browser.find_element(By.ID, "progress")
        assert heading.text == f"Comparison {position + 1} of {len(data['comparisons'])}"
        assert not browser.find_element(By.ID, "next").is_enabled()
        if position == 0:
            width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert width[0] <= width[1] == 360
            photos = [browser.find_element(By.ID, side).rect for side in ("left", "right")]
            assert photos[0]["y"] == photos[1]["y"] and min(photo["width"] for photo in photos) > 140
            assert browser.find_element(By.CSS_SELECTOR, "label").rect["height"] >= 44
        left, right = (browser.find_element(By.ID, side).get_attribute("src") for side in ("left", "right"))
        shown = next(c for c in data["comparisons"] if sorted(c["photos"]) == sorted((left, right)))
        systems = key["comparisons"][str(shown["comparison"])]["systems"]
        better = max((0, 1), key=lambda i: STRENGTHS.get(systems[i], -9.0))
        is_left = shown["photos"][better] == left
        sides.append(is_left)
        orders.append(shown["comparison"])
        for _ in range(questions):
            # An arrow chooses within a question, Tab goes on to the next and then to the button.
            press(browser, Keys.TAB, Keys.SPACE, *([] if is_left else [Keys.ARROW_RIGHT]))
        press(browser, Keys.TAB, Keys.ENTER)
    press(browser, Keys.TAB, Keys.ENTER)
    return sides, orders


def test_a_judge_without_a_mouse_on_a_phone(folders, drawings_dir, browser, tmp_path):
    browser, downloads = browser
    settings = {"split": "all", "num_comparisons": 9, "num_attention_checks": 2}
    output = str(tmp_path / "study.html")
    page, key_path = make_user_study.main(StudyArguments(folders, str(drawings_dir), output, **settings))
    key, data = json.loads(key_path.read_text()), page_data(page)
    all_sides, all_orders = [], []
    for _ in range(2):
        browser.get(page.as_uri())
        sides, orders = answer_by_keyboard(browser, key, data)
        all_sides += sides
        all_orders.append(orders)
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith(("data:", "blob:")) for name in loaded)
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    # Two judges saw the same comparisons in two orders, the better one left and right.
    assert sorted(all_orders[0]) == sorted(all_orders[1]) == list(range(11)) and all_orders[0] != all_orders[1]
    assert 0 < sum(all_sides) < 22

    deadline = time.monotonic() + 20
    while len(list(downloads.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    files = sorted(str(path) for path in downloads.glob("answers-*.json"))
    assert len(files) == 2
    results = analyze_user_study.main(AnalysisArguments(str(key_path), files, str(tmp_path / "results")))
    assert results["judges"] == 2 and results["judges_left_out"] == 0
    for result in results["questions"].values():
        assert [entry["system"] for entry in result["ranking"]] == ["ours", "gan", "floor"]
        assert {(*entry["systems"], entry["rate"]) for entry in result["preferences"]} == {
            ("floor", "gan", 0.0),
            ("floor", "ours", 0.0),
            ("gan", "ours", 0.0),
        }
