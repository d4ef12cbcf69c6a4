"use strict";
// Reads what serves and how from the server that this page came from. Texts of the server become text, never markup;
// chapters of the report are markup that the report has escaped, and no script in them could run (see the policy).

const SHOWN_S = 120; // seconds that the charts go back
const GAP_S = 5; // seconds without a sample that break a line
const WIDTH = 120, HEIGHT = 48; // of a chart's view box
const RETRY_MS = [1000, 2000, 5000, 10000];
const KEY = "autotune API key"; // its name in this tab's storage
const SVG = "http://www.w3.org/2000/svg";
const TONES = {tuned: "good", failed: "bad", stale: "bad", tuning: "doubt", "rolled back": "doubt"};
const CHARTS = [
  {title: "Tokens per second", unit: "", lines: [["", sample => sample.tokens_per_s]]},
  {title: "Requests", unit: "", lines: [["running", sample => sample.running], ["waiting", sample => sample.waiting]]},
  {title: "Time to the first token", unit: "ms", lines: quantiles("ttft_ms")},
  {title: "Time between two tokens", unit: "ms", lines: quantiles("inter_token_ms")},
];

const $ = id => document.getElementById(id);
let key = sessionStorage.getItem(KEY) || "";
let samples = [];
let known = ""; // what the overview was last read for
let chaptersOf = ""; // what the chapters were last read for; null if that failed
let failures = 0; // of reading these, one after the other
let isWatching = false;
let leaving = new AbortController(); // ends the stream when the page is left

function quantiles(name) {
  return ["p50", "p99"].map(rank => [rank, sample => sample[name] && sample[name][rank]]);
}

// Asking the server

class Denied extends Error {}

async function ask(path, options = {}) {
  const headers = {...options.headers};
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, {...options, headers, cache: "no-store"});
  if (answer.status === 401) throw new Denied(key ? "The server does not know this key." : "");
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said && said.error ? said.error.message : `the server answered ${answer.status}`);
  }
  return answer;
}

async function watch() {
  if (isWatching) return;
  isWatching = true;
  for (let failed = 0; ; failed++) {
    try {
      leaving = new AbortController();
      const answer = await ask("/autotune/events", {signal: leaving.signal});
      openUp();
      failed = 0;
      await read(answer.body);
      link("lost", "the stream ended; asking again");
    } catch (error) {
      if (error instanceof Denied) {
        isWatching = false;
        return close(error.message);
      }
      link("lost", `no connection: ${error.message}; asking again`);
    }
    await new Promise(done => setTimeout(done, RETRY_MS[Math.min(failed, RETRY_MS.length - 1)]));
  }
}

async function read(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const {done, value} = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) take(event);
  }
}

function take(event) {
  const data = JSON.parse(event.slice(event.indexOf("data: ") + 6));
  if (event.startsWith("event: history")) samples = data;
  else show(data);
}

// The key

function openUp() {
  $("door").hidden = true;
  for (const id of ["summary", "content", "foot"]) $(id).hidden = false;
  $("forget").hidden = !key;
}

function close(said) {
  for (const id of ["summary", "content", "foot"]) $(id).hidden = true;
  $("door").hidden = false;
  $("denied").textContent = said;
  link("", "locked");
  $("key").value = "";
  $("key").focus();
}

$("door").addEventListener("submit", event => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem(KEY, key);
  known = chaptersOf = "";
  watch();
});
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

// Figures as they change

function show(sample) {
  samples = samples.filter(each => each.t < sample.t && each.t > sample.t - SHOWN_S);
  samples.push(sample);
  link("up", "live");
  CHARTS.forEach(draw);
  showCounts(sample);
  showStep(sample);
  const now = JSON.stringify([sample.state, sample.transforms, sample.may, sample.lines]);
  if (now !== known) {
    known = now;
    overview().then(isRead, readLater);
  } else if (sample.state !== "tuning" && !sample.transforms.length) setText("lead", sentence(sample.detail));
}

function isRead() {
  if (failures) setText("said", "");
  failures = 0;
}

