// The same kill under the rules of other brokers: three simulations, computed here and labelled so; nothing of them runs.

import { h } from "./dom.js";
import { say } from "./say.js";

// Each rule: what happens at which second, on which line; a pure list, as the documents of the brokers state it.
const RULES = {
  filao: { takeover: 2.2, second: 2, refused: true, order: [14, 15, 16] },
  token: { takeover: 8, second: 2, refused: false, order: [14, 15, 16], lost: true },
  age: { takeover: 12, second: 2, refused: true, order: [14, 15, 16], waits: true },
  tail: { takeover: 2.4, second: 2, refused: true, order: [15, 16, 14], tail: true },
};
const END = 16;

export function compare(state) {
  const chosen = state.rule ?? "filao";
  const rule = RULES[chosen];
  return h("div", { class: "compare" },
    h("div", {}, h("p", { class: "simulated" }, say("simulated")),
      h("fieldset", { class: "rules" }, h("legend", {}, say("compare_with")), Object.keys(RULES).map((key) => h("label", { class: key === chosen ? "on" : "" },
        h("input", { type: "radio", name: "rule", checked: key === chosen, onchange: () => state.choose(key) }), say(`rule_${key}`))))),
    h("div", { class: "compared", tabindex: 0, role: "region", "aria-label": say("tab_compare") }, drawn(rule, chosen), h("p", {}, say(`rule_${chosen}_why`))));
}

function drawn(rule, chosen) {
  const x = (at) => 84 + at * 28;
  const bar = (lane, from, to, claim, kind) => h("g", { class: `bar ${kind}` }, h("rect", { x: x(from), y: 8 + lane * 40, width: x(to) - x(from), height: 32, rx: 7 }), h("text", { x: x(from) + 8, y: 30 + lane * 40 }, String(claim)));
  const first = rule.tail ? [15, 16] : [14];
  const later = rule.takeover;
  const found = [bar(0, 0, 2, 14, "killed")];
  if (rule.tail) found.push(bar(1, later, later + 3, 15, "acked"), bar(1, later + 3.2, later + 6.2, 16, "acked"), bar(1, later + 6.4, later + 9.4, 14, "again acked"));
  else if (rule.lost) found.push(bar(0, 2, 10, 14, "paused"), bar(1, later, later + 4, 14, "again killed"));
  else found.push(bar(1, later, later + 3, 14, "again acked"), bar(1, later + 3.2, Math.min(END, later + 6.2), 15, "acked"));
  return h("svg", { viewBox: `0 0 ${x(END) + 10} 92`, class: "mini", role: "img", "aria-label": say(`rule_${chosen}_why`) },
    h("text", { x: 0, y: 30 }, say("consumer_short", { n: 1 })), h("text", { x: 0, y: 70 }, say("consumer_short", { n: 2 })), found, first.length ? null : null);
}
