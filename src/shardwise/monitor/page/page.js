"use strict";

const PHASES = ["data", "forward", "backward", "synchronisation", "optimizer", "other"];
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
let source = null;
let shownEvents = { run: null, last: "" };

function make(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  const most = Number.isInteger(value) || digits === 0 ? 1e15 : 1e6; // counts are written out
  if (size !== 0 && (size < 1e-3 || size >= most)) return value.toExponential(Math.max(1, digits - 2));
  return value.toLocaleString("en", { maximumFractionDigits: size >= 100 ? 0 : digits });
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${number(value * 1e3, 2)} ms`;
  if (value < 120) return `${number(value, 1)} s`;
  const whole = Math.round(value);
  return whole < 7200 ? `${Math.floor(whole / 60)} min` : `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

function bytes(value) {
  if (value === null || value === undefined) return "–";
  let unit = 0;
  while (value >= 1024 && unit < 4) { value /= 1024; unit += 1; }
  return `${number(value, 1)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

const percent = (value) => `${Math.round(100 * value)} %`;
const progress = (run) => {
  if (run.sweep) return `${number(run.sweep.ended)} of ${number(run.sweep.trials)} trials`;
  return run.total_steps ? `${number(run.step)} of ${number(run.total_steps)}` : number(run.step);
};
const best = (sweep) => (sweep.best === null ? "" : `, best is trial ${sweep.best} with ${sweep.metric} ${number(sweep.best_value, 4)}`);

function table(target, caption, columns, rows) {
  const head = make("tr");
  for (const column of columns) head.append(make("th", column, { scope: "col" }));
  const thead = make("thead");
  thead.append(head);
  const tbody = make("tbody");
  for (const cells of rows) {
    const row = make("tr");
    cells.forEach((cell, index) => {
      const box = index === 0 ? make("th", undefined, { scope: "row" }) : make("td");
      if (cell instanceof Node) box.append(cell); else box.textContent = cell;
      if (index > 0 && typeof cell === "string" && cell.length > 40) box.className = "wide";
      row.append(box);
    });
    tbody.append(row);
  }
  target.replaceChildren(thead, tbody);
  target.setAttribute("aria-label", caption);
}

// The button that has the focus keeps it when its table is built anew.
function keepingFocus(change) {
  const id = document.activeElement && document.activeElement.id;
  change();
  if (id && document.activeElement.id !== id && byId(id)) byId(id).focus();
}

function showRuns(view) {
  byId("runs-section").hidden = view.runs.length < 2;
  if (view.runs.length < 2) return;
  const names = Object.keys(view.differing);
  const metrics = [...new Set(view.runs.flatMap((run) => Object.keys(run.metrics)))];
  const columns = ["run", "status", "plan", "step", "loss", ...metrics.map((name) => `test ${name}`), "samples/s", "step time", ...names];
  const rows = view.runs.map((run, index) => {
    const button = make("button", run.path, { id: `choose ${run.path}`, type: "button", "aria-pressed": String(run.path === view.run.path) });
    button.addEventListener("click", () => connect(run.path));
    return [button, make("span", run.status, { class: `status ${run.status}` }), run.plan, progress(run),
      number(run.loss), ...metrics.map((name) => number(Object.hasOwn(run.metrics, name) ? run.metrics[name] : null)), number(run.samples_per_second, 0),
      seconds(run.step_seconds), ...names.map((name) => String(view.differing[name][index] ?? "–"))];
  });
  keepingFocus(() => table(byId("runs"), "Runs, the latest first, with the settings in which they differ", columns, rows));
}

function showNumbers(run) {
  const predicted = run.predicted || {};
  const ratio = predicted.step_seconds && run.step_seconds ? ` (${number(run.step_seconds / predicted.step_seconds, 2)} of predicted)` : "";
  const most = Math.max(0, ...run.rank_rows.map((row) => row.peak_memory_bytes));
  const items = [
    ["loss", number(run.loss)],
    ...Object.entries(run.objectives || {}).map(([name, value]) => [`loss ${name}`, number(value)]),
    ...Object.entries(run.metrics).map(([name, value]) => [`test ${name}`, number(value)]),
    ["samples per second", number(run.samples_per_second, 0)],
    ["step time", seconds(run.step_seconds) + ratio],
    ["predicted step time", predicted.step_seconds ? seconds(predicted.step_seconds) : null],
    ["memory, fullest rank", most ? bytes(most) + (predicted.memory_bytes ? ` (predicted ${bytes(predicted.memory_bytes)})` : "") : null],
    ["gradient norm", run.gradient_norm === null ? null : number(run.gradient_norm)],
    ["learning rate", run.learning_rates.length ? [...new Set(run.learning_rates)].map((rate) => number(rate, 6)).join(", ") : null],
    ["epochs done", number(run.epoch)],
    ["plan", `${run.plan || "–"} on ${run.device || "?"}`],
    ["lines left out", run.skipped_lines ? number(run.skipped_lines) : null],
  ];
  byId("numbers").replaceChildren(...items.filter((item) => item[1] !== null).map(([name, value]) => {
    const box = make("div");
    box.append(make("dt", name), make("dd", value));
    return box;
  }));
}

function chart(name, points) {
  const width = 360, height = 170, left = 48, bottom = 20, top = 8;
  const figure = make("figure");
  const title = make("h3", name);
  const last = points[points.length - 1];
  const low = Math.min(...points.map((point) => point[2])), high = Math.max(...points.map((point) => point[3]));
  const first = points[0][0], end = last[0];
  const x = (step) => left + ((step - first) / (end - first || 1)) * (width - left - 8);
  const y = (value) => top + (1 - (value - low) / (high - low || 1)) * (height - top - bottom);
  const words = `${name} against steps: now ${number(last[1])} at step ${number(last[0] + 1)}, lowest ${number(low)}, highest ${number(high)}`;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words });
  svg.append(draw("line", { class: "axis", x1: left, y1: height - bottom, x2: width, y2: height - bottom }));
  svg.append(draw("line", { class: "axis", x1: left, y1: top, x2: left, y2: height - bottom }));
  svg.append(draw("text", { x: left - 4, y: top + 8, "text-anchor": "end" }, number(high, 3)));
  svg.append(draw("text", { x: left - 4, y: height - bottom, "text-anchor": "end" }, number(low, 3)));
  svg.append(draw("text", { x: left, y: height - 5 }, `step ${number(first + 1)}`));
  svg.append(draw("text", { x: width - 2, y: height - 5, "text-anchor": "end" }, number(end + 1)));
  const upper = points.map((point) => `${x(point[0])},${y(point[3])}`);
  const lower = points.map((point) => `${x(point[0])},${y(point[2])}`).reverse();
  svg.append(draw("polygon", { class: "band", points: [...upper, ...lower].join(" ") }));
  svg.append(draw("polyline", { class: "curve", points: points.map((point) => `${x(point[0])},${y(point[1])}`).join(" ") }));
  const details = make("details");
  details.append(make("summary", `Table of ${name}`));
  const every = Math.max(1, Math.ceil(points.length / 20));
  const body = make("table");
  const rows = points.filter((_, index) => index % every === 0 || index === points.length - 1);
  table(body, name, ["step", "mean", "lowest", "highest"], rows.map((point) => [number(point[0] + 1), ...point.slice(1).map((value) => number(value))]));
  const scroll = make("div", undefined, { class: "scroll", tabindex: "0", role: "region", "aria-label": `Table of ${name}` });
  scroll.append(body);
  details.append(scroll);
  figure.append(title, svg, details);
  return figure;
}

function showCurves(run) {
  const open = new Set([...document.querySelectorAll("#curves details[open]")].map((node) => node.dataset.name));
  const figures = Object.entries(run.curves).filter(([, points]) => points.length > 1).map(([name, points]) => {
    const figure = chart(name.replaceAll("_", " "), points);
    const details = figure.querySelector("details");
    details.dataset.name = name;
    details.open = open.has(name);
    details.querySelector("summary").id = `table of ${name}`;
    return figure;
  });
  keepingFocus(() => byId("curves").replaceChildren(...(figures.length ? figures : [make("p", "nothing to draw yet")])));
}

function showRanks(run) {
  byId("ranks-section").hidden = !run.rank_rows.length;
  if (!run.rank_rows.length) return;
  const longest = Math.max(...run.rank_rows.map((row) => row.step_ms));
  byId("bars").replaceChildren(...run.rank_rows.slice(0, 64).map((row) => {
    const line = make("div", undefined, { class: "bar" });
    const bar = make("div");
    for (const phase of PHASES) {
      const part = make("div", undefined, { class: phase });
      part.style.width = `${(100 * (row.phase_ms[phase] || 0)) / (longest || 1)}%`;
      bar.append(part);
    }
    line.append(make("span", `rank ${row.rank}`), bar);
    return line;
  }));
  byId("legend").replaceChildren(...PHASES.map((phase) => {
    const item = make("li");
    item.append(make("i", undefined, { class: phase }), phase);
    return item;
  }));
  const columns = ["rank", ...PHASES, "late", "samples", "processor", "no core", "sent a step", "memory"];
  table(byId("ranks"), "A step of each rank, in milliseconds", columns, run.rank_rows.map((row) => [`${row.rank}`,
    ...PHASES.map((phase) => number(row.phase_ms[phase], 2)), number(row.late_ms, 2), number(row.samples, 1), percent(row.cpu),
    percent(row.core_wait), bytes(row.sent_bytes), bytes(row.memory_bytes)]));
}

function showExperts(run) {
  byId("experts-section").hidden = !run.experts;
  if (!run.experts) return;
  const layers = Object.entries(run.experts.tokens);
  const most = Math.max(...layers.map(([, tokens]) => tokens.length));
  const columns = ["layer", ...Array.from({ length: most }, (_, index) => `expert ${index}`), "dropped"];
  table(byId("experts"), "Tokens of each expert", columns, layers.map(([name, tokens]) => [name,
    ...Array.from({ length: most }, (_, index) => number(tokens[index])), number(run.experts.dropped[name] || 0)]));
}

function showAlert(run) {
  const words = [run.stall && run.stall.message, run.straggler && run.straggler.message, run.message, run.error].filter(Boolean).join(" ");
  const alert = byId("alert");
  alert.hidden = !words;
  if (alert.textContent !== words) alert.textContent = words;
  byId("stall-section").hidden = !run.stall;
  if (!run.stall) return;
  byId("positions").replaceChildren(...run.stall.positions.map((position) => {
    const box = make("div");
    box.append(make("h3", `rank ${position.rank}: ${position.where || "unknown"}`), make("pre", [position.stack || []].flat().join("\n") || "no stack"));
    return box;
  }));
}

// Only new events are added, so that a screen reader reads those alone.
function showEvents(run) {
  const list = byId("events");
  const keys = run.notes.map((note) => `${note.t} ${note.kind} ${note.text}`);
  let start = 0;
  if (shownEvents.run === run.path && shownEvents.last) start = keys.lastIndexOf(shownEvents.last) + 1;
  else list.replaceChildren();
  for (const note of run.notes.slice(start)) {
    const item = make("li", undefined, note.grave ? { class: "grave" } : {});
    const when = new Date(note.t * 1e3);
    const text = note.text.startsWith(note.kind) ? note.text : `${note.kind}: ${note.text}`;
    item.append(make("time", when.toLocaleTimeString("en-GB"), { datetime: when.toISOString() }), text);
    list.prepend(item);
  }
  shownEvents = { run: run.path, last: keys[keys.length - 1] || "" };
}

function show(view) {
  byId("place").textContent = view.place;
  if (!view.run) {
    byId("run-title").textContent = "No runs yet: one appears here when a training has made its folder";
    return;
  }
  const run = view.run;
  showRuns(view);
  const title = byId("run-title");
  title.replaceChildren(`${run.path}: `, make("span", run.status, { class: `status ${run.status}` }));
  document.title = `${run.status}: ${run.path}`;
  const [done, all] = run.sweep ? [run.sweep.ended, run.sweep.trials] : [run.step, run.total_steps];
  byId("progress-line").hidden = !all;
  byId("progress").value = all ? done / all : 0;
  const left = run.left_seconds !== null && run.status === "running" ? `, ${seconds(run.left_seconds)} left`
    : run.status === "silent" ? `, no news since ${new Date(run.last * 1e3).toLocaleTimeString("en-GB")}: it was killed, hangs, or does something long between steps` : "";
  byId("progress-text").textContent = run.sweep ? `${progress(run)}${best(run.sweep)}${left}` : `step ${progress(run)}${left}`;
  showNumbers(run);
  showAlert(run);
  showCurves(run);
  showRanks(run);
  showExperts(run);
  showEvents(run);
  const settings = Object.entries(run.settings).filter(([, value]) => value !== null);
  table(byId("settings"), "Settings of this run", ["name", "value"], settings.map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : String(value)]));
}

function connect(run) {
  if (source) source.close();
  source = new EventSource(run ? `stream?run=${encodeURIComponent(run)}` : "stream");
  source.addEventListener("state", (message) => {
    if (byId("connection").textContent !== "live") byId("connection").textContent = "live";
    show(JSON.parse(message.data));
  });
  source.addEventListener("error", () => { byId("connection").textContent = "connection lost: trying again"; });
}

connect("");