function readLater(error) {
  problem(error);
  if (error instanceof Denied) return; // all is read again with another key
  setTimeout(() => { known = ""; }, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
}

function draw(chart) {
  const latest = samples[samples.length - 1];
  const values = samples.flatMap(sample => chart.lines.map(([, of]) => of(sample))).filter(Number.isFinite);
  const top = ceiling(Math.max(0, ...values));
  chart.lines.forEach(([, of], index) => {
    const value = of(latest);
    chart.values[index].textContent = Number.isFinite(value) ? number(value) : "–";
    chart.units[index].textContent = chart.unit && Number.isFinite(value) ? chart.unit : "";
    chart.paths[index].setAttribute("d", path(samples, of, latest.t, top));
  });
  chart.top.textContent = values.length ? `${number(top)} ${chart.unit}`.trim() : "";
  chart.svg.setAttribute("aria-label", `${chart.title}, the last two minutes; at most ${number(top)} ${chart.unit}`.trim());
}

function path(samples, of, now, top) {
  let steps = "", last = null;
  for (const sample of samples) {
    const value = of(sample);
    if (!Number.isFinite(value)) { last = null; continue; }
    const x = WIDTH * (1 - (now - sample.t) / SHOWN_S), y = HEIGHT * (1 - value / top);
    steps += `${last === null || sample.t - last > GAP_S ? "M" : "L"}${x.toFixed(2)} ${y.toFixed(2)}`;
    last = sample.t;
  }
  return steps;
}

// The least round number that is not below a value.
function ceiling(value) {
  if (value <= 1) return 1;
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 5, 10].find(step => step * scale >= value) * scale;
}

function number(value) {
  if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return value.toFixed(1);
}

function showCounts(sample) {
  const {stop = 0, length = 0, deadline = 0, abort = 0} = sample.answers;
  const bypassed = Object.entries(sample.bypassed).map(([reason, count]) => `${count} (${reason})`).join(", ");
  const rows = [
    ["complete answers", stop + length],
    ["given up by clients", abort],
    ["past the deadline", deadline, true],
    ["refused, queue full", sample.refused, true],
    ["invalid requests", sample.failed["4xx"] || 0, true],
    ["server errors", sample.failed["5xx"] || 0, true],
    ["calls served by the plan", sample.served],
  ];
  if (bypassed) rows.push(["by the original", bypassed]);
  if (sample.batching) rows.push(["decoded together", sample.batching]);
  const shown = rows.filter(([, value], index) => index < 1 || value);
  $("counts").replaceChildren(...shown.map(([name, value, isBad]) => {
    const told = typeof value === "number" ? number(value) : value;
    return node("div", typeof value === "number" ? "" : "long", node("dt", "", name), node("dd", isBad ? "some" : "", told));
  }));
}

function showStep(sample) {
  const isTuning = sample.state === "tuning";
  $("tuning").hidden = !sample.step;
  $("doing").hidden = !isTuning;
  setText("tuning-title", isTuning ? "Tuning as it runs" : "How it was tuned");
  const before = $(isTuning ? "now" : "chapters"); // what is over goes to the end
  if (before.nextElementSibling !== $("tuning")) before.after($("tuning"));
  if (!sample.step) return;
  setText("step", sentence(sample.step.text));
  if (sample.step.share === null) $("share").removeAttribute("value");
  else $("share").value = sample.step.share;
}

// What changes rarely

async function overview() {
  const shown = await (await ask("/autotune")).json();
  document.title = `${shown.model}: autotune serve`;
  setText("model", shown.model);
  setText("state", shown.state);
  $("state").className = `badge ${TONES[shown.state] || ""}`;
  setText("lead", shown.lead);
  showSwitch(shown.may);
  showPlan(shown);
  showLines(shown);
  $("download").hidden = !shown.has_report;
  const of = shown.has_report ? JSON.stringify([shown.count, shown.plan.transforms]) : "";
  if (of !== chaptersOf) {
    chaptersOf = of;
    await chapters();
  }
}

function showSwitch(may) {
  $("rollback").hidden = !may.rollback;
  $("commit").hidden = !may.commit;
}

function showPlan({plan, state, tiles, watch}) {
  const count = plan.transforms.length;
  const none = state === "tuning" ? "Nothing is proven yet; the original serves." : "The original serves; there is no plan.";
  const out = "The plan does not serve now. It consists of, in this order:";
  const serves = "It serves. It consists of, in this order:";
  setText("told", !count ? none : plan.serves ? serves : out);
  $("tiles").hidden = !tiles.length;
  $("tiles").replaceChildren(...tiles.map(([title, value, compared]) => node("div", "tile",
    node("p", "muted", title), node("p", "figure", value), node("p", "muted", compared))));
  $("transforms").hidden = !count;
  $("transforms").replaceChildren(...plan.transforms.map(({name, reasons}) => node("li", "",
    code(name), ...reasons.map(reason => node("p", "", reason)))));
  setText("watch", watch && `Watch over the plan: breaker ${watch}.`);
}

