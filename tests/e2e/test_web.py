"""The page at / in a real headless Chromium: most of it over an engine that writes what a test tells it to, the last test over the bundled model."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizer import save_tokenizer
from serve_fake import FakeEngine, Server
from serve_process import ServerProcess, wait_for

from miniinfer.engine.text import Tokenizer
from miniinfer.models.hub import BUNDLED

FILES = Path(__file__).parents[2] / "miniinfer" / "assets" / "web"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> [x](javascript:window.hacked=1) <b>bold</b>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium (Debian, Ubuntu: apt install chromium)")
    with sync.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[Server]:
    with Server(FakeEngine(tokenizer, max_model_len=4096)) as running:
        yield running


@pytest.fixture
def server(shared: Server) -> Server:
    """The shared server with an engine as it was at first."""
    engine = shared.engine
    engine.reply, engine.delay, engine.seen, engine.aborted = (lambda prompt: "hello there"), 0.0, [], []
    return shared


class Visit:
    """A page in a profile of its own, and what its console said."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1360, "height": 860}, **options})
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)

    def ready(self) -> Visit:
        self.page.wait_for_selector("#model option", state="attached")
        return self

    def send(self, text: str, wait: bool = True) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        if wait:
            self.idle()

    def idle(self) -> None:
        self.page.wait_for_selector("#stop", state="hidden")
        self.page.wait_for_selector("#send", state="visible")

    def until(self, expression: str) -> None:
        """Playwright's own wait_for_function evaluates strings in the page, which the page's policy forbids."""
        assert wait_for(lambda: self.page.evaluate(expression)), expression

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def last(self) -> str:
        return self.texts(".message:last-child .body")[0]


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Visit]:
    """The page, which must not have had an error to tell."""
    one = Visit(browser, server.url).ready()
    yield one
    one.context.close()
    assert one.errors == []


def head(url: str, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as e:
        return e.code, e.headers


# -------------------------------------------------------------------------------------------------------------- files


def test_files_and_headers(server: Server) -> None:
    for name in ["", *(f"web/{path.name}" for path in FILES.iterdir())]:
        status, headers = head(f"{server.url}/{name}")
        assert status == 200 and int(headers["content-length"]) > 0
        assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
        assert int(head(f"{server.url}/{name}", accept_encoding="gzip")[1]["content-length"]) <= int(headers["content-length"]) + 40
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-cache"
        assert head(f"{server.url}/{name}", if_none_match=headers["etag"])[0] == 304
        assert head(f"{server.url}/{name}", if_none_match='"old"')[0] == 200
    assert head(f"{server.url}/web/app.js")[1]["content-type"].startswith("text/javascript")
    for wrong in ("web/nothing.js", "web/..%2f..%2fconfig.py", "web/%2e%2e/config.py", "web/"):
        assert head(f"{server.url}/{wrong}")[0] == 404


def test_files_are_few_whole_and_our_own() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FILES.iterdir()}
    assert sum(len(text.encode()) for text in texts.values()) < 80_000
    everything = "\n".join(texts.values())
    assert set(re.findall(r"https?://[\w.]+", everything)) == {"http://www.w3.org"}  # SVG's namespace
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", everything)
    for name in re.findall(r'from "\./([\w.]+)"', everything):
        assert name in texts


# --------------------------------------------------------------------------------------------------------------- chat


def test_an_answer_is_shown_while_it_is_written(visit: Visit, server: Server) -> None:
    server.engine.reply, server.engine.delay = (lambda prompt: "one two three four five six seven " * 4), 0.03
    visit.send("count", wait=False)
    visit.until("document.querySelector('.message.writing .body')?.textContent.length > 20")
    assert len(visit.last()) < 100
    visit.idle()
    assert visit.last() == ("one two three four five six seven " * 4).strip()
    (stats,) = visit.texts(".assistant .stats")
    assert re.search(r"\d+ tokens · \d+(\.\d)? tok/s · first after \d+ ms · prompt \d+, 3 cached", stats)
    assert visit.page.text_content("#status") == "Answer complete"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request(visit: Visit, server: Server, how: str) -> None:
    server.engine.reply, server.engine.delay = (lambda prompt: "one two three " * 200), 0.02
    visit.send("count", wait=False)
    visit.until("document.querySelector('.assistant .body')?.textContent.length > 20")
    assert not visit.page.is_visible("#send")
    if how == "button":
        visit.page.click("#stop")
    else:
        visit.page.keyboard.press("Escape")
    visit.idle()
    assert wait_for(lambda: len(server.engine.aborted) == 1)
    assert visit.last().startswith("one two three") and "stopped" in visit.texts(".assistant .stats")[0]
    server.engine.reply, server.engine.delay = (lambda prompt: "again"), 0.0
    visit.send("more")
    assert visit.last() == "again"


