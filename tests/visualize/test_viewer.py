"""The viewer in a real browser, and the page and the widget that hold it."""

import base64
import csv
import io
import json
import re
import struct
import zlib

import browser
import numpy as np
import pytest

import attn_ops
from attn_ops import reference, visualize
from attn_ops.visualize import payload

RNG = np.random.default_rng(0)
EVIL = [
    "</script><script>document.title='evil'</script>",
    "<img src=x onerror=document.title='evil'>",
    "<b>bold</b>",
    "&amp;",
    "'\"",
    "]]>",
]
TOKENS = ["[CLS]", "good", "film", *EVIL, "good", "", ""]
SEEN = np.zeros((1, 1, 12, 12), bool)
SEEN[..., :10, :10] = True


def weights(rows, keys, heads=1, **options):
    return reference.attention_weights(
        2 * RNG.normal(size=(1, rows, heads, 8)), RNG.normal(size=(1, keys, heads, 8)), **options
    )


@pytest.fixture(scope="module")
def attention():
    """Two layers over a sentence with padding, and one that reads from another sentence."""
    own = {f"encoder/<i>{n}</i>/attention": weights(12, 12, 3, mask=SEEN) for n in range(2)}
    hidden = dict.fromkeys(own, ~SEEN)
    tokens = {**dict.fromkeys(own, TOKENS), "cross": (TOKENS, list("vwxyz"))}
    return visualize.ModelAttention.from_weights(
        {**own, "cross": weights(12, 5, 2)}, tokens=tokens, hidden=hidden, model="<script>title</script>"
    )


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as started:
        yield started


@pytest.fixture(scope="module")
def file(attention, tmp_path_factory):
    path = tmp_path_factory.mktemp("viewer") / "page.html"
    visualize.viewer(attention, path)
    return path


# ------------------------------------------------------------------------------------------------------- in the browser


def test_it_opens_hovers_and_chooses(chromium, file, attention):
    with browser.Page(chromium, file) as page:
        p = attention[0].weights[0, 0]
        page.point(3, 1, 10, 10)
        told(page.said, f"query “{TOKENS[3]}” (3) → key “good” (1): ", p[3, 1])
        assert page.page.locator(".lines line[stroke-opacity='0']").count() > 50  # all but those of the row
        page.page.mouse.move(5, 5)
        assert page.said.startswith("Point at a cell")
        page.point(4, 2, 10, 10)
        page.page.mouse.down()
        page.page.mouse.up()
        page.page.mouse.move(5, 5)
        told(page.said, f"query “{TOKENS[4]}” (4) → key “film” (2): ", p[4, 2])
        token = page.page.locator(".lines .token[data-axis=row][data-at='2']")
        token.hover()
        best = np.argsort(-p[2])[0]
        told(page.said, f"query “film” (2) reads most from “{TOKENS[best]}” ({best}) ", *np.sort(p[2])[:-4:-1])
        page.page.locator(".lines .token[data-axis=key][data-at='1']").hover()
        told(page.said, "key “good” (1) receives ", attention[0].received[0, 0, 1])


def test_tokens_titles_and_names_stay_text(chromium, file):
    with browser.Page(chromium, file) as page:
        assert page.page.title() == page.page.locator("h1").inner_text() == "<script>title</script>"
        assert page.heading == "encoder/<i>0</i>/attention · head 0"
        page.press("t")
        assert [x for x in page.page.locator(".text .token").all_inner_texts()] == TOKENS[:10]
        assert page.page.locator(".attn-ops img, .attn-ops b, .attn-ops i, .attn-ops script").count() == 0
        assert page.page.title() == "<script>title</script>"


