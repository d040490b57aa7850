// Choose: the text token by token, and under it what may come next.

import { read } from "./api.js";
import { $, element, newTexts, share, shown, visible } from "./dom.js";

export function setUpChoose(cuts) {
  let text = []; // {id, text}
  let undone = []; // what Forward brings back
  let next = [];
  let asked = 0;

  const ids = (tokens) => tokens.map((token) => token.id);

  // from: a text, or the tokens of one; later: what Forward brings back from there. What is shown
  // changes when the answer is there, and the last click counts.
  async function show(from, later = []) {
    const number = ++asked;
    const answer = await read(typeof from === "string" ? from : ids(from), cuts());
    if (number !== asked) return;
    [text, undone, next] = [answer.tokens, later, answer.next];
    $("chosen").textContent = answer.text;
    $("back").disabled = text.length < 2;
    $("forward").disabled = undone.length === 0;
    $("candidates").replaceChildren(...next.map(candidate));
  }

  function candidate(token) {
    const percent = (p) => `${(100 * p).toFixed(1)} %`;
    const button = element("button", { type: "button", title: `token ${token.id}` },
      element("span", { className: "name", textContent: visible(token.text) }),
      element("span", {},
        share(element("span", { className: "bar prob" }), token.prob),
        share(element("span", { className: "bar drawn" }), token.drawn)),
      element("span", { className: "number",
        textContent: `${percent(token.prob)} ${percent(token.drawn)}` }));
    button.dataset.id = token.id;
    button.addEventListener("click", () => shown(() => show([...text, token])));
    return element("li", {}, button);
  }

  $("back").addEventListener("click", () => {
    if (text.length > 1) shown(() => show(text.slice(0, -1), [...undone, text.at(-1)]));
  });
  $("forward").addEventListener("click", () => {
    if (undone.length) shown(() => show([...text, undone.at(-1)], undone.slice(0, -1)));
  });
  $("options").addEventListener("change", () => {
    if (!$("choose").hidden && text.length) shown(() => show(text, undone));
  });

  const newText = newTexts();
  return (given) => {
    const text = newText(given);
    if (text !== null) shown(() => show(text));
  };
}