def test_regenerate_and_edit(visit: Visit, server: Server) -> None:
    answers = iter(["first", "second", "third", "fourth"])
    server.engine.reply = lambda prompt: next(answers)
    visit.send("question")
    visit.page.click("text=Regenerate")
    visit.idle()
    assert visit.texts(".assistant .body") == ["second"]
    visit.send("another")
    assert visit.texts(".message .body") == ["question", "second", "another", "third"]
    visit.page.hover(".message.user >> nth=0")
    visit.page.click(".message.user >> nth=0 >> text=Edit")
    visit.page.fill(".message textarea", "better question")
    visit.page.click(".editing >> text=Send")
    visit.idle()
    assert visit.texts(".message .body") == ["better question", "fourth"]
    prompt = server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False)
    assert "better question" in prompt and "another" not in prompt
    visit.page.press("#prompt", "ArrowUp")
    assert visit.page.input_value(".message textarea") == "better question"
    visit.page.press(".message textarea", "Escape")
    assert visit.texts(".message .body") == ["better question", "fourth"]


def test_settings_reach_the_request(visit: Visit, server: Server) -> None:
    fields = {"temperature": "0.5", "top_p": "0.9", "top_k": "7", "min_p": "0.1", "max_tokens": "3", "seed": "11"}
    fields |= {"presence_penalty": "0.2", "frequency_penalty": "0.3", "repetition_penalty": "1.1", "stop": "zebra\ncrossing", "system": "Be brief."}
    for name, value in fields.items():
        visit.page.fill(f"[name={name}]", value)
    visit.send("hi")
    prompt, params = server.engine.seen[-1][:2]
    numbers = {name: float(value) for name, value in fields.items() if name not in ("stop", "system")}
    assert {name: getattr(params, name) for name in numbers} == numbers and list(params.stop) == ["zebra", "crossing"]
    assert "Be brief." in server.engine.tokenizer.decode(prompt)
    assert "cut off at the token limit" in visit.texts(".assistant .stats")[0]


def test_the_model_is_chosen(browser: Any, server: Server) -> None:
    visit = Visit(browser, "about:blank")
    cards = [{"id": name, "object": "model", "max_model_len": length} for name, length in (("tiny", 4096), ("<b>other</b>", 99))]
    visit.page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": cards}))
    visit.page.goto(server.url)
    visit.ready()
    assert "4,096 tokens" in visit.texts(".welcome")[0]
    visit.page.select_option("#model", "<b>other</b>")
    assert visit.texts(".welcome h2") == ["<b>other</b>"]
    visit.send("hi")
    assert "<b>other</b>" in visit.texts(".error span")[0] and "(404)" in visit.texts(".error span")[0]
    visit.page.select_option("#model", "tiny")
    visit.page.click("text=Try again")
    visit.idle()
    assert visit.last() == "hello there" and visit.texts(".assistant .who") == ["tiny"]
    visit.context.close()


def test_formats_reach_the_request(visit: Visit) -> None:
    sent: list[dict[str, Any]] = []
    visit.page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    assert not visit.page.is_visible("[name=schema]")
    visit.page.select_option("[name=format]", "json_schema")
    visit.page.fill("[name=schema]", '{"type": "object", "properties": {"a": {"type": "integer"}}}')
    visit.page.select_option("[name=effort]", "none")
    visit.page.fill("[name=template]", '{"enable_thinking": false}')
    visit.page.fill("[name=tools]", '[{"name": "f", "parameters": {"type": "object"}}]')
    visit.page.fill("#prompt", "hi")
    visit.page.press("#prompt", "Enter")
    visit.page.wait_for_selector(".message.assistant:not(.writing)")
    (body,) = sent
    schema = {"name": "answer", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}, "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert body["reasoning_effort"] == "none" and body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    visit.errors.clear()  # the engine of these tests knows no grammars


