// Places of a block. A state is one `step` event: token_ids (-1: masked), pieces, confidence, new, gaps (-1: given), …

export const MASKED = "░";

/** What a place says, by textContent alone: it is the model's text. */
function write(element, piece) {
  if (piece === "") {
    const none = document.createElement("span");
    none.className = "no-text";
    none.textContent = "·"; // a token without text of its own, such as an end
    element.append(none);
  } else {
    element.append(piece.replaceAll("\n", "⏎"));
  }
}

const given = (state, i) => state.gaps[i] === -1;

function place(state, i) {
  const element = document.createElement("span");
  const masked = state.token_ids[i] < 0;
  element.className = "place";
  element.classList.toggle("masked", masked);
  element.classList.toggle("given", given(state, i));
  element.classList.toggle("new", !masked && state.fresh.has(i));
  element.style.setProperty("--sure", state.confidence[i].toFixed(3));
  if (masked) element.textContent = MASKED;
  else write(element, state.pieces[i]);
  return element;
}

/** A state as `step` brings it, with what drawing needs beside it: in which step each place was decided. */
export function withHistory(state, before) {
  const same = before && before.block === state.block;
  const fresh = new Set(state.new);
  const since = state.token_ids.map((id, i) =>
    (id < 0 ? null : same && !fresh.has(i) && before.since[i] !== null ? before.since[i] : state.step));
  return { ...state, fresh, since };
}

export const decided = state => state.token_ids.filter(id => id >= 0).length;

/** A place in the flow of the text; line breaks break lines here. */
export function placeInText(state, i) {
  const element = place(state, i);
  if (state.token_ids[i] >= 0 && state.pieces[i].includes("\n")) element.append("\n");
  return element;
}

/** The block inside the answer. */
export function drawLive(parent, state) {
  parent.replaceChildren(...state.token_ids.map((_, i) => placeInText(state, i)));
}

/** The block as a map of equal cells; `tell` gets a sentence about the cell under the pointer. */
export function drawPlaces(parent, state, tell) {
  parent.replaceChildren(...state.token_ids.map((id, i) => {
    const element = place(state, i);
    element.addEventListener("pointerenter", () => tell(sentence(state, i)));
    element.addEventListener("pointerleave", () => tell(""));
    return element;
  }));
  parent.setAttribute("aria-label", `${decided(state)} of ${state.token_ids.length} places are decided`);
}

function sentence(state, i) {
  if (given(state, i)) return `Place ${state.start + i + 1}: ${JSON.stringify(state.pieces[i])}, given`;
  const share = `${(100 * state.confidence[i]).toFixed(1)} %`;
  const text = JSON.stringify(state.pieces[i]);
  return state.token_ids[i] < 0
    ? `Place ${state.start + i + 1}: masked; best candidate ${text} at ${share}`
    : `Place ${state.start + i + 1}: ${text}, decided in step ${state.since[i]} at ${share}`;
}
