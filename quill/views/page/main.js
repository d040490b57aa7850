// The tabs, and what they have in common.

import { about } from "./api.js";
import { $, numbers, showError, shown } from "./dom.js";
import { setUpChoose } from "./choose.js";
import { setUpSee } from "./see.js";
import { setUpTrain } from "./train.js";
import { setUpWrite } from "./write.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

// views: what to call when a tab is opened, with what it should show, if another tab says so.
const views = {};

function open(name, ...given) {
  for (const tab of tabs) {
    const isOpen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", isOpen);
    tab.tabIndex = isOpen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !isOpen;
  }
  $("options").hidden = name === "see" || name === "train";
  history.replaceState(null, "", `#${name}`); // to set location.hash would move the focus
  showError(null);
  views[name]?.(...given);
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}

const cuts = () => numbers($("options"));
$("options").addEventListener("submit", (event) => event.preventDefault());

shown(async () => {
  const model = await about();
  document.title = `Quill: ${model.name}`;
  const kind = model.is_gpt ? `${model.model.n_layer} layers of ` +
    `${model.model.n_head} heads, ${model.model.n_embd} wide, context ${model.model.block_size}` :
    model.model.model;
  const size = model.n_parameters.toLocaleString("en");
  $("about").textContent =
    `${model.name}: ${size} parameters, ${kind}, ${model.vocab_size.toLocaleString("en")} tokens`;
  setUpWrite(model, cuts, open);
  views.choose = setUpChoose(cuts);
  views.see = setUpSee(model);
  views.train = setUpTrain(model);
  const asked = location.hash.slice(1);
  open(tabs.some((tab) => tab.getAttribute("aria-controls") === asked) ? asked : "write");
  document.querySelector("main").inert = false; // before, its buttons would do nothing
});
