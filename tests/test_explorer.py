"""The explorer: its numbers against distances computed directly, and the page in a browser."""

import base64
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_analysis import call, make_run, prepare
from tqdm import tqdm

from analysis import explorer
from analysis.runs import Run
from base.errors import UserError
from harmonic import HarmonicHead, contributions, distance
from sample import Explainer

HEADS = ("cross_entropy", "cosine_linear", "cosine", "manhattan", "chebyshev", "mahalanobis")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs on the same data, and one with another tokenizer."""
    home = tmp_path_factory.mktemp("home")
    prepare(home / "data" / "small")
    prepare(home / "data" / "other", 290)
    make_run(home / "out" / "cross_entropy", home / "data" / "small")
    make_run(home / "out" / "cosine", home / "data" / "small", head="cosine")
    make_run(home / "out" / "other", home / "data" / "other", head="cosine")
    return home


def unpack(text: str, dtype: str, *shape: int) -> torch.Tensor:
    found = np.frombuffer(base64.b64decode(text), dtype).reshape(shape)
    return torch.from_numpy(found.astype(np.float64))


@pytest.mark.parametrize("name", HEADS)
def test_the_numbers_are_those_of_the_head(monkeypatch, name):
    monkeypatch.setattr(explorer, "CHUNK", 4000)  # Chunks of 40 rows, and one of 20.
    torch.manual_seed(0)
    head, count, kept, largest = HarmonicHead(16, 300, name, init_std=0.5), 100, 20, 4
    chosen = torch.randperm(300)[:count]
    with tqdm(disable=True) as bar:
        found = explorer.describe(Run(Path("out/a"), "a", None, None, "wiki"), head, chosen, bar)

    w = head.prototypes().detach()[chosen]
    if name == "cross_entropy":
        values = w @ w.T
    elif head.is_control:
        values = head(w).detach()[:, chosen]
    else:
        values = distance(w, w, name, **head.geometry()).detach()
    values.fill_diagonal_(-torch.inf if head.is_control else torch.inf)
    stored = unpack(found["values"], "<f4", count, kept).float()
    places = unpack(found["neighbours"], "<u2", count, kept).long()
    expected = values.topk(kept, largest=head.is_control).values
    torch.testing.assert_close(stored, expected)
    torch.testing.assert_close(stored, values.gather(1, places))

    parts = contributions(w[:, None], w[places], name, **head.geometry())
    shares = unpack(found["shares"], "u1", count, kept, largest).float().div(255).square()
    at = unpack(found["coordinates"], "<u2", count, kept, largest).long()
    torch.testing.assert_close(shares, parts.gather(-1, at), atol=0.005, rtol=0)
    torch.testing.assert_close(shares, parts.topk(largest).values, atol=0.005, rtol=0)


@pytest.mark.parametrize(
    ("name", "words", "line"),
    [
        ("mahalanobis", "part of sum |d (P d)|", "of sum |d (P d)|, with d = h - w"),
        ("mahalanobis_diagonal", "part of the sum of squares", "of d^2"),
        ("chebyshev_smooth", "weight in the smooth maximum", "of d"),
        ("student_t", "part of d^2", "of d^2"),
        ("cross_entropy", "part of the sum of |h w|", "of sum |h w|"),
    ],
)
def test_shares_of_coordinates_are_called_what_they_are(name, words, line):
    head = HarmonicHead(4, 6, name)
    assert words in explorer.measure_of(head)
    assert Explainer(SimpleNamespace(head=head), None, 1).share == line


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
  const wait = () => new Promise(done => setTimeout(done, 300));
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
  await wait();
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
  const note = document.getElementById("left-out").textContent;
  seen.push(/^The \\d+ rarest tokens are left out/.test(note));
  seen.push(ink().every(Boolean), document.documentElement.scrollWidth <= innerWidth);
  document.title = JSON.stringify(errors.length ? errors : seen);
})();
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium (apt-get install chromium)")
def test_the_page_in_chromium(home, tmp_path, monkeypatch):
    page, runs = tmp_path / "e.html", [home / "out" / name for name in ("cross_entropy", "cosine")]
    call(explorer.main, monkeypatch, *runs, f"--out={page}", "--device=cpu", "--tokens=250")
    page.write_text(page.read_text().replace("</body>", STEPS))
    for width in (1400, 420):
        found = results(page, width)
        assert found[:2] == ["␣sun", True]
        assert found[2].startswith("␣king")
        assert found[3:6] == ["␣king", True, "#token= king"]
        assert found[6:] == [True] * 11


def results(page: Path, width: int) -> list:
    """What the steps saw on a page of a width."""
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
    return json.loads(title)