def test_all_by_keyboard(chromium, file, attention):
    with browser.Page(chromium, file) as page:
        page.press("ArrowDown", "ArrowDown", "ArrowRight")
        assert page.said.startswith("query “good” (1) → key “[CLS]” (0)")
        page.press("]", "]")
        assert page.heading.endswith("<i>0</i>/attention · head 2") and "query “good” (1)" in page.said
        page.press("]")
        assert page.heading.endswith("<i>1</i>/attention · head 0")
        page.press("}")
        assert page.heading == "cross · head 0" and page.page.locator(".matrix canvas").get_attribute(
            "aria-label"
        ).endswith("12 queries by 5 keys")
        page.press("ArrowDown", "ArrowLeft")
        told(page.said, "query “[CLS]” (0) → key “z” (4): ", attention["cross"].weights[0, 0, 0, 4])
        page.press("{", "[")
        assert page.heading.endswith("<i>0</i>/attention · head 2")
        page.press("p")
        assert page.page.locator(".matrix canvas").get_attribute("aria-label").endswith("12 queries by 12 keys")
        page.press("ArrowUp", "ArrowLeft")
        assert page.said == "query “” (11) → key “” (11): hidden by the mask"
        page.press("Escape", "s")
        assert page.page.locator("table tbody tr").count() == 8
        page.press("?")
        assert page.page.locator("dialog").is_visible() and page.page.locator("dialog dt").count() >= 12
        page.press("Escape")
        assert not page.page.locator("dialog").is_visible()
        page.press("d")
        assert page.page.locator(".attn-ops").get_attribute("data-theme") == "dark"
        page.press("+")
        assert page.page.locator(".matrix canvas").get_attribute("aria-label").endswith("6 queries by 6 keys")
        assert page.page.locator(".matrix text").count() == 12  # six rows and six keys


def test_heads_are_sorted(chromium, file, attention):
    with browser.Page(chromium, file) as page:
        page.page.get_by_text("Table", exact=True).click()
        header = page.page.locator("th button[data-column=entropy]")
        header.click()
        entropies = [float(x) for x in page.page.locator("tbody td:nth-child(2)").all_inner_texts()]
        expected = np.sort(np.concatenate([layer.entropy[0] for layer in attention]))
        np.testing.assert_allclose(entropies, expected, atol=0.006)
        header.click()
        assert page.page.locator("th").nth(1).get_attribute("aria-sort") == "descending"
        assert [float(x) for x in page.page.locator("tbody td:nth-child(2)").all_inner_texts()] == entropies[::-1]
        assert set(page.page.locator("tbody td:nth-child(3)").all_inner_texts()) >= {"–"}  # of the two sentences
        page.page.locator("tbody tr").first.click()
        most = max(
            ((layer.entropy[0, h], f"{layer.name} · head {h}") for layer in attention for h in range(layer.heads))
        )[1]
        assert page.heading == most


def test_hidden_is_hatched_and_small_is_not(chromium, tmp_path):
    p = np.zeros((1, 1, 8, 8), "float32")
    p[..., 0] = 1.0
    hidden = ~np.tri(8, dtype=bool)
    visualize.viewer(visualize.ModelAttention.from_weights(p, hidden=hidden), tmp_path / "a.html")
    with browser.Page(chromium, tmp_path / "a.html") as page:
        colours = page.cells(8, 8)
        seen = np.tri(8, dtype=bool)
        small = colours[seen & (np.arange(8) > 0)]
        assert (small == small[0]).all() and small.min() > 235
        assert (colours[:, 0, :3].sum(-1) < 250).all()
        among = {tuple(colour) for colour in colours[~seen]}
        assert len(among) > 1 and tuple(small[0]) not in among  # stripes and their ground


def test_search(chromium, file):
    with browser.Page(chromium, file) as page:
        page.press("/")
        page.page.keyboard.type("GOOD")
        assert page.page.locator("header [role=status]").inner_text() == "2 queries, 2 keys"
        page.press("Enter")
        assert page.said.startswith("query “good” (1)")
        page.press("Enter")
        assert page.said.startswith("query “good” (9)")
        assert page.page.locator(".matrix .found").count() == 4
        page.press("Escape")
        assert page.page.locator(".matrix .found").count() == 0


