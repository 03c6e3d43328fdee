"use strict";
// Words that others wrote (names, problems) are set as text, never as markup.
const STATES = {
  ok: ["ok", "answers", ""], path_mtu: ["warn", "small packets only", "m"], unreachable: ["bad", "does not answer", "x"],
  refused: ["bad", "this node's kernel does not send there", "!"], silent: ["none", "has never answered", "?"],
  untried: ["none", "not tried", "?"], unknown: ["none", "not known: its agent was not asked, or did not answer", "?"],
};
const DRAWN = 12;
const byId = (id) => document.getElementById(id);
function make(name, attributes, ...children) {
  const space = ["svg", "g", "path", "circle", "text", "title", "defs", "marker"].includes(name) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const made = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes || {})) if (value !== undefined && value !== null) made.setAttribute(key, value);
  for (const child of children.flat()) made.append(child);
  return made;
}
const rtt = (us) => (us === null || us === undefined ? "" : us >= 1000 ? `${(us / 1000).toFixed(1)} ms` : `${us} µs`);
const stateOf = (pair) => STATES[pair ? pair[2] : "unknown"] || STATES.unknown;

let data = null, pairs = new Map(), chosen = null;
const live = location.protocol.startsWith("http");
const query = () => new URLSearchParams(location.search).get("token") || "";

function load(found) {
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.key : "";
  data = found;
  pairs = new Map(found.pairs.map((pair) => [`${pair[0]}/${pair[1]}`, pair]));
  header(); picture(); worst(); problems(); refused(); range(); skew(); mends(); names();
  const box = byId("details");
  if (chosen && !box.contains(document.activeElement) && !box.querySelector("[role=status] *")) chosen();
  const again = focused ? document.querySelector(`[data-key="${focused}"]`) : null;
  if (again) again.focus();  // the picture is another, who uses the keyboard stays where he was
}

function header() {
  const nodes = data.nodes, asked = nodes.filter((node) => node.asked === "answered").length;
  document.title = `overlay: ${data.network.prefix || "no network"}`;
  byId("title").textContent = `${data.network.prefix || "no network config yet"}, ${nodes.length} node${nodes.length === 1 ? "" : "s"}`;
  const facts = [["seen from", data.from], ["at", data.made_at], ["agents that answered", `${asked} of ${data.shown.length} asked`]];
  for (const [state, count] of Object.entries(data.counts)) facts.push([`${data.from}: ${(STATES[state] || STATES.unknown)[1]}`, count]);
  byId("facts").replaceChildren(...facts.map(([what, value]) => make("li", {}, `${what} `, make("b", {}, String(value)))));
}

function pairText(from, to) {
  const pair = pairs.get(`${from}/${to}`), one = data.nodes[from], other = data.nodes[to];
  const parts = [`${one.name} to ${other.name}: ${stateOf(pair)[1]}`];
  if (pair && pair[3] !== null && pair[3] !== undefined) parts.push(rtt(pair[3]));
  if (pair && pair[2] === "ok" && one.mtu) parts.push(`MTU ${one.mtu}`);
  if (pair && pair[4]) parts.push(`${Math.round(pair[4] * 100)} % lost`);
  return parts.join(", ");
}

// --- the picture

function picture() {
  const box = byId("picture"), shown = data.shown;
  byId("columns").classList.toggle("wide", shown.length > 40);
  byId("legend").textContent = shown.length <= DRAWN
    ? "Each line is one direction, as its first node says: whole, it answers; long dashes, small packets only; short dashes, it does not; dots, not known. Choose one for what was found."
    : `Each cell is one direction: the row's node says how the column's answers${data.nodes.length > shown.length ? ` (${shown.length} of ${data.nodes.length} nodes are shown)` : ""}. Arrow keys move.`;
  box.replaceChildren(shown.length <= DRAWN ? drawing(shown) : heat(shown));
}

