// The viewer of attn_ops.visualize: one module without dependencies, for a page of its own and for notebooks (anywidget).
//
// `render({ model, el })` draws into `el` what `model.get("header")` (JSON text) describes and `model.get("data")` (bytes,
// zlib) holds; page.py writes both. Parts, in this order: the data; colours; small helpers; the views, each of which draws
// the state of one `Viewer`; export; the keyboard; `render`. Text of users only ever becomes text nodes.

// ------------------------------------------------------------------------------------------------------------- the data

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// A byte u stands for the weight scale * (u / 255)^2: small weights keep their digits.
const SQUARES = Float64Array.from({ length: 256 }, (_, u) => (u / 255) ** 2);

// The weights of a layer: all of them, or means of blocks and the largest of each row ("blocks").
class Layer {
  constructor(header, bytes, index) {
    Object.assign(this, header);
    this.index = index;
    const part = (at) => at && bytes.subarray(at[0], at[0] + at[1]);
    this.codes = part(this.codesAt);
    this.hiddenBits = part(this.hiddenAt);
    this.seen = part(this.seenAt);
    this.received = part(this.receivedAt);
    if (this.block > 1) {
      this.topKeys = new Int32Array(part(this.topKeysAt).slice().buffer);
      this.topCodes = part(this.topCodesAt);
    }
    // Of the matrix of codes, in blocks.
    this.codeRows = Math.ceil(this.rows / this.block);
    this.codeKeys = Math.ceil(this.keys / this.block);
  }

  code(head, i, j) {
    return this.codes[(head * this.codeRows + i) * this.codeKeys + j];
  }

  // Whether no pair of a cell is seen, in blocks.
  codeHidden(head, i, j) {
    if (this.block > 1) {
      return this.seen ? this.seen[((this.seenHeads > 1 ? head : 0) * this.codeRows + i) * this.codeKeys + j] === 0 : false;
    }
    if (!this.hiddenBits) return false;
    const bit = ((this.hiddenHeads > 1 ? head : 0) * this.rows + i) * this.keys + j;
    return ((this.hiddenBits[bit >> 3] >> (bit & 7)) & 1) === 1;
  }

  hidden(head, row, key) {
    return this.codeHidden(head, Math.floor(row / this.block), Math.floor(key / this.block));
  }

  // { weight, exact }: of long sequences most weights are known as the mean of a block.
  weight(head, row, key) {
    if (this.block === 1) return { weight: this.scale[head] * SQUARES[this.code(head, row, key)], exact: true };
    const first = (head * this.rows + row) * this.top;
    for (let n = first; n < first + this.top; n++) {
      if (this.topKeys[n] === key) return { weight: this.topScale[head] * SQUARES[this.topCodes[n]], exact: true };
    }
    const code = this.code(head, Math.floor(row / this.block), Math.floor(key / this.block));
    return { weight: this.scale[head] * SQUARES[code], exact: false };
  }

  // The keys that a row weighs most, [key, weight], the largest first.
  strongest(head, row, most) {
    const found = [];
    if (this.block > 1) {
      const first = (head * this.rows + row) * this.top;
      for (let n = first; n < first + this.top && this.topKeys[n] >= 0; n++) {
        found.push([this.topKeys[n], this.topScale[head] * SQUARES[this.topCodes[n]]]);
      }
      return found.slice(0, most);
    }
    for (let key = 0; key < this.keys; key++) {
      const code = this.code(head, row, key);
      if (code > 0 && !this.hidden(head, row, key)) found.push([key, this.scale[head] * SQUARES[code]]);
    }
    return found.sort((a, b) => b[1] - a[1]).slice(0, most);
  }

  receivedBy(head, key) {
    return this.receivedScale[head] * SQUARES[this.received[head * this.keys + key]];
  }

  largest(head) {
    return this.block > 1 ? Math.max(this.scale[head], this.topScale[head]) : this.scale[head];
  }
}

// -------------------------------------------------------------------------------------------------------------- colours

// OKLab to sRGB (Ottosson 2020): steps that look alike, and a lightness that falls or rises all the way, so that the map
// reads the same without colour vision and in print.
function srgb(L, a, b) {
  const [l, m, s] = [L + 0.3963377774 * a + 0.2158037573 * b, L - 0.1055613458 * a - 0.0638541728 * b,
    L - 0.0894841775 * a - 1.291485548 * b].map((x) => x ** 3);
  const linear = [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s, -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s];
  return linear.map((x) => {
    const clipped = Math.min(1, Math.max(0, x));
    return Math.round(255 * (clipped <= 0.0031308 ? 12.92 * clipped : 1.055 * clipped ** (1 / 2.4) - 0.055));
  });
}

const between = (x, y, t) => x + (y - x) * t;
const RAMPS = {
  // Paper to navy.
  light: (t) => {
    const chroma = 0.004 + 0.145 * Math.sin(0.86 * Math.PI * t ** 0.9);
    const hue = between(245, 264, t) * (Math.PI / 180);
    return srgb(between(0.985, 0.27, t), chroma * Math.cos(hue), chroma * Math.sin(hue));
  },
  // Night blue over grey to yellow, as cividis (Nuñez, Anderton, Renslow 2018).
  dark: (t) => srgb(between(0.25, 0.94, t ** 0.9), between(-0.012, -0.012, t), between(-0.075, 0.15, t)),
};

function ramp(theme) {
  return Array.from({ length: 256 }, (_, n) => RAMPS[theme](n / 255));
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

// Black or white, whichever can be read on a colour (WCAG 2.2).
function ink(rgb) {
  const [r, g, b] = rgb.map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) ** 2 > 0.0525 ? "#000" : "#fff";
}

// -------------------------------------------------------------------------------------------------------------- helpers

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, x] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), x);
    else if (x === true) node.setAttribute(name, "");
    else if (x !== null && x !== undefined && x !== false) node.setAttribute(name, x);
  }
  node.append(...children.filter((x) => x !== null && x !== undefined));
  return node;
}
const html = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => filled(document.createElementNS(SVG, tag), attributes, children);

const digits = (x) => (x === 0 ? "0" : x >= 0.0995 ? x.toFixed(3) : x >= 0.00095 ? x.toFixed(4) : x.toExponential(1));
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const shortened = (text, most) => {
  const letters = Array.from(text.replace(/\s/g, (x) => (x === " " ? "\u00b7" : "\u21b5")));
  return letters.length > most ? letters.slice(0, most - 1).join("") + "\u2026" : letters.join("");
};

// The numbers 0, n, 2n, … with at least `room` pixels between them; n is 1, 2, 5, 10, ….
function everyNth(pixels, room) {
  for (let power = 1; ; power *= 10) {
    for (const factor of [1, 2, 5]) if (factor * power * pixels >= room) return factor * power;
  }
}

function canvasOf(width, height, density = 1) {
  const canvas = html("canvas", { width: Math.max(1, Math.round(width * density)), height: Math.max(1, Math.round(height * density)) });
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  return canvas;
}

// ---------------------------------------------------------------------------------------------------------------- viewer

const TABS = ["lines", "text", "picture"];
const MOST_CELLS = 160; // tokens that a zoomed view of blocks shows one by one
const MOST_LINES = 600;
const MOST_FOUND = 100;
const ROWS_OF_LINES = 70;

