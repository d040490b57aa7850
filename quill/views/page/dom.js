// Elements. Text is only ever set as text, never as HTML: it is what a model wrote.

export const $ = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

export function svg(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

// A token so that it can be seen: line ends and spaces as signs.
export const visible = (text) =>
  text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";

export function share(node, value) {
  node.style.setProperty("--p", value);
  return node;
}

export function showError(error) {
  const isOne = error && error.name !== "AbortError"; // who stopped it knows
  $("error").hidden = !isOne;
  $("error").textContent = isOne ? error.message : "";
}

// Run an async function; what goes wrong is shown.
export async function shown(work) {
  try {
    showError(null);
    return await work();
  } catch (error) {
    showError(error);
  }
}

// -> a function: what a tab should show, which is the text of another tab, or the prompt where that
// has changed since; null where neither is new.
export function newTexts() {
  let prompt = null;
  return (given) => {
    const isNew = $("prompt").value !== prompt;
    prompt = $("prompt").value;
    return given ?? (isNew ? prompt || "\n" : null);
  };
}

// The numbers of a form's fields, by name.
export const numbers = (form) =>
  Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, Number(value)]));