function drawing(shown) {
  const size = 640, middle = size / 2, radius = shown.length === 1 ? 0 : 235;
  const at = shown.map((_, place) => {
    const angle = (place / shown.length) * 2 * Math.PI - Math.PI / 2;
    return [middle + radius * Math.cos(angle), middle + radius * Math.sin(angle)];
  });
  const svg = make("svg", { viewBox: `0 0 ${size} ${size}`, role: "group", "aria-label": "nodes, and how they reach each other" });
  shown.forEach((from, i) => shown.forEach((to, j) => {
    if (i === j) return;
    const [x1, y1] = at[i], [x2, y2] = at[j], dx = x2 - x1, dy = y2 - y1, length = Math.hypot(dx, dy);
    const bend = 26, cx = (x1 + x2) / 2 - (dy / length) * bend, cy = (y1 + y2) / 2 + (dx / length) * bend;
    const cut = 40 / length, path = `M${x1 + dx * cut} ${y1 + dy * cut} Q${cx} ${cy} ${x2 - dx * cut} ${y2 - dy * cut}`;
    const pair = pairs.get(`${from}/${to}`), label = pairText(from, to);
    const edge = make("g", { tabindex: 0, role: "button", "aria-label": label, "data-key": `p${from}-${to}` },
      make("title", {}, label), make("path", { class: "hit", d: path }), make("path", { class: `edge ${stateOf(pair)[0]}`, d: path }),
      make("text", { x: (cx + (x1 + dx * 0.35)) / 2, y: (cy + (y1 + dy * 0.35)) / 2, "text-anchor": "middle", "aria-hidden": "true" }, pair && pair[2] === "ok" ? rtt(pair[3]) : ""));
    press(edge, () => choosePair(from, to));
    svg.append(edge);
  }));
  shown.forEach((number, i) => {
    const node = data.nodes[number], [x, y] = at[i], wrong = (node.problems || []).length;
    const label = `${node.name}, ${node.subnet || "no subnet"}: ${node.asked === "answered" ? `${wrong} problem${wrong === 1 ? "" : "s"}` : node.asked}`;
    const group = make("g", { tabindex: 0, role: "button", "aria-label": label, "data-key": `n${number}` }, make("title", {}, label), make("circle", { class: "node", cx: x, cy: y, r: 34 }),
      make("text", { x, y: y + 1, "text-anchor": "middle", "aria-hidden": "true" }, node.name.length > 10 ? `${node.name.slice(0, 9)}…` : node.name),
      make("text", { x, y: y + 17, "text-anchor": "middle", "aria-hidden": "true" }, node.asked !== "answered" ? "not asked" : wrong ? `${wrong} !` : ""));
    press(group, () => chooseNode(number));
    svg.append(group);
  });
  return svg;
}

function heat(shown) {
  const order = [...shown].sort((a, b) => data.nodes[a].group.localeCompare(data.nodes[b].group) || a - b);
  const grid = make("div", { class: "heat", role: "grid", "aria-label": "who reaches whom", "aria-rowcount": order.length, style: `grid-template-columns: repeat(${order.length}, 12px)` });
  order.forEach((from, i) => {
    const row = make("div", { role: "row", style: "display: contents" });
    order.forEach((to, j) => {
      const pair = pairs.get(`${from}/${to}`), state = stateOf(pair), self = from === to;
      const label = self ? data.nodes[from].name : pairText(from, to);
      const button = make("button", { role: "gridcell", type: "button", class: self ? "self" : state[0], tabindex: i + j ? -1 : 0, "aria-label": label, title: label, "data-at": `${i}/${j}`, "data-key": `c${i}-${j}` }, self ? "" : state[2]);
      button.onclick = () => (self ? chooseNode(from) : choosePair(from, to));
      row.append(button);
    });
    grid.append(row);
  });
  grid.onkeydown = (event) => {
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!steps || !event.target.dataset.at) return;
    const [i, j] = event.target.dataset.at.split("/").map(Number);
    const next = grid.querySelector(`[data-at="${i + steps[0]}/${j + steps[1]}"]`);
    if (next) { event.target.tabIndex = -1; next.tabIndex = 0; next.focus(); event.preventDefault(); }
  };
  const groups = [...new Set(order.map((number) => data.nodes[number].group))];
  return make("div", {}, make("p", { class: "dim" }, `in the order of their zones, or else underlay networks: ${groups.slice(0, 8).join(", ")}${groups.length > 8 ? ", …" : ""}`), grid);
}