def test_export(chromium, file, attention):
    with browser.Page(chromium, file) as page:
        name, data = page.saved("Weights as CSV")
        assert name == "attention-encoder-i-0-i-attention-head-0.csv"
        rows = list(csv.reader(io.StringIO(data.decode())))
        assert rows[0][1:] == TOKENS[:10] and [row[0] for row in rows[1:]] == TOKENS[:10]
        values = np.array([[float(x) for x in row[1:]] for row in rows[1:]])
        np.testing.assert_allclose(
            values, attention[0].weights[0, 0, :10, :10], atol=attention[0].weights[0, 0].max() / 200
        )  # a byte each
        name, data = page.saved("Matrix as SVG")
        assert (
            name.endswith(".svg")
            and data.startswith(b"<svg")
            and b"data:image/png;base64" in data
            and b"&lt;b&gt;bold" in data
        )
        name, data = page.saved("Matrix as PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 400 and height > 400
        name, data = page.saved("Lines as SVG")
        assert name.endswith("-lines.svg") and data.count(b"<line") > 50
        opened = page.context.new_page()  # files that stand alone
        opened.set_content(data.decode())
        assert opened.locator("svg line").count() == data.count(b"<line")


@pytest.mark.wide(2)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_wide_and_both_themes(chromium, file, scheme):
    with browser.Page(chromium, file, width=360, height=740, scheme=scheme) as page:
        assert page.page.locator(".attn-ops").get_attribute("data-theme") == scheme
        for press in ("t", "s", "p", "]"):
            page.press(press)
            widths = page.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert widths[0] <= widths[1] == 360
        button = page.page.locator("[title='Switch between light and dark']")
        button.click()
        assert page.page.locator(".attn-ops").get_attribute("data-theme") != scheme


def test_patches_over_an_image(chromium, tmp_path):
    image = RNG.random((32, 48, 3))
    p = weights(25, 25, 2)  # a class token, and 4 x 6 patches
    visualize.viewer(visualize.ModelAttention.from_weights(p), tmp_path / "a.html", image=image)
    with browser.Page(chromium, tmp_path / "a.html") as page:
        assert page.page.locator(".picture rect[data-at]").count() == 24
        page.page.locator(".picture rect[data-at='7']").click()
        page.page.mouse.move(5, 5)
        best = np.argsort(-p[0, 0, 7])[0]
        told(page.said, f"query 7 reads most from {best} ", p[0, 0, 7, best])
        veils = np.array(
            [float(x.get_attribute("fill-opacity")) for x in page.page.locator(".picture rect[data-at]").all()]
        )
        np.testing.assert_array_equal(np.argmin(veils), np.argmax(p[0, 0, 7, 1:]))  # the one that is read most is clear
        assert veils.min() == 0 and page.page.locator(".picture .own").get_attribute("visibility") == "visible"
        page.page.get_by_text("token 0", exact=True).click()
        assert page.said.startswith("query 0 reads most")


@pytest.fixture(scope="module")
def long_attention():
    """Two layers of eight heads over 4,096 tokens: what is kept of them, made of random numbers."""
    T, size, heads = 4096, 16, 8
    layers = []
    for n in range(2):
        keys = np.sort(RNG.integers(0, T, (1, heads, T, 8)), -1).astype("int32")
        top = np.sort(RNG.random((1, heads, T, 8)), -1)[..., ::-1].astype("float32") / 8
        means, seen = RNG.random((1, heads, 256, 256), "float32") / T, np.tri(256, dtype="float32")[None, None]
        blocks = visualize.recorded.Blocks(size, means * seen, seen, keys, top)
        ones, numbers = np.ones((1, T), bool), np.ones((1, heads), "float32")
        layers.append(visualize.LayerAttention(
            f"layer_{n}", "MultiHeadAttention", (1, heads, T, T), None, None, blocks, ones, ones, numbers, numbers,
            RNG.random((1, heads, T), "float32") / T, [[f"word{i}" for i in range(T)]], [[f"word{i}" for i in range(T)]],
        ))  # fmt: skip
    return visualize.ModelAttention("long", layers)


def test_long_sequences_open_on_zoom(chromium, tmp_path, long_attention, pytestconfig):
    if not pytestconfig.getoption("whole"):
        pytest.skip("it takes half a minute: with --whole")
    path = tmp_path / "long.html"
    visualize.viewer(long_attention, path)
    assert path.stat().st_size <= 6 * 2**20
    blocks = long_attention[0].blocks
    with browser.Page(chromium, path) as page:
        page.point(3000, 1000, 4096, 4096)
        assert "the mean of a block of 16 × 16" in page.said
        page.press("/")
        page.page.keyboard.type("word2000")
        page.press("Enter", "Escape")
        key = blocks.top_keys[0, 0, 2000, 0]
        told(
            page.said,
            f"query “word2000” (2000) reads most from “word{key}” ({key}) ",
            blocks.top_weights[0, 0, 2000, 0],
        )
        for _ in range(5):
            page.press("+")
        labels = page.page.locator(".matrix text").all_text_contents()
        assert "word2000" in labels and len(labels) < 250
        page.press("0")
        _, data = page.saved("Weights as CSV")
        rows = data.decode().splitlines()
        assert len(rows) == 1 + 8 * 4096 and rows[1].startswith("0,word0,")


def test_first_paint_of_many_heads(chromium, tmp_path, record_property):
    """12 layers of 12 heads over 128 tokens: the size; how long it takes is told, and judged by nobody."""
    path = tmp_path / "many.html"
    tokens = [f"token{i}" for i in range(128)]
    p = weights(128, 128, 12)
    visualize.viewer({f"layer_{n}": np.roll(p, n, 1) for n in range(12)}, path)
    random = RNG.random((12, 128, 128), "float32") / 128
    random /= random.sum(-1, keepdims=True)
    worst = visualize.viewer(
        visualize.ModelAttention.from_weights(
            {f"layer_{n}": random[:, ::-1] if n % 2 else random for n in range(12)}, tokens=tokens
        )
    )
    assert path.stat().st_size <= 4 * 2**20 and len(worst.html) <= 4 * 2**20
    with browser.Page(chromium, path) as page:
        assert page.page.locator(".row-of-heads canvas").count() == 144
        page.page.wait_for_timeout(200)
        marks = page.page.evaluate("performance.getEntriesByName('attn-ops-painted').map((x) => x.startTime)")
        record_property("first paint, ms", marks)
        print(f"first paint after {marks[0]:.0f} ms, {path.stat().st_size / 1e6:.2f} MB")


def test_the_module_as_a_widget(chromium, attention, tmp_path):
    """As anywidget runs it: the default export, with a model that gives the header and a DataView."""
    made = visualize.viewer(attention)
    header, data = payload.payload("test", attention, 0, None, None, None, 2**24)
    script, text = (json.dumps(x).replace("<", "\\u003c") for x in (visualize.page._source("viewer.js"), header))
    code = f"""<!DOCTYPE html><style>{visualize.page._source("viewer.css")}</style><div id=a></div><script type=module>
      const module = await import(URL.createObjectURL(new Blob([{script}], {{ type: "text/javascript" }})));
      const bytes = new Uint8Array({list(data)});
      const given = {{ header: {text}, data: new DataView(bytes.buffer) }};
      window.leave = await module.default.render({{ model: {{ get: (name) => given[name] }}, el: document.getElementById("a") }});
    </script>"""
    path = tmp_path / "widget.html"
    path.write_text(code)
    with browser.Page(chromium, path) as page:
        page.page.locator(".attn-ops").focus()
        page.press("]")
        assert page.heading.endswith("head 1")
        page.page.evaluate("document.getElementById('a').style.display = 'none'")  # as in a tab that is not shown
        page.press("]")
        page.page.evaluate("window.leave()")
        assert page.page.locator(".attn-ops").count() == 0
    assert json.loads(header)["title"] == made.title


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_else(file, attention):
    text = file.read_text()
    assert text.count("</script>") == 3 and "&lt;script&gt;title" in text
    links = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)))
    assert links == {"http://www.w3.org/2000/svg"}  # a name, which nobody asks for
    assert "default-src 'none'" in text and not re.search(
        r"\b(eval|fetch|XMLHttpRequest|innerHTML|insertAdjacentHTML)\b", text
    )


