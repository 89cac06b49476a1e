"use strict";
// One conversation: an answer streams in, and with every token the strips show what its step read in each layer.

const at = (id) => document.getElementById(id);
const strips = ["read", "hits", "completed"];
let messages = [];
let running = null;

function tell(text, failed = false) {
  at("status").textContent = text;
  at("status").classList.toggle("failed", failed);
}

function addTurn(role, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  at("talk").append(turn);
  return turn;
}

function headers() {
  const key = at("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

const share = (value) => `${(100 * value).toFixed(1)}%`;
const tokens = (value) => `${value.toFixed(0)} tok`;

function show(layers) {
  for (const name of strips) {
    const values = layers[name];
    const strip = at(name);
    while (strip.children.length < values.length) strip.append(document.createElement("div"));
    const most = name === "read" ? Math.max(...values, 1) : 1;
    const told = name === "read" ? tokens : share;
    values.forEach((value, i) => {
      const cell = strip.children[i];
      cell.style.setProperty("--value", ((value ?? 0) / most).toFixed(3));
      cell.title = `layer ${i}: ${value === null ? "nothing asked for" : told(value)}`;
    });
    const known = values.filter((value) => value !== null);
    at(`${name}-now`).textContent = known.length ? told(known.reduce((a, b) => a + b, 0) / known.length) : "–";
  }
}

function request() {
  const kvoffload = { return_progress: true, return_layers: true };
  for (const name of ["budget", "session"]) if (at(name).value) kvoffload[name] = at(name).value;
  return {
    model: at("model").textContent, messages, stream: true, max_tokens: Number(at("max").value) || 256,
    stream_options: { include_usage: true }, kvoffload,
  };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.startsWith("data: ") ? part.slice(6) : null;
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  return new Error(body.error?.message ?? `${response.status} ${response.statusText}`);
}

function take(event, turn, begun) {
  if (event.error) throw new Error(event.error.message);
  if (event.prompt_progress) tell(`reading the prompt: ${event.prompt_progress.processed} of ${event.prompt_progress.total} tokens`);
  if (event.kvoffload?.queue_position !== undefined) tell(`waiting behind ${event.kvoffload.queue_position} others`);
  if (event.kvoffload?.layers) {
    show(event.kvoffload.layers);
    begun.tokens += 1;
    const seconds = (performance.now() - begun.at) / 1000;
    tell(`${begun.tokens} tokens, ${(begun.tokens / seconds).toFixed(1)} a second`);
  }
  if (event.kvoffload?.session && !event.kvoffload.session.stored) begun.note = `; not stored: ${event.kvoffload.session.error}`;
  if (event.usage) {
    const cached = event.usage.prompt_tokens_details.cached_tokens;
    begun.last = `${event.usage.prompt_tokens} prompt tokens (${cached} known), ${event.usage.completion_tokens} new`;
  }
  const text = event.choices?.[0]?.delta?.content ?? "";
  turn.textContent += text;
}

async function answer() {
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  const turn = addTurn("assistant", "");
  const begun = { at: performance.now(), tokens: 0, last: "", note: "" };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw await failure(response);
    for await (const event of events(response)) take(event, turn, begun);
    tell(`done: ${begun.last}${begun.note}`);
  } catch (error) {
    tell(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  }
  if (turn.textContent) messages.push({ role: "assistant", content: turn.textContent });
  else turn.remove();
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
}

async function findModel() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) throw await failure(response);
    at("model").textContent = (await response.json()).data[0].id;
    tell("");
  } catch (error) {
    tell(error.message, true);
  }
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("prompt").value;
  if (running || !text.trim()) return;
  if (!at("model").textContent) await findModel();
  if (!at("model").textContent) return;
  at("prompt").value = "";
  messages.push({ role: "user", content: text });
  addTurn("user", text);
  answer();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("stop").addEventListener("click", () => running?.abort());
at("anew").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("talk").replaceChildren();
  tell("");
});
at("key").addEventListener("change", findModel);
findModel();