class Viewer {
  constructor(el, header, bytes) {
    this.el = el;
    this.header = header;
    this.layers = header.layers.map((layer, n) => new Layer(layer, bytes, n));
    this.tokens = header.tokens;
    this.layer = 0;
    this.head = 0;
    this.row = null; // what was chosen
    this.key = null;
    this.over = null; // what the pointer is on: { row, key }, either may be null
    this.view = null; // rows and keys that the matrix shows: { r0, r1, k0, k1 }
    this.crop = header.layers.some((layer) => layer.padded);
    this.theme = null; // null: that of the system
    this.power = 0.5;
    this.shared = false; // whether all heads have one scale
    this.tab = header.image || header.grid ? "picture" : "lines";
    this.table = false;
    this.sort = { by: "head", down: false };
    this.query = "";
    this.found = [];
    this.build();
    this.select(0, 0);
  }

  get current() {
    return this.layers[this.layer];
  }

  get dark() {
    return (this.theme ?? (isDark() ? "dark" : "light")) === "dark";
  }

  label(axis, position) {
    const which = axis === "row" ? this.current.queryTokens : this.current.keyTokens;
    return which === null ? String(position) : this.tokens[which][position];
  }

  hasTokens(axis) {
    return (axis === "row" ? this.current.queryTokens : this.current.keyTokens) !== null;
  }

  // All that there is to see, without padding if that is wanted.
  bounds() {
    const { rows, keys, realRows, realKeys } = this.current;
    return this.crop ? { r0: realRows[0], r1: realRows[1], k0: realKeys[0], k1: realKeys[1] } : { r0: 0, r1: rows, k0: 0, k1: keys };
  }

  // From the code of a weight to a colour, 256 of them.
  colours(layer, head, scale = layer.scale[head]) {
    const top = this.shared ? Math.max(...this.layers.flatMap((x) => x.scale)) : scale;
    return Array.from(SQUARES, (x) => this.palette[Math.round(255 * clamp((x * scale) / (top || 1), 0, 1) ** this.power)]);
  }

  colourOf(weight) {
    const top = this.shared ? Math.max(...this.layers.flatMap((x) => x.scale)) : this.current.largest(this.head);
    return this.palette[Math.round(255 * clamp(weight / (top || 1), 0, 1) ** this.power)];
  }

  // --------------------------------------------------------------------------------------------------------------- frame

  build() {
    const { title } = this.header;
    const root = (this.root = html("section", { class: "attn-ops", tabindex: "-1", role: "region", "aria-label": `Attention of ${title}` }));
    const button = (text, title, onclick, more) => html("button", { type: "button", title, "aria-label": title, onclick, ...more }, text);

    this.search = html("input", {
      type: "search", placeholder: "find a token", "aria-label": "Find a token", size: "12",
      oninput: () => this.find(this.search.value),
      onkeydown: (event) => {
        if (event.key === "Enter") this.nextFound(event.shiftKey ? -1 : 1);
        if (event.key === "Escape") { this.search.value = ""; this.find(""); root.focus(); }
        event.stopPropagation();
      },
    });
    this.foundNote = html("span", { class: "quiet small", role: "status" });
    this.menu = html("details", { class: "menu" }, html("summary", { "aria-label": "Export" }, "Export"), html("div", {},
      button("Matrix as SVG", "Save the matrix as SVG", () => this.save("svg")),
      button("Matrix as PNG", "Save the matrix as PNG", () => this.save("png")),
      button("Lines as SVG", "Save the lines as SVG", () => this.save("lines")),
      button("Weights as CSV", "Save the weights of this head as CSV", () => this.save("csv"))));
    this.themeButton = button("", "Switch between light and dark", () => this.switchTheme());
    root.append(html("header", { class: "top" }, html("h1", {}, title),
      html("div", { class: "tools", role: "toolbar", "aria-label": "Tools" }, this.search, this.foundNote, this.menu, this.themeButton,
        button("?", "Help and keys", () => this.help.showModal()))));

    this.overview = html("div", { class: "heads" });
    this.tableButton = button("Table", "Heads as a table that can be sorted", () => { this.table = !this.table; this.drawOverview(); },
      { "aria-pressed": "false" });
    const side = html("nav", { class: "panel", "aria-label": "Layers and heads" },
      html("div", { class: "bar" }, html("h2", { class: "grow" }, "Layers and heads"), this.tableButton), this.overview);

    this.heading = html("h2", { class: "grow", tabindex: "-1" });
    this.numbers = html("p", { class: "sidenote" });
    this.matrix = html("div", { class: "matrix" });
    this.legend = html("div", { class: "legend" });
    this.said = html("p", { class: "said", role: "status", "aria-live": "polite" });
    this.powerChoice = html("select", { "aria-label": "Colours", onchange: () => { this.power = Number(this.powerChoice.value); this.draw(); } },
      html("option", { value: "0.5" }, "\u221a weight"), html("option", { value: "1" }, "weight"), html("option", { value: "0.25" }, "\u2074\u221a weight"));
    this.sharedButton = button("One scale", "One colour scale for all heads", () => { this.shared = !this.shared; this.draw(); this.drawOverview(); });
    this.cropButton = button("Padding", "Show padding", () => { this.crop = !this.crop; this.view = null; this.draw(); });
    this.zoomTools = html("span", { class: "tools" },
      button("\u2212", "Zoom out", () => this.zoom(2)), button("+", "Zoom in", () => this.zoom(0.5)), button("All", "Show all", () => this.showAll()));
    const large = html("section", { class: "panel", "aria-label": "Matrix of one head" },
      html("div", { class: "bar" }, this.heading, this.zoomTools), this.numbers, this.matrix,
      html("div", { class: "bar", style: "margin:8px 0 0" }, this.powerChoice, this.sharedButton, this.cropButton), this.legend, this.said);

    this.tabs = Object.fromEntries(TABS.map((tab) => [tab, html("button",
      { type: "button", role: "tab", onclick: () => { this.tab = tab; this.drawSide(); } },
      { lines: "Lines", text: "Text", picture: "Image" }[tab])]));
    if (!this.header.grid) this.tabs.picture.hidden = true;
    this.side = html("div", { role: "tabpanel", "aria-label": "Tokens" });
    const tokens = html("section", { class: "panel", "aria-label": "Tokens of one head" },
      html("div", { class: "tabs", role: "tablist", "aria-label": "Ways to see the tokens" }, ...Object.values(this.tabs)), this.side);

    this.help = this.helpPanel(button);
    root.append(html("div", { class: "frame" }, side, html("div", { class: "one" }, large, tokens)), this.help);
    this.el.replaceChildren(root);
    root.addEventListener("keydown", (event) => this.key_(event));
    this.bindMatrix();
    // Not for the width of a scroll bar, which may come and go with what is drawn; and not out of sight.
    const changed = (drawn, now) => now > 0 && (now < drawn || now > drawn + 24);
    this.observer = new ResizeObserver(() => {
      if (changed(this.width, this.matrix.clientWidth)) this.draw();
      if (changed(this.overviewWidth, this.overview.clientWidth)) this.drawOverview();
    });
    this.observer.observe(root);
    this.system = matchMedia("(prefers-color-scheme: dark)");
    this.followSystem = () => this.theme === null && this.redraw();
    this.system.addEventListener("change", this.followSystem);
    this.applyTheme();
  }

  leave() {
    this.observer.disconnect();
    this.system.removeEventListener("change", this.followSystem);
    this.root.remove();
  }