def test_errors_in_the_servers_words_and_at_their_field(browser: Any, server: Server) -> None:
    visit = Visit(browser, server.url).ready()
    visit.page.fill("[name=temperature]", "-1")
    visit.send("hi")
    assert "temperature: must be" in visit.texts(".error span")[0]
    assert visit.page.get_attribute("[name=temperature]", "aria-invalid") == "true"
    visit.page.fill("[name=temperature]", "warm")
    visit.page.click("text=Try again")
    visit.idle()
    assert "“warm” is not a number" in visit.texts(".error span")[0]
    visit.page.fill("[name=temperature]", "")
    visit.page.fill("[name=tools]", "[{")
    visit.page.click("text=Try again")
    visit.idle()
    assert "Tools: not valid JSON" in visit.texts(".error span")[0]
    visit.page.fill("[name=tools]", "")
    visit.page.click("text=Try again")
    visit.idle()
    assert visit.texts(".message .body") == ["hi", "hello there"]
    visit.context.close()


def test_token_probabilities(visit: Visit) -> None:
    visit.page.check("[name=logprobs]")
    visit.send("hi")
    assert "".join(visit.page.locator(".tokens span").all_text_contents()).startswith("hello there")
    visit.page.hover(".tokens span >> nth=0")
    rows = visit.page.locator("#tip tr")
    assert visit.page.is_visible("#tip") and rows.count() >= 2
    token = visit.page.text_content(".tokens span >> nth=0")
    assert visit.page.text_content("#tip .chosen .token") == token and "%" in (visit.page.text_content("#tip .chosen") or "")
    visit.page.focus(".tokens")
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.text_content(".tokens .picked") == visit.page.text_content(".tokens span >> nth=1")
    visit.page.click("text=Text")
    assert visit.page.locator(".tokens").count() == 0 and visit.last() == "hello there"


def test_tool_calls_and_their_results(visit: Visit, server: Server) -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 17, "b": 25}}</tool_call>'
    server.engine.reply = lambda prompt: "it is 42" if '{"sum": 42}' in prompt else call
    visit.page.fill("[name=tools]", '[{"name": "add", "parameters": {"type": "object"}}]')
    visit.send("17 + 25?")
    assert visit.texts(".call b") == ["add"] and json.loads(visit.texts(".call code")[0]) == {"a": 17, "b": 25}
    visit.page.fill(".result textarea", '{"sum": 42}')
    visit.page.click("text=Send result")
    visit.page.wait_for_selector(".message.tool")
    visit.idle()
    assert visit.last() == "it is 42" and visit.page.locator(".result").count() == 0


def test_reasoning_is_folded(visit: Visit, server: Server) -> None:
    server.engine.reply = lambda prompt: "<think>let me see</think>\n\nit is so"
    visit.send("why?")
    assert visit.last() == "it is so"
    assert not visit.page.is_visible(".assistant .thought")
    visit.page.click(".assistant .reasoning summary")
    assert visit.texts(".assistant .thought") == ["let me see"]


# ----------------------------------------------------------------------------------------------------------- markdown


def test_markup_in_a_message_is_text(visit: Visit, server: Server) -> None:
    server.engine.reply = lambda prompt: f"{EVIL}\n\n```html\n{EVIL}\n```\n\n- {EVIL}\n"
    visit.send(EVIL)
    assert EVIL in visit.texts(".user .body")[0] and '<img src=x onerror="window.hacked=1"><script>' in visit.last()
    assert visit.texts(".assistant pre") == [EVIL]
    assert visit.page.locator("#log :is(img, script, b, a)").count() == 0
    assert visit.page.evaluate("window.hacked") is None


def test_markdown(visit: Visit, server: Server) -> None:
    text = (
        "# Title\n\nSome **bold**, *slanted*, `code *x*` and 2*3*4, snake_case_name.\n\n1. one\n2. two\n   - inner\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n> said\n\n```py\ndef f():\n    return 1\n```\n\nSee [here](https://example.org/a_(b)) or https://example.org/x."
    )
    server.engine.reply = lambda prompt: text
    visit.send("show")
    counts = {tag: visit.page.locator(f".assistant .body {tag}").count() for tag in ("h3", "strong", "ol > li", "li li", "td", "blockquote", "pre")}
    assert counts == {"h3": 1, "strong": 1, "ol > li": 2, "li li": 1, "td": 2, "blockquote": 1, "pre": 1}
    assert visit.texts(".assistant p code") == ["code *x*"] and "snake_case_name" in visit.last()
    assert visit.page.text_content(".assistant pre") == "def f():\n    return 1"
    links = visit.page.locator(".assistant a")
    assert [link.get_attribute("href") for link in links.all()] == ["https://example.org/a_(b)", "https://example.org/x"]
    assert all(link.get_attribute("rel") == "noopener noreferrer" for link in links.all())


