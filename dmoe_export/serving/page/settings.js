// The settings drawer: one field for each option that the server names, empty for its default.

/** `options`: name, group, help, kind (integer, number, text, boolean or choice), choices, default; `filled`: name → value. */
export function drawOptions(parent, options, filled) {
  const groups = new Map();
  for (const one of options) {
    if (!groups.has(one.group)) groups.set(one.group, []);
    groups.get(one.group).push(field(one));
  }
  parent.replaceChildren(...[...groups].map(([name, fields]) => {
    const group = document.createElement("fieldset"), title = document.createElement("legend");
    title.textContent = name;
    group.append(title, ...fields);
    return group;
  }));
  for (const input of parent.querySelectorAll("[name]")) input.value = filled[input.name] ?? "";
}

function field(one) {
  const label = document.createElement("label"), name = document.createElement("span");
  label.className = "field";
  name.className = "name";
  name.textContent = one.name;
  const hint = document.createElement("span");
  hint.className = "hint";
  hint.id = `hint-${one.name}`;
  hint.textContent = one.help;
  const input = one.kind === "choice" || one.kind === "boolean" ? choice(one) : entry(one);
  input.name = one.name;
  input.dataset.kind = one.kind;
  input.setAttribute("aria-describedby", hint.id);
  label.append(name, input);
  const whole = document.createElement("div");
  whole.append(label, hint);
  return whole;
}

function choice(one) {
  const select = document.createElement("select");
  const values = one.kind === "boolean" ? ["true", "false"] : one.choices;
  for (const value of ["", ...values]) {
    const option = document.createElement("option");
    option.value = value;
    option.textContent = value || `default: ${one.default}`;
    select.append(option);
  }
  return select;
}

function entry(one) {
  const input = document.createElement("input");
  input.type = "text"; // the server says what is wrong with a number, in one sentence
  if (one.kind !== "text") input.inputMode = one.kind === "integer" ? "numeric" : "decimal";
  input.placeholder = one.default;
  input.autocomplete = "off";
  return input;
}

/** What is filled in, as JSON values; what is no number goes as text, so that the server refuses it by name. */
export function chosen(parent) {
  const values = {};
  for (const input of parent.querySelectorAll("[name]")) {
    const text = input.value.trim(), kind = input.dataset.kind;
    if (text === "") continue;
    const number = Number(text);
    if (kind === "boolean") values[input.name] = text === "true";
    else if ((kind === "integer" || kind === "number") && Number.isFinite(number)) values[input.name] = number;
    else values[input.name] = text;
  }
  return values;
}

export function clear(parent) {
  for (const input of parent.querySelectorAll("[name]")) input.value = "";
}
