"""The page, end to end: the real command, a real browser where there is one, events that arrive while it looks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardwise.cli.main import _run
from shardwise.spec.observations import ExpertsEvent, StallEvent, StragglerEvent

from .made import finished, ranks_event, run_event, steps_event, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STRAGGLER = "rank 1 is slow in backward: 9.60 ms more a step than the other ranks"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write(tmp_path / "old", finished())
    settings = {"set.lr": {"value": 0.5, "source": "command line"}, "seed": {"value": 0, "source": "default"}}
    write(
        tmp_path / "live", [run_event(t=4000.0, settings=settings), steps_event(0, t=4001.0), ranks_event(0, t=4001.0)]
    )
    return tmp_path


@pytest.fixture
def address(runs: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "shardwise.cli.main", "watch", str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]{16,}/", line)
            assert found, line
            yield found.group()
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(20) == 0


def append(folder: Path, *events: Any) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(event.to_line() + "\n" for event in events)


def _get(address: str, **headers: str) -> tuple[int, Any, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_only_the_address_with_the_token_answers_and_headers_are_strict(address: str) -> None:
    status, headers, page = _get(address)
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    assert headers["Cache-Control"] == "no-store"
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    base, token = re.fullmatch(r"(http://[^/]+)/(.*)/", address).groups()  # type: ignore[union-attr]
    for path in ("/", "/wrong-token-of-some-length/", f"/{token}/../../etc/passwd", f"/{token}/server.py", "/wrong"):
        assert _get(base + path)[0] == 404, path
    assert _get(address, Host="evil.example")[0] == 400
    record = json.loads(_get(address + "state.json")[2])
    assert [run["path"] for run in record["runs"]] == ["live", "old"]
    assert record["differing"] == {"set.lr": [0.5, 0.1]}
    assert json.loads(_get(address + "state.json?run=old")[2])["run"]["metrics"]["accuracy"] == 0.9375


def test_prometheus_can_scrape_it(address: str) -> None:
    status, headers, text = _get(address + "metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    sample = re.compile(r'shardwise_[a-z_]+\{run="[^"]*"(,[a-z_]+="[^"]*")*\} (-?[0-9.e+-]+|NaN)')
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines and all(sample.fullmatch(line) for line in lines)
    assert 'shardwise_status{run="old",status="finished"} 1.0' in lines
    assert 'shardwise_phase_seconds{run="live",rank="1",phase="backward"} 0.001' in lines
    assert 'shardwise_metric{run="old",metric="accuracy"} 0.9375' in lines


def test_a_taken_port_and_a_short_token_are_refused(address: str, runs: Path) -> None:
    port = address.split(":")[2].split("/")[0]
    assert _run(["watch", str(runs), "--port", port]) == 2
    assert _run(["watch", str(runs), "--token", "short"]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER: the page is tested in Chromium only where one is installed")
def test_in_a_browser(address: str, runs: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    complaints: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if not _ours(request.url, address) else None)
        page.goto(address)
        expect(page.get_by_role("status")).to_have_text("live")
        expect(page.get_by_text("step 10 of 100")).to_be_visible()
        # It arrives by itself, and a screen reader hears of it.
        straggler = StragglerEvent(
            step=20, rank=1, phase="backward", cause="waiting", lost_seconds=0.01, step_seconds=0.02, message=STRAGGLER
        )
        append(runs / "live", replace(steps_event(10), samples=32_000_000), ranks_event(10, slow=0.01), straggler)
        expect(page.get_by_text("step 20 of 100")).to_be_visible()
        expect(page.get_by_text("160,001,600", exact=True).first).to_be_visible()
        expect(page.get_by_role("alert")).to_contain_text(STRAGGLER)
        log = page.get_by_role("log")
        expect(log).to_contain_text(STRAGGLER)
        assert log.get_attribute("aria-live") == "polite"
        _check_tables(page)
        # Another run, chosen with the keyboard.
        page.get_by_role("button", name="old").focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="old: finished")).to_be_visible()
        expect(page.get_by_text("step 100 of 100")).to_be_visible()
        expect(page.get_by_role("button", name="old")).to_be_focused()
        # On a phone nothing sticks out; wide tables scroll by themselves.
        position = {"rank": 1, "where": "stopped", "stack": ["my_job.py:17 in forward"]}
        stall = StallEvent(
            t=5000.0, step=20, waited_seconds=9.0, bound_seconds=5.0, what="stopped", missing=[1],
            message="rank 1 is stopped", positions=[position],
        )  # fmt: skip
        append(runs / "live", ExpertsEvent(step=20, tokens={"moe": list(range(32))}, dropped={"moe": 0}), stall)
        page.set_viewport_size({"width": 360, "height": 740})
        page.get_by_role("button", name="live").click()
        expect(page.get_by_role("heading", name="live: stalled")).to_be_visible()
        expect(page.get_by_text("my_job.py:17 in forward")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        browser.close()
    assert complaints == []


def _ours(url: str, address: str) -> bool:
    return url.startswith((address, "data:"))


def _check_tables(page: Any) -> None:
    """What the charts show stands in tables as well, and all of it can be reached by name."""
    from playwright.sync_api import expect

    table = page.get_by_role("table", name="A step of each rank, in milliseconds")
    expect(table.get_by_role("row")).to_have_count(3)
    expect(table.get_by_role("rowheader", name="1")).to_be_visible()
    chart = page.get_by_role("img", name=re.compile("loss against steps: now .* at step 20"))
    expect(chart).to_be_visible()
    page.get_by_text("Table of loss").click()
    expect(page.get_by_role("table", name="loss", exact=True).get_by_role("row")).to_have_count(21)
    runs = page.get_by_role("table", name=re.compile("Runs, the latest first"))
    expect(runs.get_by_role("columnheader", name="set.lr")).to_be_visible()
    assert page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
