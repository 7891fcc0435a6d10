"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const at = (id) => document.getElementById(id);
const shown = (value) => value === null ? "–" : value >= 1000 ? value.toFixed(0) : value.toPrecision(3);
const fill = (select, texts) => texts.forEach((text, place) => select.append(new Option(text, place)));

// -- the table, sorted by a column: the better end first, the other one at a second click

const heads = [...document.querySelectorAll("#numbers thead th")], body = document.querySelector("#numbers tbody");

function sort(place) {
  const first = place && facts.columns[place - 1].better === "higher" ? "descending" : "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const way = heads[place].getAttribute("aria-sort") === first ? other : first, sign = way === "ascending" ? 1 : -1;
  const key = (row) => place ? facts.values[row.dataset.row][place - 1] : facts.rows[row.dataset.row].name;
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[place].setAttribute("aria-sort", way);
  body.append(...[...body.rows].sort((one, two) => {
    const a = key(one), b = key(two);
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (place ? a - b : a.localeCompare(b));
  }));
}

heads.forEach((head, place) => head.firstElementChild.addEventListener("click", () => sort(place)));
at("intervals").addEventListener("change", () => at("numbers").classList.toggle("intervals", at("intervals").checked));

// -- cost against quality

const HIGH = 400, LEFT = 52, RIGHT = 12, TOP = 14, BOTTOM = 44, LINE = 14; // pixels
const columns = facts.columns.map((one, place) => ({ ...one, place }));
const judged = columns.filter((one) => one.metric || !one.place), costs = columns.filter((one) => !one.metric && one.place);

function draw(kind, facts, text = "") {
  const one = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(facts)) one.setAttribute(name, value);
  one.textContent = text;
  at("cost").append(one);
  return one;
}

function round(low, high) { // round numbers in a range
  const ten = 10 ** Math.floor(Math.log10((high - low) / 2)), step = [1, 2, 5, 10].find((one) => (high - low) / one / ten <= 6) * ten;
  return Array.from({ length: 8 }, (_, place) => (Math.ceil(low / step) + place) * step).filter((one) => one <= high);
}

function decades(low, high) {
  const tens = Array.from({ length: 40 }, (_, place) => 10 ** (place - 20));
  const fine = tens.flatMap((one) => [one, 2 * one, 5 * one]).filter((one) => one >= low && one <= high);
  return fine.length <= 8 ? fine : tens.filter((one) => one >= low && one <= high);
}

function drawCost() {
  const up = judged[at("up").value], across = costs[at("across").value], wide = at("cost").clientWidth;
  const all = facts.rows.map((row, place) => ({ ...row, y: facts.values[place][up.place], x: facts.values[place][across.place] }));
  const there = all.filter((one) => !one.floor && one.x !== null && one.y !== null);
  at("cost").replaceChildren();
  at("cost").setAttribute("viewBox", `0 0 ${wide} ${HIGH}`);
  if (!there.length) return;
  const worse = up.better === "lower" ? 1 : -1; // the way in which y grows worse
  const floors = all.filter((one) => one.floor && one.y !== null).map((one) => one.y).sort((a, b) => worse * (a - b)).slice(0, 1);
  const ends = (values, room) => {
    const low = Math.min(...values), high = Math.max(...values), more = room * (high - low) || 0.5;
    return [low - more, high + more];
  };
  const [left, right] = ends(there.map((one) => Math.log(Math.max(one.x, 1e-4))), 0.06), [low, high] = ends([...there.map((one) => one.y), ...floors], 0.08);
  const x = (value) => LEFT + (Math.log(Math.max(value, 1e-4)) - left) / (right - left) * (wide - LEFT - RIGHT);
  const y = (value) => TOP + (worse > 0 ? value - low : high - value) / (high - low) * (HIGH - TOP - BOTTOM);
  for (const one of round(low, high)) {
    draw("line", { x1: LEFT, x2: wide - RIGHT, y1: y(one), y2: y(one), class: "axis" });
    draw("text", { x: LEFT - 6, y: y(one) + 4, "text-anchor": "end", class: "soft" }, Number(one.toPrecision(3)));
  }
  for (const one of decades(Math.exp(left), Math.exp(right))) {
    draw("line", { x1: x(one), x2: x(one), y1: TOP, y2: HIGH - BOTTOM, class: "axis" });
    draw("text", { x: x(one), y: HIGH - BOTTOM + 16, "text-anchor": "middle", class: "soft" }, Number(one.toPrecision(3)));
  }
  draw("text", { x: (LEFT + wide - RIGHT) / 2, y: HIGH - 6, "text-anchor": "middle", class: "soft" }, across.name);
  for (const one of floors) {
    draw("line", { x1: LEFT, x2: wide - RIGHT, y1: y(one), y2: y(one), class: "bar" });
    draw("text", { x: wide - RIGHT, y: y(one) - 4, "text-anchor": "end", class: "soft" }, "the best baseline");
  }
  const front = [];
  for (const one of [...there].sort((a, b) => a.x - b.x || worse * (a.y - b.y)))
    if (!front.length || worse * (one.y - front.at(-1).y) < 0) front.push(one);
  draw("path", { class: "front", d: front.map((one, place) => place ? `H${x(one.x)}V${y(one.y)}` : `M${x(one.x)} ${y(one.y)}`).join("") });
  const taken = there.map((one) => ({ x: x(one.x) - 5, y: y(one.y) - 5, width: 10, height: 10 }));
  for (const one of there.sort((a, b) => y(a.y) - y(b.y))) name(one, x(one.x), y(one.y), wide, taken);
}

