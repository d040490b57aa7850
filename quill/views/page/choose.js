// Choose: the text token by token, and under it what may come next.

import { read } from "./api.js";
import { $, element, share, shown, visible } from "./dom.js";

export function setUpChoose(cuts) {
  let text = []; // {id, text}
  let undone = []; // what Forward brings back
  let next = [];
  let asked = 0;

  // from: a text, or token ids
  async function show(from) {
    const number = ++asked;
    const answer = await read(from, cuts());
    if (number !== asked) return; // a later click was faster
    if (typeof from === "string") [text, undone] = [answer.tokens, []];
    next = answer.next;
    $("chosen").replaceChildren(...text.map((token) => token.text));
    $("back").disabled = text.length < 2;
    $("forward").disabled = undone.length === 0;
    $("candidates").replaceChildren(...next.map(candidate));
  }

  const ids = () => text.map((token) => token.id);

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
    button.addEventListener("click", () => take(token));
    return element("li", {}, button);
  }

  function take(token) {
    text.push({ id: token.id, text: token.text });
    undone = [];
    shown(() => show(ids()));
  }

  $("back").addEventListener("click", () => {
    undone.push(text.pop());
    shown(() => show(ids()));
  });
  $("forward").addEventListener("click", () => {
    text.push(undone.pop());
    shown(() => show(ids()));
  });
  $("options").addEventListener("change", () => {
    if (!$("choose").hidden && text.length) shown(() => show(ids()));
  });

  return (given) => {
    if (given !== undefined || !text.length) {
      shown(() => show(given ?? ($("prompt").value || "\n")));
    }
  };
}
