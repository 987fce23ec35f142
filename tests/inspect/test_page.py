"""The page of a recorded Llama under ZeRO-3, in headless Chromium; and what of it can be checked without."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from graphopt.inspect.compare import compare
from graphopt.inspect.document import document
from graphopt.inspect.page import page
from graphopt.sizes import readable_size
from tests.support.browser import Browser, find_browser
from tests.support.inspected import inspected

WEB = Path(str(resources.files("graphopt.inspect"))) / "web"
ZERO, BUCKET, SCHEDULE = 5, 6, 7  # stages


class Recorded:
    """A document, as a test asks about it."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.columns = values["records"]

    def text(self, index: int) -> str:
        return "" if index < 0 else str(self.values["strings"][index])

    def of(self, record: int, column: str) -> str:
        return self.text(self.columns[column][record])

    def order(self, stage: int) -> list[int]:
        """The records of a stage, in execution order."""
        runs = self.values["stages"][stage]["order"]
        return list(itertools.chain.from_iterable(range(first, first + count) for first, count in runs))

    def named(self, stage: int, **wanted: str) -> list[str]:
        """Names of the nodes of a stage whose columns contain these texts."""
        found = [r for r in self.order(stage) if all(text in self.of(r, column) for column, text in wanted.items())]
        return [self.of(record, "name") for record in found]


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    inspection = inspected("llama")
    return Recorded(document(inspection, comparison=compare(inspection, inspected("llama", "dp=2,zero=1"))))