function name(one, x, y, wide, taken) { // a dot and its name, where there is room for it
  const text = draw("text", {}, one.name), width = text.getComputedTextLength();
  const free = (box) => box.x >= LEFT && box.x + width <= wide && box.y >= 0 && box.y <= HIGH - BOTTOM && taken.every((other) =>
    box.x > other.x + other.width || other.x > box.x + width || box.y >= other.y + other.height || other.y >= box.y + LINE);
  const places = [0, ...[1, 2, 3, 4, 5, 6, 7, 8, 9, 10].flatMap((lines) => [-lines * LINE, lines * LINE])].flatMap((down) =>
    [x + 8, x - 8 - width, x - width / 2].slice(0, down ? 3 : 2).map((left) => ({ x: left, y: y + down - LINE / 2, width, height: LINE })));
  const box = places.find(free) || places[0], middle = box.y + LINE / 2;
  taken.push(box);
  if (Math.abs(middle - y) > LINE) draw("line", { class: "lead", x1: x, y1: y, x2: box.x > x ? box.x : Math.min(x, box.x + width), y2: middle });
  text.setAttribute("x", box.x); text.setAttribute("y", middle + 4);
  draw("circle", { cx: x, cy: y, r: 4.5 });
}

fill(at("up"), judged.map((one) => one.name));
fill(at("across"), costs.map((one) => one.name));
for (const id of ["up", "across"]) at(id).addEventListener("change", drawCost);
addEventListener("resize", drawCost);
drawCost();

// -- agreement

function drawAgreement() {
  const values = facts.agreement[at("measure").value];
  [...document.querySelector("#alike tbody").rows].forEach((row, one) => [...row.querySelectorAll("td")].forEach((cell, two) => {
    const value = values[one][two];
    cell.textContent = value === null ? "–" : value.toFixed(2).replace(/^-(0\.00)$/, "$1");
    cell.style.background = `rgba(${value > 0 ? "178, 24, 43" : "33, 102, 172"}, ${Math.abs(value) * 0.9})`;
    cell.style.color = Math.abs(value) > 0.55 ? "#fff" : "";
  }));
}

at("measure").addEventListener("change", drawAgreement);
drawAgreement();

// -- maps

function label() {
  for (const one of document.querySelectorAll("#maps .value")) {
    const of_metrics = facts.shown[one.dataset.row];
    one.textContent = at("value").value < 0 ? "" : shown(of_metrics[at("value").value][one.dataset.image]);
  }
}

fill(at("value"), facts.metrics);
at("value").append(new Option("nothing", -1));
at("value").addEventListener("change", label);
label();
at("size").value = parseFloat(getComputedStyle(at("maps")).getPropertyValue("--size"));
at("size").addEventListener("input", () => at("maps").style.setProperty("--size", `${at("size").value}rem`));
document.documentElement.dataset.ready = "yes";
