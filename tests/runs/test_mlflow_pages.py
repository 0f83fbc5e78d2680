"""MLflow's pages in a browser, as a person sees them: a search, its trials, charts, plots."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.runs.catalog import find_run
from pipeline.search.run import run_search
from pipeline.training.loop import train
from tests.commands import clean_environment
from tests.conftest import experiment_of
from tests.ports import free_port
from tests.runs.test_runs import SETTINGS

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

NESTED = "//*[@role='gridcell'][.//a[.='sweep']]//button"
PATIENCE = 30.0  # seconds until something is on the page


class Project(NamedTuple):
    """A folder with a search of two trials and a run of its own."""

    folder: Path
    trials: tuple[str, ...]
    """Their names, which are their folders."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Project:
    folder = tmp_path_factory.mktemp("project")
    runs = folder / "runs"
    section = {
        "space": {"inner.lr": {"grid": [0.01, 0.02]}},
        "scheduler": "none",
        "algorithm": "grid",
        "max_concurrent": 1,
    }
    settings = {**SETTINGS, "tracking": {"uri": f"sqlite:///{runs}/mlflow.db"}}
    experiment = experiment_of({**settings, "search": section}, outer={"iterations": 12})
    found = run_search(experiment, runs / "sweep")
    train(experiment_of(settings), runs / "alone")
    return Project(folder, tuple(trial.trial_id for trial in found.trials))


@pytest.fixture(scope="module")
def pages(project: Project) -> Iterator[str]:
    """The address that `maml ui` prints."""
    server = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "ui", "--port", str(free_port())],
        cwd=project.folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, "")
        address = next(m[1] for line in lines if (m := re.match(r"MLflow: (\S+)", line)))
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # The sandbox and the shared memory of a desktop are not there in a container.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1600,1600")
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


class Page:
    """What a test looks at; screenshots of it are left in the test's folder."""

    def __init__(self, browser: Any, address: str, folder: Path):
        self.browser, self._address, self._folder = browser, address, folder

    def open(self, path: str = "") -> None:
        """The list of runs, or a page below it."""
        self.browser.get("about:blank")  # a change after the # alone loads nothing
        before, _, query = self._address.partition("?")
        self.browser.get(f"{before}{path}?{query}")

    def wait(self, what: str, found: Callable[[Any], Any]) -> Any:
        """What `found` finds, as soon as it finds anything."""
        # The page is being drawn: elements come and go.
        waiting = WebDriverWait(self.browser, PATIENCE, 0.1, (WebDriverException,))
        try:
            return waiting.until(found, f"not on the page: {what}")
        finally:
            name = re.sub(r"[^a-z0-9]+", "-", what.lower())
            self.browser.save_screenshot(str(self._folder / f"{name}.png"))

    def link(self, text: str) -> Any:
        return self.wait(f"link {text}", lambda b: b.find_element(By.LINK_TEXT, text))

    def element(self, what: str, xpath: str) -> Any:
        return self.wait(what, lambda b: b.find_element(By.XPATH, xpath))


def page_of(run_dir: Path) -> str:
    """The path of a run's page."""
    return "/runs/" + find_run(str(run_dir), None).run_id


@pytest.fixture(scope="module")
def trial(project: Project) -> str:
    return page_of(project.folder / "runs" / "sweep" / "trials" / project.trials[0])


@pytest.fixture
def page(browser: Any, pages: str, tmp_path: Path) -> Page:
    return Page(browser, pages, tmp_path)


def test_the_list_of_runs_shows_a_search_and_its_trials(page: Page, project: Project) -> None:
    page.open()
    page.link("sweep")
    page.link("alone")
    assert not page.browser.find_elements(By.LINK_TEXT, project.trials[0]), "folded into the search"
    page.element("nested runs", NESTED).click()
    for name in project.trials:
        page.link(name)
    assert "4 matching runs" in page.browser.find_element(By.TAG_NAME, "body").text


def test_the_page_of_a_run_tells_what_it_was_and_what_came_of_it(
    page: Page, project: Project
) -> None:
    page.open(page_of(project.folder / "runs" / "alone"))
    page.element("summary", "//*[contains(text(), 'sinusoid tasks, mlp with 25 parameters')]")
    header = page.element("meta-test", "//table[.//*[text()='trained']]//tr[1]")
    cells = [cell.get_attribute("textContent") for cell in header.find_elements(By.XPATH, "./*")]
    assert cells == ["MSE after", "0 steps", "1 step", "10 steps"]


def test_a_metric_is_drawn_as_a_line(page: Page, trial: str) -> None:
    page.open(f"{trial}/model-metrics")
    page.element("search", "//input[@placeholder='Search metric charts']").send_keys("query_loss")
    page.wait("one chart", lambda b: len(b.find_elements(By.CLASS_NAME, "js-plotly-plot")) == 1)
    line = page.element("chart of query_loss", "//*[local-name()='path'][@class='js-line']")
    points = re.split("[ML]", line.get_attribute("d"))[1:]
    assert len(points) == 12, "one per iteration"
    assert len({point.split(",")[1] for point in points}) > 1, "the loss moves"


def test_a_plot_is_displayed(page: Page, trial: str) -> None:
    page.open(f"{trial}/artifacts/plots/training.png")
    width = "return Math.max(0, ...Array.from(document.images, image => image.naturalWidth))"
    page.wait("plot", lambda b: b.execute_script(width) >= 800)
    assert page.element("file name", "//*[text()='plots/training.png']")