function press(element, act) {
  element.addEventListener("click", act);
  element.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); act(); } });
}

// --- details

function choosePair(from, to) {
  chosen = () => details([[from, to], [to, from]].flatMap(([one, other]) => oneWay(one, other)), from, to);
  chosen();
}

function oneWay(from, to) {
  const pair = pairs.get(`${from}/${to}`), [color, words] = stateOf(pair), node = data.nodes[from];
  const lines = [make("h3", {}, `${node.name} to ${data.nodes[to].name}`), make("p", { class: color }, pairText(from, to))];
  if (pair && pair[5] && pair[2] !== "ok") lines.push(make("p", {}, pair[5]));
  if (!pair) lines.push(make("p", { class: "dim" }, node.why || (node.asked === "answered" ? words : `${node.name} was not asked`)));
  const near = (node.problems || []).map((problem) => `${problem.subject}: ${problem.text} (since ${problem.since})`);
  if (near.length) lines.push(make("p", {}, `${node.name} says of itself:`), make("ul", {}, near.map((line) => make("li", {}, line))));
  return lines;
}

function details(lines, from, to) {
  const box = byId("details");
  box.replaceChildren(...lines);
  if (from === undefined) return;
  const one = data.nodes[from], other = data.nodes[to];
  const command = `overlay check ${other.name}; overlay trace POD POD`;
  box.append(make("p", { class: "dim" }, `on ${one.name}: `, make("code", {}, command)));
  if (!live) return;
  const form = make("form", {}, make("label", {}, `a pod of ${one.name}`, make("input", { name: "source", required: "", placeholder: aPod(one.subnet) })),
    make("label", {}, `a pod of ${other.name}`, make("input", { name: "destination", required: "", placeholder: aPod(other.subnet) })), make("button", {}, "trace"));
  const out = make("div", { role: "status" });
  form.onsubmit = (event) => { event.preventDefault(); traced(out, form.source.value, form.destination.value); };
  const ladder = make("button", { type: "button" }, "ask both now"), rungs = make("div", { role: "status" });
  ladder.onclick = () => asked(rungs, [[one, other], [other, one]]);
  box.append(ladder, rungs, form, out);
}

async function fetched(path, words) {
  const answer = await fetch(`${path}?${new URLSearchParams({ ...words, token: query() })}`);
  return answer.json();
}

async function asked(out, directions) {
  out.replaceChildren(make("p", { class: "dim" }, "probes are on their way…"));
  const parts = await Promise.all(directions.map(async ([one, other]) => {
    const found = await fetched("check.json", { source: one.subnet, destination: other.subnet });
    const head = make("h3", {}, `${one.name} asks ${other.name}`);
    if (found.error) return [head, make("p", { class: "bad" }, found.error)];
    const rows = found.probes.map((each) => [each.name, each.address, each.refused || `${each.answered} of ${each.sent}`, rtt(each.rtt_us)]);
    const says = [...found.look_ups, ...found.far_side, found.remedy].filter(Boolean);
    return [head, table(["probe", "to", "answered", "RTT"], rows, found.probes.map((each) => (each.answered ? "ok" : "bad"))),
      make("p", { class: found.state === "ok" ? "ok" : "bad" }, found.verdict), make("ul", {}, says.map((line) => make("li", {}, line)))];
  }));
  out.replaceChildren(...parts.flat());
}