def test_markdown_loses_nothing_and_takes_any_text(visit: Visit) -> None:
    """Written piece by piece it looks as written at once; letters all stay; texts made to be slow are not."""
    result = visit.page.evaluate(
        """async () => {
          const { render } = await import("/web/markdown.js");
          let seed = 1;
          const next = (n) => (seed = (seed * 48271) % 2147483647) % n;
          const parts = ["a", "b ", "**", "*", "_", "`", "```", "\\n", "\\n\\n", "- ", "1. ", "> ", "# ", "|", "|-|",
            "[x](", ")", "~~", "    ", "<i>"];
          const letters = (text) => text.replace(/[^ab]/g, "");
          for (let i = 0; i < 1500; i++) {
            let text = "";
            const whole = document.createElement("div"), grown = document.createElement("div");
            for (let n = next(30); n >= 0; n--) render(grown, text += parts[next(parts.length)]);
            render(whole, text);
            if (whole.innerHTML !== grown.innerHTML) return ["differs", text];
            whole.querySelectorAll("figcaption button").forEach((button) => button.remove());
            whole.querySelectorAll("figcaption span").forEach((span) => span.textContent === "text" && span.remove());
            if (letters(whole.textContent) !== letters(text)) return ["lost", text];
          }
          const start = performance.now();
          for (const part of ["*a ", "**a", "`", "`` ` ", "[", "[x](", "> ", "- ", "_a_", "| ", "# # ", "~~a ", "\\n", " ", "<", "https://"]) {
            render(document.createElement("div"), part.repeat(20000));
            render(document.createElement("div"), "- |\\n" + part.repeat(20000));
          }
          return ["time", performance.now() - start];
        }"""
    )
    assert result[0] == "time" and result[1] < 8000, result


# ---------------------------------------------------------------------------------------------------- around the chat


def test_conversations_are_kept(visit: Visit, server: Server) -> None:
    visit.send("the first one")
    visit.page.click("#new")
    visit.send("the second one")
    assert visit.texts("#chats .title") == ["the second one", "the first one"]
    visit.page.reload()
    visit.ready()
    assert visit.texts(".message .body") == ["the second one", "hello there"]
    visit.page.click("text=the first one")
    visit.page.click("text=Rename")
    visit.page.fill("input.title", "renamed")
    visit.page.press("input.title", "Enter")
    assert visit.texts("#chats .title") == ["the second one", "renamed"]
    with visit.page.expect_download() as file:
        visit.page.click("text=Export")
    exported = json.loads(Path(file.value.path()).read_text())
    assert exported["title"] == "renamed" and [m["content"] for m in exported["messages"]] == ["the first one", "hello there"]
    visit.page.on("dialog", lambda dialog: dialog.accept())
    visit.page.click("text=Delete")
    visit.page.reload()
    visit.ready()
    assert visit.texts("#chats .title") == ["the second one"]


def test_a_key_is_asked_for(browser: Any, tokenizer: Tokenizer) -> None:
    with Server(FakeEngine(tokenizer), api_key="sesame") as server:
        visit = Visit(browser, server.url)
        visit.page.wait_for_selector("#key-dialog[open]")
        visit.page.fill("#key", "wrong")
        visit.page.press("#key", "Enter")
        visit.page.wait_for_selector("text=does not know this key")
        visit.page.fill("#key", "sesame")
        visit.page.press("#key", "Enter")
        visit.ready()
        visit.send("hi")
        assert visit.last() == "hello there"
        visit.page.reload()  # the key is kept for the tab
        visit.ready()
        assert visit.page.locator("#key-dialog[open]").count() == 0
        assert "sesame" not in json.dumps(visit.page.evaluate("({...localStorage})"))
        visit.context.close()


def test_live_figures(visit: Visit, server: Server) -> None:
    server.engine.stats = {"running": 3.0, "waiting": 1.0, "kv_usage": 0.25, "prefix_queries": 100.0, "prefix_hits": 50.0, "steps": 10.0}
    visit.send("hi")
    visit.page.click("#tab-live")
    assert visit.page.is_visible("#charts") and not visit.page.is_visible("#composer")
    visit.until("[...document.querySelectorAll('.line0')].filter((line) => line.getAttribute('d')?.length > 8).length >= 4")
    shown = {card.split("\n")[0]: card for card in visit.texts(".chart")}
    assert re.search(r"3 running\s+1 waiting", shown["Requests"]) and "25 %" in shown["KV cache"]
    server.engine.stats |= {"prefix_queries": 200.0, "prefix_hits": 100.0}
    visit.until("document.body.innerText.includes('50 %')")  # whether the page's first look came before the test's figures or after
    threading.Thread(target=lambda: head(f"{server.url}/v1/models")).start()
    visit.page.reload()
    assert visit.page.is_visible("#charts")  # the address knows the tab


