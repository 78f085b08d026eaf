"""The explorer: its numbers against distances computed directly, and the page in a browser."""

import base64
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from test_analysis import call, make_run, prepare

from analysis import explorer
from analysis.runs import find_runs
from base.errors import UserError
from harmonic import contributions, distance

HEADS = ("cross_entropy", "cosine", "manhattan", "chebyshev", "mahalanobis")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of each head on the same data, and one with another tokenizer."""
    home = tmp_path_factory.mktemp("home")
    prepare(home / "data" / "small")
    prepare(home / "data" / "other", 290)
    for head in HEADS:
        make_run(home / "out" / head, home / "data" / "small", head=head)
    make_run(home / "out" / "other", home / "data" / "other", head="cosine")
    return home


def unpack(text: str, dtype: str, *shape: int) -> torch.Tensor:
    found = np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
    return torch.from_numpy(found.astype(np.float64))


def test_the_numbers_are_those_of_the_heads(home, monkeypatch):
    monkeypatch.setattr(explorer, "CHUNK", 4096)  # Several chunks, and a last one that is shorter.
    runs = find_runs([home / "out" / head for head in HEADS])
    page = explorer.collect(runs, explorer.ExplorerConfig(tokens=100), "cpu")
    count, kept, largest = len(page["tokens"]), page["kept"], page["largest"]
    chosen = unpack(page["ids"], "<u4", count).long()
    words = runs[0].data().load_tokenizer()
    assert (count, kept, largest) == (100, 20, 4)
    assert page["left_out"] == words.vocab_size - 100
    assert page["tokens"] == [words.decode_token(i) for i in chosen]
    counts = unpack(page["counts"], "<u4", count)
    assert (counts.diff() <= 0).all()

    for run, found in zip(runs, page["runs"], strict=True):
        head = run.load()[0].head
        w = head.prototypes().detach()[chosen]
        if head.name == "cross_entropy":
            nearness = w @ w.T
        else:
            nearness = -distance(w, w, head.name, **head.geometry()).detach()
        places = unpack(found["neighbours"], "<u2", count, kept).long()
        values = unpack(found["values"], "<f4", count, kept).float()
        sign = 1 if head.is_control else -1
        nearness.fill_diagonal_(-torch.inf)
        torch.testing.assert_close(sign * values, nearness.topk(kept).values)
        torch.testing.assert_close(sign * values, nearness.gather(1, places))

        parts = contributions(w[:, None], w[places], head.name, **head.geometry())
        shares = unpack(found["shares"], "u1", count, kept, largest).float().div(255).square()
        at = unpack(found["coordinates"], "<u2", count, kept, largest).long()
        torch.testing.assert_close(shares, parts.gather(-1, at), atol=0.005, rtol=0)
        torch.testing.assert_close(shares, parts.topk(largest).values, atol=0.005, rtol=0)


def test_different_tokenizers_are_refused(home, tmp_path, monkeypatch):
    page = tmp_path / "e.html"
    with pytest.raises(UserError, match="cosine and other have different tokenizers"):
        runs = [home / "out" / name for name in ("cosine", "other")]
        call(explorer.main, monkeypatch, *runs, f"--out={page}", "--device=cpu")
    assert not page.exists()


STEPS = """
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
(async () => {
  const seen = [];
  const wait = () => new Promise(done => setTimeout(done, 100));
  const press = (element, key) =>
    element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const title = () => document.getElementById("token").textContent;
  const items = run => [...document.querySelectorAll(".run")[run].querySelectorAll(".near button")];
  const named = button => button.querySelector(".word").textContent.replace(" ◆", "");
  const ink = () => [...document.querySelectorAll("canvas")].map(canvas => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return data.some(value => value);
  });
  await wait();
  seen.push(title());  // the deep link
  const search = document.getElementById("search"), list = document.getElementById("suggestions");
  press(document.body, "/");
  seen.push(document.activeElement === search);
  search.value = "ki";
  search.dispatchEvent(new Event("input"));
  seen.push(!list.hidden && list.children.length > 0 && list.children[0].textContent);
  press(search, "ArrowDown"); press(search, "ArrowUp"); press(search, "Enter");
  const typed = title();
  seen.push(typed, list.hidden, decodeURIComponent(location.hash));
  press(search, "ArrowDown"); press(items(0)[0], "ArrowDown"); press(items(0)[1], "ArrowRight");
  const focused = document.activeElement;
  seen.push(focused === items(1)[1], focused.classList.contains("chosen"));
  seen.push(location.hash.includes("&with="));
  const wanted = named(focused);
  focused.click();
  await wait();
  seen.push(title() === wanted, document.activeElement === items(1)[0]);
  history.back();
  await wait();
  seen.push(title() === typed);
  history.forward();
  await wait();
  seen.push(title() === wanted);
  location.hash = "#token=nonsense";
  await wait();
  seen.push(document.getElementById("about").textContent.startsWith("There is no token"));
  document.getElementById("zoom").value = 3;
  document.getElementById("zoom").dispatchEvent(new Event("input"));
  seen.push(...ink(), document.documentElement.scrollWidth <= innerWidth);
  document.title = JSON.stringify(errors.length ? errors : seen);
})();
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1400, 420])
def test_the_page_in_chromium(home, tmp_path, monkeypatch, width):
    page, runs = tmp_path / "e.html", [home / "out" / head for head in HEADS[:2]]
    call(explorer.main, monkeypatch, *runs, f"--out={page}", "--device=cpu")
    page.write_text(page.read_text().replace("</body>", STEPS))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--window-size={width},2000", "--virtual-time-budget=30000", "--dump-dom"]
    for _ in range(3):
        done = subprocess.run(
            [*command, f"{page.as_uri()}#token=%20sun"], capture_output=True, text=True, timeout=120
        )
        assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        title = done.stdout.split("<title>")[1].split("</title>")[0]
        if title.startswith("["):
            break
    found = json.loads(title.replace("&amp;", "&"))
    assert found[:2] == ["␣sun", True]
    assert found[2].startswith("␣king")
    assert found[3:6] == ["␣king", True, "#token= king"]
    assert found[6:] == [True] * (len(found) - 6) and len(found) == 17