def test_what_a_notebook_and_a_script_get(attention, tmp_path, monkeypatch):
    made = visualize.viewer(attention, title="a & b")
    assert made.save(tmp_path / "a.html").read_text() == made.html and "<title>a &amp; b</title>" in made.html
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shown = made._repr_mimebundle_()
    assert shown["text/html"].startswith("<iframe srcdoc=") and shown["text/html"].count("<") == 2
    with pytest.raises(ImportError, match="pip install anywidget"):
        made.widget()
    layer = visualize.viewer(attention["cross"])
    assert json.loads(layer._header)["title"] == "cross" and len(json.loads(layer._header)["layers"]) == 1


def test_the_bytes_are_the_weights(attention):
    header, data = payload.payload("test", attention, 0, None, None, None, 2**24)
    header, data = json.loads(header), zlib.decompress(data)
    for layer, own in zip(header["layers"], attention):
        begin, count = layer["codesAt"]
        codes = np.frombuffer(data[begin : begin + count], np.uint8).reshape(own.shape[1:])
        found = np.array(layer["scale"])[:, None, None] * (codes / 255) ** 2
        np.testing.assert_allclose(found, own.weights[0], atol=0.5 / 127 * own.weights.max())
        np.testing.assert_array_equal(codes[own.weights[0] == 0], 0)
    begin, count = header["layers"][0]["hiddenAt"]
    bits = np.unpackbits(np.frombuffer(data[begin : begin + count], np.uint8), bitorder="little")[:144]
    np.testing.assert_array_equal(bits.reshape(12, 12).astype(bool), ~SEEN[0, 0])