def test_percentiles_and_rates(visit: Visit) -> None:
    found = visit.page.evaluate(
        """async () => {
          const { Scrape, quantile, rate, growth } = await import("/web/metrics.js");
          const text = (n) => `# HELP x y\\nvllm:t_bucket{model_name="a",le="0.1"} ${n}\\nvllm:t_bucket{model_name="a",le="0.2"} ${3 * n}
vllm:t_bucket{model_name="a",le="+Inf"} ${4 * n}\\nvllm:n_total{model_name="a",reason="x, \\\\"y\\\\""} ${n}\\nvllm:n_total{model_name="b"} 500\\n`;
          const [before, after] = [new Scrape(text(10), 0, "a"), new Scrape(text(30), 4000, "a")];
          return [quantile(before, after, "t", 0.5), quantile(before, after, "t", 0.95), rate(before, after, "n_total"),
            growth(after, before, "n_total"), quantile(before, before, "t", 0.5) ?? null, after.sum("missing") ?? null];
        }"""
    )
    assert found == [pytest.approx(0.15), pytest.approx(0.2), 5, 10, None, None]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Any, server: Server, scheme: str) -> None:
    visit = Visit(browser, server.url, viewport={"width": 360, "height": 700}, has_touch=True, is_mobile=True, color_scheme=scheme).ready()
    server.engine.reply = lambda prompt: "```\n" + "wide " * 60 + "\n```\n\n" + "x" * 300
    visit.send("hi")
    for act in ("#open-settings", "#open-list", "#tab-live"):
        visit.page.click(act)
        assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if act != "#tab-live":
            panel = visit.page.locator(act.replace("open-", "")).bounding_box()
            assert panel["x"] >= 0 and panel["x"] + panel["width"] <= 360
    visit.page.click("#tab-chat")
    visit.page.keyboard.press("Escape")
    box = visit.page.locator("#composer").bounding_box()
    assert box["y"] + box["height"] <= 700
    light = visit.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128")
    assert light == (scheme == "light") and visit.errors == []
    visit.context.close()


def test_every_control_has_a_name_and_text_stands_out(visit: Visit) -> None:
    visit.page.check("[name=logprobs]")
    visit.send("hi")
    unnamed = visit.page.evaluate(
        """() => [...document.querySelectorAll("button, input:not([hidden]), select, textarea, [role=img]")]
          .filter((one) => !(one.ariaLabel || one.getAttribute("aria-labelledby") || one.labels?.[0]?.textContent.trim() || one.textContent.trim()))
          .map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    contrast = """() => {
      const light = (name) => {
        const hex = getComputedStyle(document.documentElement).getPropertyValue(name).match(/\\w\\w/g).map((part) => parseInt(part, 16) / 255);
        const [r, g, b] = hex.map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
      const pairs = [["--text", "--page"], ["--faint", "--page"], ["--faint", "--sunk"], ["--accent", "--page"], ["--wrong", "--page"],
        ["--on-accent", "--accent"]];
      return pairs.map(([a, b]) => [a, b, ratio(a, b)]);
    }"""
    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)
        assert [pair for pair in visit.page.evaluate(contrast) if pair[2] < 4.5] == []


@pytest.mark.skipif(not (BUNDLED / "model.safetensors").exists(), reason="this checkout carries no bundled model")
def test_the_bundled_model(browser: Any, tmp_path: Path) -> None:
    with contextlib.closing(ServerProcess("bundled", tmp_path / "server.log", "--dtype", "auto")) as server:
        assert f" http://127.0.0.1:{server.port}/ " in server.greeting.splitlines()[0]
        visit = Visit(browser, f"http://127.0.0.1:{server.port}/").ready()
        visit.page.fill("[name=temperature]", "0")
        visit.page.check("[name=logprobs]")
        visit.send("What is 17 + 25?")
        assert "42" in visit.last()
        visit.page.hover(".tokens span >> nth=0")
        assert visit.page.locator("#tip tr").count() == 5
        visit.page.click("#tab-live")
        visit.until("document.querySelector('.line0').getAttribute('d')?.length > 8")
        assert visit.errors == []
        visit.context.close()