@pytest.fixture(scope="module")
def file(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(recorded.values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(*find_browser(), tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """The window, which must log nothing and ask the network for nothing."""
    window.complaints(), window.requests()
    yield window
    assert window.complaints() == []
    assert [url for url in window.requests() if not url.startswith(("file:", "data:", "blob:"))] == []


def test_built_of_these_sources() -> None:
    """`npm run build` in graphopt/inspect/web makes the page anew; build.mjs computes the same hash."""
    sources = [*WEB.glob("src/**/*.*"), *(WEB / name for name in ("build.mjs", "package-lock.json", "package.json"))]
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(WEB).as_posix(), path) for path in sources):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    built = (WEB / "page.html").read_text(encoding="utf-8")
    assert f'<meta name="sources" content="{digest.hexdigest()}">' in built, "run `make page`"


def test_template_is_small_and_names_no_other_place() -> None:
    built = (WEB / "page.html").read_text(encoding="utf-8")
    assert len(built.encode()) < 1_500_000
    shell = re.sub(r"<script.*?</script>|<style>.*?</style>", "", built, flags=re.DOTALL)
    assert "http:" not in shell and "https:" not in shell
    assert "default-src 'none'" in shell
    assert "resolved" not in (WEB / "package-lock.json").read_text()


def test_equal_recordings_give_equal_pages(recorded: Recorded) -> None:
    assert page(recorded.values) == page(json.loads(json.dumps(recorded.values)))


def test_nothing_in_a_recording_ends_its_script(recorded: Recorded, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "odd.html"
    odd = {**recorded.values, "title": "</script><script>alert(1)</script>é\u2028", "notes": ["<b>bold</b>"]}
    path.write_text(page(odd), encoding="utf-8")
    browser.open(path, "summary")
    assert browser.text("h1").startswith("</script><script>alert(1)</script>é")
    assert "<b>bold</b>" in browser.texts(".summary section:last-child li")


def test_opens_at_the_last_stage_with_layers_folded(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file)
    names = [stage["name"] for stage in recorded.values["stages"]]
    assert [text.split()[0] for text in browser.texts(".stages button")] == names
    assert browser.texts(".stages [aria-pressed=true] b") == ["schedule"]
    assert browser.texts(".fold.repeat .title") == ["model.layers.0 … 1 2 alike"]
    browser.click("main .quiet", "Fold all")
    browser.until(lambda: browser.texts(".fold .title") == ["inputs", "forward", "backward", "outputs"])


def test_unfolds_to_nodes_and_folds_again(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file)
    browser.click(".fold.repeat")
    for path in ("model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.up_proj"):
        browser.click(f'[data-key="forward/{path}"]')
    wanted = recorded.named(SCHEDULE, module="model.layers.1.mlp.up_proj", phase="forward", target="aten.mm")
    row = browser.text(f'[data-name="{wanted[0]}"]')
    assert "aten.mm.default(" in row and "float32[128, 128]" in row and "64.0 KiB" in row and "linear.py" in row
    browser.click(".fold.repeat")
    browser.until(lambda: browser.count('[data-key^="forward/model.layers.1"]') == 0)


def test_search_unfolds_what_hides_the_match(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file)
    matches = recorded.named(SCHEDULE, module="layers.1.mlp", target="aten.mm")
    browser.keys("/", "module:layers.1.mlp target:aten.mm")
    assert browser.text("#matches") == f"{len(matches)} found"
    browser.keys(Keys.ENTER)
    browser.until(lambda: browser.count(f'.tree .selected[data-name="{matches[0]}"]') == 1)
    assert browser.text("#why h2") == matches[0]
    assert browser.text("#matches") == f"1 of {len(matches)}"
    browser.keys(Keys.ENTER)
    browser.until(lambda: browser.count(f'.tree .selected[data-name="{matches[1]}"]') == 1)
    browser.keys(Keys.SHIFT, Keys.ENTER, Keys.NULL, " nowhere")
    browser.until(lambda: browser.text("#matches") == "0 found")
    assert "No node of this program has all of this" in browser.text(".found")


def test_stages_change_by_click_and_by_arrow(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file)
    browser.click(".stages button", "capture")
    browser.until(lambda: browser.address == "graph=capture")
    assert browser.texts(".stages [aria-pressed=true] b") == ["capture"]
    browser.keys(Keys.ARROW_RIGHT)
    browser.until(lambda: browser.address == "graph=canonicalize")
    assert f"after canonicalize · forward program · {len(recorded.order(1))} nodes" in browser.text("main .bar")


def test_drawing_unfolds_by_a_click(browser: Browser, file: Path) -> None:
    browser.open(file, "graph=schedule&view=drawing")
    browser.until(lambda: browser.count(".box") > 3)
    boxes, arrows = browser.count(".box"), browser.count(".edge")
    assert arrows > 3
    browser.click('.box[data-key="forward/model"]')
    browser.until(lambda: browser.count(".box") > boxes)
    assert browser.count('.frame[data-key="forward/model"]') == 1
    assert any("2 alike" in text for text in browser.texts(".box.repeat text"))
    browser.click('.frame[data-key="forward/model"] text')
    browser.until(lambda: browser.count(".box") == boxes)


def test_diff_side_by_side(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file, "diff=bucket")
    stage = recorded.values["stages"][BUCKET]
    assert f"bucket{{bytes=64KiB}} collectives {stage['statistics']['collectives']}" in browser.text("main .bar")
    header = browser.text(".sides .header")
    assert header == f"before · {len(recorded.order(ZERO))} nodes after · {len(recorded.order(BUCKET))} nodes"
    folded = browser.texts(".same-run")
    assert re.fullmatch(r"⋯ \d+ nodes unchanged ⋯", folded[0])
    moved = {recorded.text(name) for name in stage["moved"]}
    assert moved.issuperset(
        browser.run("return [...document.querySelectorAll('.side.moved')].map(e => e.dataset.name)")
    )
    assert browser.count(".side.changed") >= 2
    rows = browser.count(".sides .row")
    browser.click(".same-run")
    browser.until(lambda: browser.texts(".same-run")[:1] != folded[:1] and browser.count(".sides .row") >= rows)


def test_diff_by_provenance(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file, "diff=zero")
    browser.click(".segments button", "By provenance")
    stage = recorded.values["stages"][ZERO]
    shards = [record for record, _ in stage["made"] if "input (shard" in recorded.of(record, "target")]
    gone = [entry for entry in stage["removed"] if "input (parameter" in recorded.of(entry[0], "target")]
    assert f"made {len(shards)} shard inputs" in browser.texts(".provenance .fold")
    browser.click(".provenance .fold", "parameter inputs")
    name, places = recorded.of(gone[0][0], "name"), [recorded.text(place) for place in gone[0][1]]
    rows = browser.until(lambda: [row for row in browser.texts(".provenance .row") if row.startswith(f"{name} ")])
    assert rows[0].endswith(f"now {' '.join(places)}")


def test_memory_marks_the_peak(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file, "memory")
    memory = recorded.values["memory"]
    peak = recorded.of(recorded.order(SCHEDULE)[memory["peak_position"]], "name")
    label = browser.text(".peak text")
    assert label.startswith("peak ") and label.endswith(f" at {peak}")
    assert len(browser.texts(".plot path")) == len(memory["categories"])
    nodes = sum(recorded.of(record, "kind") != "output" for record in recorded.order(SCHEDULE)) + 1
    width = browser.run("return document.querySelector('.plot').clientWidth")
    browser.point(".plot", (memory["peak_position"] + 0.5) / nodes * width, 200)
    tip = browser.text(".tip")
    assert (
        tip.startswith(f"{peak} node {memory['peak_position']}") and label.split(" at ")[0].removeprefix("peak ") in tip
    )
    owner, category, size, first, last = memory["at_peak"][0]
    top = browser.texts(".at-peak .row")[1].split()
    assert top[:2] == [recorded.text(owner), category] and top[-2:] == [str(first), str(last)]
    assert readable_size(size).split()[1] == top[3]
    browser.click(".at-peak .link")
    assert browser.text("#why h2") == recorded.text(owner)


def test_memory_zooms(browser: Browser, file: Path) -> None:
    browser.open(file, "memory")
    before = browser.run("return document.querySelector('.plot path').getAttribute('d')")
    browser.run("document.querySelector('.chart').focus()")
    browser.keys("w", "w")
    browser.until(lambda: browser.run("return document.querySelector('.plot path').getAttribute('d')") != before)
    browser.keys("0")
    browser.until(lambda: browser.run("return document.querySelector('.plot path').getAttribute('d')") == before)


def test_why_tells_the_chain_of_passes(recorded: Recorded, browser: Browser, file: Path) -> None:
    wait = recorded.named(SCHEDULE, module="model.layers.1.self_attn.o_proj", phase="forward", target="wait_tensor")[0]
    browser.open(file, f"why={wait}")
    reasons = " ".join(browser.texts("#why .reasons li"))
    assert "stage 3 gathers model.layers.1.self_attn.o_proj.weight" in reasons
    chain = browser.texts("#why .chain > li")
    assert chain[0].startswith("capture captured linear")
    assert chain[1].startswith("differentiate made t_") and " from linear" in chain[1]
    assert chain[2].startswith(f"zero made {wait} from t_")
    facts = browser.text("#why .facts")
    assert "placement replicated" in facts and "layer model.layers.1" in facts and "made by zero" in facts
    reader = browser.texts("#why section:last-of-type .link")[0]
    browser.click("#why section:last-of-type .link")
    browser.until(lambda: browser.text("#why h2") == reader)
    browser.open(file, f"why={wait}")
    browser.click("#why .chain .link", "capture")
    browser.until(lambda: browser.address.startswith("graph=capture&why=linear"))


def test_why_tells_what_became_of_a_removed_node(recorded: Recorded, browser: Browser, file: Path) -> None:
    record, places = next(
        entry for entry in recorded.values["stages"][ZERO]["removed"] if "embed_tokens" in recorded.of(entry[0], "name")
    )
    browser.open(file, f"memory&why={recorded.of(record, 'name')}")
    assert "in the program after checkpoint" in browser.text("#why .scroll")
    assert browser.texts("#why .chain > li")[-1] == f"zero removed; now {' '.join(map(recorded.text, places))}"
    browser.open(file, "why=no_such_node")
    assert "No program of this recording has a node named no_such_node" in browser.text("#why")


def test_schedule_shows_tasks_and_saves_a_trace(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file, "schedule")
    schedule = recorded.values["schedule"]
    assert browser.texts(".stream") == schedule["streams"]
    width = browser.run("return document.querySelector('canvas').clientWidth")
    name, stream, start, duration = max((t for t in schedule["tasks"] if t[1] == 1), key=lambda task: task[3])
    browser.point("canvas", (start + duration / 2) / schedule["total_us"] * width, 24 + 74 * stream + 20)
    assert browser.text(".tip").startswith(f"{recorded.text(name)} ")
    browser.point("canvas", (start + duration / 2) / schedule["total_us"] * width, 24 + 74 * stream + 20, click=True)
    assert browser.text("#why h2") == recorded.text(name)
    browser.click("#save-trace")
    events = json.loads(browser.saved("LlamaForCausalLM.trace.json"))["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads == dict(enumerate(schedule["streams"]))
    complete = [(event["name"], event["tid"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert complete == [(recorded.text(task[0]), *task[1:]) for task in schedule["tasks"]]


def test_summary_has_passes_communication_and_memory(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file, "summary")
    text = browser.text(".summary")
    assert recorded.values["pipeline"] in text
    for found in recorded.values["communication"]["collectives"]:
        assert f"{found['collective']} dp {found['calls']} " in text
    browser.click("td .link", "zero")
    browser.until(lambda: browser.address.startswith("diff=zero"))


def test_summary_has_the_verdict_of_a_check(recorded: Recorded, browser: Browser, tmp_path: Path) -> None:
    found = [("differentiate", "reassociates", 1e-7, 1e-5), ("zero", "bitwise", None, 0.0)]
    passes = [dict(zip(("name", "tier", "worst", "bound"), row, strict=True), role="loss") for row in found]
    path = tmp_path / "checked.html"
    verdict = {"passes": passes, "guilty": "zero", "node": "mm_3"}
    path.write_text(page({**recorded.values, "verdict": verdict}), encoding="utf-8")
    browser.open(path, "summary")
    rows = browser.texts(".summary tr")
    assert "differentiate reassociates 1.0e-7 1.0e-5 loss agrees" in rows
    assert "zero bitwise infinite 0.0e+0 loss differs" in rows
    browser.click("p .link", "mm_3")
    assert browser.text("#why h2") == "mm_3"


def test_source_leads_to_nodes(recorded: Recorded, browser: Browser, file: Path) -> None:
    matmul = recorded.named(SCHEDULE, module="model.layers.1.mlp.down_proj", phase="forward", target="aten.mm")[0]
    browser.open(file, f"source&why={matmul}")
    line = browser.text(".line.selected")
    assert f"{matmul} = aten_mm(" in line
    argument = browser.texts(".line.selected .link")[1]
    browser.click(".line.selected .link", argument)
    browser.until(lambda: browser.text("#why h2") == argument)
    browser.click("#save-source")
    assert browser.saved("LlamaForCausalLM.py") == recorded.values["source"]


def test_compare_shows_two_plans(recorded: Recorded, browser: Browser, file: Path) -> None:
    browser.open(file, "compare")
    comparison = recorded.values["comparison"]
    cells = browser.texts(".summary td")
    for row in (*comparison["rows"], *comparison["moved"][:3]):
        assert [cell for cell in row if cell and " ".join(cell.split()) not in cells] == []


def test_a_link_opens_a_view(recorded: Recorded, browser: Browser, file: Path, tmp_path: Path) -> None:
    wait = recorded.named(SCHEDULE, target="wait_tensor")[0]
    browser.open(file, f"diff=bucket&view=provenance&why={wait}")
    assert browser.texts("[role=tab][aria-selected=true]") == ["Diff"]
    assert browser.texts(".segments [aria-pressed=true]") == ["By provenance"]
    assert browser.text("#why h2") == wait
    browser.keys(Keys.ESCAPE, "3")
    browser.until(lambda: browser.address == "memory")
    started = tmp_path / "started.html"
    started.write_text(page({**recorded.values, "start": f"why={wait}"}), encoding="utf-8")
    browser.open(started)
    assert browser.text("#why h2") == wait
    assert browser.count(f'.tree .selected[data-name="{wait}"]') == 1