function showLines({state, lines}) {
  const list = $("lines");
  const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
  list.replaceChildren(...lines.map(({at, text}) => node("li", "", node("span", "", at), node("span", "", text))));
  if (isAtEnd) list.scrollTop = list.scrollHeight;
  setText("past-title", `${lines.length} steps${state === "tuning" ? " so far" : ""}`);
  if (state === "tuning" && !$("past").dataset.opened) {
    $("past").open = true;
    $("past").dataset.opened = "yes";
  }
}

async function chapters() {
  const reading = chaptersOf !== "";
  let found = [];
  try {
    setText("drawing", reading ? "Drawing the report's charts ..." : "");
    if (reading) found = await (await ask("/autotune/chapters")).json();
  } catch (error) {
    chaptersOf = null;
    throw error;
  } finally {
    setText("drawing", "");
  }
  $("chapters").replaceChildren(...found.map(({id, title, html}) => {
    const heading = node("h2", "", title), section = node("section", "", heading);
    section.id = id;
    heading.id = `${id}-title`;
    section.setAttribute("aria-labelledby", heading.id);
    section.append(...new DOMParser().parseFromString(html, "text/html").body.childNodes);
    for (const styled of section.querySelectorAll("[data-style]")) styled.style.cssText = styled.dataset.style;
    return section;
  }));
}

// What a user may do

async function change(button, path) {
  button.disabled = true;
  setText("said", "");
  try {
    const options = {method: "POST", headers: {"Content-Type": "application/json"}, body: "{}"};
    const shown = await (await ask(path, options)).json();
    showSwitch(shown.may);
    known = "";
    setText("said", shown.plan.serves ? "The plan serves from the next request on." : "The original serves from the next request on.");
    (shown.may.commit ? $("commit") : $("rollback")).focus();
  } catch (error) {
    problem(error);
  } finally {
    button.disabled = false;
  }
}

$("rollback").addEventListener("click", event => change(event.target, "/autotune/rollback"));
$("commit").addEventListener("click", event => change(event.target, "/autotune/commit"));
$("download").addEventListener("click", async event => {
  event.target.disabled = true;
  try {
    const file = await (await ask("/autotune/report")).blob();
    const anchor = node("a", "");
    anchor.href = URL.createObjectURL(file);
    anchor.download = "report.html";
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
  } catch (error) {
    problem(error);
  } finally {
    event.target.disabled = false;
  }
});

addEventListener("pagehide", () => leaving.abort());
addEventListener("pageshow", event => event.persisted && location.reload());

// Building blocks

function node(tag, kind, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}

function code(name) { // a line may break after "(", ",", "@" or "="
  const parts = name.split(/(?<=[(,@=])/);
  return node("code", "", ...parts.flatMap((part, index) => index ? [node("wbr", ""), part] : [part]));
}

function setText(id, text) { // unchanged text is left alone: a screen reader would read it again
  if ($(id).textContent !== text) $(id).textContent = text;
}

function sentence(text) {
  return text ? `${text[0].toUpperCase()}${text.slice(1).replace(/\.+$/, "")}.` : "";
}

function link(kind, said) {
  $("link").className = `link ${kind}`;
  setText("link", said);
}

function problem(error) {
  if (error instanceof Denied) close(error.message);
  else setText("said", sentence(error.message));
}

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

for (const chart of CHARTS) {
  const figure = $("live").content.cloneNode(true).firstElementChild;
  chart.svg = figure.querySelector("svg");
  chart.top = figure.querySelector(".top");
  figure.querySelector("figcaption").textContent = chart.title;
  for (const y of [0, HEIGHT]) chart.svg.append(shape("line", {x1: 0, x2: WIDTH, y1: y, y2: y}));
  const tones = chart.lines.map((_, index) => index ? "before" : "after");
  chart.paths = tones.map(tone => shape("path", {class: tone}));
  chart.svg.append(...[...chart.paths].reverse());
  chart.values = chart.lines.map(() => node("b", "", "–"));
  chart.units = chart.lines.map(() => node("span", ""));
  figure.querySelector(".values").append(...chart.lines.map(([name], index) => {
    const key = chart.lines.length > 1 ? [node("i", `swatch ${tones[index]}`), `${name} `] : [];
    return node("span", "value", ...key, chart.values[index], " ", chart.units[index]);
  }));
  $("lives").append(figure);
}

watch();