  helpPanel(button) {
    const keys = [["\u2190 \u2192", "the key before, the key after"], ["\u2191 \u2193", "the query before, the query after"],
      ["[ ]", "the head before, the head after"], ["{ }", "the layer before, the layer after"], ["+ \u2212 0", "zoom in, zoom out, show all"],
      ["Enter", "zoom in on the chosen weight"], ["/", "find a token; Enter and n for the next"], ["l t i", "lines, text, image"],
      ["s", "heads as a table, or as pictures"], ["c", "colours by weight, its root or fourth root"], ["p", "show or hide padding"],
      ["d", "dark or light"], ["e", "export"], ["Esc", "choose nothing"], ["?", "this help"]];
    return html("dialog", { "aria-label": "Help" }, html("h2", {}, "How to read this"),
      html("p", {}, "A row of the matrix is a query: the token that reads. A column is a key: a token that it reads from. The darker (in the dark: the brighter) a cell, " +
        "the more of that token's value goes into the row's result; a row sums to 1, or less beside attention sinks. Hatched cells are hidden by a mask: not small, but impossible."),
      html("p", {}, "Entropy tells how spread out a head is, in nats: 0 looks at one token, ln n at n tokens alike. Distance is how many positions away it looks, on average. ",
        "In long sequences a cell is the mean of a block; zoomed in, the largest weights of each row are shown as they are."),
      html("dl", {}, ...keys.flatMap(([key, what]) => [html("dt", {}, ...key.split(" ").map((x) => html("kbd", {}, x))), html("dd", {}, what)])),
      html("p", { class: "quiet small" }, "Double click zooms in; a drag moves what is shown. Nothing leaves this page: it needs no network."),
      button("Close", "Close help", () => this.help.close()));
  }

  applyTheme() {
    this.root.dataset.theme = this.dark ? "dark" : "light";
    this.palette = ramp(this.root.dataset.theme);
    this.themeButton.textContent = this.dark ? "Light" : "Dark";
    this.hatch = null;
  }

  switchTheme() {
    this.theme = this.dark ? "light" : "dark";
    this.redraw();
  }

  redraw() {
    this.applyTheme();
    this.draw();
    this.drawOverview();
  }

  select(layer, head) {
    const before = this.current;
    this.layer = layer;
    this.head = clamp(head, 0, this.current.heads - 1);
    if (before.rows !== this.current.rows || before.keys !== this.current.keys) {
      this.view = this.row = this.key = null;
    }
    this.over = null;
    this.find(this.query, false);
    this.draw();
    if (this.overviewWidth) this.markHead(); else this.drawOverview();
  }

  draw() {
    this.drawMatrix();
    this.drawSide();
    this.say();
  }

  // The row and the key that are meant: where the pointer is, else what was chosen.
  get meant() {
    return this.over ?? { row: this.row, key: this.key };
  }

  say() {
    const { row, key } = this.meant;
    const layer = this.current;
    const name = (axis, at) => (this.hasTokens(axis) ? `\u201c${this.label(axis, at)}\u201d (${at})` : String(at));
    let text = "Point at a cell or a token, or use the arrow keys.";
    if (row !== null && key !== null) {
      const { weight, exact } = layer.weight(this.head, row, key);
      const what = layer.hidden(this.head, row, key) ? "hidden by the mask"
        : exact ? digits(weight) : `${digits(weight)}, the mean of a block of ${layer.block} \u00d7 ${layer.block}`;
      text = `query ${name("row", row)} \u2192 key ${name("key", key)}: ${what}`;
    } else if (row !== null) {
      const most = layer.strongest(this.head, row, 3).map(([at, weight]) => `${name("key", at)} ${digits(weight)}`);
      text = `query ${name("row", row)} reads most from ${most.join(", ") || "nothing"}`;
    } else if (key !== null) {
      text = `key ${name("key", key)} receives ${digits(layer.receivedBy(this.head, key))} of a query on average`;
    }
    this.said.textContent = text;
  }

  choose(row, key) {
    this.over = null;
    this.row = row;
    this.key = key;
    this.showChosen();
    this.drawSide();
    this.say();
  }

  hover(row, key) {
    const before = this.over;
    this.over = row === null && key === null ? null : { row, key };
    if (before?.row === this.over?.row && before?.key === this.over?.key) return;
    this.drawCross();
    this.say();
    this.markSide();
  }

  // ------------------------------------------------------------------------------------------------------------ all heads

  drawOverview() {
    this.overviewWidth = this.overview.clientWidth;
    this.tableButton.setAttribute("aria-pressed", String(this.table));
    this.overview.replaceChildren(...(this.table ? [this.headTable()] : this.thumbnails()));
    this.markHead(false);
  }

  thumbnails() {
    const most = Math.max(...this.layers.map((layer) => layer.heads));
    const room = Math.max(120, this.overviewWidth - 4);
    const size = clamp(Math.floor(room / Math.min(most, 12)) - 7, 14, 60);
    return this.layers.map((layer) => html("div", { class: "of-layer", role: "group", "aria-label": `layer ${layer.name}` },
      html("div", { class: "name" }, layer.name),
      html("div", { class: "row-of-heads" }, ...Array.from({ length: layer.heads }, (_, head) => html("button", {
        type: "button", tabindex: "-1", role: "option", "data-at": `${layer.index}.${head}`, title: this.headTitle(layer, head),
        "aria-label": this.headTitle(layer, head), onclick: () => this.select(layer.index, head),
      }, this.thumbnail(layer, head, size))))));
  }

  headTitle(layer, head) {
    const far = layer.distance ? `, distance ${layer.distance[head].toFixed(1)}` : "";
    return `${layer.name}, head ${head}: entropy ${layer.entropy[head].toFixed(2)}${far}`;
  }

