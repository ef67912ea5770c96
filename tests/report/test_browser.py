"""The report as a person meets it: opened from disk in a browser, clicked, looked at.

Screenshots lie in pytest's temporary folders, or in the folder that MILES_SCREENSHOTS names.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from miles.report.page import write_report
from miles.report.samples import Selection

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt brings playwright")
expect = playwright.expect
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or Google Chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, tmp_path):
    """`visit(runs, **options)` writes their report and opens it; at the end nothing may have gone wrong in the page."""
    complaints, requests, pages = [], [], []

    def visit(*runs, selection=None, **options):
        out = tmp_path / "report.html"
        write_report(runs, out, selection)
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **options})
        pages.append(page)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(out.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield visit
    for page in pages:
        page.close()
    assert complaints == []
    assert {url.split(":")[0] for url in requests} <= {"file", "blob", "data"}


@pytest.fixture
def shoot(tmp_path):
    folder = Path(os.environ.get("MILES_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(page, name):
        path = folder / f"{name}.png"
        page.mouse.move(0, 0)
        page.screenshot(path=path)
        assert path.stat().st_size > 20_000  # an empty page is smaller

    return shoot


def records(run):
    files = sorted((run / "rollouts").iterdir())
    return [
        {**json.loads(line), "step": int(path.stem[5:])} for path in files for line in path.read_text().splitlines()
    ]


def samples_of(page):
    page.get_by_role("tab", name="Samples").click()
    page.wait_for_selector(".tokens .text span")
    return page.locator(".count")


def fact(page, name):
    return page.locator(".detail .fact", has=page.locator(f"dt:text-is('{name}')")).locator("dd")


def test_head_and_curves(run, visit, shoot):
    page = visit(run)
    expect(page.locator("h1")).to_have_text("first")
    expect(page.locator("#head .status")).to_have_text("completed")
    expect(page.locator("#head")).to_contain_text("0.1 → 0.8")
    expect(page.locator("#head")).to_contain_text(
        "reward: mean over the first → over the last tenth of the steps · evaluation sets: first → last evaluation"
    )
    page.get_by_role("tab", name="Settings").click()
    expect(page.locator("tr", has_text="miles-grpo").locator("td").last).to_have_text(
        "advantage estimator: grpo · policy losses: ppo_clip, reinforce"
    )
    page.get_by_role("tab", name="Curves").click()
    expect(page.locator(".card", has_text="Reward").first.locator("svg .scatterlayer path.js-line")).to_have_count(1)
    headings = page.locator("#curves h2").all_inner_texts()
    assert headings == [
        "Reward", "Evaluation", "Policy", "Optimisation", "Lengths and outcomes", "Trainer against engine",
        "Throughput", "Where the time went", "Other",
    ]  # fmt: skip
    expect(page.locator(".card h3", has_text="my_plugin/something")).to_have_count(1)  # nobody here knows that metric
    entropy = page.locator(".card", has_text="Entropy")
    entropy.scroll_into_view_if_needed()
    ticks = entropy.locator(".ytick text").all_text_contents
    expect(entropy.locator(".ytick text").first).to_be_visible()
    linear = ticks()
    entropy.get_by_role("button", name="log").click()
    expect(entropy.get_by_role("button", name="log")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(200)
    assert ticks() != linear
    page.locator("#smooth").fill("0.9")
    expect(page.locator("output[for=smooth]")).to_have_text("0.90")
    page.evaluate("scrollTo(0, 0)")
    reward = page.locator(".card", has_text="Reward").first
    page.wait_for_timeout(300)
    expect(reward.locator("svg .scatterlayer .trace")).to_have_count(1)  # three points: nothing to smooth
    shoot(page, "curves")


def test_tokens_are_coloured_by_what_is_asked_for(run, visit, shoot):
    page = visit(run)
    samples_of(page)
    first = records(run)[0]
    start = first["prompt_length"]
    spans = page.locator(".tokens .text span")
    expect(spans).to_have_count(len(first["tokens"]))

    def shaded():
        return [
            i for i, name in enumerate(spans.evaluate_all("all => all.map((e) => e.className)")) if name == "shaded"
        ]

    said = list(range(start, len(first["tokens"])))
    assert shaded() == said  # by log-probability, which the prompt has none of
    page.get_by_role("button", name="loss mask").click()
    assert shaded() == said
    page.get_by_role("button", name="advantage").click()
    assert shaded() == list(range(30))  # the prompt has advantages too: zeros
    hues = spans.evaluate_all("all => all.map((e) => e.style.cssText)")
    sign = "good" if first["advantages"][-1] > 0 else "bad"
    assert "--much: 0%" in hues[0]
    assert all(f"--hue: var(--{sign})" in hue and "--much: 0%" not in hue for hue in hues[start:])
    page.get_by_role("button", name="nothing").click()
    assert shaded() == []
    page.get_by_role("button", name="log-prob").click()
    spans.nth(start).hover()
    hint = page.locator("#hint")
    expect(hint).to_be_visible()
    expect(hint).to_contain_text(f"token{first['tokens'][start]}")
    shown = float(re.search(r"log-prob(-[\d.e-]+)", hint.inner_text().replace("\n", ""))[1])
    assert shown == pytest.approx(first["rollout_log_probs"][start], abs=6e-4)
    shoot(page, "samples")


def test_filters_and_order(run, visit):
    page = visit(run)
    count = samples_of(page)
    every = records(run)
    expect(count).to_have_text("1,200 samples")

    def expect_found(keep):
        found = sum(map(keep, every))
        assert 0 < found < 1200
        expect(count).to_have_text(f"{found:,} of 1,200 samples")

    page.get_by_label("lowest reward").fill("0.25")
    page.get_by_label("highest reward").fill("0.5")
    expect_found(lambda s: 0.25 <= s["reward"] <= 0.5)
    page.get_by_label("status").select_option("truncated")
    expect_found(lambda s: 0.25 <= s["reward"] <= 0.5 and s["status"] == "truncated")
    page.get_by_label("lowest reward").fill("")
    page.get_by_label("highest reward").fill("")
    page.get_by_label("set", exact=True).select_option("words")
    page.get_by_label("first step").fill("2")
    page.get_by_label("last step").fill("2")
    expect_found(lambda s: s["status"] == "truncated" and s["task_set"] == "words" and s["step"] == 2)
    page.get_by_label("sort by").select_option("reward")
    kept = [s for s in every if s["status"] == "truncated" and s["task_set"] == "words" and s["step"] == 2]
    lowest, highest = (choose(kept, key=lambda s: s["reward"]) for choose in (min, max))
    expect(fact(page, "reward")).to_have_text(f"{lowest['reward']:g}")
    page.get_by_role("button", name="ascending").click()
    expect(fact(page, "reward")).to_have_text(f"{highest['reward']:g}")
    expect(fact(page, "loss")).to_have_text(re.compile(r"-?0\.\d+"))
    expect(fact(page, "brief")).to_have_text(f"{highest['reward_parts']['brief']:g}")


def test_a_group_and_the_keyboard(run, visit):
    page = visit(run)
    count = samples_of(page)
    title = page.locator(".detail h2")
    expect(title).to_have_text("Sample 0")
    for key, now in (("j", 1), ("ArrowDown", 2), ("k", 1), ("End", 1199), ("j", 1199), ("Home", 0)):
        page.keyboard.press(key)
        expect(title).to_have_text(f"Sample {now}")
    page.keyboard.press("/")
    page.keyboard.type("question 3:")
    expect(count).to_have_text("5 of 1,200 samples")
    expect(title).to_have_text("Sample 15")
    page.keyboard.press("Escape")
    page.get_by_role("searchbox").fill("")
    expect(count).to_have_text("1,200 samples")
    page.locator(".row").nth(7).click()
    expect(title).to_have_text("Sample 7")
    page.get_by_role("button", name="group 1", exact=True).click()
    expect(count).to_have_text("5 of 1,200 samples")
    expect(title).to_have_text("Sample 7")


def test_what_a_model_wrote_is_text(run, visit, hostile):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: first", "name: '<i>first</i> {{blocks}} </script>'"))
    page = visit(run)
    expect(page.locator("h1")).to_have_text("<i>first</i> {{blocks}} </script>")
    count = samples_of(page)
    page.get_by_role("searchbox").fill("onerror=")
    expect(count).to_have_text("12 of 1,200 samples")
    page.locator(".detail summary", has_text="As text").click()
    expect(page.locator(".detail pre").nth(1)).to_contain_text(hostile)
    words = page.locator(".tokens .text").all_inner_texts()
    assert "</script>" in "".join(words) or "<b>bold</b>" in "".join(words)  # tokens of the vocabulary
    assert page.locator("img, b:text-is('bold')").count() == 0
    assert page.title() == "<i>first</i> {{blocks}} </script> · miles"


def test_runs_beside_each_other(run, tmp_path, write_run, visit, shoot):
    other = write_run(tmp_path / "second", 600, 30, seed=1, optimizer={"lr": 3e-5})
    (other / "summary.json").write_text('{"status": "failed", "error": "NonFiniteError: <b>no</b>", "steps": 2}')
    third = write_run(tmp_path / "third", 600, 30, seed=2)
    page = visit(run, other, third, color_scheme="dark")
    expect(page.locator("#head")).to_contain_text("second: NonFiniteError: <b>no</b>")
    expect(page.locator("#head")).to_contain_text("reward: mean over the first → over the last tenth of the steps")
    traces = page.locator(".card", has_text="Reward").first.locator("svg .scatterlayer .trace")
    expect(traces).to_have_count(3)
    shoot(page, "three-runs-dark")
    page.get_by_role("group", name="Runs").get_by_role("button", name="second").click()
    expect(traces).to_have_count(2)
    page.get_by_role("tab", name="Settings").click()
    row = page.locator("tr", has_text="optimizer.lr")
    assert row.locator("td").all_inner_texts() == ["1e-05", "3e-05", "1e-05"]
    count = samples_of(page)
    page.get_by_label("run", exact=True).select_option("second")
    expect(count).to_have_text("600 of 2,400 samples")


def test_a_run_that_failed_before_its_first_step(run, visit, shoot):
    for path in (
        "metrics.jsonl",
        "rollouts/step_000001.jsonl",
        "rollouts/step_000002.jsonl",
        "rollouts/step_000003.jsonl",
    ):
        (run / path).unlink()
    (run / "summary.json").write_text('{"status": "failed", "error": "ConfigError: no such model"}')
    page = visit(run)
    expect(page.locator("#head")).to_contain_text("ConfigError: no such model")
    expect(page.locator("#curves")).to_contain_text("There are no curves")
    shoot(page, "failed")
    expect(page.locator("#head .note", has_text="there is no metrics.jsonl (no step was finished")).to_have_count(1)
    page.get_by_role("tab", name="Samples").click()
    expect(page.locator("#samples")).to_contain_text("No samples are shown: none were kept (--dump-samples 0), or no")


def test_steps_that_have_no_samples(run, visit):
    page = visit(run, selection=Selection(steps=(7, 9)))
    said = "there are samples of steps 1 to 3 and none of steps 7 to 9 (--steps)"
    expect(page.locator("#head .note")).to_have_text(said)
    page.get_by_role("tab", name="Samples").click()
    expect(page.locator("#samples")).to_have_text(f"No samples are shown: {said}.")


@pytest.mark.slow
def test_a_hundred_thousand_samples(tmp_path, write_run, visit):
    run = write_run(tmp_path / "large", 100_000, 12)
    page = visit(run)
    count = samples_of(page)
    expect(count).to_have_text("100,000 samples")
    assert page.locator(".row").count() < 60  # those in view
    page.get_by_label("lowest reward").fill("0.999")
    found = sum(record["reward"] >= 0.999 for record in records(run))
    expect(count).to_have_text(f"{found:,} of 100,000 samples")
    page.get_by_label("lowest reward").fill("")
    page.get_by_role("searchbox").fill("question 19999:")
    expect(count).to_have_text("5 of 100,000 samples", timeout=30_000)
    expect(page.locator(".detail h2")).to_have_text("Sample 99995")
