// The status page: what the models do, live, and a box to try one. No data ever becomes markup: text is set as text.

const POINTS = 120; // of a chart, one a second
const MESSAGES = 20; // of the conversation that are kept
const LOG_LINES = 200;
const LOG_EVERY = 2000; // milliseconds
const KEY = "fluidmcp-key"; // where this tab keeps the key until it is closed

const $ = (id) => document.getElementById(id);

// Asking the gateway

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function reasonOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the answer was ${answer.status}`;
  }
}

/** The events of a stream (WHATWG HTML §9.2.5), with their comments. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const whole = (rest + value).split(/\r\n\r\n|\n\n|\r\r/);
      rest = whole.pop();
      for (const event of whole) yield parsed(event);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(event) {
  const data = [];
  let comment = "";
  for (const line of event.split(/\r\n|\n|\r/)) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    else if (line.startsWith(":")) comment = line.slice(1).trim();
  }
  return { data: data.join("\n"), comment };
}

// Charts

const CHARTS = [
  { title: (model) => `${model.unit}/s`, value: (model) => model.per_second, text: (value) => short(value) },
  { title: () => "first byte after", value: (model) => model.ttfb, text: (value) => seconds(value) },
  { title: () => "in flight", value: (model) => model.in_flight, text: (value) => short(value) },
];

const short = (value) => (value >= 100 ? value.toFixed(0) : String(Number(value.toFixed(1))));
const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${short(value)} s`);

class Chart {
  constructor(kind, place) {
    this.kind = kind;
    this.points = [];
    const copy = $("chart").content.cloneNode(true);
    [this.title, this.now, this.svg, this.path] = [".title", "output", "svg", "path"].map((at) => copy.querySelector(at));
    place.append(copy);
  }

  add(model) {
    this.points.push(this.kind.value(model));
    if (this.points.length > POINTS) this.points.shift();
  }

  draw(model) {
    const known = this.points.filter((value) => value !== null);
    const top = known.length ? Math.max(...known) : 0;
    const now = this.points.at(-1) ?? null;
    const title = this.kind.title(model);
    write(this.title, title);
    write(this.now, now === null ? "–" : this.kind.text(now));
    const most = known.length ? `now ${now === null ? "nothing" : this.kind.text(now)}, at most ${this.kind.text(top)}` : "nothing yet";
    this.svg.setAttribute("aria-label", `${title} in the last two minutes: ${most}`);
    this.path.setAttribute("d", this.line(top));
  }

  /** A gap where nothing is known; a lone point is a dash. */
  line(top) {
    const right = POINTS - this.points.length;
    let line = "";
    let isDown = false;
    this.points.forEach((value, index) => {
      if (value !== null) {
        const at = `${right + index} ${(29 - (top ? (value / top) * 28 : 0)).toFixed(1)}`;
        line += isDown ? `L${at}` : `M${at}h1`;
      }
      isDown = value !== null;
    });
    return line;
  }
}

// Models

const LOADING = ["starting", "waking"];
const AT_REST = ["stopped", "failed", "asleep"];

