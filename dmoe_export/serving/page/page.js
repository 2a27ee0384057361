// The chat: questions go to v1/chat/denoising, whose events fill the answer and the panel beside it.

import { decided, drawLive, withHistory } from "./block.js";
import { events, getJson, Refused } from "./events.js";
import { Gaps, isGap, partsOf, unseeing } from "./infill.js";
import { Panel } from "./panel.js";
import { chosen, clear, drawOptions } from "./settings.js";

const at = id => document.getElementById(id);
const panel = new Panel();
let models = [], key = "", running = null, turns = [];

// ---- what the server is

async function begin() {
  try {
    const facts = await getJson("v1/chat/denoising", key);
    models = facts.models;
    at("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
    at("model").disabled = models.length < 2;
    useModel();
    at("key-row").hidden = true;
    trouble("");
  } catch (error) {
    failed(error);
  }
}

function useModel() {
  const model = models.find(({ id }) => id === at("model").value);
  drawOptions(at("options"), model.options, chosen(at("options")));
  panel.model(model);
}
at("model").addEventListener("change", useModel);

function trouble(sentence) {
  at("trouble").textContent = sentence;
  at("trouble").hidden = !sentence;
}

function failed(error) {
  trouble(error instanceof Refused ? error.message : `The server cannot be reached (${error.message}).`);
  if (error instanceof Refused && error.status === 401) {
    at("key-row").hidden = false;
    at("key").focus();
  }
}

function useKey() {
  key = at("key").value.trim();
  at("message").focus();
  return begin();
}
at("use-key").addEventListener("click", useKey);
at("key").addEventListener("keydown", event => {
  if (event.key === "Enter") {
    event.preventDefault();
    useKey();
  }
});

// ---- one question

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** An answer on the page: `committed` is read aloud as it grows, `live` is the block that is not finished; of a text
    with gaps `live` is the whole until it ends. */
function newAnswer(parts) {
  const row = element("li", "answer"), committed = element("span", "committed"), live = element("span", "live");
  const after = element("p", "after-answer");
  committed.setAttribute("aria-live", "polite");
  live.setAttribute("aria-hidden", "true");
  row.append(committed, live, after);
  at("turns").append(row);
  const gaps = parts && new Gaps(parts);
  gaps?.draw(live);
  return { row, committed, live, after, gaps, states: [], active: null, frame: null, text: "",
    started: performance.now() };
}

/** Runs `change`, and keeps the end in sight where it was. */
function following(change) {
  const box = getComputedStyle(at("chat")).overflowY === "visible" ? document.querySelector("main") : at("chat");
  const last = at("turns").lastElementChild?.getBoundingClientRect().bottom ?? 0;
  const seen = last <= box.getBoundingClientRect().bottom + 40;
  change();
  if (seen) at("turns").lastElementChild?.scrollIntoView({ block: "nearest" });
}

async function ask(question) {
  at("empty").hidden = true;
  trouble("");
  at("turns").append(element("li", "user", question));
  const parts = partsOf(question), infill = parts.some(isGap) ? parts : null, answer = newAnswer(infill);
  answer.row.scrollIntoView({ block: "nearest" });
  busy(true);
  panel.follow(answer);
  const system = at("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...turns,
    { role: "user", content: parts.join("") }];
  const asked = infill ? { infill } : { messages };
  running = new AbortController();
  let ended = "";
  try {
    const body = { model: at("model").value, ...asked, ...chosen(at("options")) };
    for await (const { event, data } of events("v1/chat/denoising", body, key, running.signal))
      ended = take(answer, event, JSON.parse(data)) || ended;
    if (!ended) throw new Error("it closed the connection before the answer ended");
  } catch (error) {
    ended = error.name === "AbortError" ? "stopped" : "failed";
    if (ended === "failed") failed(error);
  }
  finish(answer, infill && ended === "length" ? "stop" : ended, parts.join("")); // a last gap is as long as it was asked for
}

/** Draws the last state once per frame of the screen: steps can be faster. */
function draw(answer) {
  answer.frame ??= requestAnimationFrame(() => {
    answer.frame = null;
    if (answer.active) following(() => (answer.gaps ? answer.gaps.draw(answer.live) : drawLive(answer.live, answer.active)));
    panel.grown(answer);
  });
}

/** Takes an event into the answer; says how it ended, once it has. */
function take(answer, event, data) {
  if (event === "step") {
    const state = withHistory(data, answer.states.at(-1));
    state.elapsed = (performance.now() - answer.started) / 1000;
    answer.states.push(state);
    answer.active = state;
    answer.gaps?.step(state);
    draw(answer);
  } else if (event === "block") {
    following(() => {
      answer.text += data.text;
      if (answer.gaps) return; // the picture stays until all of it is there
      answer.committed.append(data.text);
      answer.active = null;
      answer.live.replaceChildren();
    });
  } else if (event === "error") {
    throw new Refused(500, data.error.message);
  } else if (event === "done") {
    answer.statistics = data.statistics;
    answer.filled = data.gaps;
    return data.finish_reason;
  }
  return "";
}

const count = (amount, thing, ending = "s") => `${amount} ${thing}${amount === 1 ? "" : ending}`;

const ENDS = { length: "ended by max_new_tokens", timeout: "out of time", cancelled: "cancelled", stopped: "stopped",
  failed: "failed" };

function finish(answer, ended, question) {
  const unused = [document.body, at("stop")].includes(document.activeElement);
  running = null;
  busy(false);
  answer.active = null;
  answer.live.replaceChildren();
  if (answer.gaps) following(() => showFilled(answer, ended));
  else if (answer.text || ended === "stop")
    turns.push({ role: "user", content: question }, { role: "assistant", content: answer.text });
  following(() => after(answer, ended));
  panel.ended(answer);
  if (unused) at("message").focus(); // the button that had it is gone
}

/** A text whose gaps are filled; one that ended early is as far as it came. */
function showFilled(answer, ended) {
  const texts = answer.filled?.every(gap => gap.text !== null); // a model without a tokenizer has none
  if (ended === "stop" && texts) answer.gaps.drawFilled(answer.committed, answer.text, answer.filled);
  else answer.committed.append(answer.text);
}

/** The line below an answer: what it took, how it ended, and its steps again. */
function after(answer, ended) {
  const last = answer.states.at(-1);
  if (last) {
    const made = answer.statistics ?? { new_tokens: last.start + decided(last), given_tokens: last.given_tokens };
    const tokens = made.new_tokens - made.given_tokens;
    answer.after.append(element("span", "",
      `${count(tokens, "token")} in ${count(last.forwards, "forward pass", "es")}, ${last.elapsed.toFixed(2)} s`));
  }
  for (const remark of answer.gaps && ended === "stop" ? unseeing(answer.gaps.parts, answer.filled) : [])
    answer.after.append(element("span", "", remark));
  if (ENDS[ended]) answer.after.append(element("span", ended === "failed" ? "bad" : "", ENDS[ended]));
  if (last) {
    const again = element("button", "quiet", "Step through");
    again.type = "button";
    again.addEventListener("click", () => panel.replay(answer));
    answer.after.append(again);
  }
}

function busy(now) {
  at("send").hidden = now;
  at("stop").hidden = !now;
  at("fresh").disabled = now;
}

const stop = () => running?.abort();

// ---- keys and buttons

function grow() {
  at("message").style.height = "auto";
  at("message").style.height = `${at("message").scrollHeight + 2}px`;
}

at("ask").addEventListener("submit", event => {
  event.preventDefault();
  const question = at("message").value.trim();
  if (!question || running) return;
  at("message").value = "";
  grow();
  ask(question);
});
at("message").addEventListener("input", grow);
at("message").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !at("settings").open) stop();
});
at("stop").addEventListener("click", stop);
at("fresh").addEventListener("click", () => {
  turns = [];
  at("turns").replaceChildren();
  at("empty").hidden = false;
  panel.follow(null);
  trouble("");
  at("message").focus();
});
at("open-settings").addEventListener("click", () => at("settings").showModal());
at("defaults").addEventListener("click", () => {
  clear(at("options"));
  at("system").value = "";
});
window.addEventListener("pagehide", stop);

begin();
