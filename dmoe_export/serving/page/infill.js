// A text with gaps, such as "It is <gap:8>.": its parts for the server, and the whole of it on the page while gaps fill.

import { MASKED, placeInText } from "./block.js";

const MARK = /(<+)gap:(\d+)(?:-(\d+))?>/g;

/** Texts and gaps of a text: <gap:8>, <gap:2-8>, and <<gap:8> is the text <gap:8>; what is no mark is text. */
export function partsOf(text) {
  const parts = [];
  let plain = "", from = 0;
  for (const { 0: mark, 1: brackets, 2: fewest, 3: most, index } of text.matchAll(MARK)) {
    plain += text.slice(from, index);
    from = index + mark.length;
    if (brackets.length > 1) plain += mark.slice(1);
    else {
      parts.push(plain, { gap: most === undefined ? Number(fewest) : [Number(fewest), Number(most)] });
      plain = "";
    }
  }
  return [...parts, plain + text.slice(from)].filter(part => part !== "");
}

export const isGap = part => typeof part !== "string";
const most = part => (Array.isArray(part.gap) ? part.gap[1] : part.gap);

function span(className, ...content) {
  const element = document.createElement("span");
  element.className = className;
  element.append(...content);
  return element;
}

/** Where the gaps of a text stand: each place by its position in the answer, as the last step that had it left it. */
export class Gaps {
  constructor(parts) {
    this.parts = parts;
    this.seen = new Map(); // position → { gap, state, i }
  }

  step(state) {
    this.latest = state;
    for (const position of this.seen.keys()) if (position >= state.start) this.seen.delete(position);
    state.gaps.forEach((gap, i) => this.seen.set(state.start + i, { gap, state, i }));
  }

  /** The whole text: what is given, and each gap with its places; those that no step has looked at are masked. */
  draw(parent) {
    const last = Math.max(-1, ...this.seen.keys());
    let number = -1;
    parent.replaceChildren(...this.parts.map(part => {
      if (!isGap(part)) return span("given", part);
      number += 1;
      const mine = [...this.seen].filter(([, one]) => one.gap === number);
      const whole = mine.length && mine.at(-1)[0] < last; // something behind it was seen, so it has no more places
      const unseen = whole ? 0 : Math.max(0, most(part) - mine.length);
      return span("gap", ...mine.map(([, one]) => this.place(one)),
        ...Array.from({ length: unseen }, () => span("place masked", MASKED)));
    }));
  }

  place({ state, i }) {
    const element = placeInText(state, i);
    if (state !== this.latest) element.classList.remove("new");
    return element;
  }

  /** The text at its end, as the server has it; `filled`: of each gap. */
  drawFilled(parent, text, filled) {
    const letters = [...text]; // an offset counts whole characters
    let from = 0;
    for (const gap of filled) {
      const to = gap.text_offset + [...gap.text].length;
      parent.append(span("given", letters.slice(from, gap.text_offset).join("")),
        span("filled", letters.slice(gap.text_offset, to).join("")));
      from = to;
    }
    parent.append(span("given", letters.slice(from).join("")));
  }
}

/** Of each gap that was filled without a look at the text behind it, a remark. */
export function unseeing(parts, filled) {
  const gaps = parts.map((part, i) => [part, i]).filter(([part]) => isGap(part));
  return gaps.flatMap(([, i], number) => {
    const behind = parts.slice(i + 1).some(part => !isGap(part));
    return behind && filled[number].in_sight === 0 ? [`gap ${number + 1} saw nothing of the text behind it`] : [];
  });
}