class Card {
  constructor(id) {
    this.id = id;
    this.model = null;
    const copy = $("card").content.cloneNode(true);
    this.element = copy.querySelector("article");
    const title = this.part(".id");
    title.id = `model-${id}`;
    title.textContent = id;
    this.element.setAttribute("aria-labelledby", title.id);
    this.charts = CHARTS.map((kind) => new Chart(kind, this.part(".charts")));
    for (const button of this.element.querySelectorAll("[data-action]")) {
      button.setAttribute("aria-label", `${button.textContent} ${id}`);
      button.addEventListener("click", () => this.ask(button.dataset.action));
    }
    this.part(".message").setAttribute("aria-label", `Last failure of ${id}`);
    this.part(".log").setAttribute("aria-label", `Log of ${id}`);
    this.part("progress").setAttribute("aria-label", `Loading of ${id}`);
    this.part("details").addEventListener("toggle", () => this.followLog());
    $("models").append(this.element);
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  add(model) {
    this.model = model;
    for (const chart of this.charts) chart.add(model);
  }

  draw(time, isAdmin) {
    const model = this.model;
    const state = this.part(".state");
    if (state.dataset.state !== model.state) {
      if (state.dataset.state) tell(`${this.id} is ${model.state}`);
      state.dataset.state = model.state;
    }
    write(state, model.state);
    this.drawLoading(model);
    write(this.part(".age"), duration(time - model.since));
    for (const name of ["restarts", "in_flight", "queued"]) write(this.part(`.${name}`), String(model[name]));
    for (const chart of this.charts) chart.draw(model);
    showText(this.part(".last_exit"), model.last_exit && `last exit: ${model.last_exit}`);
    showText(this.part(".message"), model.state === "ready" ? null : model.message);
    for (const part of this.element.querySelectorAll(".admin")) part.hidden = !isAdmin;
    const rests = AT_REST.includes(model.state);
    for (const button of this.element.querySelectorAll("[data-action]"))
      button.disabled = button.dataset.action === "start" ? !rests : model.state === "stopped";
  }

  drawLoading(model) {
    const loading = this.part(".loading");
    loading.hidden = !LOADING.includes(model.state);
    const [stage, bar] = loading.children;
    write(stage, model.stage ?? "");
    if (model.percent === null) bar.removeAttribute("value");
    else bar.value = model.percent;
  }

  async ask(action) {
    const { in_flight: inside } = this.model;
    if (action !== "start" && inside && !confirm(`${inside} requests are inside ${this.id}. ${action} it?`)) return;
    const note = this.part(".note");
    write(note, `asked to ${action}`);
    try {
      const answer = await fetch(`models/${this.id}/${action}`, { method: "POST", headers: headers() });
      if (!answer.ok) write(note, await reasonOf(answer));
    } catch {
      write(note, "the gateway does not answer");
    }
  }

  async followLog() {
    const [details, log] = [this.part("details"), this.part(".log")];
    while (details.open && this.element.isConnected) {
      if (!document.hidden) {
        try {
          const answer = await fetch(`models/${this.id}/logs?lines=${LOG_LINES}`, { headers: headers() });
          const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
          write(log, answer.ok ? (await answer.text()) || "nothing yet" : await reasonOf(answer));
          if (atEnd) log.scrollTop = log.scrollHeight;
        } catch {
          // the feed says that the gateway does not answer
        }
      }
      await pause(LOG_EVERY);
    }
  }
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function showText(element, text) {
  element.hidden = !text;
  write(element, text || "");
}

function tell(text) {
  $("news").textContent = text;
}

function duration(total) {
  const whole = Math.max(0, Math.round(total));
  const [days, hours, minutes] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60];
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${whole} s`;
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// The feed

const cards = new Map();
let latest = null;
let isDrawn = true;

function take(snapshot) {
  latest = snapshot;
  for (const model of snapshot.models) {
    if (!cards.has(model.id)) cards.set(model.id, new Card(model.id));
    cards.get(model.id).add(model);
  }
  if (isDrawn) requestAnimationFrame(draw); // however many come before the next frame
  isDrawn = false;
}

function draw() {
  isDrawn = true;
  const there = new Set(latest.models.map((model) => model.id));
  for (const [id, card] of cards) {
    if (there.has(id)) card.draw(latest.time, latest.admin);
    else {
      card.element.remove();
      cards.delete(id);
    }
  }
  connected(latest.closing ? "the gateway is shutting down" : "live", latest.closing);
  $("chat").hidden = false;
  offer([...there]);
}

function offer(ids) {
  const list = $("model");
  const shown = [...list.options].map((option) => option.value);
  if (shown.join() === ids.join()) return;
  const chosen = list.value;
  list.replaceChildren(...ids.map((id) => new Option(id, id)));
  if (ids.includes(chosen)) list.value = chosen;
}

function connected(text, isLost = false) {
  write($("connection"), text);
  $("connection").classList.toggle("lost", isLost);
}

/** Until the feed ends, which it does once a minute; false: a key is needed. */
async function watch() {
  const answer = await fetch("models", { headers: headers({ Accept: "text/event-stream" }), cache: "no-store" });
  if (answer.status === 401) return false;
  if (!answer.ok) throw new Error(await reasonOf(answer));
  const hasKey = Boolean(sessionStorage.getItem(KEY));
  if (hasKey) $("door").hidden = true;
  $("forget").hidden = !hasKey;
  $("use").hidden = hasKey; // an open gateway may have keys for administrators
  for await (const { data } of eventsOf(answer.body)) if (data) take(JSON.parse(data));
  return true;
}

async function follow() {
  for (let wait = 1000; ; wait = Math.min(wait * 2, 10000)) {
    try {
      do {
        if (!(await watch())) return askForKey();
        wait = 1000;
      } while (!latest?.closing);
      latest.closing = false; // it may be another gateway that answers next
    } catch (error) {
      connected(error instanceof TypeError ? "no answer from the gateway, trying again" : error.message, true);
    }
    await pause(wait);
  }
}

function askForKey() {
  const had = sessionStorage.getItem(KEY);
  sessionStorage.removeItem(KEY);
  forgetModels();
  connected("locked");
  openDoor(had ? "That key does not open this gateway." : "");
}

function openDoor(note) {
  write($("door-note"), note);
  $("door").hidden = false;
  $("key").focus();
}

function forgetModels() {
  for (const card of cards.values()) card.element.remove();
  cards.clear();
  latest = null;
  $("chat").hidden = $("forget").hidden = $("use").hidden = true;
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  location.reload(); // whatever is under way has the old one, or none
});

$("use").addEventListener("click", () => openDoor(""));

$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

// The conversation

let messages = [];
let speaking = null; // aborts the answer that is coming

function say(role, name, text) {
  const line = document.createElement("p");
  line.className = role;
  const who = document.createElement("b");
  who.textContent = name;
  const words = document.createTextNode(text);
  line.append(who, words);
  const talk = $("talk");
  talk.append(line);
  while (talk.childElementCount > MESSAGES) talk.firstElementChild.remove();
  return words;
}

function remember(role, content) {
  messages = [...messages, { role, content }].slice(-MESSAGES);
  while (messages[0].role !== "user") messages.shift(); // templates want the user to begin
}

async function converse(model) {
  speaking = new AbortController();
  const answer = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json", Prefer: "progress" }),
    body: JSON.stringify({ model, messages, stream: true }),
    signal: speaking.signal,
  });
  if (!answer.ok) throw new Error(await reasonOf(answer));
  const talk = $("talk");
  const words = say("assistant", model, "");
  try {
    for await (const { data, comment } of eventsOf(answer.body)) {
      write($("chat-note"), comment);
      if (data === "[DONE]") return;
      if (!data) continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      words.appendData(event.choices?.[0]?.delta?.content ?? "");
      talk.scrollTop = talk.scrollHeight;
    }
    throw new Error("the answer broke off");
  } finally {
    if (words.data) remember("assistant", words.data);
  }
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("words").value.trim();
  if (!text || speaking) return;
  $("words").value = "";
  say("user", "you", text);
  remember("user", text);
  busy(true);
  try {
    await converse($("model").value);
    write($("chat-note"), "");
  } catch (error) {
    const stopped = error.name === "AbortError";
    $("chat-note").classList.toggle("wrong", !stopped);
    write($("chat-note"), stopped ? "stopped" : error instanceof TypeError ? "the answer broke off" : error.message);
  } finally {
    if (messages.at(-1)?.role === "user") messages.pop(); // nobody has answered it
    speaking = null;
    busy(false);
  }
});

function busy(isBusy) {
  if (isBusy) $("chat-note").classList.remove("wrong");
  $("talk").setAttribute("aria-busy", String(isBusy)); // read out when it is whole
  $("send").disabled = isBusy;
  $("halt").disabled = !isBusy;
}

$("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("halt").addEventListener("click", () => speaking?.abort());
$("clear").addEventListener("click", () => {
  messages = [];
  $("talk").replaceChildren();
  write($("chat-note"), "");
});

follow();