// An address that a pod can have, of either family.
function aPod(subnet) {
  return subnet.includes(":") ? subnet.replace(/\/\d+$/, "2") : subnet.replace(/\.\d+\/\d+$/, ".2");
}

async function traced(out, source, destination) {
  out.replaceChildren(make("p", { class: "dim" }, "probes are on their way…"));
  const found = await fetched("trace.json", { source, destination });
  if (found.error) { out.replaceChildren(make("p", { class: "bad" }, found.error)); return; }
  const round = found.rounds.find((each) => each.verdict !== "delivered") || found.rounds[found.rounds.length - 1];
  const steps = round.steps.filter((step) => !step.of_the_answer);
  const last = steps.reduce((best, step, place) => (step.counted ? place : best), -1);
  out.replaceChildren(make("p", { class: found.verdict === "delivered" ? "ok" : "bad" }, found.text), make("ul", {}, [...found.because, ...found.notes].map((line) => make("li", {}, line))),
    make("ol", { class: "way" }, steps.map((step, place) => make("li", { class: step.counted ? "ok" : place > last ? "bad" : "dim" }, `${step.node}: ${step.step} — ${step.counted} of ${round.sent}`))));
}

function chooseNode(number) {
  chosen = () => {
    const node = data.nodes[number], rows = [["public IP", node.public_ip], ["subnet", node.subnet], ["version", node.version], ["ready", node.ready === undefined ? undefined : node.ready ? "yes" : "no"],
      ["MTU", node.mtu], ["up for", node.uptime_s === undefined ? undefined : `${Math.round(node.uptime_s / 60)} min`], ["asked", node.asked === "answered" ? undefined : `${node.asked}${node.why ? `: ${node.why}` : ""}`], ["from here", node.from_here]];
    const lines = [make("h3", {}, node.name), table(["", ""], rows.filter(([, value]) => value !== undefined && value !== ""))];
    const now = (node.problems || []).map((each) => [each.since, "now", each.subject, each.text]);
    const past = (node.history || []).map((each) => [each.since, each.until, each.subject, each.text]).reverse();
    lines.push(make("h3", {}, "history"), now.length + past.length ? table(["since", "until", "problem", "what"], [...now, ...past]) : make("p", { class: "dim" }, "nothing since its agent started, as far as it was asked"));
    details(lines);
  };
  chosen();
}

function table(heads, rows, classes) {
  const head = heads.some(Boolean) ? [make("thead", {}, make("tr", {}, heads.map((each) => make("th", { scope: "col" }, each))))] : [];
  return make("table", {}, ...head, make("tbody", {}, rows.map((row, place) => make("tr", { class: classes ? classes[place] : undefined }, row.map((each) => (each instanceof Node ? make("td", {}, each) : make("td", {}, String(each))))))));
}
const nothing = (text) => make("p", { class: "dim" }, text);

// --- beside it

function worst() {
  byId("worst-s").hidden = !data.worst.length;
  byId("worst").replaceChildren(table(["node", "subnet", "what", "said by"], data.worst.map((each) => [choice(each.name, each.place), each.subnet, each.text, `${each.said_by.length}: ${each.said_by.slice(0, 3).join(", ")}`])));
}

function choice(name, place) {
  if (place === null || place === undefined) return document.createTextNode(name);
  const button = make("button", { type: "button" }, name);
  button.onclick = () => chooseNode(place);
  return button;
}

function problems() {
  const rows = data.problems.map((each) => [each.node, each.subject, each.text, each.since]);
  byId("problems").replaceChildren(rows.length ? table(["node", "problem", "what", "since"], rows) : nothing(`none of ${data.nodes.filter((node) => node.asked === "answered").length} agents that were asked says that anything is wrong`));
}