  // The largest weight of each part of the matrix: means would lose what is sharp.
  thumbnail(layer, head, size) {
    const [rows, keys] = this.crop
      ? [layer.realRows, layer.realKeys].map(([a, b]) => [Math.floor(a / layer.block), Math.ceil(b / layer.block)])
      : [[0, layer.codeRows], [0, layer.codeKeys]];
    const height = Math.min(size * 2, Math.max(1, rows[1] - rows[0]));
    const width = Math.min(size * 2, Math.max(1, keys[1] - keys[0]));
    const largest = new Int16Array(width * height).fill(-1);
    for (let i = rows[0]; i < rows[1]; i++) {
      const y = Math.floor(((i - rows[0]) * height) / (rows[1] - rows[0])) * width;
      for (let j = keys[0]; j < keys[1]; j++) {
        const at = y + Math.floor(((j - keys[0]) * width) / (keys[1] - keys[0]));
        const code = layer.code(head, i, j);
        if (code > largest[at] && (code > 0 || !layer.codeHidden(head, i, j))) largest[at] = code;
      }
    }
    const canvas = html("canvas", { width, height, "aria-hidden": "true" });
    canvas.style.width = canvas.style.height = `${size}px`;
    const image = new ImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const lookup = words(this.colours(layer, head));
    const empty = words([this.dark ? [37, 46, 58] : [226, 230, 236]])[0];
    for (let n = 0; n < largest.length; n++) pixels[n] = largest[n] < 0 ? empty : lookup[largest[n]];
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  headTable() {
    const rows = this.layers.flatMap((layer) => Array.from({ length: layer.heads }, (_, head) => ({ layer, head,
      entropy: layer.entropy[head], distance: layer.distance ? layer.distance[head] : null })));
    const { by, down } = this.sort;
    if (by !== "head") rows.sort((x, y) => ((x[by] ?? Infinity) - (y[by] ?? Infinity)) * (down ? -1 : 1));
    else if (down) rows.reverse();
    const column = (name, text) => html("th", { scope: "col", "aria-sort": by === name ? (down ? "descending" : "ascending") : "none" },
      html("button", { type: "button", onclick: () => {
        this.sort = { by: name, down: by === name ? !down : false };
        this.drawOverview();
        this.overview.querySelector(`[data-column="${name}"]`)?.focus();
      }, "data-column": name }, text + (by === name ? (down ? " \u2193" : " \u2191") : "")));
    return html("table", {}, html("caption", { class: "unseen" }, "Heads with their entropy and mean distance"),
      html("thead", {}, html("tr", {}, column("head", "head"), column("entropy", "entropy"), column("distance", "distance"))),
      html("tbody", {}, ...rows.map(({ layer, head, entropy, distance }) => html("tr", {
        "data-at": `${layer.index}.${head}`, tabindex: "-1", onclick: () => this.select(layer.index, head),
      }, html("td", {}, `${layer.name} \u00b7 ${head}`), html("td", {}, entropy.toFixed(2)), html("td", {}, distance === null ? "\u2013" : distance.toFixed(1))))));
  }

  markHead(scroll = true) {
    for (const node of this.overview.querySelectorAll("[data-at]")) {
      const chosen = node.dataset.at === `${this.layer}.${this.head}`;
      node.setAttribute("aria-selected", String(chosen));
      node.tabIndex = chosen ? 0 : -1;
      if (chosen && scroll) {
        const [inner, outer] = [node.getBoundingClientRect(), this.overview.getBoundingClientRect()];
        if (inner.top < outer.top || inner.bottom > outer.bottom) this.overview.scrollTop += inner.top - outer.top - 30;
      }
    }
  }

  // -------------------------------------------------------------------------------------------------------------- matrix

  drawMatrix() {
    const layer = this.current;
    this.view ??= this.bounds();
    this.heading.textContent = `${layer.name} \u00b7 head ${this.head}`;
    const far = layer.distance ? ` \u00b7 mean distance ${layer.distance[this.head].toFixed(1)}` : "";
    this.numbers.textContent = `${layer.cls} \u00b7 ${layer.rows} queries \u00d7 ${layer.keys} keys \u00b7 entropy ${layer.entropy[this.head].toFixed(2)}${far}`;
    this.cropButton.hidden = !this.layers.some((x) => x.padded);
    this.cropButton.setAttribute("aria-pressed", String(!this.crop));
    this.sharedButton.setAttribute("aria-pressed", String(this.shared));
    this.powerChoice.value = String(this.power);

    const { r0, r1, k0, k1 } = this.view;
    const [rows, keys] = [r1 - r0, k1 - k0];
    this.width = this.matrix.clientWidth;
    const width = Math.max(200, this.width);
    const letters = (axis, from, to) => {
      let most = String(to).length;
      if (this.hasTokens(axis)) for (let n = from; n < to; n += Math.max(1, Math.floor((to - from) / 400))) most = Math.max(most, Array.from(this.label(axis, n)).length);
      return most;
    };
    const wide = clamp(letters("row", r0, r1), 2, width < 480 ? 9 : 16);
    const high = clamp(letters("key", k0, k1), 2, 12);
    const left = wide * 6.7 + 8;
    const top = high * 6.7 + 8;
    const roomX = Math.max(40, width - left - 2);
    const roomY = Math.max(220, Math.min(760, (globalThis.innerHeight || 800) * 0.78) - top);
    const cell = Math.min(34, roomX / keys, Math.max(roomY / rows, roomX / keys > 6 && rows > keys ? 6 : 0));
    // Flat matrices have cells that are no squares.
    const cellX = keys < rows / 4 ? Math.min(34, Math.max(cell, Math.min(roomX / keys, 12))) : cell;
    const cellY = rows < keys / 4 ? Math.min(26, Math.max(cell, 14)) : cell;
    const [w, h] = [cellX * keys, cellY * rows];
    this.geometry = { left, top, cellX, cellY, w, h, wide, high };

    this.matrix.style.height = `${Math.ceil(top + h + 2)}px`;
    const density = Math.min(2, globalThis.devicePixelRatio || 1);
    this.canvas = canvasOf(w, h, density);
    filled(this.canvas, { role: "img", "aria-label": `Attention weights of ${layer.name}, head ${this.head}: ${rows} queries by ${keys} keys` }, []);
    Object.assign(this.canvas.style, { left: `${left}px`, top: `${top}px` });
    this.paint(this.canvas.getContext("2d"), w * density, h * density);
    this.labels = svg("svg", { width, height: top + h + 2, "aria-hidden": "true" });
    this.drawLabels(this.labels);
    this.cross = svg("g");
    this.labels.append(this.cross);
    this.matrix.replaceChildren(this.canvas, this.labels);
    this.drawCross();
    this.drawLegend();
  }

  // The cells of the view, on a hatched ground that shows where nothing is seen.
  paint(context, w, h) {
    const { r0, r1, k0, k1 } = this.view;
    const layer = this.current;
    context.imageSmoothingEnabled = false;
    context.fillStyle = this.hatching(context);
    context.fillRect(0, 0, w, h);
    const block = layer.block;
    const [i0, i1, j0, j1] = [Math.floor(r0 / block), Math.ceil(r1 / block), Math.floor(k0 / block), Math.ceil(k1 / block)];
    const image = new ImageData(j1 - j0, i1 - i0);
    const pixels = new Uint32Array(image.data.buffer);
    const lookup = words(this.colours(layer, this.head));
    let n = 0;
    for (let i = i0; i < i1; i++) {
      for (let j = j0; j < j1; j++, n++) {
        if (!layer.codeHidden(this.head, i, j)) pixels[n] = lookup[layer.code(this.head, i, j)];
      }
    }
    const small = html("canvas", { width: j1 - j0, height: i1 - i0 });
    small.getContext("2d").putImageData(image, 0, 0);
    const [x, y] = [w / (k1 - k0), h / (r1 - r0)];
    context.drawImage(small, (j0 * block - k0) * x, (i0 * block - r0) * y, (j1 - j0) * block * x, (i1 - i0) * block * y);
    if (block > 1 && r1 - r0 <= MOST_CELLS * 2) this.paintStrongest(context, x, y);
    if (block === 1 && x >= 30 * (w / this.geometry.w) && y >= 15 * (h / this.geometry.h)) this.paintNumbers(context, x, y);
  }

  paintStrongest(context, x, y) {
    const { r0, r1, k0, k1 } = this.view;
    const layer = this.current;
    const colours = this.colours(layer, this.head, layer.topScale[this.head]);
    for (let row = r0; row < r1; row++) {
      const first = (this.head * layer.rows + row) * layer.top;
      for (let n = first; n < first + layer.top && layer.topKeys[n] >= 0; n++) {
        const key = layer.topKeys[n];
        if (key < k0 || key >= k1) continue;
        context.fillStyle = css(colours[layer.topCodes[n]]);
        context.fillRect((key - k0) * x, (row - r0) * y, x, y);
      }
    }
  }

  paintNumbers(context, x, y) {
    const { r0, r1, k0, k1 } = this.view;
    const layer = this.current;
    const colours = this.colours(layer, this.head);
    context.font = `${Math.round(Math.min(x / 3.2, y / 1.6))}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let row = r0; row < r1; row++) {
      for (let key = k0; key < k1; key++) {
        const { weight } = layer.weight(this.head, row, key);
        if (weight < 0.005 || layer.hidden(this.head, row, key)) continue;
        context.fillStyle = ink(colours[layer.code(this.head, row, key)]);
        context.fillText(weight.toFixed(2).replace(/^0/, ""), (key - k0 + 0.5) * x, (row - r0 + 0.5) * y);
      }
    }
  }

  hatching(context) {
    if (!this.hatch) {
      const style = getComputedStyle(this.root);
      const tile = html("canvas", { width: 8, height: 8 });
      const ground = tile.getContext("2d");
      ground.fillStyle = style.getPropertyValue("--hatch-ground");
      ground.fillRect(0, 0, 8, 8);
      ground.strokeStyle = style.getPropertyValue("--hatch");
      ground.lineWidth = 1.2;
      for (const at of [-8, 0, 8]) {
        ground.beginPath();
        ground.moveTo(at - 1, 9);
        ground.lineTo(at + 9, -1);
        ground.stroke();
      }
      this.hatch = tile;
    }
    return context.createPattern(this.hatch, "repeat");
  }

  drawLabels(into) {
    const { r0, r1, k0, k1 } = this.view;
    const { left, top, cellX, cellY, wide, high } = this.geometry;
    const matching = new Set(this.found.map(({ axis, at }) => `${axis}${at}`));
    const step = { row: everyNth(cellY, 11), key: everyNth(cellX, 11) };
    const few = this.found.length <= MOST_FOUND; // those have labels between the others
    for (let row = r0; row < r1; row++) {
      const found = matching.has(`row${row}`);
      if ((row - r0) % step.row && !(found && few)) continue;
      const y = top + (row - r0 + 0.5) * cellY;
      if (found) into.append(svg("rect", { class: "found", x: 0, y: y - 6.5, width: left - 3, height: 13, rx: 3 }));
      into.append(svg("text", { x: left - 5, y: y + 3.7, "text-anchor": "end", class: this.hasTokens("row") ? "" : "quiet" }, shortened(this.label("row", row), wide)));
    }
    for (let key = k0; key < k1; key++) {
      const found = matching.has(`key${key}`);
      if ((key - k0) % step.key && !(found && few)) continue;
      const x = left + (key - k0 + 0.5) * cellX;
      if (found) into.append(svg("rect", { class: "found", x: x - 6.5, y: 0, width: 13, height: top - 3, rx: 3 }));
      into.append(svg("text", { transform: `translate(${x + 3.7} ${top - 5}) rotate(-90)`, class: this.hasTokens("key") ? "" : "quiet" }, shortened(this.label("key", key), high)));
    }
  }

  drawCross() {
    const { row, key } = this.meant;
    const { r0, r1, k0, k1 } = this.view;
    const { left, top, cellX, cellY, w, h, wide, high } = this.geometry;
    const parts = [];
    const [inRow, inKey] = [row !== null && row >= r0 && row < r1, key !== null && key >= k0 && key < k1];
    const y = top + (row - r0) * cellY;
    const x = left + (key - k0) * cellX;
    if (inRow) {
      parts.push(svg("rect", { class: "band", x: 0, y, width: left, height: Math.max(1, cellY) }),
        svg("rect", { class: "guide", x: left, y, width: w, height: cellY }),
        svg("rect", { class: "ground", x: 0, y: y + cellY / 2 - 7, width: left - 2, height: 14 }),
        svg("text", { class: "strong", x: left - 5, y: y + cellY / 2 + 3.7, "text-anchor": "end" }, shortened(this.label("row", row), wide)));
    }
    if (inKey) {
      parts.push(svg("rect", { class: "band", x, y: 0, width: Math.max(1, cellX), height: top }),
        svg("rect", { class: "guide", x, y: top, width: cellX, height: h }),
        svg("rect", { class: "ground", x: x + cellX / 2 - 7, y: 0, width: 14, height: top - 2 }),
        svg("text", { class: "strong", transform: `translate(${x + cellX / 2 + 3.7} ${top - 5}) rotate(-90)` }, shortened(this.label("key", key), high)));
    }
    if (inRow && inKey) parts.push(svg("rect", { class: "cross", x: x - 1, y: y - 1, width: cellX + 2, height: cellY + 2, rx: 2 }));
    this.cross.replaceChildren(...parts);
  }

  drawLegend() {
    const layer = this.current;
    const strip = html("canvas", { width: 256, height: 1 });
    strip.style.cssText = "width:110px;height:12px";
    const image = new ImageData(256, 1);
    const top = this.shared ? Math.max(...this.layers.flatMap((x) => x.scale)) : layer.scale[this.head];
    const lookup = words(Array.from({ length: 256 }, (_, n) => this.palette[Math.round(255 * (n / 255) ** this.power)]));
    new Uint32Array(image.data.buffer).set(lookup);
    strip.getContext("2d").putImageData(image, 0, 0);
    this.legend.replaceChildren(html("span", {}, "0", strip, digits(top)),
      layer.hiddenBits || layer.seen ? html("span", {}, html("span", { class: "swatch hatched" }), "hidden by a mask") : null ?? "",
      layer.block > 1 ? html("span", {}, `cells are means of ${layer.block} \u00d7 ${layer.block} pairs; zoom in for the largest of each row`) : "");
  }

  bindMatrix() {
    let drag = null;
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      const { cellX, cellY } = this.geometry;
      const [row, key] = [Math.floor((event.clientY - box.top) / cellY) + this.view.r0, Math.floor((event.clientX - box.left) / cellX) + this.view.k0];
      return row >= this.view.r0 && row < this.view.r1 && key >= this.view.k0 && key < this.view.k1 ? { row, key } : null;
    };
    this.matrix.addEventListener("pointermove", (event) => {
      if (drag) {
        const { cellX, cellY } = this.geometry;
        const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
        if (Math.abs(dx) + Math.abs(dy) > 4) drag.moved = true;
        if (drag.moved) this.look(drag.view.r0 - Math.round(dy / cellY), drag.view.k0 - Math.round(dx / cellX));
        return;
      }
      const place = at(event);
      this.hover(place?.row ?? null, place?.key ?? null);
    });
    this.matrix.addEventListener("pointerleave", () => { drag = null; this.hover(null, null); });
    this.matrix.addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, view: this.view, moved: false }; });
    this.matrix.addEventListener("pointerup", (event) => {
      const moved = drag?.moved;
      drag = null;
      const place = moved ? null : at(event);
      if (place) { this.choose(place.row, place.key); this.root.focus({ preventScroll: true }); }
    });
    this.matrix.addEventListener("dblclick", (event) => {
      const place = at(event);
      if (place) { this.choose(place.row, place.key); this.zoom(0.25); }
    });
    this.matrix.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const place = at(event);
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8, place);
    }, { passive: false });
  }

  // Shows as many rows and keys as now, from these on.
  look(r0, k0) {
    const all = this.bounds();
    const [rows, keys] = [this.view.r1 - this.view.r0, this.view.k1 - this.view.k0];
    r0 = clamp(r0, all.r0, all.r1 - rows);
    k0 = clamp(k0, all.k0, all.k1 - keys);
    if (r0 === this.view.r0 && k0 === this.view.k0) return;
    this.view = { r0, r1: r0 + rows, k0, k1: k0 + keys };
    this.drawMatrix();
  }

  // Around a place, or what is chosen (of a query alone, the key that it reads most), or the middle.
  zoom(factor, place = null) {
    const all = this.bounds();
    const { r0, r1, k0, k1 } = this.view;
    const best = this.row === null ? undefined : this.current.strongest(this.head, this.row, 1)[0]?.[0];
    const middle = { row: place?.row ?? this.row ?? Math.floor((r0 + r1) / 2), key: place?.key ?? this.key ?? best ?? Math.floor((k0 + k1) / 2) };
    const rows = clamp(Math.round((r1 - r0) * factor), Math.min(4, all.r1 - all.r0), all.r1 - all.r0);
    const keys = clamp(Math.round((k1 - k0) * factor), Math.min(4, all.k1 - all.k0), all.k1 - all.k0);
    const from = (at, size, low, high) => clamp(at - Math.floor(size / 2), low, high - size);
    const [r, k] = [from(middle.row, rows, all.r0, all.r1), from(middle.key, keys, all.k0, all.k1)];
    this.view = { r0: r, r1: r + rows, k0: k, k1: k + keys };
    this.draw();
  }

  showAll() {
    this.view = null;
    this.draw();
  }

  // Moves the view to where the chosen row and key are.
  showChosen() {
    const { r0, r1, k0, k1 } = this.view;
    const all = this.bounds();
    const move = (at, from, to, low, high) => (at === null || (at >= from && at < to) ? from : clamp(at - Math.floor((to - from) / 2), low, high - (to - from)));
    const [r, k] = [move(this.row, r0, r1, all.r0, all.r1), move(this.key, k0, k1, all.k0, all.k1)];
    if (r !== r0 || k !== k0) {
      this.view = { r0: r, r1: r + r1 - r0, k0: k, k1: k + k1 - k0 };
      this.drawMatrix();
    } else {
      this.drawCross();
    }
  }

  // ------------------------------------------------------------------------------------------------- lines, text, picture

  drawSide() {
    for (const [tab, button] of Object.entries(this.tabs)) button.setAttribute("aria-selected", String(tab === this.tab));
    const draw = { lines: () => this.drawLines(), text: () => this.drawText(), picture: () => this.drawPicture() }[this.tab];
    this.side.replaceChildren(...draw());
    this.markSide();
  }

  markSide() {
    if (this.tab === "lines") this.markLines();
    else if (this.tab === "text") this.markText();
    else this.markPicture();
  }

  // Which rows and keys have room beside each other: all, or those around what is chosen.
  listed() {
    const all = this.bounds();
    const layer = this.current;
    const around = (at, low, high) => {
      if (high - low <= ROWS_OF_LINES) return range(low, high);
      const from = clamp((at ?? low) - ROWS_OF_LINES / 2, low, high - ROWS_OF_LINES);
      return range(from, from + ROWS_OF_LINES);
    };
    const rows = around(this.row ?? this.view.r0, all.r0, all.r1);
    if (all.k1 - all.k0 <= ROWS_OF_LINES) return { rows, keys: range(all.k0, all.k1), some: rows.length < all.r1 - all.r0 };
    const wanted = new Set();
    const of = this.row === null ? rows : [this.row];
    for (const row of of) for (const [key] of layer.strongest(this.head, row, this.row === null ? 2 : ROWS_OF_LINES / 2)) wanted.add(key);
    if (this.key !== null) wanted.add(this.key);
    const near = around(this.key ?? this.row ?? this.view.k0, all.k0, all.k1);
    const keys = new Set([...wanted].slice(0, ROWS_OF_LINES));
    for (const key of near) if (keys.size < ROWS_OF_LINES && key >= all.k0 && key < all.k1) keys.add(key);
    return { rows, keys: [...keys].sort((a, b) => a - b), some: true };
  }

  drawLines() {
    const layer = this.current;
    const { rows, keys, some } = this.listed();
    const width = Math.max(260, this.side.clientWidth);
    const step = 17;
    const longest = (axis, list) => Math.max(...list.map((at) => Array.from(this.label(axis, at)).length)) + (this.hasTokens(axis) ? 0 : 1);
    const column = clamp(Math.max(longest("row", rows), longest("key", keys)) * 6.7 + 14, 56, width * 0.34);
    const letters = Math.floor((column - 12) / 6.7);
    const height = Math.max(rows.length, keys.length) * step + 22;
    const yOf = (n) => 22 + n * step;
    const places = new Map(keys.map((key, n) => [key, n]));
    const found = [];
    rows.forEach((row, n) => {
      for (const [key, weight] of layer.strongest(this.head, row, 40)) if (places.has(key)) found.push({ row, key, weight, n, m: places.get(key) });
    });
    found.sort((a, b) => b.weight - a.weight);
    this.lineParts = found.slice(0, MOST_LINES).map((x) => {
      return { ...x, node: svg("line", { x1: column, x2: width - column, y1: yOf(x.n) + step / 2, y2: yOf(x.m) + step / 2 }) };
    });
    const matching = new Set(this.found.map(({ axis, at }) => `${axis}${at}`));
    const token = (axis, at, n) => {
      const x = axis === "row" ? 0 : width - column;
      const group = svg("g", { class: "token", "data-axis": axis, "data-at": at,
        onpointerenter: () => this.hover(axis === "row" ? at : null, axis === "key" ? at : null),
        onpointerleave: () => this.hover(null, null),
        onclick: () => (axis === "row" ? this.choose(this.row === at ? null : at, null) : this.choose(null, this.key === at ? null : at)) });
      const text = (this.hasTokens(axis) ? "" : "#") + shortened(this.label(axis, at), letters);
      group.append(svg("rect", { x, y: yOf(n), width: column, height: step - 1, rx: 4, class: matching.has(`${axis}${at}`) ? "found" : "", fill: "transparent" }),
        svg("text", axis === "row" ? { x: column - 6, y: yOf(n) + 12, "text-anchor": "end" } : { x: width - column + 6, y: yOf(n) + 12 }, text));
      return group;
    };
    this.tokenParts = [...rows.map((row, n) => token("row", row, n)), ...keys.map((key, n) => token("key", key, n))];
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Lines from queries to the keys that they read, ${layer.name}, head ${this.head}` },
      svg("text", { x: column - 6, y: 13, "text-anchor": "end", class: "quiet" }, "query"), svg("text", { x: width - column + 6, y: 13, class: "quiet" }, "key"),
      svg("g", {}, ...this.lineParts.map((x) => x.node)), ...this.tokenParts);
    this.linesPicture = picture;
    const note = some ? "Tokens around the chosen ones; arrow keys move on." : "Point at a token for its lines; a click keeps them.";
    return [html("p", { class: "sidenote" }, note), html("div", { class: "scroll lines" }, picture)];
  }

  markLines() {
    const { row, key } = this.meant;
    const calm = row === null && key === null;
    const shown = this.lineParts.filter((x) => (row !== null ? x.row === row : key !== null ? x.key === key : true));
    const largest = Math.max(...shown.map((x) => x.weight), 1e-12);
    for (const x of this.lineParts) x.node.setAttribute("stroke-opacity", "0");
    for (const x of shown) {
      const strength = (x.weight / largest) ** 0.7;
      x.node.setAttribute("stroke-opacity", (calm ? 0.65 * strength : 0.12 + 0.88 * strength).toFixed(3));
      x.node.setAttribute("stroke-width", (0.6 + 2.8 * (x.weight / largest)).toFixed(2));
    }
    const layer = this.current;
    for (const group of this.tokenParts) {
      const [axis, at] = [group.dataset.axis, Number(group.dataset.at)];
      const [rect, text] = group.children;
      let fill = "transparent";
      let colour = null;
      if (axis === "row" ? at === row : at === key) text.setAttribute("class", "strong");
      else text.removeAttribute("class");
      const pair = axis === "key" && row !== null ? [row, at] : axis === "row" && key !== null && row === null ? [at, key] : null;
      if (pair && !layer.hidden(this.head, ...pair)) {
        const { weight, exact } = layer.weight(this.head, ...pair);
        if (exact && weight > 0) { const rgb = this.colourOf(weight); fill = css(rgb); colour = ink(rgb); }
      }
      const found = rect.getAttribute("class") === "found";
      if (!found) rect.setAttribute("fill", fill);
      text.style.fill = !found && colour ? colour : "";
    }
  }

  drawText() {
    const all = this.bounds();
    const most = 1500;
    const from = all.k1 - all.k0 > most ? clamp((this.key ?? this.row ?? all.k0) - most / 2, all.k0, all.k1 - most) : all.k0;
    const matching = new Set(this.found.filter(({ axis }) => axis === "key").map(({ at }) => at));
    this.textParts = range(from, Math.min(all.k1, from + most)).map((key) => html("span", { class: `token${matching.has(key) ? " found" : ""}`, "data-at": key,
      onpointerenter: () => this.current.same && this.hover(key, null), onpointerleave: () => this.hover(null, null),
      onclick: () => (this.current.same ? this.choose(this.row === key ? null : key, null) : this.choose(this.row, key)) },
    (this.hasTokens("key") ? this.label("key", key) : `#${key}`)));
    this.textNote = html("p", { class: "sidenote" });
    const text = html("div", { class: "scroll text" });
    for (const part of this.textParts) text.append(part, " ");
    return [this.textNote, text];
  }

  markText() {
    const { row } = this.meant;
    const layer = this.current;
    this.textNote.textContent = row === null ? `Colours: what each token receives on average.${layer.same ? " Point at one for what it reads from." : ""}`
      : `Colours: what query ${this.hasTokens("row") ? `\u201c${this.label("row", row)}\u201d (${row})` : row} reads from.`;
    const weights = this.textParts.map((part) => (row === null ? layer.receivedBy(this.head, Number(part.dataset.at)) : layer.weight(this.head, row, Number(part.dataset.at)).weight));
    const top = Math.max(...weights, 1e-12);
    this.textParts.forEach((part, n) => {
      const key = Number(part.dataset.at);
      const hidden = row !== null && layer.hidden(this.head, row, key);
      const rgb = this.palette[Math.round(255 * (weights[n] / top) ** Math.max(this.power, 0.5))];
      part.classList.toggle("hidden", hidden);
      part.classList.toggle("own", layer.same && key === row);
      part.style.background = hidden ? "" : css(rgb);
      part.style.color = hidden ? "" : ink(rgb);
      part.title = hidden ? "hidden" : digits(weights[n]);
    });
  }

  drawPicture() {
    const { image, grid } = this.header;
    const layer = this.current;
    const count = grid.rows * grid.columns;
    const fits = (extent) => extent >= grid.first + count;
    if (!fits(layer.keys)) return [html("p", { class: "sidenote" }, `This layer has ${layer.keys} keys, no grid of ${grid.rows} \u00d7 ${grid.columns} patches.`)];
    const [width, height] = image ? [image.width, image.height] : [grid.columns * 16, grid.rows * 16];
    const [w, h] = [width / grid.columns, height / grid.rows];
    this.patches = range(0, count).map((n) => svg("rect", { x: (n % grid.columns) * w, y: Math.floor(n / grid.columns) * h, width: w, height: h, "data-at": grid.first + n, "shape-rendering": "crispEdges",
      onpointerenter: () => layer.same && this.hover(grid.first + n, null), onpointerleave: () => this.hover(null, null),
      onclick: () => (layer.same ? this.choose(this.row === grid.first + n ? null : grid.first + n, null) : this.choose(this.row, grid.first + n)) }));
    this.ownPatch = svg("rect", { class: "own", width: w, height: h, visibility: "hidden", "pointer-events": "none" });
    this.textNote = html("p", { class: "sidenote" });
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Attention over ${grid.rows} by ${grid.columns} patches` },
      image ? svg("image", { href: image.src, width, height, style: "image-rendering:auto", preserveAspectRatio: "none" }) : null, ...this.patches, this.ownPatch);
    const others = grid.first ? html("div", { class: "tools", style: "margin-bottom:8px" }, ...range(0, grid.first).map((n) => html("button",
      { type: "button", onclick: () => this.choose(this.row === n ? null : n, null) }, layer.keyTokens === null ? `token ${n}` : this.label("key", n)))) : null;
    return [this.textNote, others, html("div", { class: "picture" }, picture)].filter((x) => x);
  }

  markPicture() {
    if (!this.patches?.length || !this.side.contains(this.patches[0])) return;
    const { row } = this.meant;
    const { grid, image } = this.header;
    const layer = this.current;
    this.textNote.textContent = row === null ? "Veiled: patches that receive little. Point at a patch for what it reads from."
      : `What query ${this.hasTokens("row") ? this.label("row", row) : row} reads from.`;
    const weights = this.patches.map((part) => (row === null ? layer.receivedBy(this.head, Number(part.dataset.at)) : layer.weight(this.head, row, Number(part.dataset.at)).weight));
    const top = Math.max(...weights, 1e-12);
    this.patches.forEach((part, n) => {
      const share = (weights[n] / top) ** this.power;
      const hidden = row !== null && layer.hidden(this.head, row, Number(part.dataset.at));
      // Over an image, what is read stays bright: the rest is veiled.
      part.setAttribute("fill", hidden ? "rgb(128 128 128)" : image ? (this.dark ? "rgb(8 12 18)" : "rgb(245 247 250)") : css(this.palette[Math.round(255 * share)]));
      part.setAttribute("fill-opacity", hidden ? 0.9 : image ? (0.86 * (1 - share)).toFixed(3) : 1);
    });
    const at = row === null || !layer.same ? -1 : row - grid.first;
    this.ownPatch.setAttribute("visibility", at >= 0 && at < this.patches.length ? "visible" : "hidden");
    if (at >= 0 && at < this.patches.length) for (const name of ["x", "y"]) this.ownPatch.setAttribute(name, this.patches[at].getAttribute(name));
  }

  // ----------------------------------------------------------------------------------------------------------- the search

  find(text, redraw = true) {
    this.query = text;
    const wanted = text.toLowerCase();
    this.found = [];
    if (wanted) {
      for (const [axis, extent] of [["row", this.current.rows], ["key", this.current.keys]]) {
        for (let at = 0; at < extent; at++) if (this.label(axis, at).toLowerCase().includes(wanted)) this.found.push({ axis, at });
      }
    }
    const rows = this.found.filter(({ axis }) => axis === "row").length;
    this.foundNote.textContent = !wanted ? "" : this.found.length ? `${rows} queries, ${this.found.length - rows} keys` : "not found";
    if (redraw) this.draw();
  }

  nextFound(step) {
    const rows = this.found.filter(({ axis }) => axis === "row").map(({ at }) => at);
    const keys = this.found.filter(({ axis }) => axis === "key").map(({ at }) => at);
    const next = (list, now) => {
      const after = step > 0 ? list.find((at) => now === null || at > now) : list.findLast((at) => now === null || at < now);
      return after ?? list.at(step > 0 ? 0 : -1);
    };
    if (rows.length) this.choose(next(rows, this.row), null);
    else if (keys.length) this.choose(null, next(keys, this.key));
  }

  // --------------------------------------------------------------------------------------------------------------- export

  save(kind) {
    this.menu.open = false;
    const layer = this.current;
    const name = `attention-${layer.name}-head-${this.head}`.replace(/[^\w.-]+/g, "-");
    if (kind === "csv") return download(new Blob([this.csv()], { type: "text/csv" }), `${name}.csv`);
    if (kind === "lines") {
      if (this.tab !== "lines") { this.tab = "lines"; this.drawSide(); }
      return download(new Blob([this.standalone(this.linesPicture)], { type: "image/svg+xml" }), `${name}-lines.svg`);
    }
    const picture = this.matrixSvg();
    if (kind === "svg") return download(new Blob([picture.text], { type: "image/svg+xml" }), `${name}.svg`);
    const image = new Image();
    image.onload = () => {
      const canvas = canvasOf(picture.width, picture.height, 2);
      const context = canvas.getContext("2d");
      context.scale(2, 2);
      context.drawImage(image, 0, 0);
      canvas.toBlob((blob) => download(blob, `${name}.png`), "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(picture.text)}`;
    return undefined;
  }

  // A copy of a picture that needs nothing of this page.
  standalone(node, before = []) {
    const copy = node.cloneNode(true);
    const style = getComputedStyle(this.root);
    const get = (name) => style.getPropertyValue(name).trim();
    const { width, height } = node.viewBox.baseVal?.width ? node.viewBox.baseVal : { width: node.width.baseVal.value, height: node.height.baseVal.value };
    for (const [name, x] of [["xmlns", SVG], ["width", Math.ceil(width)], ["height", Math.ceil(height)]]) copy.setAttribute(name, x);
    const rules = `text{fill:${get("--ink")};font:11px ui-monospace,Menlo,Consolas,monospace;white-space:pre}text.quiet{fill:${get("--quiet")}}` +
      `text.strong{fill:${get("--mark")};font-weight:700}.found{fill:${get("--found")}}.cross{fill:none;stroke:${get("--mark")};stroke-width:1.5}` +
      `.band{fill:${get("--mark")};opacity:.12}.guide{fill:none;stroke:${get("--mark")};opacity:.45}.ground{fill:${get("--panel")}}line{stroke:${get("--accent")};stroke-linecap:round}`;
    copy.prepend(svg("style", {}, rules), svg("rect", { width: "100%", height: "100%", fill: get("--panel") }), ...before);
    return new XMLSerializer().serializeToString(copy);
  }

  matrixSvg() {
    const { left, top, w, h } = this.geometry;
    const [x, y] = [Math.max(1, Math.min(8, Math.floor(1800 / w))), Math.max(1, Math.min(8, Math.floor(1800 / h)))];
    const canvas = html("canvas", { width: Math.ceil(w * x), height: Math.ceil(h * y) });
    this.paint(canvas.getContext("2d"), canvas.width, canvas.height);
    const image = svg("image", { x: left, y: top, width: w, height: h, href: canvas.toDataURL("image/png"), preserveAspectRatio: "none" });
    return { text: this.standalone(this.labels, [image]), width: this.labels.width.baseVal.value, height: this.labels.height.baseVal.value };
  }

  csv() {
    const layer = this.current;
    const all = this.bounds();
    const cell = (text) => (/[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text);
    if (layer.block > 1) {
      const lines = ["query,query token,key,key token,weight"];
      for (const row of range(all.r0, all.r1)) {
        for (const [key, weight] of layer.strongest(this.head, row, layer.top)) {
          lines.push([row, cell(this.label("row", row)), key, cell(this.label("key", key)), weight.toPrecision(3)].join(","));
        }
      }
      return lines.join("\r\n") + "\r\n";
    }
    const keys = range(all.k0, all.k1);
    const lines = [["query \\ key", ...keys.map((key) => cell(this.label("key", key)))].join(",")];
    for (const row of range(all.r0, all.r1)) {
      const weights = keys.map((key) => (layer.hidden(this.head, row, key) ? "" : String(Number(layer.weight(this.head, row, key).weight.toPrecision(3)))));
      lines.push([cell(this.label("row", row)), ...weights].join(","));
    }
    return lines.join("\r\n") + "\r\n";
  }

  // --------------------------------------------------------------------------------------------------------- the keyboard

  key_(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.help.open || event.target.closest?.("select, input, details[open]")) {
      if (event.key === "Escape" && this.menu.open) this.menu.open = false;
      return;
    }
    const all = this.bounds();
    const step = (at, by, low, high) => (at === null ? (by > 0 ? low : high - 1) : clamp(at + by, low, high - 1));
    const next = (list, now) => list[(list.indexOf(now) + 1) % list.length];
    const of = this.current;
    const actions = {
      ArrowDown: () => this.choose(step(this.row, 1, all.r0, all.r1), this.key),
      ArrowUp: () => this.choose(step(this.row, -1, all.r0, all.r1), this.key),
      ArrowRight: () => this.choose(this.row, step(this.key, 1, all.k0, all.k1)),
      ArrowLeft: () => this.choose(this.row, step(this.key, -1, all.k0, all.k1)),
      "]": () => (this.head + 1 < of.heads ? this.select(this.layer, this.head + 1) : this.select((this.layer + 1) % this.layers.length, 0)),
      "[": () => {
        const before = (this.layer + this.layers.length - 1) % this.layers.length;
        return this.head > 0 ? this.select(this.layer, this.head - 1) : this.select(before, this.layers[before].heads - 1);
      },
      "}": () => this.select((this.layer + 1) % this.layers.length, this.head),
      "{": () => this.select((this.layer + this.layers.length - 1) % this.layers.length, this.head),
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), 0: () => this.showAll(),
      Enter: () => (event.target.closest?.("button, summary, tr") ? event.target.closest("tr")?.click() ?? false : this.zoom(0.25)),
      "/": () => this.search.focus(), n: () => this.nextFound(1), N: () => this.nextFound(-1),
      l: () => this.show("lines"), t: () => this.show("text"), i: () => this.header.grid && this.show("picture"),
      s: () => { this.table = !this.table; this.drawOverview(); },
      c: () => { this.power = next([0.5, 1, 0.25], this.power); this.draw(); this.drawOverview(); },
      p: () => { this.crop = !this.crop; this.view = null; this.draw(); this.drawOverview(); },
      d: () => this.switchTheme(),
      e: () => { this.menu.open = true; this.menu.querySelector("button").focus(); },
      "?": () => this.help.showModal(),
      Escape: () => this.choose(null, null),
    };
    const action = actions[event.key];
    if (!action || action() === false) return;
    event.preventDefault();
    event.stopPropagation();
  }

  show(tab) {
    this.tab = tab;
    this.drawSide();
  }
}

