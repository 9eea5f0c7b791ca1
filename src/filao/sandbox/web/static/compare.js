// The same kill under the rules of other brokers: simulations, computed here and labelled so; nothing of them runs.

import { h } from "./dom.js";
import { say } from "./say.js";

// Each rule is a list of bars, as the documents of the brokers state it: the consumer, from and to which second, the claim, what it is.
const RULES = {
  filao: [[1, 0, 2, 14, "killed"], [2, 2.2, 5.2, 14, "again acked"], [2, 5.4, 8.4, 15, "acked"], [2, 8.6, 11.6, 16, "acked"]],
  token: [[1, 0, 2, 14, ""], [1, 2, 10, 14, "paused"], [2, 2.2, 4.9, 15, "acked"], [2, 5.1, 7.8, 16, "acked"], [2, 8, 12, 14, "again killed"]],
  age: [[1, 0, 2, 14, "killed"], [2, 2.2, 5.2, 15, "acked"], [2, 5.4, 8.4, 16, "acked"], [2, 12, 15, 14, "again acked"]],
  tail: [[1, 0, 2, 14, "nacked"], [2, 2.2, 5.2, 15, "acked"], [2, 5.4, 8.4, 16, "acked"], [2, 8.6, 11.6, 14, "again acked"]],
};
const END = 16; // seconds that are drawn

export function compare(state) {
  const chosen = state.rule ?? "filao";
  return h("div", { class: "compare" },
    h("div", {}, h("p", { class: "simulated" }, say("simulated")),
      h("fieldset", { class: "rules" }, h("legend", {}, say("compare_with")), Object.keys(RULES).map((key) => h("label", { class: key === chosen ? "on" : "" },
        h("input", { type: "radio", name: "rule", checked: key === chosen, onchange: () => state.choose(key) }), say(`rule_${key}`))))),
    h("div", { class: "compared", tabindex: 0, role: "region", "aria-label": say("tab_compare") }, drawn(chosen), h("p", {}, say(`rule_${chosen}_why`))));
}

function drawn(chosen) {
  const x = (at) => 84 + at * 28;
  const bar = ([consumer, from, to, claim, kind]) => h("g", { class: `bar ${kind}` },
    h("rect", { x: x(from), y: consumer * 34 - 31, width: x(to) - x(from), height: 28, rx: 7 }), h("text", { x: x(from) + 8, y: consumer * 34 - 11 }, String(claim)));
  return h("svg", { viewBox: `0 0 ${x(END) + 10} 72`, class: "mini", role: "img", "aria-label": say(`rule_${chosen}_why`) },
    [1, 2].map((n) => h("text", { x: 0, y: n * 34 - 11 }, say("consumer_short", { n }))), RULES[chosen].map(bar));
}
