// Two small plots of unique experts, in SVG. Axes go from 0 to all the experts of a layer.

const WIDTH = 320, HEIGHT = 74, LEFT = 26, RIGHT = 4, TOP = 6, BOTTOM = 14;

function node(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const y = (value, most) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * Math.min(1, value / most);

function frame(svg, most, first, last) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const parts = [0, most].flatMap(value => [
    node("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value, most), y2: y(value, most) }),
    node("text", { x: LEFT - 4, y: y(value, most) + 3, "text-anchor": "end" }, value)]);
  parts.push(node("text", { x: LEFT, y: HEIGHT - 2 }, first),
    node("text", { x: WIDTH - RIGHT, y: HEIGHT - 2, "text-anchor": "end" }, last));
  svg.replaceChildren(...parts);
}

/** One bar for each layer. */
export function byLayer(svg, values, most) {
  frame(svg, most, "layer 1", values.length > 1 ? `layer ${values.length}` : "");
  const step = (WIDTH - LEFT - RIGHT) / values.length, width = Math.min(step * 0.75, 40);
  values.forEach((value, i) => {
    const bar = node("rect", { class: "bar", x: LEFT + step * i + (step - width) / 2, y: y(value, most), width,
      height: Math.max(0, y(0, most) - y(value, most)), rx: 1 });
    bar.append(node("title", {}, `layer ${i + 1} with experts: ${value} of ${most}`));
    svg.append(bar);
  });
  svg.setAttribute("aria-label", `Unique experts of each layer, of ${most}: ${values.join(", ")}`);
}

/** Mean, least and most over layers of each state; a line at state `now`. */
export function byForward(svg, states, most, now) {
  frame(svg, most, "1", states.length > 1 ? `${states.length}` : "");
  const x = i => LEFT + (WIDTH - LEFT - RIGHT) * (states.length > 1 ? i / (states.length - 1) : 0.5);
  const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
  const line = pick => states.map((state, i) => `${x(i).toFixed(1)},${y(pick(state), most).toFixed(1)}`);
  const high = line(state => Math.max(...state)), low = line(state => Math.min(...state)).reverse();
  svg.append(node("polygon", { class: "band", points: [...high, ...low].join(" ") }),
    node("polyline", { class: "mean", points: line(mean).join(" ") }));
  if (states.length === 1) svg.append(node("circle", { class: "dot", cx: x(0), cy: y(mean(states[0]), most), r: 2.5 }));
  svg.append(node("line", { class: "now", x1: x(now), x2: x(now), y1: TOP, y2: HEIGHT - BOTTOM }));
  svg.setAttribute("aria-label", `Unique experts in ${states.length} forward passes, mean over layers, of ${most}: `
    + `from ${mean(states[0]).toFixed(1)} to ${mean(states.at(-1)).toFixed(1)}`);
}