function range(from, to) {
  return Array.from({ length: Math.max(0, to - from) }, (_, n) => from + n);
}

// Colours as the 32-bit words of an ImageData.
function words(colours) {
  const bytes = new Uint8ClampedArray(4 * colours.length).fill(255);
  colours.forEach((rgb, n) => bytes.set(rgb, 4 * n));
  return new Uint32Array(bytes.buffer);
}

function download(blob, name) {
  const link = html("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --------------------------------------------------------------------------------------------------------------- render

async function render({ model, el }) {
  const data = model.get("data");
  const bytes = data instanceof DataView ? new Uint8Array(data.buffer, data.byteOffset, data.byteLength) : data;
  const viewer = new Viewer(el, JSON.parse(model.get("header")), await inflated(bytes));
  performance.mark("attn-ops-drawn");
  requestAnimationFrame(() => setTimeout(() => performance.mark("attn-ops-painted")));
  return viewer;
}

// A page of its own: what it shows is in it, and the whole page listens to keys.
async function renderPage() {
  const encoded = document.getElementById("attn-ops-data").textContent.trim();
  const letters = atob(encoded);
  const bytes = new Uint8Array(letters.length);
  for (let n = 0; n < bytes.length; n++) bytes[n] = letters.charCodeAt(n);
  const given = { header: document.getElementById("attn-ops-header").textContent, data: bytes };
  const viewer = await render({ model: { get: (name) => given[name] }, el: document.getElementById("attn-ops") });
  document.addEventListener("keydown", (event) => event.target === document.body && viewer.key_(event));
  viewer.root.classList.add("page");
}

export default {
  // anywidget calls what this returns when the output goes away.
  async render({ model, el }) {
    const viewer = await render({ model, el });
    return () => viewer.leave();
  },
};
export { render, renderPage };
