"""`--allowed-skips`, which CI gives: a skip for a reason that nobody listed is a failure."""

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_listed():
    pytest.skip("no data sets in /somewhere")

@pytest.fixture
def server():
    pytest.skip("no server")

def test_in_a_fixture(server):
    pass

@pytest.mark.skipif(True, reason="not today")
def test_by_a_mark():
    pass

@pytest.mark.xfail
def test_expected_to_fail():
    assert False

def test_fine():
    pass
"""


@pytest.fixture
def folder(pytester: pytest.Pytester) -> pytest.Pytester:
    """Tests that are skipped in each way there is, and a list of one reason."""
    pytester.makepyfile(test_some=TESTS)
    pytester.makepyfile(test_file="import pytest; pytest.importorskip('no_such_module')")
    pytester.makefile(".txt", reasons="# why\n\n^Skipped: no data sets\n")
    return pytester


def run(folder: pytest.Pytester, *options: str) -> tuple[dict[str, int], str]:
    # Not the plugin that searches all objects of this process for what was left open.
    plugins = ("-p", "tests.allowed_skips", "-p", "no:unraisableexception")
    done = folder.runpytest_inprocess(*plugins, *options)
    return done.parseoutcomes(), done.stdout.str()


def test_without_the_option_every_skip_is_one(folder: pytest.Pytester) -> None:
    outcomes, _ = run(folder)
    assert outcomes == {"skipped": 4, "xfailed": 1, "passed": 1}


def test_an_unlisted_skip_fails_and_says_why(folder: pytest.Pytester) -> None:
    outcomes, said = run(folder, "--allowed-skips=reasons.txt", "--continue-on-collection-errors")
    # "errors", as of everything that fails before a test begins.
    assert outcomes == {"skipped": 1, "errors": 3, "xfailed": 1, "passed": 1}
    for reason in ("no server", "not today", "could not import 'no_such_module'"):
        assert reason in said