def test_many_layers_come_in_blocks_and_too_many_are_refused():
    p = weights(64, 64, 2)
    made = visualize.viewer({"a": p, "b": p}, max_bytes=10000)
    assert all(layer["block"] > 1 for layer in json.loads(made._header)["layers"])
    assert len(zlib.decompress(made._data)) <= 10000
    with pytest.raises(
        ValueError, match=r"2 layers take [\d,]+ bytes, and max_bytes allows 100: record fewer \(layers=\)"
    ):
        visualize.viewer({"a": p, "b": p}, max_bytes=100)


def test_refusals(attention):
    with pytest.raises(ValueError, match="must be probabilities"):
        visualize.viewer(np.ones((3, 3)))
    with pytest.raises(ValueError, match="example 1 is not in a batch of 1"):
        visualize.viewer(attention, example=1)
    with pytest.raises(ValueError, match="no layers"):
        visualize.viewer(visualize.ModelAttention("empty", []))
    x = np.zeros((2, 3, 4), "float32")
    x[1, 2] = np.nan
    layer = attn_ops.layers.MultiHeadAttention(1, 2, name="broken")
    layer(x, x)
    found = visualize.attention(layer, (x, x))
    visualize.viewer(found)  # the first example has no NaN
    with pytest.raises(ValueError, match="weights of broken are NaN for example 1"):
        visualize.viewer(found, example=1)
    p = visualize.ModelAttention.from_weights(np.eye(25))
    for image in (np.zeros((2, 2, 2)), "a.png", np.zeros(3), [["a"]]):
        with pytest.raises(ValueError, match="image must be an array"):
            visualize.viewer(p, image=image)
    with pytest.raises(ValueError, match=r"25 keys are no grid of patches over an image of 10 x 70.*grid="):
        visualize.viewer(p, image=np.zeros((10, 70)))
    with pytest.raises(ValueError, match="grid must be"):
        visualize.viewer(p, grid=3)
    with pytest.raises(ValueError, match="a grid of 6 x 6 patches does not fit 25 keys"):
        visualize.viewer(p, grid=(6, 6))


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_images_are_png(channels):
    pixels = RNG.integers(0, 256, (6, 4) if channels is None else (6, 4, channels), dtype=np.uint8)
    matplotlib = pytest.importorskip("matplotlib.image")
    shown = payload._image("test", pixels)
    read = matplotlib.imread(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2])))
    np.testing.assert_array_equal(np.rint(255 * read).astype(np.uint8), pixels if channels != 1 else pixels[..., 0])
    assert (shown["height"], shown["width"]) == (6, 4)


def told(text, before, *expected):
    """Whether a text begins so, and goes on with these numbers: weights are kept in a byte each."""
    assert text.startswith(before)
    rest = re.sub(r"“.*?” \(\d+\)|of a query.*", "", text[len(before) :])
    np.testing.assert_allclose(
        [float(x) for x in re.findall(r"\d[\d.e-]*", rest)][: len(expected)], expected, rtol=0.04, atol=1e-4
    )
