"""The HTML report: built from small folders, then opened in headless Chromium and clicked."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from flowhn import reproduce, run_report
from flowhn.errors import UserError
from flowhn.reporting.report import Source, write_report
from flowhn.reporting.report_tables import render

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)
NO_LINKS = {"rows": [], "names": {}}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of what this repository has committed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run_report.make_report([f"output_dir={tmp_path_factory.mktemp('report')}"])


def test_every_committed_table_is_on_the_page_with_its_figures_and_records(page):
    text = page.read_text()
    folders = [path.parent for path in (ROOT / "experiments").glob("*/*/table.md")]
    assert folders
    for folder in folders:
        assert folder.relative_to(ROOT).as_posix() in text
    assert text.count("<img ") == sum(len(list(folder.glob("*.png"))) for folder in folders)
    records = [
        path
        for folder in folders
        for kind in ("records", "measurements", "evals")
        for path in (folder / kind).glob("*.json")
    ]
    assert text.count("<details ") == len(records)
    assert "./reproduce.sh table1" in text


def test_the_page_refers_to_nothing_outside_itself(page):
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    assert not re.findall(r"url\(|@import|<link|<iframe", text)


def test_every_number_of_a_table_leads_to_an_anchor_that_is_there(page):
    text = page.read_text()
    anchors = set(re.findall(r'id="([^"]+)"', text))
    links = re.findall(r'<a href="#([^"]+)" class="source">', text)
    assert len(links) > 200
    assert set(links) <= anchors


def test_a_number_leads_to_the_record_of_its_row(page):
    text = page.read_text()
    row = re.search(r"<td[^>]*>FlowHN FAC_Split</td>(.*?)</tr>", text, re.S)[1]
    anchors = re.findall(r'href="#([^"]+)"', row)
    record = re.search(rf'<details id="{anchors[0]}">.*?</details>', text, re.S)[0]
    assert "flowhn_fac-s0.json" in record
    assert set(anchors) == {anchors[0], "paper"}
    assert anchors.count("paper") == 2, "the columns TPS and MFU of the paper lead to the paper"


def test_markdown_cannot_bring_html_or_pictures_in():
    shown = render("# Title\n\n<script>alert(1)</script>\n\n![x](http://a/b.png)\n\n| a | b |\n|--|--|\n| <b>x</b> | 1 |\n",
                   NO_LINKS, "here")  # fmt: skip
    assert "<script>" not in shown
    assert "<img" not in shown
    assert "<b>" not in shown
    assert "Title" not in shown
    assert '<a href="#here" class="source">1</a>' in shown


def test_a_broken_record_is_one_sentence(tmp_path):
    folder = tmp_path / "table1" / "x"
    (folder / "records").mkdir(parents=True)
    (folder / "table.md").write_text("# T\n")
    (folder / "records" / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json cannot be read"):
        write_report([Source(folder=folder, artefact="table1", title="T")], tmp_path / "report.html")


def test_every_kind_of_table_and_record_is_shown_with_the_folders_command(tmp_path):
    folder = tmp_path / "long_context" / "x"
    (folder / "evals").mkdir(parents=True)
    for name in ("table", "verdicts", "rates", "gap"):
        (folder / f"{name}.md").write_text(f"# T\n\nthe {name} is here\n")
    content = {"cell": "llama", "size": "tiny", "seed": 0, "created": "2026-11-25T00:00:00", "versions": {"torch": "2.13"},
               "device": {"name": "a CPU", "type": "cpu", "count": 1}, "git": {"commit": "0" * 40, "dirty": False}}  # fmt: skip
    (folder / "evals" / "llama-s0.json").write_text(json.dumps(content))
    (folder / "command.txt").write_text("./reproduce.sh long_context size=135m\n")
    text = write_report([Source(folder=folder, artefact="long_context", title="T")], tmp_path / "r.html").read_text()
    for name in ("table", "verdicts", "rates", "gap"):
        assert f"the {name} is here" in text
    assert "evals/llama-s0.json" in text
    assert "./reproduce.sh long_context size=135m" in text
    (folder / "command.txt").unlink()
    text = write_report([Source(folder=folder, artefact="long_context", title="T")], tmp_path / "r.html").read_text()
    assert "./reproduce.sh" not in text, "a command is not guessed"


def test_nothing_to_report_and_other_overrides_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nothing to report"):
        run_report.make_report([])
    with pytest.raises(UserError, match="size=tiny has no meaning"):
        run_report.make_report(["size=tiny"])


def test_reproduce_lists_and_makes_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert reproduce._main(["--list"]) == 0
    assert "report " in capsys.readouterr().out
    assert reproduce._main(["report", "--dry-run", f"output_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert f"would write {tmp_path}/report.html" in said
    assert "experiments/table1/tiny-docs-laptop" in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="is made alone"):
        reproduce._main(["table1", "report"])
    assert reproduce._main(["report", f"output_dir={tmp_path}"]) == 0
    assert (tmp_path / "report.html").is_file()


def in_browser(
    page: Path, profile: Path, body: Callable[[Callable[..., Awaitable[Any]], list[dict]], Awaitable[None]]
) -> None:
    """Open a page in headless Chromium and run ``body(call, events)``: ``call`` sends a DevTools command and gives its result."""
    import aiohttp

    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--window-size=1400,1000",
               f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def talk() -> None:
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().strip()):
            assert browser.poll() is None, "Chromium ended"
            assert time.monotonic() < deadline, "Chromium did not start within a minute"
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                target = next(one for one in await answer.json(content_type=None) if one["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                events: list[dict] = []
                number = 0

                async def call(method: str, **params: Any) -> Any:
                    nonlocal number
                    number += 1
                    await socket.send_json({"id": number, "method": method, "params": params})
                    while True:
                        message = await asyncio.wait_for(socket.receive_json(), timeout=60)
                        if message.get("id") == number:
                            assert "error" not in message, message
                            return message["result"]
                        events.append(message)

                await call("Network.enable")
                await call("Runtime.enable")
                await call("Page.enable")
                await call("Page.navigate", url=page.as_uri())
                while not any(event.get("method") == "Page.loadEventFired" for event in events):
                    await call("Runtime.evaluate", expression="1")
                    await asyncio.sleep(0.05)
                await body(call, events)

    try:
        asyncio.run(talk())
    finally:
        browser.kill()
        browser.wait()


async def evaluate(call: Callable[..., Awaitable[Any]], script: str) -> Any:
    result = await call("Runtime.evaluate", expression=script, returnByValue=True, userGesture=True)
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")


@needs_chromium
def test_in_chromium_columns_sort_numbers_open_records_and_nothing_is_fetched(page, tmp_path):
    column = """[...document.querySelectorAll("#s0 table.sortable")[0].tBodies[0].rows].map(row => row.cells[%d].textContent)"""
    click = """document.querySelectorAll("#s0 table.sortable")[0].tHead.rows[0].cells[%d].click()"""

    async def body(call: Callable[..., Awaitable[Any]], events: list[dict]) -> None:
        heads = await evaluate(
            call, '[...document.querySelectorAll("#s0 table.sortable th")].map(th => th.textContent)'
        )
        tps, loss = heads.index("TPS"), heads.index("val loss")
        before = await evaluate(call, column % tps)
        numbers = [float(text.replace(",", "")) for text in before]
        assert numbers != sorted(numbers)
        await evaluate(call, click % tps)
        assert [float(text.replace(",", "")) for text in await evaluate(call, column % tps)] == sorted(numbers)
        await evaluate(call, click % tps)
        assert [float(text.replace(",", "")) for text in await evaluate(call, column % tps)] == sorted(
            numbers, reverse=True
        )
        await evaluate(call, click % loss)
        losses = [float(text) for text in await evaluate(call, column % loss)]
        assert losses == sorted(losses)
        await evaluate(call, click % 0)
        names = await evaluate(call, column % 0)
        assert names == sorted(names, key=str.lower)

        link = 'document.querySelector("#s0 table.sortable tbody a.source")'
        anchor = await evaluate(call, f'{link}.getAttribute("href").slice(1)')
        assert not await evaluate(call, f'document.getElementById("{anchor}").open')
        await evaluate(call, f"{link}.click()")
        await asyncio.sleep(0.3)
        assert await evaluate(call, f'document.getElementById("{anchor}").open')

        await evaluate(call, 'document.querySelector("button.copy").click()')
        await asyncio.sleep(0.3)
        assert await evaluate(call, 'document.querySelector("button.copy").textContent') in ("copied", "press Ctrl+C")
        assert await evaluate(call, "[...document.images].every(one => one.complete && one.naturalWidth > 100)")

        asked = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith(("data:", page.as_uri()))] == []
        errors = [e for e in events if e.get("method") == "Runtime.exceptionThrown"]
        assert not errors, json.dumps(errors)[:500]

    in_browser(page, tmp_path / "profile", body)
