"use strict";
(() => {
  const text = (id) => document.getElementById(id).textContent;
  const bytes = (id) => Uint8Array.from(atob(text(id)), (c) => c.charCodeAt(0));
  const facts = JSON.parse(text("facts"));
  const [plot, stage, card, select, legend, said] = ["plot", "stage", "card", "column", "legend", "said"].map((id) => document.getElementById(id));
  const pen = plot.getContext("2d");
  const count = facts.count;
  const raw = new Uint16Array(bytes("points").buffer); // x, y in 65535ths of the longer side
  const xs = new Float32Array(count), ys = new Float32Array(count);
  for (let i = 0; i < count; i++) { xs[i] = raw[2 * i] / 65535; ys[i] = 1 - raw[2 * i + 1] / 65535; }

  // An order that looks random, so that no colour lies on top of another because of its place in the data set.
  const order = new Uint32Array(count);
  for (let i = 0, state = 1; i < count; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const j = Math.floor((state / 2 ** 32) * (i + 1));
    order[i] = order[j]; order[j] = i;
  }

  // Points by the cell of a grid they lie in, to find the nearest without looking at all of them.
  const CELLS = 128;
  const cell = (v) => Math.min(CELLS - 1, Math.max(0, Math.floor(v * CELLS)));
  const starts = new Uint32Array(CELLS * CELLS + 1), inCells = new Uint32Array(count);
  for (let i = 0; i < count; i++) starts[cell(ys[i]) * CELLS + cell(xs[i]) + 1]++;
  for (let c = 0; c < CELLS * CELLS; c++) starts[c + 1] += starts[c];
  const filled = starts.slice();
  for (let i = 0; i < count; i++) inCells[filled[cell(ys[i]) * CELLS + cell(xs[i])]++] = i;
  function within(left, top, right, bottom, visit) {
    for (let row = cell(top); row <= cell(bottom); row++)
      for (let at = starts[row * CELLS + cell(left)], end = starts[row * CELLS + cell(right) + 1]; at < end; at++) {
        const i = inCells[at];
        if (xs[i] >= left && xs[i] <= right && ys[i] >= top && ys[i] <= bottom) visit(i);
      }
  }

  // Columns: codes into kinds (65535 unknown), or values on a scale (NaN unknown). Decoded when first shown.
  const SHADES = 64, loaded = [];
  function column(number) {
    if (!facts.columns.length) return null;
    if (!loaded[number]) {
      const told = facts.columns[number], buffer = bytes("column-" + number).buffer;
      if (told.kinds) {
        const codes = new Uint16Array(buffer), counts = new Uint32Array(told.kinds.length + 1);
        for (const code of codes) counts[Math.min(code, told.kinds.length)]++;
        loaded[number] = { ...told, codes, counts, colours: [...told.kinds.map((_, k) => facts.palette[k % facts.palette.length]), facts.unknown] };
      } else {
        const values = new Float32Array(buffer), codes = new Uint16Array(count), [low, high] = told.ends;
        for (let i = 0; i < count; i++) codes[i] = Number.isNaN(values[i]) ? SHADES : Math.min(SHADES - 1, Math.floor(((values[i] - low) / (high - low || 1)) * SHADES));
        loaded[number] = { ...told, values, codes, colours: [...facts.ramp, facts.unknown] };
      }
    }
    return loaded[number];
  }
  const worth = (told, number, i) => {
    const held = column(number);
    if (told.kinds) return held.codes[i] < told.kinds.length ? told.kinds[held.codes[i]] : "unknown";
    return Number.isNaN(held.values[i]) ? "unknown" : String(+held.values[i].toPrecision(4));
  };

  // What is seen: unit coordinates times scale, plus the place of the origin, in CSS pixels.
  const view = { scale: 1, x: 0, y: 0 };
  let width = 0, height = 0, fitted = 1, chosen = 0, only = -1, pointed = -1, pinned = false, asked = false, untouched = true;
  const sx = (i) => xs[i] * view.scale + view.x, sy = (i) => ys[i] * view.scale + view.y;
  function fit() {
    const spanX = facts.span[0], spanY = facts.span[1];
    untouched = true;
    fitted = view.scale = 0.94 * Math.min(width / spanX, height / spanY);
    view.x = (width - spanX * view.scale) / 2;
    view.y = (height + spanY * view.scale) / 2 - view.scale;
    draw(); show();
  }
  function resize() {
    const box = stage.getBoundingClientRect(), dense = window.devicePixelRatio || 1, first = !width;
    const middle = [(width / 2 - view.x) / view.scale, (height / 2 - view.y) / view.scale];
    [width, height] = [Math.max(1, box.width), Math.max(1, box.height)];
    plot.width = Math.round(width * dense); plot.height = Math.round(height * dense);
    pen.setTransform(dense, 0, 0, dense, 0, 0);
    if (first || untouched) return fit();
    view.x = width / 2 - middle[0] * view.scale; view.y = height / 2 - middle[1] * view.scale;
    draw();
  }
  function draw() { if (!asked) { asked = true; requestAnimationFrame(paint); } }

  const sheets = [];
  function sheet(number) { // decoded when first wanted
    if (!sheets[number]) {
      const image = new Image();
      image.onload = () => { image.ready = true; draw(); show(); };
      image.src = facts.sheets.kind + text("sheet-" + number);
      sheets[number] = image;
    }
    return sheets[number];
  }
  const slots = facts.sheets.rows ? new Map([...new Uint32Array(bytes("rows").buffer)].map((row, slot) => [row, slot])) : null;
  function picture(target, i, x, y, size) { // false until it is decoded, or if there is none
    const { size: side, across, each } = facts.sheets;
    const slot = !side ? undefined : slots ? slots.get(i) : i;
    if (slot === undefined) return false;
    const image = sheet(Math.floor(slot / each)), place = slot % each;
    if (!image.ready) return false;
    target.drawImage(image, (place % across) * side, Math.floor(place / across) * side, side, side, x, y, size, size);
    return true;
  }

  function paint() {
    asked = false;
    const held = column(chosen), style = getComputedStyle(document.documentElement);
    pen.clearRect(0, 0, width, height);
    const left = -view.x / view.scale, top = -view.y / view.scale, right = left + width / view.scale, bottom = top + height / view.scale;
    let seen = count;
    if (view.scale > 1.5 * fitted) { seen = 0; within(left, top, right, bottom, () => seen++); }
    const grown = Math.sqrt(view.scale / fitted), dot = Math.min(7, Math.max(1.1, 55 / Math.sqrt(count)) * grown);
    const colours = held ? held.colours : [facts.palette[0]];
    for (let part = 0; part < 8; part++) {
      const from = Math.floor((part * count) / 8), to = Math.floor(((part + 1) * count) / 8), places = [];
      for (let at = from; at < to; at++) {
        const i = order[at], x = sx(i), y = sy(i);
        if (x < -dot || y < -dot || x > width + dot || y > height + dot) continue;
        const code = held ? held.codes[i] : 0, colour = Math.min(code, colours.length - 1);
        (places[colour] ||= []).push(x, y);
      }
      places.forEach((list, colour) => {
        pen.globalAlpha = only >= 0 && only !== colour ? 0.08 : 0.82;
        pen.fillStyle = colours[colour];
        if (list.length > 4000 || dot < 1.3) {
          for (let k = 0; k < list.length; k += 2) pen.fillRect(list[k] - dot, list[k + 1] - dot, 2 * dot, 2 * dot);
          return;
        }
        pen.beginPath();
        for (let k = 0; k < list.length; k += 2) { pen.moveTo(list[k] + dot, list[k + 1]); pen.arc(list[k], list[k + 1], dot, 0, 6.2832); }
        pen.fill();
      });
    }
    pen.globalAlpha = 1;
    if (facts.sheets.size && seen <= facts.closeUp) closeUp(left, top, right, bottom, held, colours);
    if (pointed >= 0) {
      pen.lineWidth = 2; pen.strokeStyle = style.getPropertyValue("--mark");
      pen.beginPath(); pen.arc(sx(pointed), sy(pointed), dot + 4, 0, 6.2832); pen.stroke();
    }
  }
  function closeUp(left, top, right, bottom, held, colours) { // few points are in sight: their pictures, where they are
    const side = Math.min(64, Math.max(32, facts.sheets.size)), taken = [];
    within(left, top, right, bottom, (i) => {
      const x = sx(i), y = sy(i), colour = held ? Math.min(held.codes[i], colours.length - 1) : 0;
      if (only >= 0 && only !== colour) return;
      if (taken.some(([a, b]) => Math.max(Math.abs(a - x), Math.abs(b - y)) < side * 0.6)) return;
      pen.fillStyle = colours[colour];
      pen.fillRect(x - side / 2 - 2, y - side / 2 - 2, side + 4, side + 4);
      if (picture(pen, i, x - side / 2, y - side / 2, side)) taken.push([x, y]);
    });
  }

  let names = null;
  function show() {
    card.hidden = pointed < 0 || sx(pointed) < 0 || sy(pointed) < 0 || sx(pointed) > width || sy(pointed) > height;
    if (card.hidden) return;
    names ||= JSON.parse(text("names"));
    const small = card.querySelector("canvas"), brush = small.getContext("2d");
    small.hidden = !picture(brush, pointed, 0, 0, 128);
    const title = typeof names[pointed] === "number" ? "image " + names[pointed] : names[pointed];
    card.querySelector("b").textContent = title;
    const told = facts.columns.map((each, number) => each.title + ": " + worth(each, number, pointed));
    card.querySelector("div").replaceChildren(...told.flatMap((line) => [line, document.createElement("br")]));
    said.textContent = [title, ...told].join(", ");
    const x = sx(pointed), y = sy(pointed), wide = card.offsetWidth, high = card.offsetHeight;
    card.style.left = Math.max(4, Math.min(width - wide - 4, x + 16 + wide > width ? x - wide - 16 : x + 16)) + "px";
    card.style.top = Math.max(4, Math.min(height - high - 4, y - high / 2)) + "px";
  }
  function point(i) { if (i !== pointed) { pointed = i; show(); draw(); } }
  function nearest(x, y, reach) {
    const u = (x - view.x) / view.scale, v = (y - view.y) / view.scale, r = reach / view.scale;
    let best = -1, least = r * r;
    within(u - r, v - r, u + r, v + r, (i) => {
      const held = column(chosen);
      if (only >= 0 && held && Math.min(held.codes[i], held.colours.length - 1) !== only) return;
      const d = (xs[i] - u) ** 2 + (ys[i] - v) ** 2;
      if (d <= least) { least = d; best = i; }
    });
    return best;
  }
  function zoom(factor, x = pinned ? sx(pointed) : width / 2, y = pinned ? sy(pointed) : height / 2) {
    untouched = false;
    const scale = Math.min(fitted * 4000, Math.max(fitted * 0.5, view.scale * factor)), ratio = scale / view.scale;
    view.x = x - (x - view.x) * ratio; view.y = y - (y - view.y) * ratio; view.scale = scale;
    draw(); show();
  }
  function move(dx, dy) { untouched = false; view.x += dx; view.y += dy; draw(); show(); }

  // Mouse, pen and fingers: one drags, two pinch, a tap or click keeps the image under it.
  const down = new Map();
  let moved = 0, span = 0;
  const place = (event) => { const box = plot.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  plot.addEventListener("pointerdown", (event) => {
    plot.setPointerCapture(event.pointerId); down.set(event.pointerId, place(event));
    moved = down.size > 1 ? 99 : 0; span = 0;
  });
  plot.addEventListener("pointermove", (event) => {
    const [x, y] = place(event), before = down.get(event.pointerId);
    if (!before) { if (!pinned && event.pointerType !== "touch") point(nearest(x, y, 14)); return; }
    down.set(event.pointerId, [x, y]);
    const all = [...down.values()];
    moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
    if (moved > 4) plot.classList.add("dragging");
    if (moved > 4) move((x - before[0]) / all.length, (y - before[1]) / all.length);
    if (all.length === 2) {
      const now = Math.hypot(all[0][0] - all[1][0], all[0][1] - all[1][1]);
      if (span) zoom(now / span, (all[0][0] + all[1][0]) / 2, (all[0][1] + all[1][1]) / 2);
      span = now;
    }
  });
  const lifted = (event) => {
    if (!down.delete(event.pointerId)) return;
    plot.classList.remove("dragging"); span = 0;
    if (event.type === "pointerup" && moved <= 4) {
      const found = nearest(...place(event), event.pointerType === "touch" ? 28 : 14);
      pinned = found >= 0; point(found);
    }
  };
  plot.addEventListener("pointerup", lifted); plot.addEventListener("pointercancel", lifted);
  plot.addEventListener("pointerleave", () => { if (!pinned && !down.size) point(-1); });
  plot.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...place(event));
  }, { passive: false });
  plot.addEventListener("dblclick", (event) => zoom(2, ...place(event)));

  // From image to image: all of them from the middle of the view outwards.
  let path = null, step = -1;
  function walk(by) {
    if (!path || step < 0) {
      const u = (width / 2 - view.x) / view.scale, v = (height / 2 - view.y) / view.scale;
      const far = Float32Array.from(xs, (x, i) => (x - u) ** 2 + (ys[i] - v) ** 2);
      const held = column(chosen), wanted = only < 0 ? () => true : (i) => Math.min(held.codes[i], held.colours.length - 1) === only;
      path = Uint32Array.from(order.filter(wanted)).sort((a, b) => far[a] - far[b] || a - b);
    }
    if (!path.length) return;
    step = Math.max(0, Math.min(path.length - 1, step + by));
    pinned = true; point(path[step]);
    const x = sx(pointed), y = sy(pointed);
    if (x < 0 || y < 0 || x > width || y > height) { move(width / 2 - x, height / 2 - y); }
  }
  const stop = () => { pinned = false; step = -1; path = null; point(-1); };
  const keys = {
    ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60), ArrowDown: () => move(0, -60),
    "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), "0": fit,
    n: () => walk(1), p: () => walk(-1), Escape: stop,
    c: () => { if (facts.columns.length) { select.selectedIndex = (select.selectedIndex + 1) % select.length; recolour(); } },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ["SELECT", "BUTTON"].includes(event.target.tagName) && event.key !== "Escape") return;
    const act = keys[event.key] || keys[event.key.toLowerCase()];
    if (act) { event.preventDefault(); act(); }
  });
  document.getElementById("closer").onclick = () => zoom(1.6);
  document.getElementById("farther").onclick = () => zoom(1 / 1.6);
  document.getElementById("whole").onclick = fit;

  function recolour() {
    chosen = select.selectedIndex; only = -1; path = null; step = -1;
    const held = column(chosen);
    legend.replaceChildren();
    if (held && held.kinds) {
      [...held.kinds, "unknown"].forEach((kind, code) => {
        if (!held.counts[code]) return;
        const button = document.createElement("button"), [dot, name, many] = ["i", "span", "small"].map((tag) => document.createElement(tag));
        dot.style.background = held.colours[code]; name.textContent = name.title = kind; many.textContent = held.counts[code].toLocaleString("en");
        button.append(dot, name, many); button.setAttribute("aria-pressed", "false");
        button.onclick = () => {
          only = only === code ? -1 : code; path = null; step = -1;
          for (const each of legend.querySelectorAll("button")) each.setAttribute("aria-pressed", String(each === button && only === code));
          draw();
        };
        legend.append(button);
      });
      if (held.kinds.length > facts.palette.length) legend.append("Colours repeat after " + facts.palette.length + " kinds.");
    } else if (held) {
      const ramp = document.createElement("div"), ends = document.createElement("div");
      ramp.className = "ramp"; ramp.style.background = "linear-gradient(90deg," + facts.ramp.join(",") + ")";
      ends.className = "ends";
      for (const end of held.ends) { const one = document.createElement("span"); one.textContent = String(+end.toPrecision(4)); ends.append(one); }
      legend.append(ramp, ends);
    }
    draw(); show();
  }
  for (const each of facts.columns) select.add(new Option(each.title));
  if (!facts.columns.length) document.querySelector("aside").hidden = true;
  select.onchange = recolour;
  new ResizeObserver(resize).observe(stage);
  resize(); recolour(); paint();
  document.documentElement.dataset.ready = performance.now().toFixed(0); // milliseconds from the beginning of the load
})();