function refused() {
  const rows = data.refused.map((each) => [each.key, each.reason, String(each.said_by.length)]);
  byId("refused").replaceChildren(rows.length ? table(["record", "why", "nodes"], rows) : nothing("none"));
}

function range() {
  const { subnets, taken } = data.network, share = subnets ? Math.round((taken / subnets) * 100) : 0;
  const cells = Math.min(subnets, 512), each = subnets / Math.max(cells, 1);
  const parts = [make("p", {}, `${taken} of ${subnets} subnets are taken (${share} %)`), make("meter", { min: 0, max: subnets || 1, value: taken, "aria-label": "subnets taken" })];
  const base = (text) => text.split("/")[0].split(".").reduce((sum, part) => sum * 256 + Number(part), 0);
  if (data.network.prefix && cells) {
    const first = base(data.network.prefix), step = 2 ** (32 - data.network.subnet_len), there = new Map();
    for (const node of data.nodes) if (node.subnet) { const cell = Math.min(cells - 1, Math.floor(((base(node.subnet) - first) / step) / (each * (subnets + 1) / subnets))); there.set(cell, [...(there.get(cell) || []), `${node.subnet} ${node.name}`]); }
    parts.push(make("div", { class: "map", "aria-hidden": "true" }, Array.from({ length: cells }, (_, cell) => make("i", { class: there.has(cell) ? "taken" : undefined, title: (there.get(cell) || ["free"]).slice(0, 4).join(", ") }))));
  }
  byId("range").replaceChildren(...parts);
}

function skew() {
  const line = (what, those) => [what, Object.entries(those).map(([value, who]) => `${value}: ${who.length} (${who.slice(0, 3).join(", ")}${who.length > 3 ? ", …" : ""})`).join("; ")];
  const more = [data.versions, data.configs, data.mtus].some((each) => Object.keys(each).length > 1);
  const rows = [line("version", data.versions), line("network config", data.configs), line("MTU of pods", data.mtus)];
  const others = data.nodes.filter((node) => node.asked === "no answer").length;
  byId("skew").replaceChildren(make("p", { class: more ? "warn" : "dim" }, more ? "they are not the same everywhere" : "the same on all that answered"), table(["", ""], rows), others ? nothing(`${others} gave no answer: flannel's, older ones, or nodes that are down`) : "");
}

function mends() {
  const minutes = data.mends_per_minute, most = Math.max(1, ...minutes), total = minutes.reduce((sum, each) => sum + each, 0);
  byId("mends").replaceChildren(make("p", {}, minutes.length ? `${total} in the last ${minutes.length} minutes, of all nodes that answered` : "not counted yet: an agent counts by the minute"),
    make("div", { class: "bars", "aria-hidden": "true" }, minutes.map((count) => make("i", { style: `height: ${Math.max(1, (count / most) * 48)}px`, title: String(count) }))));
}

function names() {
  byId("names").replaceChildren(...data.nodes.map((node) => make("option", { value: node.name })));
}

byId("search").onsubmit = (event) => {
  event.preventDefault();
  const find = (text) => data.nodes.findIndex((node) => [node.name, node.public_ip, node.subnet].includes(text) || (node.subnet && node.subnet.endsWith(".0/24") && text.startsWith(node.subnet.slice(0, -4)) && /^[\d.]+$/.test(text)));
  const form = event.target, [from, to] = [form.from.value.trim(), form.to.value.trim()].map(find);
  if (from < 0 || to < 0) details([make("p", { class: "bad" }, `no node has ${from < 0 ? form.from.value : form.to.value}: a name, a public IP, a subnet, or a pod's address`)]);
  else if (from === to) chooseNode(from);
  else choosePair(from, to);
};

load(JSON.parse(byId("data").textContent));
if (live) setInterval(async () => {
  try { const answer = await fetch(`data.json?token=${encodeURIComponent(query())}`); if (answer.ok) load(await answer.json()); } catch (error) { /* the agent restarts */ }
}, 5000);
