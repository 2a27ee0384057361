// The panel beside the chat: figures, the block as a map, experts, and a slider over the steps of an answer.

import { decided, drawPlaces } from "./block.js";
import { byForward, byLayer } from "./plots.js";

const at = id => document.getElementById(id);
const PLAY = 300; // milliseconds of a step that is played
const KEPT = 4; // answers whose steps stay in memory; older ones lose their "Step through"

export class Panel {
  constructor() {
    this.answer = null; // whose steps the slider goes over
    this.live = true; // it shows each step as it comes
    this.kept = [];
    this.timer = null; // while steps are played
    const now = () => Number(at("step").value);
    for (const [id, event, to] of [["step", "input", now], ["back", "click", () => now() - 1],
      ["on", "click", () => now() + 1]]) {
      at(id).addEventListener(event, () => {
        this.pause();
        this.go(to());
      });
    }
    at("play").addEventListener("click", () => (this.timer ? this.pause() : this.play()));
  }

  /** `facts`: experts of a layer, null for a model without. */
  model(facts) {
    this.most = facts?.experts ?? null;
    at("f-experts").parentElement.hidden = !this.most;
    at("of-experts").textContent = this.most ? `of ${this.most} in a layer` : "";
  }

  /** An answer begins; null for none. */
  follow(answer) {
    this.pause();
    this.answer = answer;
    this.live = true;
    for (const id of ["f-forwards", "f-per-forward", "f-per-second", "f-experts"]) at(id).textContent = "–";
    for (const id of ["block", "experts"]) at(id).hidden = true; // until there is something to show
  }

  grown(answer) {
    if (answer !== this.answer) return;
    if (this.live) this.show(answer.states.length - 1);
    else this.show(Number(at("step").value));
  }

  ended(answer) {
    if (!answer.states.length) return;
    this.kept.push(answer);
    if (this.kept.length > KEPT) {
      const old = this.kept.shift();
      old.states = [];
      old.after.querySelector("button")?.remove();
    }
    this.buttons();
  }

  /** Go over the steps of an answer from its first. */
  replay(answer) {
    this.follow(answer);
    this.go(0);
    at("step").focus();
    at("show").scrollIntoView({ block: "nearest" });
  }

  /** From the step shown to the last one, or from the first. */
  play() {
    if (Number(at("step").value) >= this.answer.states.length - 1) this.go(0);
    at("play").textContent = "Pause";
    this.timer = setInterval(() => {
      this.go(Number(at("step").value) + 1);
      if (this.live) this.pause();
    }, PLAY);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    at("play").textContent = "Play";
  }

  /** Show step `i`; the last one goes on with what comes. */
  go(i) {
    const last = this.answer.states.length - 1;
    const shown = Math.max(0, Math.min(last, i));
    this.live = shown === last;
    this.show(shown);
  }

  show(i) {
    const { states } = this.answer, state = states[i];
    at("block").hidden = false;
    at("step").max = states.length - 1;
    at("step").value = i;
    at("step").setAttribute("aria-valuetext", `step ${i + 1} of ${states.length}`);
    at("where").textContent = `step ${i + 1} of ${states.length} · ${state.phase.replace("+", " + ")} · `
      + `${(1000 * state.seconds).toFixed(1)} ms`;
    at("which").textContent = `${state.block + 1}: ${decided(state)} of ${state.token_ids.length} places`;
    drawPlaces(at("places"), state, said => { at("detail").textContent = said || "\u00a0"; });
    const tokens = state.start + decided(state) - state.given_tokens;
    at("f-forwards").textContent = state.forwards;
    at("f-per-forward").textContent = (tokens / state.forwards).toFixed(2);
    at("f-per-second").textContent = (tokens / state.elapsed).toFixed(1);
    at("experts").hidden = !this.most || !state.unique_experts.length;
    if (!at("experts").hidden) {
      const mean = state.unique_experts.reduce((sum, value) => sum + value, 0) / state.unique_experts.length;
      at("f-experts").textContent = mean.toFixed(1);
      byLayer(at("by-layer"), state.unique_experts, this.most);
      byForward(at("by-forward"), states.map(one => one.unique_experts), this.most, i);
    }
    this.buttons();
  }

  buttons() {
    const there = this.answer?.states.length ?? 0, i = Number(at("step").value);
    at("step").disabled = at("play").disabled = there < 2;
    at("back").disabled = there < 2 || i <= 0;
    at("on").disabled = there < 2 || i >= there - 1;
  }
}
